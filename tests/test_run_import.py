"""The benchmark of `import sq_cpu`."""

import pytest
import run_import


def test_what_torch_loads_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_import, "WATCHED", ("torch", "sq_cpu", "no_such_package"))
    found = run_import.measure(rounds=2)
    assert found["loaded"] == ["sq_cpu"]
    assert 0 < found["modules"] < 10_000
    for name in ("torch", "sq_cpu", *run_import.COMMANDS):
        assert found["seconds"][name]["rounds"] == 2
        assert found["seconds"][name]["median"] > 0

"""The benchmark of schemes beside each other in one process, on a model of one block."""

import json
from pathlib import Path

import pytest
import run_schemes
import typer
from typer.testing import CliRunner


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(run_schemes.main)
    return made


def test_it_tells_what_each_scheme_takes_beside_the_first(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run_schemes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(run_schemes, "ROWS", {1: 9, 3: 5})
    loads: list[str] = []
    generate = run_schemes.Generate

    def loaded(folder: str, *sizes: int) -> object:
        loads.append(Path(folder).name)
        return generate(folder, *sizes)

    monkeypatch.setattr(run_schemes, "Generate", loaded)
    out = tmp_path / "out.json"
    options = ["--shape", "tiny", "--schemes", "O3-plain,O3,O1", "--budget", "0"]
    result = CliRunner().invoke(app, [*options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(loads) == ["O1", "O3", "O3-plain"]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["work"], row["rows"], row["scheme"]) for row in rows] == [
        (work, count, scheme)
        for count in (1, 3)
        for work in ("prefill", "decode")
        for scheme in ("O3", "O1")
    ]
    for row in rows:
        assert row["groups"] == run_schemes.GROUPS
        assert row["ratio"] > 0
        assert row["base"] == "O3-plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schemes", "O3"], "two schemes or more"),
        (["--shape", "none"], "shape 'none'"),
        (["--schemes", "O3,O9"], "O9"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    app: typer.Typer, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, [*options, "--out", str(out)])
    assert result.exit_code == 1
    assert message in result.output
    assert not out.exists()


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}

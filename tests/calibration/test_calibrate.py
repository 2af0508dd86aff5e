"""Calibration: exact ranges, every form of batch, and nothing left behind in the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import batches, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError


class Two(nn.Module):
    """Two linears on one input, which changes in place in between, and one that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = (nn.Linear(3, 2) for _ in range(3))
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        x = self.drop(x.clone())
        y = self.first(x)
        x += shift
        return torch.cat([y, self.second(input=x)])


X = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.5]])


def test_ranges_are_exact_and_unreached_layers_are_named() -> None:
    found = calibrate(Two(), [(X, 0.0), (2 * X, 10.0)])
    assert found.channel_min["first"].tolist() == [-8, -4, 0.5]
    assert found.channel_max["first"].tolist() == [2, 10, 6]
    assert found.channel_max["second"].tolist() == [12, 20, 16]  # sees the change in place
    assert found.absmax("first").tolist() == [8, 10, 6]
    assert (found.tokens, found.batches, found.unreached) == (4, 2, ("spare",))
    with pytest.raises(SqCpuError, match="no calibration batch reached spare"):
        found.absmax("spare")
    with pytest.raises(SqCpuError, match="does not cover other"):
        found.absmax("other")


@pytest.mark.parametrize("batch", [X, (X,), [X], {"x": X}, {"x": X, "shift": 0.0}])
def test_every_form_of_batch(batch: Any) -> None:
    assert calibrate(Two(), iter([batch])).absmax("second").tolist() == [4, 5, 3]


def test_inference_mode_and_bfloat16() -> None:
    with torch.inference_mode():
        found = calibrate(Two().bfloat16(), [(X.bfloat16(), 10.0)])
    assert found.channel_max["first"].tolist() == [1, 5, 3]
    assert found.channel_max["second"].tolist() == [11, 15, 13]
    assert found.channel_max["second"].dtype == torch.float32


def test_ranges_of_a_language_model_match_its_inputs() -> None:
    model = tiny_model("llama")
    seen: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach())
    )
    found = calibrate(model, batches())
    handle.remove()
    rows = torch.cat(seen).flatten(0, 1)
    assert torch.equal(found.channel_min["model.layers.1.mlp.down_proj"], rows.amin(dim=0))
    assert torch.equal(found.channel_max["model.layers.1.mlp.down_proj"], rows.amax(dim=0))
    assert found.tokens == 3 * 2 * 16
    assert "lm_head" not in found.channel_min


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "calibration got no batches"),
        ([X, X[:0]], r"calibration batch 1 is empty \(\(0, 3\)\)"),
        ([()], "calibration batch 0 holds no tensor"),
        ([["text"]], r"batch 0 holds no tensor: a batch needs tensors.*return_tensors"),
        ([X, "text"], "calibration batch 1 is a str"),
        (X, r"batches is one Tensor; pass an iterable of batches, as in \[batch\]"),
        ([X, X * torch.nan], "calibration batch 1: NaN or Inf in the input of first"),
        ([X.masked_fill(X > 4, torch.inf)], "calibration batch 0: NaN or Inf"),
    ],
)
def test_bad_batches_are_refused_and_the_model_is_restored(bad: Any, message: str) -> None:
    model = Two().train()
    model.second.eval()
    with pytest.raises(SqCpuError, match=message):
        calibrate(model, bad)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(SqCpuError, match="nothing to calibrate"):
        calibrate(nn.ReLU(), [X])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_padding_is_not_counted(model_type: str) -> None:
    model, ids = tiny_model(model_type), batches(1)[0]
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    padded = calibrate(model, [{"input_ids": ids.where(mask > 0, 0), "attention_mask": mask}])
    alone = calibrate(model, [ids[:1], ids[1:, :10]])
    assert padded.tokens == alone.tokens == 26
    for name, low in alone.channel_min.items():
        # The padded batch sums in another order.
        torch.testing.assert_close(padded.channel_min[name], low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            padded.channel_max[name], alone.channel_max[name], rtol=1e-4, atol=1e-5
        )
        assert padded.rows[name].shape == alone.rows[name].shape


def test_batches_longer_than_the_context_are_refused() -> None:
    model = tiny_model("llama")
    calibrate(model, batches(1, length=64))
    with pytest.raises(SqCpuError, match="batch 1 has 65 tokens and the model 64 positions"):
        calibrate(model, [*batches(1), {"input_ids": batches(1, length=65)[0]}])


def test_ignoring_what_is_not_there_is_refused() -> None:
    with pytest.raises(SqCpuError, match="'secnd', which matches no linear: use second"):
        calibrate(Two(), [X], ignore=("first", "secnd"))


def test_changed_weights_are_told_apart() -> None:
    model = Two()
    found = calibrate(model, [X])
    found.check_weight("second", model.second)
    with torch.no_grad():
        model.second.weight.mul_(1.5)
    with pytest.raises(SqCpuError, match="weights of second changed since the calibration"):
        found.check_weight("second", model.second)
    found.check_weight("first", model.first)


def test_progress_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Two(), [X])
    assert capsys.readouterr() == ("", "")
    calibrate(Two(), [X], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrating" in err


def test_saved_calibrations_load_equal(tmp_path: Path) -> None:
    found = calibrate(Two(), [X])
    loaded = Calibration.load(found.save(tmp_path / "calibration.safetensors"))
    for name in ("first", "second"):
        assert torch.equal(loaded.channel_min[name], found.channel_min[name])
        assert torch.equal(loaded.channel_max[name], found.channel_max[name])
    assert loaded.channel_min.keys() == loaded.channel_max.keys() == {"first", "second"}
    assert (loaded.tokens, loaded.batches, loaded.unreached) == (2, 1, ("spare",))
    assert loaded.fingerprints == found.fingerprints
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_the_example_is_a_row_of_the_first_batch_as_long_as_it_came(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.randint(64, (3, 50))
    mask = torch.ones_like(ids)
    mask[[0, 2], :9] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    found = calibrate(model, [batch])
    loaded = Calibration.load(found.save(tmp_path / "calibration"))
    for calibration in (found, loaded):
        assert calibration.example is not None
        args, kwargs = calibration.example
        assert args == ()
        assert torch.equal(kwargs["input_ids"], ids[1:2])
        assert torch.equal(kwargs["attention_mask"], mask[1:2])
        assert kwargs["use_cache"] is False
    assert calibrate(Two(), [X]).example[0][0].equal(X)  # not token ids: whole


def test_an_example_that_no_file_can_hold_is_left_out(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, options: dict[str, int]) -> Tensor:
            result: Tensor = self.linear(x) * options["scale"]
            return result

    found = calibrate(Nested(), [(torch.ones(2, 4), {"scale": 2})])
    assert found.example is not None
    assert Calibration.load(found.save(tmp_path / "calibration")).example is None


def test_unusable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibrate(Two(), [X])
    with pytest.raises(SqCpuError, match=r"cannot write .*No such file or directory"):
        found.save(tmp_path / "missing" / "file")
    with pytest.raises(SqCpuError, match=r"cannot read the calibration .*missing"):
        Calibration.load(tmp_path / "missing")
    path = tmp_path / "file"
    save_file({"a": X}, path)
    with pytest.raises(SqCpuError, match="is not a calibration"):
        Calibration.load(path)
    for header in ('{"format_version": 1}', "[]", '"text"', '{"format_version": "1"}'):
        save_file({"a": X}, path, {"sq_cpu.calibration": header})
        with pytest.raises(SqCpuError, match=r"is not (one that sq_cpu writes|a calibration)"):
            Calibration.load(path)
    path.write_bytes(found.save(path).read_bytes()[:-8])
    with pytest.raises(SqCpuError, match="cannot read the calibration"):
        Calibration.load(path)
    monkeypatch.setattr(sys.modules["sq_cpu.calibration.calibration"], "_VERSION", 99)
    found.save(path)
    monkeypatch.undo()
    with pytest.raises(SqCpuError, match="format 99, newer than this sq_cpu reads"):
        Calibration.load(path)


def prefixed(prefix: list[int]) -> list[Any]:
    """Return batches whose texts begin with a prefix, but one; some after padding."""
    ids = batches(1)[0].repeat(2, 1) % 60 + 3
    ids[:3, : len(prefix)] = torch.tensor(prefix)
    behind = torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1)
    mask = torch.ones_like(behind)
    mask[:, :2] = 0
    return [ids, {"input_ids": behind, "attention_mask": mask}]


@pytest.mark.parametrize("prefix", [[1], [1, 2, 0]])
@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_a_prefix_is_not_counted(tmp_path: Path, name: str, prefix: list[int]) -> None:
    model = tiny_model(name)
    given = prefixed(prefix)
    found = calibrate(model, given, rows=500, gradient_rows=50, prefix=prefix)
    seen: dict[str, list[Tensor]] = {}
    layer = next(n for n, m in model.named_modules() if n.endswith(("fc1", "up_proj", "h_to_4h")))

    def keep(_: nn.Module, args: Any) -> None:
        seen.setdefault(layer, []).append(args[0].reshape(4, -1, args[0].shape[-1]))

    hook = model.get_submodule(layer).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(given[0])
        model(**given[1])
    hook.remove()
    first, second = seen[layer]
    count = len(prefix)
    counted = [*first[:3, count:], first[3], *second[:3, 2 + count :], second[3, 2:]]
    rows = torch.cat(counted)
    assert found.rows_seen[layer] == len(rows)
    low, high = found.channels(layer)
    assert torch.allclose(low, rows.amin(0), atol=1e-5)
    assert torch.allclose(high, rows.amax(0), atol=1e-5)
    assert found.prefix == tuple(prefix)
    assert Calibration.load(found.save(tmp_path / "calibration")).prefix == found.prefix
    without = calibrate(model, given)
    assert without.prefix == ()
    assert without.rows_seen[layer] == len(rows) + 6 * count


def test_a_prefix_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=r"no text of the batches begins with the prefix \[1, 2\]"):
        calibrate(tiny_model("llama"), prefixed([1]), prefix=[1, 2])
    with pytest.raises(SqCpuError, match="the model can have no prefix in float: Two is no model"):
        calibrate(Two(), [X], prefix=[1])
    with pytest.raises(SqCpuError, match="prefix: token ids are a list of integers"):
        calibrate(tiny_model("llama"), prefixed([1]), prefix=["a"])  # type: ignore[list-item]

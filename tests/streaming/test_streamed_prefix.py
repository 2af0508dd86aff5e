"""A prefix of a streamed model: the one that the whole model in memory gets, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from float_folders import CONFIGS, assert_equal, float_folder, in_memory
from torch import Tensor

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.models.calls import Batch
from sq_cpu.streaming.stream import Stream

PREFIX = (1, 5)


def texts() -> list[Batch]:
    """Return batches of texts with the prefix, one with padding in front, and one without it."""
    ids = tiny.batches(4)
    for each in ids[:3]:
        each[:, :2] = torch.tensor(PREFIX)
    mask = torch.ones_like(ids[0])
    mask[1, :3] = 0
    padded = ids[0].clone()
    padded[1, :3], padded[1, 3:5] = 0, torch.tensor(PREFIX)
    return [*ids[1:], {"input_ids": padded, "attention_mask": mask}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        (Scheme.of("O3"), {"alpha": 0.8}),
        (Scheme.of("O3", ignore=()), {}),  # the last norm is folded, too
        (Scheme.of("O1"), {"head": "int8"}),
        (Scheme.of("O1"), {"smooth": False}),
    ],
    ids=["O3", "O3-head", "O1-int8_head", "naive"],
)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_equals_quantizing_in_memory(
    model_type: str, scheme: Scheme, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = float_folder(tmp_path / "float", model_type)
    given = settings | {"prefix": PREFIX, "dtype": dtype}
    model = in_memory(source, tmp_path / "whole", scheme, texts=texts(), **given)
    made = sq_cpu.quantize_checkpoint(
        source, tmp_path / "streamed", texts(), scheme=scheme, **given
    )
    assert made.record == model.sq_cpu_config
    assert made.record.prefix == PREFIX
    assert made.calibration_tokens == 4 * 32 - 3 - 2 * 6
    assert_equal(tmp_path / "streamed", tmp_path / "whole")
    loaded = sq_cpu.load(tmp_path / "streamed")
    assert sq_cpu.prefix_of(loaded) is not None
    ids = tiny.batches(3)[1]
    ids[:, :2] = torch.tensor(PREFIX)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_resumed(finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = float_folder(tmp_path / "float")
    given: dict[str, Any] = {"scheme": Scheme.of("O3", ignore=()), "prefix": PREFIX}
    in_memory(source, tmp_path / "whole", texts=texts(), **given)
    out = tmp_path / "out"
    stop_after(finished, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sq_cpu.quantize_checkpoint(source, out, texts(), **given)
    monkeypatch.undo()
    with pytest.raises(SqCpuError, match=f"{finished} finished blocks made with another prefix;"):
        sq_cpu.quantize_checkpoint(source, out, texts(), **given | {"prefix": (1,)})
    said: list[str] = []
    sq_cpu.quantize_checkpoint(source, out, texts(), say=said.append, **given)
    assert said == [f"resuming: {finished} of 3 blocks are finished"]
    assert_equal(out, tmp_path / "whole")


def stop_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a job interrupted when so many blocks are finished."""
    block, outer = Stream.block, Stream.quantize_outer

    def stopping(self: Stream, index: int, *args: Any) -> Any:
        if index == blocks:
            raise KeyboardInterrupt
        return block(self, index, *args)

    def stopping_outer(self: Stream, *args: Any) -> Any:
        if self.state.blocks == blocks:
            raise KeyboardInterrupt
        return outer(self, *args)

    monkeypatch.setattr(Stream, "block", stopping)
    monkeypatch.setattr(Stream, "quantize_outer", stopping_outer)


def test_what_is_refused(tmp_path: Path) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    with pytest.raises(SqCpuError, match="no text of the batches begins with the prefix"):
        sq_cpu.quantize_checkpoint(source, out, texts(), prefix=(9,))
    with pytest.raises(SqCpuError, match="a prefix needs batches to calibrate on"):
        sq_cpu.quantize_checkpoint(source, out, scheme="O1", smooth=False, prefix=PREFIX)
    with pytest.raises(SqCpuError, match="has 9 tokens; it has 1 to 8"):
        sq_cpu.quantize_checkpoint(source, out, texts(), prefix=[1] * 9)
    assert [each.name for each in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("wrong", ["reads no cache", "sees later tokens"])
@pytest.mark.parametrize("block", [0, 2])
def test_a_block_that_can_have_none(
    block: int, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def changed(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == block:
            if wrong == "reads no cache":
                kwargs["past_key_values"] = None
            else:
                kwargs["attention_mask"] = None
                self.self_attn.is_causal = False
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", changed)
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    with pytest.raises(SqCpuError, match="the model can have no prefix in float") as raised:
        sq_cpu.quantize_checkpoint(source, out, texts(), prefix=PREFIX)
    what = f"block {block} keeps 0 pairs" if wrong == "reads no cache" else "depend on later ones"
    assert what in str(raised.value)
    assert not out.exists()
    if block:  # others are finished, for the prefix
        assert "begin again without: --prefix off --overwrite" in str(raised.value)
        made = sq_cpu.quantize_checkpoint(source, out, texts(), prefix=(), overwrite=True)
        assert made.record.prefix == ()

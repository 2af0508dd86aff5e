"""What `ignore` names: linears and subtrees, by path or its end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from other_models import ids, images, other_model
from tiny import VOCABULARY, batches, inputs, tiny_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.errors import SqCpuError
from sq_cpu.models.linears import check_ignore, is_ignored, linearized, quantizable_linears
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme

TREE = nn.ModuleDict(
    {
        "tower": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))}),
        "text": nn.ModuleDict(
            {"a": nn.Linear(2, 2), "towers": nn.ModuleDict({"a": nn.Linear(2, 2)})}
        ),
        "head": nn.Linear(2, 2),
    }
)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("head", ["head"]),
        ("a", ["tower.a", "text.a", "text.towers.a"]),
        ("text.a", ["text.a"]),
        ("tower", ["tower.a", "tower.b.0"]),
        ("tower.b", ["tower.b.0"]),
        ("b.0", ["tower.b.0"]),
        ("towers", ["text.towers.a"]),
        ("text", ["text.a", "text.towers.a"]),
    ],
)
def test_an_entry_is_a_path_or_its_end_of_a_linear_or_of_what_holds_it(
    entry: str, names: list[str]
) -> None:
    linears = quantizable_linears(TREE)
    assert [name for name in linears if is_ignored(TREE, name, (entry,))] == names
    check_ignore(TREE, (entry,))


@pytest.mark.parametrize(
    ("entry", "close"),
    [
        ("towr", "tower"),
        ("tower.c", "tower.a or tower.b"),
        ("heads", "head"),
        ("towe", "tower"),
        ("tower.", "tower.b or tower.a"),
        ("", "the end of a linear's or module's path"),
        ("a.b.c.d.e", "the end of a linear's or module's path"),
    ],
)
def test_an_entry_that_names_nothing_is_refused_with_the_nearest(entry: str, close: str) -> None:
    with pytest.raises(SqCpuError, match="matches no linear: use ") as caught:
        check_ignore(TREE, (entry,))
    assert set(close.split(" or ")) <= set(str(caught.value).split("use ")[1].split(" or ")) or (
        close in str(caught.value)
    )


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("llava", "vision_tower"),
        ("llava", "model.language_model.layers.0"),
        ("clip", "vision_model"),
        ("gemma3", "model.vision_tower"),
        ("mixtral", "experts"),
        ("gpt2", "transformer.h.1"),
        ("whisper", "encoder"),
    ],
)
def test_a_subtree_stays_in_float(name: str, entry: str, scheme: str) -> None:
    if name == "llava":
        image_token = VOCABULARY - 1
        model, given = other_model(name), []
        for text, pixels in zip(ids(), images(), strict=True):
            text[:, 2:6] = image_token
            given.append({"input_ids": text, "pixel_values": pixels})
    else:
        model, given = tiny_model(name), inputs(name)
    ignore = ("lm_head", entry)
    with linearized(model):
        every = quantizable_linears(model, ("lm_head",)).keys()
    below = {each for each in every if f".{entry}." in f".{each}."}
    assert below
    found = calibrate(model, given, ignore=ignore)
    assert found.channel_min.keys() == every - below
    quantized = quantize(copy.deepcopy(model), found, scheme=Scheme.of(scheme, ignore=ignore))
    record: Any = quantized.sq_cpu_config
    assert set(record.layers) == every - below
    assert {each for each, why in record.kept.items() if why == "ignored"} >= below


def test_the_default_is_also_the_path_of_a_head_with_linears_of_its_own() -> None:
    model = tiny_model("roberta")
    found = calibrate(model, batches())
    assert not any("lm_head" in name for name in found.channel_min)


class Held(nn.Module):
    """Calls a linear from a plain container, beside the module of its name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.plain, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        kinds: dict[str, Any] = {
            "list": [self.plain, nn.ReLU()],
            "tuple": (self.plain,),
            "table": {"first": self.plain},
            "nested": [{"first": (self.plain, 1)}],
        }
        self.held = kinds[kind]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.other(tree_leaves(self.held)[0](x))
        return found


@pytest.mark.parametrize("kind", ["list", "tuple", "table", "nested"])
def test_a_linear_that_a_plain_container_holds_stays_in_float(kind: str, tmp_path: Path) -> None:
    model, x = Held(kind), torch.randn(3, 4)
    quantize(model, calibrate(model, [x]))
    record: Any = model.sq_cpu_config
    assert record.layers == ("other",)
    assert record.kept == {
        "plain": "a plain list or table of the model holds it, too, and may call it"
    }
    loaded = load(save(model, tmp_path / "out"), model=Held(kind))
    assert torch.equal(loaded(x), model(x))

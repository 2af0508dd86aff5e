"""With what folds are proven: whole rows, of which padding and losses prove nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from folding_cases import LeakyNorm
from tiny import CONFIGS, VOCABULARY, batches, inputs, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

import sq_cpu
from sq_cpu import Family, Group, Stack
from sq_cpu.models.calls import example_of
from sq_cpu.models.families import FAMILIES
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.models.padding import padding_of
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.proof import prove_with


def folds_of(model: Any, batch: Any, **settings: Any) -> dict[str, str]:
    """Quantize and give, by group that a row claims to fold, why it was not; "" if it was."""
    with linearized(model):
        claimed = {group.name for group in smoothing_groups(model) if group.producer}
    calibration = sq_cpu.calibrate(model, [batch])
    record = sq_cpu.quantize(model, calibration, **settings).sq_cpu_config
    assert record.plan is not None
    return {g.name: "" if g.fold else g.note for g in record.plan.groups if g.name in claimed}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


# --- what the example is ------------------------------------------------------------------------


def cut(*args: Any, **kwargs: Any) -> Any:
    return example_of(args, kwargs, padding_of(nn.Identity(), args, kwargs))


def test_of_ids_it_is_the_row_with_the_least_padding() -> None:
    ids, mask = torch.arange(60).reshape(3, 20), torch.ones(3, 20)
    mask[[0, 2], :5] = 0
    given = {"input_ids": ids, "labels": ids, "position_ids": ids[:1], "return_dict": True}
    given |= {"attention_mask": mask, "next_sentence_label": ids[:, 0], "count": torch.tensor(3)}
    _, found = cut(**given)
    assert torch.equal(found["input_ids"], ids[1:2])
    assert torch.equal(found["labels"], ids[1:2])
    assert torch.equal(found["attention_mask"], mask[1:2])
    assert torch.equal(found["position_ids"], ids[:1])
    assert torch.equal(found["next_sentence_label"], ids[1:2, 0])
    assert (found["return_dict"], int(found["count"])) == (True, 3)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :7], "attention_mask": mask.bool()}
    _, found = cut(**given)
    assert torch.equal(found["decoder_input_ids"], ids[1:2, :7])


@pytest.mark.parametrize(
    "other",
    [
        {"pixel_values": torch.zeros(2, 3, 4, 4)},
        {"pixel_values": torch.zeros(30, 12), "image_grid_thw": torch.ones(2, 3).long()},
        {"position_ids": torch.zeros(3, 2, 20).long()},
        {"past_key_values": ((torch.zeros(2, 4, 3, 8),) * 2,)},
        {"features": torch.zeros(2, 8)},
        {"packed": torch.arange(7)},
        {"inputs_embeds": [torch.zeros(2, 20, 8)]},
    ],
)
def test_beside_anything_else_the_batch_stays_whole(other: dict[str, Any]) -> None:
    ids = torch.zeros(2, 20).long()
    _, found = cut(input_ids=ids, **other)
    assert found["input_ids"].shape == (2, 20)
    assert found.keys() == {"input_ids", *other}
    (args, _) = cut(torch.zeros(5, 20))
    assert args[0].shape == (5, 20)


def test_it_is_a_copy_with_all_that_it_holds() -> None:
    x, cache = torch.zeros(2, 3), DynamicCache()
    args, _ = cut([x, (x,)], cache, {"a": x})
    x += 1
    cache.update(x, x, 0)
    assert not any(value.any() for value in (args[0][0], args[0][1][0], args[2]["a"]))
    assert args[1].get_seq_length() == 0


def test_what_is_padding_alone_is_no_example() -> None:
    ids, mask = torch.zeros(2, 20).long(), torch.zeros(2, 20).long()
    assert cut(input_ids=ids, attention_mask=mask) is None
    model = tiny_model("llama")
    full = {"input_ids": batches(1)[0]}
    empty = full | {"attention_mask": torch.zeros(2, 16).long()}
    found = sq_cpu.calibrate(model, [empty, full])
    assert found.example is not None
    assert torch.equal(found.example[1]["input_ids"], full["input_ids"][:1])


# --- what it proves -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2", "t5", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("labels", ["some", "first_row", "all"])
def test_labels_do_not_matter(name: str, labels: str) -> None:
    (batch,) = inputs(name, 1)
    target = batch.get("decoder_input_ids", batch["input_ids"]).clone()
    target[{"some": (slice(None), slice(3)), "first_row": 0, "all": slice(None)}[labels]] = -100
    found = folds_of(tiny_model(name), batch | {"labels": target})
    assert found == folds_of(tiny_model(name), batch)
    assert "" in found.values()
    as_tuple = batch | {"labels": target, "return_dict": False}
    assert folds_of(tiny_model(name), as_tuple) == found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, "sdpa") for n in ("llama", "opt", "bert", "gpt2", "mixtral", "t5")]
    + [("llama", "eager"), ("t5", "eager")],
)
def test_padding_neither_hinders_a_fold_nor_proves_one(
    name: str, side: str, attention: str
) -> None:
    (batch,) = inputs(name, 1)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, slice(5) if side == "left" else slice(11, None)] = 0
    batch |= {"attention_mask": mask}
    unpadded = folds_of(tiny_model(name, attn_implementation=attention), inputs(name, 1)[0])
    assert folds_of(tiny_model(name, attn_implementation=attention), batch) == unpadded
    # Of padding alone no calibration and no fold come; one of both in another row does no harm.
    mask[1] = 0
    assert folds_of(tiny_model(name, attn_implementation=attention), batch) == unpadded


class _Sees(nn.Module):
    """A norm, a linear, and an activation in between that is linear where the input is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) * attention_mask[..., None]
        y = self.second(nn.functional.gelu(self.first(x)))
        return {"y": y, "loss": y.sum() * torch.nan, "other_loss": y.sum(dim=0)}


@contextmanager
def registered(*families: Family) -> Iterator[None]:
    for family in families:
        sq_cpu.register_family(family)
    yield
    del FAMILIES[: len(families)]


def test_a_wrong_fold_that_padding_would_pass_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([_Sees()])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = self.blocks[0](input_ids, attention_mask)
            return found

    group = Group(producer="first", consumers=("second",))
    family = Family(model_types=("Holder",), stacks=(Stack(blocks="blocks", groups=(group,)),))
    torch.manual_seed(0)
    (ids,) = batches(1)
    mask = torch.zeros_like(ids)
    mask[0, 3] = 1
    with registered(family):
        found = folds_of(Holder().eval(), {"input_ids": ids, "attention_mask": mask})
        assert "something else uses" in found["blocks.0.first"] or "GELU" in found["blocks.0.first"]
        calibration = sq_cpu.calibrate(Holder(), [{"input_ids": ids, "attention_mask": mask}])
        alone = ((), {"input_ids": ids, "attention_mask": torch.zeros_like(mask)})
        model = Holder().eval()
        with linearized(model):
            (fold,) = (g for g in smoothing_groups(model) if g.producer)
            proof = prove_with(model, [fold], alone)
        assert proof.reasons[fold] in (
            "the model returns no tensor that could be compared",
            "the example reaches it with padding alone, which proves no fold",
        )
        assert calibration.example is not None


def test_nan_where_there_is_padding_is_no_nan_of_the_model() -> None:
    class Nan(nn.Module):
        def __init__(self, everywhere: bool) -> None:
            super().__init__()
            self.model, self.everywhere = tiny_model("llama"), everywhere

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids, attention_mask).logits
            shown = attention_mask[..., None].bool()
            return logits.where(shown != self.everywhere, torch.nan)

    (ids,) = batches(1)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    for everywhere in (False, True):
        model = Nan(everywhere).eval()
        groups = [group for group in smoothing_groups(model.model) if group.producer]
        renamed = [
            type(g)(
                name=g.name,
                consumers=tuple(f"model.{name}" for name in g.consumers),
                layout=g.layout,
                producer=f"model.{g.producer}",
            )
            for g in groups
        ]
        if everywhere:
            with pytest.raises(sq_cpu.SqCpuError, match="the model gives NaN"):
                prove_with(model, renamed, ((), batch))
        else:
            assert not any(prove_with(model, renamed, ((), batch)).reasons.values())


def test_experts_that_padding_alone_reaches_are_proven_by_their_padding() -> None:
    # Whatever rows an expert gets, a wrong fold moves them.
    model = tiny_model("mixtral")
    (batch,) = inputs("mixtral", 1)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 2:] = 0
    found = folds_of(model, batch | {"attention_mask": mask})
    assert set(found.values()) <= {"", "the example never reaches it, so the fold cannot be proven"}


# --- what it does to the model, and when it is run ----------------------------------------------


def big_bird() -> Any:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 48, "max_position_embeddings": 256, "block_size": 8}
    config = AutoConfig.for_model(
        "big_bird",
        vocab_size=VOCABULARY,
        num_random_blocks=1,
        attention_type="block_sparse",
        sep_token_id=3,
        hidden_act="relu",
        **settings,
    )
    torch.manual_seed(0)
    return transformers.BigBirdForMaskedLM(config).eval()


def test_big_bird_is_proven_with_its_sparse_attention() -> None:
    groups = (
        Group(producer="attention.self.value", consumers=("attention.output.dense",), rows="value"),
        Group(producer="intermediate.dense", consumers=("output.dense",)),
    )
    stack = Stack(blocks="encoder.layer", groups=groups)
    (ids,) = batches(1, length=128)
    with registered(Family(model_types=("big_bird",), stacks=(stack,))):
        model = big_bird()
        sparse = [type(layer.attention.self) for layer in model.bert.encoder.layer]
        found = folds_of(model, ids)
        assert len(found) == 4
        assert not any(found.values())
        assert [type(layer.attention.self) for layer in model.bert.encoder.layer] == sparse
        assert model.bert.attention_type == "block_sparse"
        short = folds_of(big_bird(), ids[:, :20])
        assert short == found


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"smooth": False}, 0), ({"plan": "unfolded"}, 0), ({}, 2), ({"plan": "leaky"}, 12)],
)
def test_nothing_is_run_where_there_is_nothing_to_prove(
    settings: dict[str, Any], most: int
) -> None:
    model = tiny_model("llama")
    if settings.get("plan") == "leaky":
        model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration)
    if settings.pop("plan", None) == "unfolded":
        groups = [sq_cpu.GroupPlan(name=group.name, fold=False) for group in plan.groups]
        settings["plan"] = SmoothPlan(tuple(groups))
    with counted(model) as calls:
        sq_cpu.quantize(model, calibration, **settings)
    assert len(calls) <= most
    assert bool(calls) == bool(most)
    # A model of no family claims no fold.
    other = tiny_model("llama")
    other.config.model_type = "something"
    with counted(other) as calls:
        sq_cpu.quantize(other, calibration)
    assert not calls


def test_a_cache_in_the_batch_is_as_long_in_every_run() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    (ids,) = batches(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    batch = {"input_ids": ids, "past_key_values": cache}
    found = folds_of(model, batch)
    # What the cache holds was not divided by s: v cannot be folded, all else can.
    assert {name for name, why in found.items() if why} == {n for n in found if "v_proj" in n}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("vit", "clip")])
def test_long_batches_prove_what_short_ones_do(name: str) -> None:
    def lengthened(ids: Tensor) -> Tensor:
        return torch.cat([ids, ids.flip(1), ids], dim=1)

    batch = {
        key: lengthened(value) if key.endswith("ids") and name != "gemma3" else value
        for key, value in inputs(name, 1)[0].items()
    }
    assert folds_of(tiny_model(name), batch) == folds_of(tiny_model(name), inputs(name, 1)[0])

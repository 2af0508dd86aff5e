"""Whose mask it is: the rows that count are those on which the padding has no influence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig

import sq_cpu
from sq_cpu.models.calls import evaluating
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.models.padding import padding_of

LENGTH = 16  # of every sequence: as many tokens, frames, and patches of images

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_SIZES |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = _TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "vocab_size": VOCABULARY,
}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
_BART |= {"decoder_ffn_dim": 48, "max_position_embeddings": 64, "forced_eos_token_id": None}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_VISION |= {
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 4,
    "model_type": "siglip_vision_model",
}

# More than tests/tiny.py has.
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "bart", _BART),
    "marian": ("MarianMTModel", "marian", _BART),
    "m2m_100": ("M2M100ForConditionalGeneration", "m2m_100", _BART),
    "llava": (
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": _SIZES | {"model_type": "llama", "num_key_value_heads": 2},
            "vision_config": _VISION,
            "image_token_id": VOCABULARY - 1,
            "image_seq_length": LENGTH,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    ),
    "bert-decoder": (
        "BertLMHeadModel",
        "bert",
        _SIZES | {"is_decoder": True, "add_cross_attention": True, "pad_token_id": 0},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY},
    ),
}


def model_of(name: str) -> Any:
    if name not in _OTHERS:
        return tiny_model(name)
    torch.manual_seed(0)
    kind, model_type, settings = _OTHERS[name]
    model = getattr(transformers, kind)(AutoConfig.for_model(model_type, **settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() == 1 else 0.15)
    return model.eval()


def ids_of(seed: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 2, (batch, LENGTH), generator=generator)


def mask_of(side: str, *lengths: int) -> Tensor:
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(length) if side == "right" else slice(LENGTH - length, None)] = 1
    return mask


def batch_of(name: str, side: str) -> dict[str, Tensor]:
    """Return a batch with a mask for every sequence that may have one, all of one length."""
    mask, other = mask_of(side, 16, 9, 4), mask_of("right", 5, 16, 11)
    batch = {"input_ids": ids_of(1), "attention_mask": mask}
    if name.startswith(("bart", "marian", "m2m_100", "t5")):
        batch |= {"decoder_input_ids": ids_of(2), "decoder_attention_mask": other}
    if name == "whisper":
        batch = {"decoder_input_ids": ids_of(2), "decoder_attention_mask": other}
        batch["input_features"] = torch.randn(3, 8, 24)
    if name == "bert-decoder":
        batch |= {"encoder_hidden_states": torch.randn(3, LENGTH, 32)}
        batch |= {"encoder_attention_mask": other}
    if name in ("clip", "llava"):
        size = 8 if name == "clip" else 16
        batch["pixel_values"] = torch.randn(3, 3, size, size)
    if name == "llava":
        mask = torch.cat([torch.ones(3, LENGTH, dtype=torch.int64), mask], dim=1)
        ids = torch.full((3, LENGTH), VOCABULARY - 1)
        batch |= {"input_ids": torch.cat([ids, ids_of(1)], dim=1), "attention_mask": mask}
    return batch


_SEQUENCES = (
    ("input_ids", "attention_mask"),
    ("decoder_input_ids", "decoder_attention_mask"),
    ("encoder_hidden_states", "encoder_attention_mask"),
)


def padded_with(batch: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    changed = dict(batch)
    for name, mask in _SEQUENCES:
        if mask in batch and name in batch:
            kept = batch[mask].bool()
            if batch[name].dim() == 3:
                changed[name] = batch[name].where(kept[..., None], batch[name] + padding)
            else:
                changed[name] = batch[name].where(kept, padding)
    return changed


def rows_of(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all rows of every linear's input."""
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).clone())

    with linearized(model):
        linears = quantizable_linears(model)
        with evaluating(model), watching_inputs(linears, "input", see):
            model(**batch)
    return {name: torch.cat(rows) for name, rows in seen.items()}


_AFTER_ATTENTION = ("o_proj", "out_proj", "output.dense", "c_proj", ".o", "out_lin")
_NAMES = ["llama", "opt", "bert", "gpt2", "t5", "t5-gated", "whisper", "clip", *_OTHERS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", _NAMES)
def test_the_rows_that_count_are_those_that_padding_does_not_change(name: str, side: str) -> None:
    model, batch = model_of(name), batch_of(name, side)
    batch = padded_with(batch, 3)
    first, second = rows_of(model, batch), rows_of(model, padded_with(batch, 4))
    found = sq_cpu.calibrate(model, [batch], ignore=(), rows=1000)
    assert found.channel_min.keys() == first.keys()
    partly = set()
    for linear, rows in first.items():
        expected = rows[(rows == second[linear]).all(dim=1)]
        if linear.endswith(_AFTER_ATTENTION):  # which may see nothing, and give the same
            assert found.rows_seen[linear] <= len(expected), linear
            continue
        assert found.rows_seen[linear] == len(expected), linear
        # Operators may add in another order while a call is traced.
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.channel_min[linear], expected.amin(dim=0), **close)
        torch.testing.assert_close(found.channel_max[linear], expected.amax(dim=0), **close)
        partly |= {linear} if len(expected) < len(rows) else set()
    assert partly
    encoder = "model.encoder" if name == "whisper" else "vision"
    others = {linear for linear in first if encoder in linear}
    assert name not in ("llava", "clip", "whisper") or others
    assert not others & partly


# --- how a mask is given ------------------------------------------------------------------------


def assert_same_ranges(found: sq_cpu.Calibration, expected: sq_cpu.Calibration) -> None:
    assert found.rows_seen == expected.rows_seen
    for name, low in expected.channel_min.items():
        assert torch.equal(found.channel_min[name], low), name
        assert torch.equal(found.channel_max[name], expected.channel_max[name]), name


def four_dimensional(mask: Tensor, causal: bool) -> Tensor:
    seen = mask.bool()[:, None, None, :].expand(-1, 1, LENGTH, -1)
    return seen & torch.ones(LENGTH, LENGTH).tril().bool() if causal else seen


@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
@pytest.mark.parametrize("form", ["position", "list", "bool", "float", "half", "inference"])
def test_a_mask_in_any_form_is_the_same(name: str, form: str) -> None:
    model, batch = model_of(name), batch_of(name, "right")
    expected = sq_cpu.calibrate(model, [batch])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given: dict[str, Any] = {
        "position": (ids, mask),
        "list": [ids, mask],
        "bool": batch | {"attention_mask": mask.bool()},
        "float": (ids, mask.float()),
        "half": (ids, mask.half()),
        "inference": batch,
    }
    with torch.inference_mode(form == "inference"):
        assert_same_ranges(sq_cpu.calibrate(model, [given[form]]), expected)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_of_queries_and_tokens(name: str, kind: str) -> None:
    model, batch = model_of(name), batch_of(name, "right")
    expected = sq_cpu.calibrate(model, [batch])
    mask = four_dimensional(batch["attention_mask"], causal=name == "llama")
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = sq_cpu.calibrate(model, [batch | {"attention_mask": mask}])
    assert found.rows_seen == expected.rows_seen
    for linear, low in expected.channel_min.items():
        torch.testing.assert_close(found.channel_min[linear], low, rtol=1e-4, atol=1e-5)


def test_an_added_bias_masks_nothing() -> None:
    ids, bias = ids_of(1), -torch.rand(3, 4, LENGTH, LENGTH)
    assert not padding_of(nn.Identity(), (), {"input_ids": ids, "attention_mask": bias}).masks
    for other in (None, torch.ones(3, 5), torch.zeros(3), {"full_attention": torch.zeros(3, 16)}):
        given = {"input_ids": ids, "attention_mask": other}
        assert not padding_of(nn.Identity(), (), given).masks


_ENCODER_DECODERS = ["bart", "marian", "m2m_100", "t5"]


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        (name, decoder)
        for name in _ENCODER_DECODERS
        for decoder in ("ids", "labels", "same_tensor", "same_storage")
    ]
    + [("bart", "shifted")],  # which makes them of the encoder's
)
def test_a_decoder_without_a_mask_counts_whole(name: str, decoder: str) -> None:
    model, batch = model_of(name), batch_of(name, "right")
    del batch["decoder_attention_mask"]
    ids = batch.pop("decoder_input_ids")
    if decoder == "labels":
        batch["labels"] = ids
    elif decoder == "same_storage":
        both = torch.cat([batch["input_ids"], ids])
        batch |= {"input_ids": both[:3], "decoder_input_ids": both[3:]}
    elif decoder != "shifted":
        batch["decoder_input_ids"] = batch["input_ids"] if decoder == "same_tensor" else ids
    seen = sq_cpu.calibrate(model, [batch]).rows_seen
    masked = int(batch["attention_mask"].sum())
    for linear, rows in seen.items():
        of_encoder = "encoder." in linear and "encoder_attn" not in linear
        cross = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k")
        of_encoder |= linear.endswith((*cross, "EncDecAttention.v"))
        assert rows == (masked if of_encoder else 3 * LENGTH), linear


@pytest.mark.parametrize("name", ["llama", "bert", "clip", *_ENCODER_DECODERS])
def test_the_sampled_loss_leaves_out_what_is_padding(name: str) -> None:
    """Gradients are those of the rows that count: of others there are none, and none flow."""
    model, batch = model_of(name), batch_of(name, "right")
    found = sq_cpu.calibrate(model, [batch], rows=1000, gradient_rows=1000, ignore=())
    head = next((n for n in found.gradients if n.endswith(("lm_head", "decoder"))), None)
    for linear, gradients in found.gradients.items():
        assert len(gradients) == found.rows_seen[linear]
        assert gradients.isfinite().all()
    if name in _ENCODER_DECODERS:
        assert head is not None
        counted = int(batch["decoder_attention_mask"].sum())
        assert found.rows_seen[head] == counted
        # A position that the loss leaves out gives its row of the head no gradient at all.
        assert (found.gradients[head].abs().amax(dim=1) > 0).all()


class Transposed(nn.Module):
    """Works on [tokens, batch, features], as XLNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.linear(self.embed(input_ids.T) * attention_mask.T[..., None])
        return y.transpose(0, 1)


@pytest.mark.parametrize("batch", [3, LENGTH])  # as many rows as tokens: which axis is which?
def test_tokens_may_come_first(batch: int) -> None:
    lengths = [9, 4, 2, *(1 for _ in range(3, batch))]
    model, mask, ids = Transposed(), mask_of("left", *lengths), ids_of(1, batch)
    found = sq_cpu.calibrate(model, [(ids, mask)], rows=1000)
    assert found.rows_seen == {"linear": sum(lengths)}
    expected = model.embed(ids)[mask.bool()]
    assert torch.equal(found.channel_max["linear"], expected.amax(dim=0))
    assert torch.equal(found.channel_min["linear"], expected.amin(dim=0))


def test_as_many_rows_as_tokens_in_xlnet() -> None:
    torch.manual_seed(0)
    settings = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCABULARY}
    model = transformers.XLNetModel(AutoConfig.for_model("xlnet", **settings)).eval()
    ids, mask = ids_of(1, LENGTH), mask_of("right", *range(1, LENGTH + 1))
    given = [{"input_ids": ids, "attention_mask": mask}]
    found = sq_cpu.calibrate(model, given, rows=1000)
    parts = [{name: each[rows] for name, each in given[0].items()} for rows in ([0], range(1, 16))]
    expected = sq_cpu.calibrate(model, parts, rows=1000)
    assert found.rows_seen == expected.rows_seen
    for name, high in expected.channel_max.items():
        torch.testing.assert_close(found.channel_max[name], high, rtol=1e-4, atol=1e-5)

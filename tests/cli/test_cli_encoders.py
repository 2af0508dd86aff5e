"""The commands are for causal language models, and say so of others before they load them."""

from pathlib import Path

import pytest
from byte_models import byte_tokenizer
from command_line import error_of, small
from tiny import tiny_model

import sq_cpu
from sq_cpu.checkpoint.sources import check_causal

KINDS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_refused_with_what_to_do_instead(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    tiny_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    commands = [
        ("quantize", folder, "-o", tmp_path / "out", *small()),
        ("quantize", folder, "-o", tmp_path / "out", "--stream", *small()),
        ("tune", folder, "-o", tmp_path / "plan.json", *small()),
        ("eval", folder),
        ("generate", folder, "Once upon"),
    ]
    for command in commands:
        error = error_of(*command)
        assert f"holds a {KINDS[kind]}, no causal language model: in Python, load it" in error
    assert not (tmp_path / "out").exists()


def test_an_int8_encoder_is_refused_where_text_is_scored(tmp_path: Path) -> None:
    model = sq_cpu.quantize(tiny_model("bert"), smooth=False)
    folder = sq_cpu.save(model, tmp_path / "int8", byte_tokenizer())
    for command in (("eval", folder), ("generate", folder, "Once upon")):
        assert "holds a BertForMaskedLM, no causal language model" in error_of(*command)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3", "mpt", "falcon"])
def test_decoders_are_let_through(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    check_causal(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"model_type": ["bert"]}', '{"architectures": 3}', "x"]
)
def test_a_config_that_says_nothing_is_left_to_what_loads_the_model(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    check_causal(tmp_path)

"""Which folders hold a causal language model: the commands that need one say so of others."""

import json
from pathlib import Path

import pytest
from byte_models import byte_tokenizer
from command_line import error_of
from tiny import tiny_model

import sq_cpu
from sq_cpu.checkpoint.classes import other_class
from sq_cpu.checkpoint.sources import check_causal
from sq_cpu.errors import SqCpuError

KINDS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
    "whisper": "WhisperForConditionalGeneration",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_refused_where_text_is_scored_or_written(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    tiny_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for command in (("eval", folder), ("generate", folder, "Once upon"), ("inspect", folder)):
        assert f"holds a {KINDS[kind]}, no causal language model: " in error_of(*command)


def test_an_int8_encoder_is_refused_alike(tmp_path: Path) -> None:
    model = sq_cpu.quantize(tiny_model("bert"), smooth=False)
    folder = sq_cpu.save(model, tmp_path / "int8", byte_tokenizer())
    for command in (("eval", folder), ("generate", folder, "Once upon")):
        assert "holds a BertForMaskedLM, no causal language model" in error_of(*command)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3", "mpt", "falcon"])
def test_decoders_are_let_through(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    check_causal(tmp_path)


def test_a_decoder_without_its_head_is_none(tmp_path: Path) -> None:
    tiny_model("llama").model.save_pretrained(tmp_path)
    with pytest.raises(SqCpuError, match="holds a LlamaModel"):
        check_causal(tmp_path)


def test_other_class() -> None:
    """By the config alone, which may be of a class that is only in the folder."""
    own = {"AutoModel": "own.Own", "AutoConfig": "own.Config"}
    cases = [
        ({"model_type": "bert"}, "BertModel"),
        ({"model_type": "vit"}, "ViTModel"),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, None),
        ({"model_type": "own", "architectures": ["Own"], "auto_map": own}, "Own"),
        ({"model_type": "own", "architectures": ["Other"], "auto_map": own}, None),
        (
            {
                "model_type": "own",
                "architectures": ["Own"],
                "auto_map": own | {"AutoModelForCausalLM": "own.Own"},
            },
            None,
        ),
    ]
    for config, expected in cases:
        assert other_class(config) == expected, config


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"model_type": ["bert"]}',
        '{"architectures": 3}',
        '{"architectures": [3], "auto_map": [3]}',
        "x",
    ],
)
def test_a_config_that_says_nothing_is_left_to_what_loads_the_model(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    check_causal(tmp_path)
    if text.startswith("{"):
        assert other_class(json.loads(text)) is None

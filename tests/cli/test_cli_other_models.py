"""Models that are no causal language models, through the commands, with files of their own kind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from byte_models import byte_tokenizer
from command_line import error_of, json_of, run
from safetensors.torch import load_file, save_file
from sample_files import MODELS, write_images, write_model, write_pairs, write_samples, write_sound
from tiny import tiny_model

import sq_cpu
from sq_cpu.checkpoint.sources import load_any
from sq_cpu.samples.batches import sample
from sq_cpu.samples.sound import read_sound

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision")
SMALL = ("--windows", 4, "--window", 24)


def calib(name: str, folder: Path) -> tuple[object, ...]:
    kind = MODELS[name][2]
    return ("--calib", write_samples(kind, folder)) if kind else ()


@pytest.mark.parametrize("name", MODELS)
def test_quantize(name: str, tmp_path: Path) -> None:
    folder, out = write_model(name, tmp_path / "float"), tmp_path / "out"
    given = calib(name, tmp_path)
    result = json_of("quantize", folder, "-o", out, "--scheme", "O3", *SMALL, *given)
    close = result["closeness"]
    assert result["layers"] > 8
    assert not [why for why in result["kept"].values() if "batch" in why]  # all were reached
    assert close["cosine"] > 0.97
    assert 0 < close["relative_error"] < 0.25
    assert close["rows"] > 0
    kind = getattr(transformers, MODELS[name][1])
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind.__name__]
    # What prepares the inputs is there, and gives the same ones.
    loaded, preprocessor = load_any(out)
    assert type(loaded) is kind
    float_model, before = load_any(folder)
    paths = given[1:]
    made = [
        sample(float_model, each, paths, windows=2, window=24).held_out[0]  # type: ignore[arg-type]
        for each in (before, preprocessor)
    ]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    # Both ways of loading give the same model, close to the float one.
    with torch.no_grad():
        outputs = [each(**made[0])[0] for each in (loaded, kind.from_pretrained(out))]
        exact = float_model(**made[0])[0]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], exact)
    assert (outputs[0] - exact).norm() < 0.3 * exact.norm()


def test_a_pipeline_takes_what_was_written(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    folder, out = write_model("vit", tmp_path / "float"), tmp_path / "out"
    run("quantize", folder, "-o", out, "--calib", images)
    classify = transformers.pipeline("image-classification", str(out))
    assert len(classify(str(images / "0.png"))) == 2
    folder, out = write_model("cross-encoder", tmp_path / "texts"), tmp_path / "out-texts"
    run("quantize", folder, "-o", out, *SMALL)
    (found,) = transformers.pipeline("text-classification", str(out))("a text")
    assert found["label"].startswith("LABEL_")


# --- what is damaged -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["captioner", "clip", "vit"])
def test_a_damaged_preprocessor_is_not_left_behind(name: str, tmp_path: Path) -> None:
    folder, given = write_model(name, tmp_path / "float"), calib(name, tmp_path)
    files = {"processor_config.json", "preprocessor_config.json", "tokenizer.json"}
    found = [folder / file for file in files if (folder / file).is_file()]
    assert found
    for path in found:
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        assert "cannot load the " in error_of(
            "quantize", folder, "-o", tmp_path / "out", *given, *SMALL
        )
        path.write_text(whole)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = write_model("vit", tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"].fill_(torch.inf)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    how = ("--calib", write_images(tmp_path / "images"), "--ignore", "classifier", *SMALL)
    error = error_of("quantize", folder, "-o", tmp_path / "out", *how)
    assert "the outputs of one of the models are not finite" in error
    assert not (tmp_path / "out").exists()


# --- samples --------------------------------------------------------------------------------------


def test_padding_of_pairs_is_not_counted(tmp_path: Path) -> None:
    folder, pairs = write_model("cross-encoder", tmp_path / "float"), tmp_path / "pairs.tsv"
    write_pairs(pairs, 9)
    out = tmp_path / "out"
    options = ("--calib", pairs, "--windows", 2, "--window", 64)
    result = json_of("quantize", folder, "-o", out, *options)
    # Three batches of three pairs, the first of which is held out.
    ids = [sum(map(len, line.split("\t"))) for line in pairs.read_text().splitlines()]
    assert result["calibration_tokens"] == sum(ids[3:])
    model, preprocessor = load_any(folder)
    made: Any = sample(model, preprocessor, [pairs], windows=2, window=64)
    masks = torch.cat([batch["attention_mask"].sum(dim=1) for batch in made.calibration])
    assert masks.tolist() == ids[3:]
    assert all(batch["attention_mask"].min() == 0 for batch in made.calibration)
    first = [len(line.split("\t")[0]) for line in pairs.read_text().splitlines()]
    types = made.held_out[0]["token_type_ids"].sum(dim=1)
    assert types.tolist() == [a - b for a, b in zip(ids[:3], first[:3], strict=True)]


def test_targets_of_pairs_are_shifted_and_masked(tmp_path: Path) -> None:
    model, preprocessor = load_any(write_model("t5", tmp_path / "float"))
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "ab", "target": "xyz", "score": 3}\n["abcd", "x"]\n')
    made: Any = sample(model, preprocessor, [path], windows=1, window=24, hold_out=False)
    (batch,) = made.calibration
    x, y = byte_tokenizer()("xy")["input_ids"]
    assert batch["decoder_input_ids"].tolist() == [[0, x, y], [0, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_held_out_samples_are_others(tmp_path: Path) -> None:
    model, preprocessor = load_any(write_model("vit", tmp_path / "float"))
    images = write_images(tmp_path / "images", 20)
    made: Any = sample(model, preprocessor, [images], windows=8, window=24)
    assert (len(made.calibration), len(made.held_out)) == (8, 1)
    rows = torch.cat([batch["pixel_values"] for batch in (*made.calibration, *made.held_out)])
    assert len(rows) == len(torch.unique(rows, dim=0)) == 20
    made = sample(model, preprocessor, [images / "0.png"], windows=8, window=24)
    assert (len(made.calibration), len(made.held_out)) == (1, 0)
    # The shipped text: others of its documents.
    model, preprocessor = load_any(write_model("bert", tmp_path / "text"))
    made = sample(model, preprocessor, [], windows=16, window=24)
    assert (len(made.calibration), len(made.held_out)) == (16, 2)
    text = "".join(sq_cpu.texts.calibration())
    decode = preprocessor.tokenizer.decode
    assert all(decode(batch["input_ids"][0]) in text for batch in made.calibration)
    assert not any(decode(batch["input_ids"][0]) in text for batch in made.held_out)


def test_special_tokens_surround_every_window(tmp_path: Path) -> None:
    from tokenizers import processors

    folder = write_model("bert", tmp_path / "float")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    model, preprocessor = load_any(folder)
    text = write_samples("text", tmp_path)
    made: Any = sample(model, preprocessor, [text], windows=4, window=512)
    assert "windows of text of 64 tokens" in made.shown  # the model's positions
    assert len(made.calibration) == 4
    for batch in (*made.calibration, *made.held_out):
        ids = batch["input_ids"][0]
        assert ids.shape == (64,)
        assert (ids[0], ids[-1]) == (1, 2)
        assert (ids[1:-1] > 2).all()


def test_sound_is_resampled_and_mixed(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    times = np.arange(4000) / 8000
    tone = np.sin(2 * np.pi * 440 * times).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([tone, 0 * tone], axis=1), 8000, subtype="FLOAT")
    found = read_sound(path, 16_000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    assert found.dtype == np.float32
    assert found.shape == (8000,)
    assert np.abs(found - expected)[100:-100].max() < 0.01
    soundfile.write(path, np.zeros(8000 * 40, np.float32), 8000)
    assert read_sound(path, 8000).shape == (30 * 8000,)


def test_the_decoder_reads_what_the_model_says(tmp_path: Path) -> None:
    model, preprocessor = load_any(write_model("whisper", tmp_path / "float"))
    made: Any = sample(model, preprocessor, [write_sound(tmp_path / "sound")], windows=3, window=24)
    for batch in made.calibration:
        ids = batch["decoder_input_ids"]
        assert ids[0, 0] == 1  # decoder_start_token_id
        assert ids.shape[1] > 2
        with torch.no_grad():
            said = model(**batch).logits.argmax(dim=-1)
        assert torch.equal(said[:, :-1], ids[:, 1:])


def test_eval_beside_the_float_model(tmp_path: Path) -> None:
    folder, out = write_model("vit", tmp_path / "float"), tmp_path / "out"
    images = write_images(tmp_path / "images")
    run("quantize", folder, "-o", out, "--scheme", "O3", "--calib", images)
    same = json_of("eval", folder, "--source", folder, "--samples", images)
    assert same["relative_error"] == 0
    found = json_of("eval", out, "--source", folder, "--samples", images)
    assert 0 < found["relative_error"] < 0.2
    assert found["rows"] == 10
    assert "perplexity eval prints" in error_of("eval", llama(tmp_path), "--source", folder)
    assert "none are shipped" in error_of("eval", out, "--source", folder)


def llama(folder: Path) -> Path:
    tiny_model("llama", vocab_size=259).save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    return folder / "llama"


@pytest.mark.parametrize("name", ["clip", "whisper", "wav2vec2"])
def test_bf16(name: str, tmp_path: Path) -> None:
    """Images and sound come as fp32."""
    folder, out = write_model(name, tmp_path / "float"), tmp_path / "out"
    given = calib(name, tmp_path)
    result = json_of("quantize", folder, "-o", out, "--dtype", "bf16", *SMALL, *given)
    assert result["closeness"]["cosine"] > 0.97
    beside = ("--source", folder, "--samples", given[1], "--windows", 2)
    assert json_of("eval", out, *beside)["cosine"] > 0.97


def test_tune_then_quantize(tmp_path: Path) -> None:
    folder, plan, out = write_model("vit", tmp_path / "float"), tmp_path / "p.json", tmp_path / "o"
    images = write_images(tmp_path / "images")
    tuned = json_of("tune", folder, "-o", plan, "--calib", images, "--windows", 4)
    assert tuned["groups"] == 9
    result = json_of("quantize", folder, "-o", out, "--plan", plan, "--calib", images)
    assert result["scheme"]["activations"] == "static"
    assert result["closeness"]["cosine"] > 0.97


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "say"),
    [
        ("vit", "takes images, and none are shipped: give --calib a folder or files of images"),
        ("whisper", "takes recordings, and none are shipped: give --calib a folder or files of"),
        ("clip", "takes images with texts, and none are shipped: give --calib a folder or files"),
    ],
)
def test_files_are_asked_for(name: str, say: str, tmp_path: Path) -> None:
    folder = write_model(name, tmp_path / "float")
    assert say in error_of("quantize", folder, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bad_files(folder: Path) -> dict[str, Path]:
    from PIL import Image

    soundfile = pytest.importorskip("soundfile")
    folder.mkdir()
    made = {name: folder / name for name in ("text.wav", "empty.wav", "nan.wav", "cut.flac")}
    made |= {name: folder / name for name in ("rate.wav", "deep.png")}
    made |= {name: folder / name for name in ("text.png", "cut.png", "huge.png")}
    soundfile.write(made["rate.wav"], np.zeros(99, np.float32), 999_983)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(made["deep.png"])
    made["text.wav"].write_text("no sound")
    soundfile.write(made["empty.wav"], np.zeros(0, np.float32), 8000)
    soundfile.write(made["nan.wav"], np.full(9, np.nan, np.float32), 8000, subtype="FLOAT")
    soundfile.write(made["cut.flac"], np.zeros(8000, np.float32), 8000)
    made["cut.flac"].write_bytes(made["cut.flac"].read_bytes()[:20])
    made["text.png"].write_text("no image")
    whole = (write_images(folder / "images", 1) / "0.png").read_bytes()
    made["cut.png"].write_bytes(whole[: len(whole) // 2])
    made["huge.png"].write_bytes(whole)
    return made


def test_a_bad_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    files = bad_files(tmp_path / "bad")
    vit, whisper = (write_model(name, tmp_path / name) for name in ("vit", "whisper"))
    for name, path in files.items():
        model = vit if name.endswith("png") else whisper
        if name == "huge.png":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
        error = error_of("quantize", model, "-o", tmp_path / "out", "--calib", path)
        assert f"{path} " in error
        assert "leave it out" in error
    assert not (tmp_path / "out").exists()


def test_bad_pairs_are_named_by_line(tmp_path: Path) -> None:
    folder = write_model("cross-encoder", tmp_path / "float")
    cases = {
        "a.tsv": ("a\tb\na\tb\tc\n", "line 2 holds 3 texts: give two a line"),
        "b.tsv": ("a\tb\na\t \n", "line 2 holds 1 texts"),
        "c.jsonl": ('["a", "b"]\n{"a": "b"}\n', "line 2 holds 1 texts"),
        "d.jsonl": ('["a", "b"]\n["a",\n', "line 2 is not JSON"),
        "e.jsonl": ("3\n", "line 1 holds 0 texts"),
        "f.tsv": ("\n", "holds no text"),
    }
    for name, (content, say) in cases.items():
        path = tmp_path / name
        path.write_text(content)
        error = error_of("quantize", folder, "-o", tmp_path / "out", "--calib", path)
        assert str(path) in error
        assert say in error
    path.write_bytes(b"a\t\xff\n")
    assert "is not UTF-8" in error_of("quantize", folder, "-o", tmp_path / "o", "--calib", path)
    mixed = ("--calib", path, "--calib", write_samples("text", tmp_path))
    error = error_of("quantize", folder, "-o", tmp_path / "out", *mixed)
    assert "text.txt holds no pairs of texts" in error


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    images, sound = write_images(tmp_path / "images"), write_sound(tmp_path / "sound")
    vit, bert, clip = (write_model(name, tmp_path / name) for name in ("vit", "bert", "clip"))
    cases = [
        (vit, sound, f"{sound} holds no images (.png, "),
        (vit, tmp_path / "none", "none: no such file or folder; give another with --calib"),
        (bert, images / "0.png", "0.png is not UTF-8 text"),
        (bert, images, f"{images} is a folder: give files of text"),
        (clip, write_samples("text", tmp_path), "give images, too, with --calib"),
    ]
    for model, path, say in cases:
        assert say in error_of("quantize", model, "-o", tmp_path / "out", "--calib", path)


@pytest.mark.parametrize("name", ["bert", "whisper"])
def test_what_needs_a_language_model(name: str, tmp_path: Path) -> None:
    folder, out = write_model(name, tmp_path / "float"), tmp_path / "out"
    kind = f"holds a {MODELS[name][1]}, no causal language model"
    given = calib(name, tmp_path)
    quantize = ("quantize", folder, "-o", out, *SMALL, *given)
    cases = [
        ((*quantize, "--stream"), kind),
        ((*quantize, "--scheme", "auto"), "--scheme auto holds a goal of perplexity"),
        ((*quantize, "--prefix", "bos"), "a prefix is for causal language models"),
        (("tune", folder, "-o", out, "--goal", "1%", *given), "autotune holds a goal"),
        (("eval", folder), kind),
        (("generate", folder, "Once"), kind),
        (("inspect", folder), kind),
    ]
    for command, say in cases:
        assert say in error_of(*command)
    assert not out.exists()


@pytest.mark.parametrize("name", ["cross-encoder", "vit", "whisper"])
def test_damaged_models(name: str, tmp_path: Path) -> None:
    folder = write_model(name, tmp_path / "float")
    quantize = ("quantize", folder, "-o", tmp_path / "out", *calib(name, tmp_path))
    config = json.loads((folder / "config.json").read_text())

    def edited(**changes: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | changes))
        return error_of(*quantize)

    own = {"AutoModel": "own.Own"}
    assert "trust_remote_code=True" in edited(architectures=["Own"], auto_map=own)
    kernel = {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel"}
    assert "a kernel of the hub" in edited(**kernel)
    if name != "whisper":  # whose type has a causal language model, too
        assert "transformers has no such class" in edited(architectures=["NoSuchModel"])
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    lost = next(key for key in tensors if "layer" in key)
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors")
    assert "the weights lack " in error_of(*quantize)
    save_file(tensors, folder / "model.safetensors")
    for path in (*folder.glob("*token*"), *folder.glob("*processor*")):
        path.unlink()
    error = error_of(*quantize)
    assert "cannot load the " in error
    (folder / "model.safetensors").write_bytes(b"nonsense")
    assert "model.safetensors is damaged" in error_of(*quantize)
    assert not (tmp_path / "out").exists()


def test_a_model_of_an_input_that_no_file_has(tmp_path: Path) -> None:
    config = transformers.PatchTSTConfig(
        num_input_channels=1, context_length=32, patch_length=8, patch_stride=8, d_model=16
    )
    transformers.PatchTSTForPrediction(config).save_pretrained(tmp_path / "float")
    error = error_of("quantize", tmp_path / "float", "-o", tmp_path / "out")
    assert "past_values" in error or "cannot load the processor" in error


def test_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper, vit = (write_model(name, tmp_path / name) for name in ("whisper", "vit"))
    sound, images = write_sound(tmp_path / "sound"), write_images(tmp_path / "images")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    error = error_of("quantize", whisper, "-o", tmp_path / "out", "--calib", sound)
    assert "soundfile is not installed: pip install 'sq_cpu[audio]'" in error
    monkeypatch.setitem(sys.modules, "PIL", None)
    error = error_of("quantize", vit, "-o", tmp_path / "out", "--calib", images)
    assert "PIL is not installed: pip install 'sq_cpu[vision]'" in error


def test_out_stays_whole(tmp_path: Path) -> None:
    """What is refused leaves an earlier checkpoint as it was."""
    folder, out = write_model("bert", tmp_path / "float"), tmp_path / "out"
    run("quantize", folder, "-o", out, *SMALL)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    error_of("quantize", folder, "-o", out, "--overwrite", *SMALL)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sq_cpu.load(out) is not None

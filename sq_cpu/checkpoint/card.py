"""The model card of a checkpoint, README.md: what was done to the model, and what was measured.

Its last line has a digest of the rest. A card that somebody edited, which has another, or wrote is
never replaced: `save` to that folder keeps it, and a model that is loaded brings it along.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from sq_cpu.errors import SqCpuError, printable
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.quantization.record import QuantizationRecord

__all__ = ["CARD", "READ_BY_US", "Measured", "carry_card", "tagged", "write_card"]

CARD = "README.md"
Measured = Sequence[Mapping[str, str]]
"""A table: rows of column -> text, all with the same columns."""
READ_BY_US = "`pip install sq_cpu`; transformers alone refuses these files."
"""What a card says of who reads the files."""

_TAGS = ("sq_cpu", "smoothquant", "int8", "w8a8", "cpu")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT = re.compile(r"\A---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)
_MARK = re.compile(r"<!-- sq_cpu wrote this, ([0-9a-f]{16}); edited, it is kept -->\n\Z")


def write_card(
    folder: Path,
    target: Path,
    model: Any,
    record: QuantizationRecord,
    measured: Measured = (),
    read_by: str = READ_BY_US,
) -> None:
    """Write the card of a model into a folder that is to become `target`.

    That is the target's own, if somebody wrote or edited it, else the one that the model was loaded
    with, unless there is something measured or others read the files now, else a new one.
    """
    carried = getattr(model, "sq_cpu_card", None)
    text = carried if isinstance(carried, str) and not measured else None
    if text is not None and _is_ours(text) and read_by not in text:
        text = None
    card = target / CARD
    there = _read(card)
    if card.is_file() and (there is None or not _is_ours(there)):
        shutil.copyfile(card, folder / CARD)  # as it is, whatever its encoding
        return
    (folder / CARD).write_text(text or _text(model, record, measured, read_by), encoding="utf-8")


def carry_card(model: Any, folder: Path, *, is_same: bool = True) -> None:
    """Have a model that was loaded from a folder bring its card along.

    Where it is not the class that was saved (`is_same`), only a card that somebody wrote.
    """
    text = _read(folder / CARD)
    if text is not None and (is_same or not _is_ours(text)):
        model.sq_cpu_card = text


def tagged(folder: Path, tags: Sequence[str]) -> None:
    """Add tags to the card in a folder; `SqCpuError` for one that has no place for them."""
    text = _read(folder / CARD) or ""
    front = _FRONT.match(text)
    if front is None or "\ntags:\n" not in front[0]:
        raise SqCpuError(f"{folder / CARD} has no tags to add to: leave out tags, and edit it")
    lines = "".join(f"- {printable(tag)}\n" for tag in tags)
    body = text.replace("\ntags:\n", f"\ntags:\n{lines}", 1)
    if _is_ours(text):
        body = _marked(_MARK.sub("", body))
    (folder / CARD).write_text(body, encoding="utf-8")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _is_ours(text: str) -> bool:
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _marked(text: str) -> str:
    return f"{text}<!-- sq_cpu wrote this, {_digest(text)}; edited, it is kept -->\n"


def _text(model: Any, record: QuantizationRecord, measured: Measured, read_by: str) -> str:
    kind = type(model).__name__
    source = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    base = source if _is_hub_name(source) else None
    name = printable(Path(source).name) if source else kind
    front = ["library_name: transformers" if is_transformers(model) else "library_name: sq_cpu"]
    if base is not None:
        front += [f"base_model: {base}", "base_model_relation: quantized"]
    if (license_ := _license(source, base)) is not None:
        front.append(f"license: {license_}")
    if kind.endswith("ForCausalLM"):
        front.append("pipeline_tag: text-generation")
    front += ["tags:", *(f"- {tag}" for tag in _TAGS)]
    parts = [
        "---",
        *front,
        "---",
        f"# {name}, int8",
        "",
        f"{base or name} with int8 weights and int8 activations (W8A8), for Xeon processors, by",
        "SmoothQuant ([arXiv 2211.10438](https://arxiv.org/abs/2211.10438)).",
        "",
        *_table([{"": what, "done": text} for what, text in _done(record).items()]),
        *(["", "## Measured", "", *_table(measured)] if measured else []),
        "",
        "## Use",
        "",
        read_by,
        "",
        "```python",
        *_use(model, kind),
        "```",
        "",
    ]
    return _marked("\n".join(parts) + "\n")


def _is_hub_name(source: str) -> bool:
    try:
        if _HUB_NAME.fullmatch(source) is None or Path(source).exists():
            return False
        try_to_load_from_cache(source, CARD)  # checks the name
    except (HFValidationError, OSError):
        return False
    return True


def _license(source: str, base: str | None) -> str | None:
    """Return the license that the float model's card names, without asking the hub."""
    text = _read(Path(source) / CARD) if source and base is None else None
    if base is not None:
        cached = try_to_load_from_cache(base, CARD)
        text = _read(Path(cached)) if isinstance(cached, str) else None
    front = _FRONT.match(text or "")
    found = _LICENSE.search(front[1]) if front else None
    return found[1] if found else None


def _done(record: QuantizationRecord) -> dict[str, str]:
    scheme, plan = record.scheme, record.plan
    rows = {
        "scheme": f"{scheme.name}: {scheme.activations} activations, {scheme.weights} weights",
        "int8 linears": str(len(record.layers)),
        "smoothing": "none",
    }
    if plan is not None and plan.groups:
        alphas = sorted({group.alpha for group in plan.groups if group.rule == "smoothquant"})
        rules = ", ".join(sorted({group.rule for group in plan.groups}))
        alpha = f", alpha {alphas[0]:g}" if alphas else ""
        alpha += f" to {alphas[-1]:g}" if len(alphas) > 1 else ""
        folded = sum(group.fold for group in plan.groups)
        rows["smoothing"] = (
            f"{rules}{alpha}; {folded} groups folded, {len(plan.groups) - folded} at run time"
        )
    if record.hadamard:
        rows["rotated"] = f"{len(record.hadamard)} linears, blocks of 64 columns"
    if record.decomposed:
        channels = sum(record.decomposed.values())
        rows["channels in float"] = f"{channels} in {len(record.decomposed)} linears"
    for reason, count in Counter(record.kept.values()).most_common(5):
        rows[f"{count} in float"] = printable(reason)
    return rows


def _table(rows: Measured) -> list[str]:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[key] for key in columns] for row in rows)]
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]


def _use(model: Any, kind: str) -> list[str]:
    if not is_transformers(model):
        return ["import sq_cpu", "", f"model = sq_cpu.load(path, model={kind}(...))"]
    return [
        "import sq_cpu",
        f"from transformers import {kind}",
        "",
        f"model = {kind}.from_pretrained(path)",
    ]

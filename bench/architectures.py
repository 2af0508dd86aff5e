"""One model type put through calibrate, quantize, save and load, and judged at each step."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from subjects import NotBuiltError, Subject, build, generated, run, same, short
from tiny_inputs import Inputs
from torch import Tensor, nn
from twins import FakeTwin, FloatTwin, NudgedTwin, Reference, recording, steps_from_fake, twin

import sq_cpu
from sq_cpu.errors import SqCpuError
from sq_cpu.models.linears import float_linears, linearized

HEAD = "O3 head"  # O3 with the output head, which is left in float otherwise
VARIANTS = {
    "O1": sq_cpu.Scheme.of("O1"),
    "O3": sq_cpu.Scheme.of("O3"),
    HEAD: sq_cpu.Scheme.of("O3", ignore=()),
}
VERDICTS = ("failed", "refused", "right", "not built")

# Of the largest output. Folding rounds weights again, which a few layers enlarge: 2^-24 to 1e-5.
FOLD_TOLERANCE = 1e-3
# A value that lies between two codes may take either: a step of the largest input times the largest
# weight. Of the few hundred products behind an output, few do.
FEW_STEPS = 4.0
NUDGES = 16


class RefusedError(Exception):
    """The subject was refused as it should be; its argument is the refusal."""

    verdict = "refused"


class FailedError(Exception):
    """What was found wrong."""

    verdict = "failed"


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference over the largest expected value, of the worst output."""
    if _shapes(found) != _shapes(expected):
        return math.inf
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return math.inf
        if not finite.any():
            continue
        a, b = a[finite].double(), b[finite].double()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return worst


def beside_nudged(
    found: list[Tensor], exact: list[Tensor], fakes: list[list[Tensor]]
) -> tuple[float, float]:
    """Return the distance from the nearest of fake-quantized outputs, and the largest among these.

    A hard decision of a model may hang on one code: a threshold (whether a speaker is active), or a
    rounded length, which shapes outputs. `fakes`, which are nudged, then decide both ways. Where
    none decides as `found` does, only the outputs count whose shapes hang on no decision.
    """
    if not any(_shapes(found) == _shapes(each) for each in fakes):
        shapes = [_shapes(each) for each in (exact, *fakes)]
        settled = [i for i, each in enumerate(zip(*shapes, strict=False)) if len({*each}) == 1]
        if len(found) != len(exact) or not any(exact[i].is_floating_point() for i in settled):
            return math.inf, 0.0
        found, *fakes = ([outputs[i] for i in settled] for outputs in (found, *fakes))
    among = (distance(a, b) for a, b in combinations(fakes, 2))
    spread = max((each for each in among if each < math.inf), default=0.0)
    return min(distance(found, each) for each in fakes), spread


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in outputs]


@dataclass
class Finding:
    """What became of a model type."""

    type: str
    verdict: str = "failed"
    """"right", "refused", "failed" or "not built"."""
    kind: str = ""
    """Its class."""
    inputs: str = ""
    linears: int = 0
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    reason: str = ""
    trace: str = ""


def examine(model_type: str, folder: Path) -> Finding:
    """Judge a model type as far as one process can; `reload` does the rest in another."""
    torch.set_num_threads(1)
    finding = Finding(model_type)
    stage = folder / "stage"
    try:
        stage.write_text("build")
        subject = build(model_type, folder)
    except NotBuiltError as reason:
        finding.verdict, finding.reason = "not built", reason.args[0]
        finding.trace = "\n".join(reason.args[1:])
        return finding
    stage.write_text("judge")
    finding.kind = type(subject.model).__name__
    finding.inputs = ", ".join(subject.batches[0])
    with linearized(subject.model):
        finding.linears = sum(isinstance(m, nn.Linear) for m in subject.model.modules())
    try:
        calibration = _calibrate(subject)
    except (RefusedError, FailedError) as outcome:
        _conclude(finding, outcome)
        return finding
    given = (subject.batches[0], type(subject.model), copy.deepcopy(subject.model.config))
    torch.save(given, folder / "given.pt")
    for name, scheme in VARIANTS.items():
        if name == HEAD and "ignored" not in finding.variants["O3"].get("kept", {"ignored": 1}):
            continue  # it has no head: this is O3 again
        row: dict[str, Any] = {}
        finding.variants[name] = row
        try:
            _quantize_and_save(subject, calibration, scheme, folder / name, row)
            row["verdict"] = "right"
        except (RefusedError, FailedError) as outcome:
            row["verdict"] = outcome.verdict
            row["reason"] = str(outcome)
            row["trace"] = _trace(outcome)
    verdicts = [row["verdict"] for row in finding.variants.values()]
    finding.verdict = next((v for v in ("failed", "right", "refused") if v in verdicts), "failed")
    return finding


def _conclude(finding: Finding, outcome: RefusedError | FailedError) -> None:
    finding.verdict = outcome.verdict
    finding.reason, finding.trace = str(outcome), _trace(outcome)


def _trace(error: BaseException) -> str:
    cause = error.__cause__
    if cause is None or isinstance(cause, SqCpuError):
        return ""
    return "".join(traceback.format_exception(cause)[-6:])[-1500:]


@contextmanager
def _judged(what: str, model: Any, inputs: Inputs, outputs: list[Tensor]) -> Iterator[None]:
    """Judge a step: an error has one line, is of sq_cpu, and leaves the model as it was."""
    try:
        yield
    except SqCpuError as error:
        message = str(error)
        if "\n" in message:
            raise FailedError(f"{what}: an error of several lines: {message!r}") from error
        try:
            after = run(model, inputs)
        except Exception as broken:
            raise FailedError(f"{what} refused ({message}) and broke the model") from broken
        if not same(after, outputs):
            raise FailedError(f"{what} refused ({message}) and changed the model") from error
        raise RefusedError(f"{what}: {message}") from error
    except Exception as error:
        raise FailedError(f"{what}: {type(error).__name__}: {short(error)}") from error


def _calibrate(subject: Subject) -> sq_cpu.Calibration:
    before = _everything(subject.model)
    with _judged("calibrate", subject.model, subject.batches[0], subject.outputs):
        calibration = sq_cpu.calibrate(subject.model, subject.batches, ignore=(), progress=False)
    after = _everything(subject.model)
    changed = [
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]
    if changed:
        raise FailedError(f"calibrate changed {', '.join(changed[:3])}")
    if not same(run(subject.model, subject.batches[0]), subject.outputs):
        raise FailedError("calibrate changed the model's output")
    return calibration


def _everything(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone().nan_to_num() for name, tensor in named}


def _quantize_and_save(
    subject: Subject,
    calibration: sq_cpu.Calibration,
    scheme: sq_cpu.Scheme,
    folder: Path,
    row: dict[str, Any],
) -> None:
    inputs, exact = subject.batches[0], subject.outputs
    model = copy.deepcopy(subject.model)
    with recording() as made, _judged("quantize", model, inputs, exact):
        sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)
    record = model.sq_cpu_config
    row["quantized"] = len(record.layers)
    reasons: dict[str, int] = {}
    for reason in record.kept.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    row["kept"] = reasons
    groups = record.plan.groups if record.plan else ()
    row["groups"] = len(groups)
    row["folded"] = sum(group.fold for group in groups)
    notes: dict[str, int] = {}
    for group in groups:
        if not group.fold:
            notes[group.note] = notes.get(group.note, 0) + 1
    row["not folded"] = notes
    row["at run time"] = len(record.smoothed)
    _check_named(subject, model, scheme)

    try:
        outputs = run(model, inputs)
    except Exception as error:
        raise FailedError(f"forward in int8: {type(error).__name__}: {short(error)}") from error
    steps = steps_from_fake(model, made, partial(run, model, inputs))
    row["steps from fake"] = max(steps.values(), default=0.0)
    if wrong := [name for name, count in steps.items() if not count <= FEW_STEPS]:
        raise FailedError(
            f"{wrong[0]} is {steps[wrong[0]]:.2g} steps from torch's fake quantization "
            f"({len(wrong)} such linears)"
        )
    twins = {"folded": FloatTwin, "fake": FakeTwin, "reference": Reference}
    found = {}
    for what, kind in twins.items():
        try:
            found[what] = run(twin(model, made, kind), inputs)
        except Exception as error:
            text = f"the {what} model does not run: {type(error).__name__}: {short(error)}"
            raise FailedError(text) from error
    row["folding"] = distance(found["folded"], exact)
    row["reference"] = distance(outputs, found["reference"])
    row["fake error"] = distance(found["fake"], exact)
    row["error"] = distance(outputs, exact)
    if not row["folding"] <= FOLD_TOLERANCE:
        raise FailedError(f"folding alone changes the float model's output by {row['folding']:.2g}")
    if row["reference"]:
        raise FailedError(f"the output is {row['reference']:.2g} from the plain-torch reference's")
    if not row["error"] <= FOLD_TOLERANCE + 3 * row["fake error"] < math.inf:
        nudged = (twin(model, made, partial(NudgedTwin, seed=seed)) for seed in range(NUDGES))
        fakes = [found["fake"], *(run(each, inputs) for each in nudged)]
        row["from nudged"], row["nudged"] = beside_nudged(outputs, exact, fakes)
        if not row["from nudged"] <= FOLD_TOLERANCE + 3 * row["nudged"]:
            raise FailedError(
                f"int8 errs by {row['error']:.2g}, torch's fake quantization by "
                f"{row['fake error']:.2g}; it is {row['from nudged']:.2g} from the nearest nudged "
                f"one, these up to {row['nudged']:.2g} from each other"
            )

    tokens = None
    if subject.generated is not None:
        try:
            tokens = generated(model, inputs)
        except Exception as error:
            raise FailedError(
                f"generate in int8: {type(error).__name__}: {short(error)}"
            ) from error
        row["generate"] = "right"
    with _judged("save", model, inputs, outputs):
        sq_cpu.save(model, folder)
    if not same(run(model, inputs), outputs):
        raise FailedError("save changed the model's output")
    torch.save({"outputs": outputs, "tokens": tokens}, folder.with_suffix(".pt"))
    row["saved"] = True


def _check_named(subject: Subject, model: Any, scheme: sq_cpu.Scheme) -> None:
    """Raise `FailedError` unless each float linear is named in `kept`."""
    kept = model.sq_cpu_config.kept
    silent = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name == entry or name.startswith(f"{entry}.") for entry in kept)
    ]
    known = float_linears(model, scheme.ignore)
    silent += [name for name in known if name not in kept]
    if silent:
        raise FailedError(f"kept says nothing of {', '.join(silent[:3])} ({len(silent)} in all)")


def reload(folder: Path) -> dict[str, str]:
    """Return by variant what is wrong with what `examine` saved, "" for nothing."""
    torch.set_num_threads(1)
    found = {}
    inputs, kind, config = torch.load(folder / "given.pt", weights_only=False)
    named = getattr(transformers, kind.__name__, None) is kind
    for name in VARIANTS:
        if not (folder / name).with_suffix(".pt").exists():
            continue
        saved = torch.load((folder / name).with_suffix(".pt"), weights_only=False)
        try:
            fresh = None if named else kind._from_config(config, dtype=torch.float32)
            model: Any = sq_cpu.load(folder / name, model=fresh)
            wrong = "" if same(run(model, inputs), saved["outputs"]) else "loaded: other outputs"
            if not wrong and saved["tokens"] is not None:
                same_tokens = torch.equal(generated(model, inputs), saved["tokens"])
                wrong = "" if same_tokens else "loaded: other tokens"
        except Exception as error:
            wrong = f"load: {type(error).__name__}: {short(error)}"
        found[name] = wrong
    return found

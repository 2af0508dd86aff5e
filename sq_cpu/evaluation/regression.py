"""Whether a saved model got slower or less accurate than a stored baseline; for tests.

Three things are measured of a causal language model, each with a baseline of its own: its accuracy,
the prefill of a prompt and the decoding of tokens after it. Machines are noisy and change, so

- a baseline holds for a machine class alone: processor, instruction set in use, threads;
- a speed is the time of the model over that of a reference, a float product of torch of fixed size
  that is timed in turns with it: what slows both down says nothing of the model;
- it is the median over the rounds, and what seems too slow is measured again, up to `ATTEMPTS`
  times: the best counts.

The pytest fixture `sq_cpu_regression` gives this to a test suite.
"""

from __future__ import annotations

import gc
import hashlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sq_cpu import files, texts
from sq_cpu.checkpoint.sources import load_source
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.baselines import HOW_TO_WRITE, Baseline, Baselines
from sq_cpu.evaluation.perplexity import perplexity, token_windows
from sq_cpu.kernels.runtime import Machine
from sq_cpu.models.calls import check_length

__all__ = ["ATTEMPTS", "Evaluate", "Gate", "Settings"]

Measured = Literal["accuracy", "prefill", "decode"]
Better = Literal["lower", "higher"]
Evaluate = Callable[[nn.Module, Any], float]
"""(model, tokenizer) -> a finite number."""
TimeRounds = Callable[[Callable[[], object], Callable[[], None], int], Sequence[float]]
"""(call, setup, rounds) -> seconds of each call, `setup` having run untimed before each."""

ATTEMPTS = 3

# The reference, fp32: M, N, K of a product, and how many weights it goes through in turn. Prefill
# is bound by arithmetic; decoding by reading weights from memory, here 128 MB.
_REFERENCES = {"prefill": (128, 1024, 1024, 1), "decode": (1, 1024, 4096, 8)}
# It is repeated for as long as a call of the model, so that a scheduler that takes the processor
# away meets both alike; but for no longer than this, in seconds.
_LONGEST_REFERENCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a test run was asked for."""

    folder: Path
    """Of the baselines."""
    write: Literal["no", "missing", "all"] = "no"
    """Which baselines are written instead of compared."""
    slower: float = 0.1
    """The fraction by which a model may be slower than its baseline."""
    less_accurate: float = 0.01
    """The fraction by which it may be less accurate."""
    max_seconds: float = 1.0
    """A measurement has as many rounds as fit in this,"""
    min_rounds: int = 5
    """but no fewer than these."""


@dataclass(frozen=True)
class _Found:
    """One measurement; the fields are those of `Baseline`."""

    value: float
    seconds: float | None = None
    reference_seconds: float | None = None


class Gate:
    """Measures saved models, and refuses those that got worse; one for all tests of a run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lines: list[str] = []
        """What was found, a line for each check that passed."""
        self._key: tuple[object, ...] = ()
        self._model: tuple[nn.Module, Any] | None = None

    def check(
        self,
        name: str,
        measured: Measured,
        folder: Path,
        *,
        time_rounds: TimeRounds,
        extra_info: dict[str, Any],
        evaluate: Evaluate | None = None,
        better: Better | None = None,
        prompt: int = 512,
        tokens: int = 32,
        slower: float | None = None,
        less_accurate: float | None = None,
    ) -> None:
        """Measure a saved model and compare it with the baseline of the test `name`.

        Parameters
        ----------
        name : str
            Of the test: what the baseline is stored under.
        measured : {"accuracy", "prefill", "decode"}
        folder : Path
            Of a causal language model, quantized or not, with its tokenizer.
        time_rounds : callable
            Runs and times the first measurement; for the accuracy, it runs the evaluation once.
        extra_info : dict
            Gets the figures, as JSON types.
        evaluate : callable, optional
            Gives the accuracy. None: the perplexity of the shipped text.
        better : {"lower", "higher"}, optional
            Which values of `evaluate` are better; must be given with it.
        prompt : int
            Tokens of the prompt.
        tokens : int
            How many are decoded after it.
        slower, less_accurate : float, optional
            Fractions, in place of the settings'.

        Raises
        ------
        SqCpuError
            When the model got worse, when there is no baseline to compare with and none is
            written, and when something cannot be loaded, run or written.
        """
        folder = files.absolute(folder)
        digest = _config_digest(folder)
        timed = measured != "accuracy"
        limit = slower if timed else less_accurate
        if limit is None:
            limit = self.settings.slower if timed else self.settings.less_accurate
        if not 0 <= limit < math.inf:
            raise SqCpuError(f"a tolerance is {limit}; give a fraction, such as 0.1")
        if better not in ((None,) if evaluate is None else ("lower", "higher")):
            raise SqCpuError('give better="lower" or better="higher" with evaluate, and only then')
        work = _work(measured, evaluate, better, prompt, tokens)
        baselines = Baselines(self.settings.folder, Machine.here())
        stored = baselines.read().get(name)
        if self.settings.write == "all" or (self.settings.write == "missing" and stored is None):
            stored = None
        else:
            stored = _comparable(stored, work, name, baselines)

        def worse(value: float) -> float:
            higher = not timed and better == "higher"
            return 0.0 if stored is None else _worse(value, stored.value, higher=higher)

        model, tokenizer = self._load(folder)
        if timed:
            bench = _Bench(model, tokenizer, measured, prompt, tokens, self.settings)
            results = [bench.measure(time_rounds)]
            while len(results) < ATTEMPTS and (stored is None or worse(results[-1].value) > limit):
                results.append(bench.measure(_time_rounds))
            results.sort(key=lambda result: result.value)
        else:
            results = [_accuracy(evaluate or _perplexity, model, tokenizer, time_rounds)]
        found = Baseline(
            work=work,
            **asdict(results[len(results) // 2 if stored is None else 0]),
            model=str(folder),
            config_sha256=digest,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
        )
        extra_info["measured"] = measured
        extra_info["machine"] = asdict(baselines.machine)
        extra_info["found"] = asdict(found)
        extra_info["baseline"] = None if stored is None else asdict(stored)
        if stored is None:
            baselines.write(name, found)
            self.lines.append(f"{name}: wrote the baseline, {_figure(found)}, to {baselines.path}")
            return
        figures = f"{_figure(found)}, baseline {_figure(stored)}"
        if worse(found.value) > limit:
            raise SqCpuError(
                f"{work}: {worse(found.value):.1%} {'slower' if timed else 'less accurate'} than "
                f"the baseline, more than {limit:.1%}: {figures}; "
                f"{f'the best of {ATTEMPTS} measurements; ' if timed else ''}now: {found}; "
                f"baseline: {stored}, in {baselines.path}; machine: {baselines.machine}"
            )
        change = f"{'slower' if timed else 'less accurate'} by {worse(found.value):.1%}"
        self.lines.append(f"{name}: {figures}: {change}, at most {limit:.1%}")

    def _load(self, folder: Path) -> tuple[nn.Module, Any]:
        """Load a model, or give the last one again: the tests of one model follow each other."""
        stat = (folder / "config.json").stat()  # a model that is saved again is another one
        key = (folder, stat.st_ino, stat.st_mtime_ns)
        if self._model is None or key != self._key:
            self._model = None  # first, for the memory
            # Without the bars, which would stand among pytest's lines.
            self._model, self._key = load_source(folder, dtype=None, say=lambda _: None), key
        return self._model


class _Bench:
    """One model and its reference, timed in turns."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        measured: Measured,
        prompt: int,
        tokens: int,
        settings: Settings,
    ) -> None:
        if prompt < 1 or tokens < 1:
            raise SqCpuError(f"need prompt and tokens of at least 1, not {prompt} and {tokens}")
        check_length(model, prompt + tokens, "the prompt with the decoded tokens")
        self._model = model
        text = "\n".join(texts.evaluation())
        windows = token_windows(tokenizer, text, window=max(2, prompt), windows=1)
        self._prompt = windows[0][:, :prompt]
        self._tokens = tokens
        self._decodes = measured == "decode"
        self._settings = settings
        m, n, k, copies = _REFERENCES[measured]
        # Ones, not zeros: the system backs fresh zeros with a single page.
        self._x, self._weights = torch.ones(m, k), torch.ones(copies, n, k)
        self._repeats = 1

    def measure(self, time_rounds: TimeRounds) -> _Found:
        """Time the model and the reference in turns; give the medians and that of the ratios."""
        references: list[float] = []

        def setup() -> None:
            self._ready()
            references.append(self._reference_seconds())

        gc.collect()
        gc.disable()
        try:
            with torch.inference_mode():
                rounds = self._plan(setup)
                references.clear()
                seconds = time_rounds(self._call, setup, rounds)
                setup()
        finally:
            gc.enable()
        # Beside each round stand the reference before it and the one after it.
        ratios = [2 * mine / (references[k] + references[k + 1]) for k, mine in enumerate(seconds)]
        median = statistics.median
        return _Found(median(ratios), median(seconds), median(references))

    def _plan(self, setup: Callable[[], None]) -> int:
        """Warm up, and return the number of rounds."""
        for _ in range(2):
            (seconds,) = _time_rounds(self._call, setup, 1)
            unit = self._reference_seconds()
        self._repeats = math.ceil(min(seconds, _LONGEST_REFERENCE) / unit)
        start = time.perf_counter()
        _time_rounds(self._call, setup, 1)
        rounds = self._settings.max_seconds / (time.perf_counter() - start)
        return max(math.ceil(rounds), self._settings.min_rounds)

    def _prefill(self) -> Any:
        return self._model(self._prompt, use_cache=True, logits_to_keep=1)

    def _ready(self) -> None:
        if self._decodes:
            self._output = self._prefill()

    def _call(self) -> None:
        if not self._decodes:
            self._prefill()
            return
        output = self._output
        for _ in range(self._tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)

    def _reference_seconds(self) -> float:
        """Return the seconds of one product of the reference."""
        copies = len(self._weights)
        start = time.perf_counter()
        for index in range(self._repeats):
            nn.functional.linear(self._x, self._weights[index % copies])
        return (time.perf_counter() - start) / self._repeats


def _time_rounds(
    call: Callable[[], object], setup: Callable[[], None], rounds: int
) -> Sequence[float]:
    seconds = []
    for _ in range(rounds):
        setup()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _perplexity(model: nn.Module, tokenizer: Any) -> float:
    return perplexity(model, tokenizer, texts.evaluation(), progress=False)


def _accuracy(
    evaluate: Evaluate, model: nn.Module, tokenizer: Any, time_rounds: TimeRounds
) -> _Found:
    values: list[Any] = []
    time_rounds(lambda: values.append(evaluate(model, tokenizer)), lambda: None, 1)
    try:
        value = float(values[0])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise SqCpuError(f"the evaluation gave {values[0]!r}, not a finite number")
    return _Found(value)


def _work(
    measured: Measured,
    evaluate: Evaluate | None,
    better: Better | None,
    prompt: int,
    tokens: int,
) -> str:
    if measured == "prefill":
        return f"prefill of {prompt} tokens"
    if measured == "decode":
        return f"decode of {tokens} tokens after {prompt}"
    if evaluate is None:
        return "perplexity of the shipped text"
    return f"own evaluation, {better} is better"


def _comparable(stored: Baseline | None, work: str, name: str, baselines: Baselines) -> Baseline:
    if stored is None:
        raise SqCpuError(
            f"no baseline of {name} for {baselines.machine} in {baselines.path}; {HOW_TO_WRITE}"
        )
    if stored.work != work:
        raise SqCpuError(
            f"the baseline of {name} in {baselines.path} is of other work ({stored.work}) than "
            f"this ({work}); {HOW_TO_WRITE}"
        )
    return stored


def _worse(found: float, stored: float, *, higher: bool) -> float:
    """Return by which fraction of the stored value the found one is worse; negative: better."""
    difference = stored - found if higher else found - stored
    if difference == 0:
        return 0.0
    return difference / abs(stored) if stored else math.copysign(math.inf, difference)


def _figure(baseline: Baseline) -> str:
    if baseline.seconds is None or baseline.reference_seconds is None:
        return f"{baseline.value:.5g}"
    return (
        f"{baseline.value:.3g} x the reference ({baseline.seconds * 1e3:.3g} ms beside "
        f"{baseline.reference_seconds * 1e3:.3g} ms)"
    )


def _config_digest(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SqCpuError(
            f"cannot read {path} ({error.strerror}); give the folder of a saved model"
        ) from error


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in ("sq_cpu", "torch", "transformers")}
    return versions | {"python": platform.python_version()}

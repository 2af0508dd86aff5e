"""Every model type of transformers through calibrate, quantize, save and load, in tiny.

Each type has a process of its own, forked from one that has only imported the libraries, and its
checkpoints are loaded in another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from architectures import Finding, examine, reload
from results import FOLDER, ResultFile, Row
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sq_cpu.progress import track

TABLE = FOLDER / "architectures.md"
FORK = multiprocessing.get_context("fork")  # of processes that import torch, and never call it


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection, gb: int) -> None:
    os.setsid()  # so that what it starts ends with it
    resource.setrlimit(resource.RLIMIT_AS, (gb << 30, gb << 30))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sender.send(work(*arguments))


def in_a_process(work: Callable[..., Any], *arguments: Any, seconds: float, gb: int) -> Any:
    """Return what `work` does; a text that says how the process ended if it did not return."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(work, arguments, sender, gb), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"it took more than {seconds:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def judge(model_type: str, seconds: float, gb: int) -> Row:
    """Examine a type in one process, and load what it saved in another."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="architectures-") as name:
        folder = Path(name)
        found = in_a_process(examine, model_type, folder, seconds=seconds, gb=gb)
        if isinstance(found, str):
            found = Finding(model_type, reason=found)
        row = asdict(found)
        saved = [each for each in row["variants"].values() if each.get("saved")]
        if saved:
            loaded = in_a_process(reload, folder, seconds=seconds, gb=gb)
            for variant, each in row["variants"].items():
                if not each.get("saved"):
                    continue
                wrong = loaded if isinstance(loaded, str) else loaded[variant]
                if wrong:
                    each["verdict"], each["reason"] = "failed", wrong
                    row["verdict"] = "failed"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main(
    types: Annotated[str, typer.Option(help="Model types, by comma; default: all.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Types at a time.")] = 1,
    seconds: Annotated[float, typer.Option(help="Limit for a process.")] = 120,
    memory: Annotated[int, typer.Option(help="Address space of a process, GB.")] = 12,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file of the results.")] = None,
    again: Annotated[
        str, typer.Option(help="Verdicts that are judged again where --json has them.")
    ] = "failed",
) -> None:
    """Judge model types; what the JSON file has is kept, but for those to judge again."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sections = {"transformers": transformers.__version__, "command": ""}
    results = ResultFile("architectures", out, resume=True, sections=sections)
    results.content["command"] = " ".join(["python", "bench/run_architectures.py", *sys.argv[1:]])
    wanted = types.split(",") if types else list(CONFIG_MAPPING_NAMES)
    drop = set(again.split(","))
    results.content["rows"] = [
        row for row in results.rows if not (row["type"] in wanted and (row["verdict"] in drop))
    ]
    known = {row["type"] for row in results.rows}
    todo = [name for name in wanted if name not in known]
    with ProcessPoolExecutor(jobs, mp_context=FORK) as pool:
        judged = pool.map(judge, todo, repeat(seconds), repeat(memory))
        for _, row in zip(track(todo, "judging"), judged, strict=True):
            results.add(row)
            if row["verdict"] == "failed":
                typer.echo(f"{row['type']}: {reason(row)}", err=True)


def reason(row: Row) -> str:
    """Return the first reason of a row that is not right."""
    parts = [f"{name}: {each['reason']}" for name, each in row["variants"].items() if each.get("reason")]
    return str(row["reason"]) or "; ".join(parts)


if __name__ == "__main__":
    typer.run(main)

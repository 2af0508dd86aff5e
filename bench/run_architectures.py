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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from architectures import VERDICTS, Finding, examine, reload
from results import FOLDER, ResultFile, Row
from subjects import NO_CLASS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sq_cpu.files import write_file
from sq_cpu.progress import track

TABLE = FOLDER / "architectures.md"
HANGS = 5  # times its CPU time is what a process may wait
FORK = multiprocessing.get_context("fork")  # of processes that import torch, and never call it


def _child(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    sender: Connection,
    seconds: int,
    gb: int,
) -> None:
    os.setsid()  # so that what it starts ends with it
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (gb << 30, gb << 30))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sender.send(work(*arguments))


def in_a_process(work: Callable[..., Any], *arguments: Any, seconds: int, gb: int) -> Any:
    """Return what `work` does; a text that says how the process ended if it did not return."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(work, arguments, sender, seconds, gb), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(HANGS * seconds):
            return f"it hung for {HANGS * seconds} s"
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return f"it took more than {seconds} s of CPU time"
        return f"its process ended with exit code {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def judge(model_type: str, seconds: int, gb: int) -> Row:
    """Examine a type in one process, and load what it saved in another."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="architectures-") as name:
        folder = Path(name)
        found = in_a_process(examine, model_type, folder, seconds=seconds, gb=gb)
        if isinstance(found, str):
            building = (folder / "stage").read_text() == "build"
            verdict = "not built" if building else "failed"
            found = Finding(model_type, verdict, reason=found)
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
    seconds: Annotated[int, typer.Option(help="CPU time of a process.")] = 60,
    memory: Annotated[int, typer.Option(help="Address space of a process, GB.")] = 12,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file of the results.")] = None,
    again: Annotated[
        str, typer.Option(help="Verdicts that are judged again where --json has them.")
    ] = "failed",
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Judge model types; what the JSON file has is kept, but for those to judge again."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sections = {"transformers": transformers.__version__, "command": ""}
    results = ResultFile("architectures", out, resume=True, sections=sections)
    results.content["command"] = " ".join(["python", "bench/run_architectures.py", *sys.argv[1:]])
    wanted = types.split(",") if types else list(CONFIG_MAPPING_NAMES)
    drop = set(again.split(","))
    results.content["rows"] = [
        row for row in results.rows if row["type"] not in wanted or row["verdict"] not in drop
    ]
    known = {row["type"] for row in results.rows}
    todo = [name for name in wanted if name not in known]
    with ProcessPoolExecutor(jobs, mp_context=FORK) as pool:
        judged = pool.map(judge, todo, repeat(seconds), repeat(memory))
        for _, row in zip(track(todo, "judging"), judged, strict=True):
            results.add(row)
            if row["verdict"] == "failed":
                typer.echo(f"{row['type']}: {reason(row)}", err=True)
    if table is not None:
        write_file(table, markdown(results.content))
    failed = sum(row["verdict"] == "failed" for row in results.rows)
    if failed:
        raise SystemExit(f"{failed} model types failed")


def reason(row: Row) -> str:
    """Return why a row is not right."""
    said: dict[str, list[str]] = {}
    for name, each in row["variants"].items():
        if text := each.get("reason"):
            said.setdefault(text, []).append(name)
    texts = [f"{', '.join(names)}: {text}" for text, names in said.items()]
    return "; ".join(texts) or str(row["reason"])


# The table.


def markdown(content: Mapping[str, Any]) -> str:
    """Return the results as a page: the numbers first, then a table a verdict."""
    rows = sorted(content["rows"], key=lambda row: str(row["type"]).lower())
    by = {verdict: [row for row in rows if row["verdict"] == verdict] for verdict in VERDICTS}
    classless = [row for row in by["not built"] if row["reason"] == NO_CLASS]
    unbuilt = [row for row in by["not built"] if row["reason"] != NO_CLASS]
    machine = content["machine"]
    built = len(rows) - len(by["not built"])
    models = len(rows) - len(classless)
    linears = sum(row["linears"] for row in rows)
    lines = [
        "# Every model type of transformers",
        "",
        f"transformers {content['transformers']}, torch {machine['torch']}, "
        f"sq_cpu {machine['sq_cpu']}, {machine['isa']} on {machine['cpu']}, "
        f"{content['date'][:10]}.",
        f"Command: `{content['command']}`. [How each is judged](../README.md#model-types).",
        "",
        "| | model types |",
        "|---|---|",
        f"| in transformers | {len(CONFIG_MAPPING_NAMES)} |",
        f"| judged | {len(rows)} |",
        f"| of these, with a model class of their own | {models} |",
        f"| built in tiny | {built} ({100 * built / max(1, models):.0f} % of those) |",
        f"| right | {len(by['right'])} |",
        f"| refused in one line, left as they were | {len(by['refused'])} |",
        f"| failed | {len(by['failed'])} |",
        "",
        f"The models that were built have {linears} linears.",
        "",
        "## Failed",
        "",
        *_reasons(by["failed"]),
        "",
        "## Refused",
        "",
        *_reasons(by["refused"]),
        "",
        "## Right",
        "",
        "int8: linears quantized under O1 / O3 / O3 with the output head. folds: groups of O3 "
        "folded / divided at run time. error: of the largest output, O1 / O3; inf: of another "
        "length, which fake quantization with nudged weights gives, too.",
        "",
        "| type | class | linears | int8 | kept in float (O3) | folds | error | generate |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, by["right"]),
        "",
        "## Not built",
        "",
        "What transformers itself does not make, run, save or load in tiny here, the first reason "
        "of each:",
        "",
        *_reasons(unbuilt),
        "",
        f"No class takes the configuration alone ({len(classless)}): "
        + ", ".join(f"`{row['type']}`" for row in classless)
        + ".",
        "",
    ]
    return "\n".join(lines)


def _reasons(rows: Sequence[Row]) -> list[str]:
    lines = [f"| {row['type']} | {row['kind']} | {_cell(reason(row))} |" for row in rows]
    return ["| type | class | reason |", "|---|---|---|", *lines] if lines else ["None."]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(row: Row) -> str:
    variants = row["variants"]
    o1, o3 = (variants[name] for name in ("O1", "O3"))

    def each(key: str, form: str = "{}", names: Iterable[str] = variants) -> str:
        values = (variants[name].get(key) for name in names)
        return " / ".join("refused" if v is None else form.format(v) for v in values)

    kept = "; ".join(f"{count} {why}" for why, count in o3.get("kept", {}).items())
    cells = [
        row["type"],
        row["kind"],
        str(row["linears"]),
        each("quantized"),
        _cell(kept),
        f"{o3.get('folded', 0)} / {o3.get('groups', 0) - o3.get('folded', 0)}",
        each("error", "{:.2g}", ("O1", "O3")),
        o1.get("generate", "-"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)

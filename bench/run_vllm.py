"""vLLM with our int8 kernel, beside vLLM's own and beside its float models.

scripts/vllm bench INT8 FLOAT            # in the environment that scripts/vllm makes

INT8 is a folder in the format compressed-tensors, FLOAT the model it was made of. Each variant is
an engine in a process of its own; they compute in turns, and those whose turn it is not are
stopped, so that none waits in a loop on the cores. Prefill: one prompt of random tokens. Decode:
the time of some tokens more than the first, of 1 and of 16 requests at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import machine
import psutil
import typer
from harness import Candidate, interleave
from results import Out, ResultFile
from rich.table import Table
from turns import random_prompts

import sq_cpu

OURS, THEIRS = "sq_cpu", "vLLM int8"
_MARK = "ANSWER "
_PLUGIN_KERNEL = "SqCpuInt8LinearKernel"
_PROMPT = 16  # tokens before the decoded ones


@dataclass(frozen=True)
class Variant:
    """An engine: a folder, the dtype it computes in around int8, and what its process is told."""

    folder: Path
    dtype: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """What is timed: a prompt's tokens for prefill, or the tokens that `rows` requests get."""

    kind: str
    rows: int
    tokens: int


class Engine:
    """vLLM in a process of its own, which is stopped but for its turns."""

    def __init__(self, variant: Variant, settings: Mapping[str, Any], log: Path) -> None:
        options = settings | {"model": str(variant.folder), "dtype": variant.dtype}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--engine", json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"} | variant.environment,
            )
        self._log = log
        started = self._answer()
        self.vocabulary: int = started["vocabulary"]
        self.vllm: str = started["vllm"]
        self.kernel = _kernel(log.read_text())
        self.suspend()

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Return the seconds of a call that gives each prompt so many tokens."""
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._stdin, flush=True)
        return float(self._answer()["seconds"])

    def suspend(self) -> None:
        """Stop all its processes."""
        for process in self._family():
            process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for process in self._family():
            process.resume()

    def close(self) -> None:
        """End them."""
        family = self._family()
        for process in reversed(family):
            process.kill()
        psutil.wait_procs(family, 30)

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _family(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return found
        lines = self._log.read_text().splitlines()
        said = next((line for line in reversed(lines) if "Error" in line), "no error in its log")
        raise sq_cpu.SqCpuError(f"an engine ended: {said} ({self._log})")


class Turn(Candidate):
    """An engine's turn at some work, with other prompts each time, the same for all engines."""

    def __init__(self, engine: Engine, work: Work) -> None:
        super().__init__(lambda _: None)
        self._engine, self._work, self._seed = engine, work, 0

    def time(self) -> float:
        """Do the work once; return its seconds."""
        work = self._work
        self._seed += 1
        length = work.tokens if work.kind == "prefill" else _PROMPT
        prompts = random_prompts(self._engine.vocabulary, work.rows, length, seed=self._seed)
        self._engine.resume()
        try:
            first = self._engine.seconds(prompts, 1)
            if work.kind == "prefill":
                return first
            return self._engine.seconds(prompts, work.tokens + 1) - first
        finally:
            self._engine.suspend()


def serve(options: dict[str, Any]) -> None:
    """Be an engine: read requests from stdin, and answer how long each took."""
    import time

    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(**options)

    def answer(**values: Any) -> None:
        print(_MARK + json.dumps(values), flush=True)

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    answer(vocabulary=vocabulary, vllm=vllm.__version__)
    for line in sys.stdin:
        request = json.loads(line)
        settings = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        start = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        answer(seconds=time.perf_counter() - start)


def _kernel(log: str) -> str:
    lines = [line for line in log.splitlines() if " for CompressedTensorsW8A8Int8" in line]
    return lines[0].rpartition("Selected ")[2].partition(" ")[0] if lines else ""


def main(
    int8: Annotated[Path, typer.Argument(help="In the format compressed-tensors, W8A8.")],
    floats: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.")],
    ours: Annotated[
        Path | None, typer.Option(help="The model as sq_cpu.save writes it by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the int8 variants around their linears.")] = (
        "bfloat16"
    ),
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prefill.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that are decoded.")] = 24,
    budget: Annotated[float, typer.Option(min=1, help="Seconds of a piece of work.")] = 60,
    logs: Annotated[Path, typer.Option(help="A folder for the engines' logs.")] = Path("build"),
    out: Out = None,
) -> None:
    """Print tokens a second of each variant, and vLLM's over those with our kernel."""
    print(machine.headline())
    variants = {
        OURS: Variant(int8, dtype, {}),
        THEIRS: Variant(int8, dtype, {"VLLM_DISABLED_KERNELS": _PLUGIN_KERNEL}),
        **({} if ours is None else {"sq_cpu folder": Variant(ours, dtype, {})}),
        "vLLM bf16": Variant(floats, "bfloat16", {}),
        "vLLM fp32": Variant(floats, "float32", {}),
    }
    settings = {
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "max_model_len": max(prompt, _PROMPT + steps) + 16,
        "max_num_seqs": 16,
    }
    engines: dict[str, Engine] = {}
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for name, variant in variants.items():
            log = logs / f"vllm-{name.replace(' ', '-')}.log"
            engines[name] = Engine(variant, settings, log)
        found = {name: engine.kernel for name, engine in engines.items()}
        if found[OURS] != _PLUGIN_KERNEL or found[THEIRS] in ("", _PLUGIN_KERNEL):
            raise sq_cpu.SqCpuError(f"the kernels that serve are {found}: not ours and vLLM's")
        command = f"scripts/vllm bench INT8 FLOAT --dtype {dtype} --prompt {prompt} --steps {steps}"
        command += (" --ours FOLDER" if ours else "") + (" --eager" if eager else "")
        sections = {
            "command": f"{command} --budget {budget:g}",
            "vllm": engines[OURS].vllm,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "kernels": found,
        }
        results = ResultFile("vllm", out, resume=False, sections=sections)
        table = Table("tokens a second", *(f"{name} (ratio)" for name in engines))
        for work in (
            Work("prefill", 1, prompt),
            Work("decode", 1, steps),
            Work("decode", 16, steps),
        ):
            turns = {name: Turn(engine, work) for name, engine in engines.items()}
            stats = interleave(turns, warm=False, budget=budget)
            done = work.rows * work.tokens
            row = asdict(work) | {
                "seconds": {name: asdict(stat) for name, stat in stats.items()},
                "tokens_per_second": {name: done / stat.median for name, stat in stats.items()},
                "ratio": {name: stat.median / stats[OURS].median for name, stat in stats.items()},
            }
            results.add(row)
            cells = (
                f"{row['tokens_per_second'][name]:.1f} ({row['ratio'][name]:.2f})" for name in stats
            )
            table.add_row(f"{work.kind}, {work.rows} x {work.tokens}", *cells)
        machine.make_console().print(table)
        print(f"wrote {results.path}")
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        serve(json.loads(sys.argv[2]))
    else:
        typer.run(main)

"""Attention over an int8 cache beside torch's scaled_dot_product_attention over a float one.

Each row is one layer of a real model's shape: a prompt of `new` tokens, or a decode step of `batch`
sequences with `context` tokens each. Ours includes the append of the new tokens; torch's key and
value tensors hold them already. The candidates take turns (harness.interleave).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import machine
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from harness import Candidate, interleave
from rich.table import Table
from torch import Tensor

from sq_cpu.kernels.paged_attention import (
    PAGE_TOKENS,
    AttentionOptions,
    BatchRows,
    KvPages,
    attend_reference,
)
from sq_cpu.progress import track

SHAPES = {  # heads, kv heads, head_dim
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-2-7B": (32, 32, 128),
    "Gemma-3-270M": (4, 1, 256),
}
_SEED = 0
_LARGEST_ERROR = 0.02  # root mean square, of results whose values are below 1 or about it


@dataclass(frozen=True)
class Work:
    """New tokens of each of `batch` sequences, with `context` tokens before them."""

    model: str
    batch: int
    context: int
    new: int

    def __str__(self) -> str:
        if self.context == 0:
            return f"prefill {self.new}"
        return f"decode {self.batch} at {self.context}"


def _works(prompts: list[int], batches: list[int], contexts: list[int]) -> list[Work]:
    works = []
    for model in SHAPES:
        works += [Work(model, 1, 0, prompt) for prompt in prompts]
        works += [Work(model, batch, context, 1) for batch in batches for context in contexts]
    return works


def measure(work: Work, threads: int, budget: float) -> dict[str, Any]:
    """Return microseconds a call of each candidate, medians."""
    heads, kv_heads, head_dim = SHAPES[work.model]
    generator = torch.Generator().manual_seed(_SEED)
    length = work.context + work.new
    q, k, v = (
        torch.randn(work.batch, count, n, head_dim, generator=generator)
        for count, n in ((work.new, heads), (length, kv_heads), (length, kv_heads))
    )
    pages = -(-length // PAGE_TOKENS)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(work.batch)]
    cache = KvPages(work.batch * pages, kv_heads, head_dim)
    lengths = [length] * work.batch
    cache.append(BatchRows(lengths, lengths, tables), k.flatten(0, 1), v.flatten(0, 1))
    rows = BatchRows([work.new] * work.batch, lengths, tables)
    options = AttentionOptions(scale=head_dim**-0.5)
    last = (slice(None), slice(work.context, None))

    def ours(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
        cache.append(rows, k, v)
        return cache.attend(rows, q, options)

    def torchs(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=work.context == 0, enable_gqa=heads != kv_heads
        )

    candidates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        flat = [x.flatten(0, 1).to(dtype) for x in (q, k[last], v[last])]
        candidates[f"int8 {name}"] = Candidate(partial(ours, *flat))
        across = [x.transpose(1, 2).contiguous().to(dtype) for x in (q, k, v)]
        candidates[f"torch {name}"] = Candidate(partial(torchs, *across))
    expected = attend_reference(q[0], k[0], v[0], options, work.context)
    error = ours(q.flatten(0, 1), k[last].flatten(0, 1), v[last].flatten(0, 1), 0)[: work.new]
    rms = float((error - expected).square().mean().sqrt())
    if not rms < _LARGEST_ERROR:
        raise AssertionError(f"{work.model}, {work}: the result is {rms:.3f} from plain attention")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            times = interleave(candidates, warm=True, budget=budget)
    finally:
        torch.set_num_threads(before)
    return {
        **asdict(work),
        "threads": threads,
        "rms_error": rms,
        "kv_bytes": cache.nbytes,
        **{name: stats.median * 1e6 for name, stats in times.items()},
    }


def main(
    models: Annotated[str, typer.Option(help="Names, of " + ", ".join(SHAPES))] = ",".join(SHAPES),
    prompts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "512,2048",
    batches: Annotated[str, typer.Option(help="Sequences of a decode step.")] = "1,16",
    contexts: Annotated[str, typer.Option(help="Tokens before a decode step.")] = "128,1024",
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "all",
    budget: Annotated[float, typer.Option(help="Seconds a row.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the microseconds of one layer's attention, int8 beside torch's."""
    works = [
        (work, count)
        for work in _works(*map(machine.numbers, (prompts, batches, contexts)))
        if work.model in models.split(",")
        for count in machine.numbers(threads)
    ]
    lines = [measure(*each, budget) for each in track(works, "measuring")]
    if as_json:
        typer.echo(json.dumps({"machine": machine.facts(), "rows": lines}, indent=1))
        return
    print(machine.headline())
    names = ("int8 bf16", "torch bf16", "int8 fp32", "torch fp32")
    table = Table("model", "work", "threads", title="us a layer; x: torch's time over ours")
    for name in (*names, "x bf16", "x fp32"):
        table.add_column(name, justify="right", no_wrap=True)
    for (work, count), line in zip(works, lines, strict=True):
        ratios = (line["torch bf16"] / line["int8 bf16"], line["torch fp32"] / line["int8 fp32"])
        cells = [f"{line[name]:.0f}" for name in names] + [f"{ratio:.2f}" for ratio in ratios]
        table.add_row(work.model, str(work), str(count), *cells)
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)

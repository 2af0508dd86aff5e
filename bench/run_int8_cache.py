"""Int8 attention and KV cache of one quantized model, beside float ones on the same int8 weights.

What they cost: the perplexity of a text, and the divergence of each token's distribution. Int8
linears turn any difference into other codes of their inputs. So the same is told of a cache in
bf16, and, with --no-int8-linears, of the same weights with inputs that are not quantized. What they
gain: the time of a prompt, and of each token that `generate` adds after a context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import machine
import torch
import typer
from divergence import Divergence
from harness import Candidate, interleave
from rich.table import Table
from torch import Tensor, nn

import sq_cpu
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.sources import load_source
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.progress import track

INT8, BF16, FLOAT = "int8", "bf16", "float"


def text_windows(tokenizer: Any, text: str, sizes: str) -> list[list[Tensor]]:
    """Cut the text as each word of "COUNTxTOKENS,..." says."""
    numbers = [map(int, word.split("x")) for word in filter(None, sizes.split(","))]
    return [
        token_windows(tokenizer, text, window=tokens, windows=count) for count, tokens in numbers
    ]


def switch(model: nn.Module, kind: str) -> None:
    """Have the model compute attention over keys and values in int8 or bf16, or in floats."""
    if kind == FLOAT:
        sq_cpu.use_int8_attention(model, enabled=False)
    else:
        sq_cpu.use_int8_attention(model, kv=kind)


def quantized(folder: str) -> tuple[Any, Any]:
    """Return a model with int8 linears as `sq-cpu quantize` makes them, and its tokenizer."""
    model, tokenizer = load_source(folder)
    batches = token_windows(tokenizer, sq_cpu.texts.calibration(), window=512, windows=16)
    sq_cpu.quantize(model, calibrate(model, batches), head="float")
    return model.eval(), tokenizer


def dequantize(model: nn.Module) -> None:
    """Give each int8 linear its weight in float: the same weight, for inputs as they are."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, sq_cpu.QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.has_bias)
            linear.weight.data = layer.weight_float()
            if layer.bias is not None:
                linear.bias.data = layer.bias.float()
            model.set_submodule(name, linear)


def accuracy(
    model: Any, windows: list[Tensor], kinds: Sequence[str] = (INT8, BF16)
) -> list[dict[str, Any]]:
    """Compare attention over a cache of these kinds with float attention.

    `windows` are ids [1, tokens]; one row for each kind.
    """
    found = {kind: Divergence() for kind in kinds}
    for ids in track(windows, "scoring"):
        logits = {}
        for kind in (FLOAT, *kinds):
            switch(model, kind)
            with torch.inference_mode():
                logits[kind] = model(ids).logits[0]
        for kind in kinds:
            found[kind].add(logits[FLOAT], logits[kind], ids[0])
    switch(model, FLOAT)
    return [{"cache": kind, **each.summary()} for kind, each in found.items()]


def speed(
    model: Any, ids: Tensor, rows: int, context: int, new: int, budget: float
) -> dict[str, Any]:
    """Time a prompt of `context` tokens, and each of `new` tokens after it, medians in seconds.

    `generate` is timed whole; its tokens' time is what it takes beyond the prompt and one token.
    """
    prompt = torch.stack([ids[i * context : (i + 1) * context] for i in range(rows)])

    def run(kind: str, tokens: int) -> Callable[[int], object]:
        def call(_: int) -> object:
            switch(model, kind)
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )

        return call

    times = interleave(
        {
            f"{kind} {tokens}": Candidate(run(kind, tokens))
            for tokens in (1, new + 1)
            for kind in (INT8, FLOAT)
        },
        warm=False,
        budget=budget,
    )
    found: dict[str, Any] = {"rows": rows, "context": context}
    for kind in (INT8, FLOAT):
        first, all_of_them = (times[f"{kind} {tokens}"].median for tokens in (1, new + 1))
        found[f"{kind} prompt"] = first
        found[f"{kind} token"] = (all_of_them - first) / new
    return found


def main(
    model: Annotated[str, typer.Argument(help="Folder of a causal LM in float.")],
    windows: Annotated[str, typer.Option(help="COUNTxTOKENS, several by commas.")] = "20x512",
    rows: Annotated[str, typer.Option(help="Sequences of a batch; empty: no timing.")] = "1",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "128,1024",
    new: Annotated[int, typer.Option(help="Tokens that are timed after it.")] = 32,
    budget: Annotated[float, typer.Option(help="Seconds for each speed.")] = 60.0,
    int8_linears: Annotated[
        bool, typer.Option(help="As they are, or with their int8 weights in float.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what int8 attention costs and gains."""
    subject, tokenizer = quantized(model)
    text = "\n".join(sq_cpu.texts.evaluation())
    if not int8_linears:
        dequantize(subject)
    scores = [
        {"linears": "int8" if int8_linears else "float", **row}
        for each in text_windows(tokenizer, text, windows)
        for row in accuracy(subject, each)
    ]
    speeds = []
    if rows and contexts:
        batches, lengths = machine.numbers(rows), machine.numbers(contexts)
        ids = torch.cat(token_windows(tokenizer, text, window=max(lengths), windows=max(batches)))
        speeds = [
            speed(subject, ids.flatten(), batch, context, new, budget)
            for batch in batches
            for context in lengths
        ]
    found = {"machine": machine.facts(), "accuracy": scores, "speed": speeds}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    print(machine.headline())
    for title, lines in (("accuracy", scores), ("seconds", speeds)):
        if lines:
            table = Table(*lines[0], title=title)
            for line in lines:
                table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in line.values()))
            machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)

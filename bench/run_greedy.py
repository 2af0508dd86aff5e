"""Whether int8 attention and the fused program choose the tokens that the model itself does.

The same int8 weights, greedily, three ways: unfused with float attention, unfused with int8
attention, and fused (whose attention is int8). Two texts are compared up to the first token that
differs; the gap is how much the reference preferred its own token there, in logits.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import machine
import torch
import typer
from rich.table import Table
from torch import Tensor

import sq_cpu
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.sources import load_source
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.progress import track

WAYS = ("float attention", "int8 attention", "fused")
PAIRS = ((WAYS[1], WAYS[2]), (WAYS[0], WAYS[1]), (WAYS[0], WAYS[2]))


def switch(model: Any, way: str) -> None:
    """Have the model run one of WAYS; WAYS[0] is how it came."""
    sq_cpu.fuse(model, enabled=way == WAYS[2])
    sq_cpu.use_int8_attention(model, enabled=way == WAYS[1])


def continued(model: Any, prompt: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Return the tokens [new] that the model adds to a prompt [1, tokens], and their logits."""
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences[0, prompt.shape[1] :], torch.cat(found.logits).float()


def compare(model: Any, prompts: list[Tensor], new: int) -> list[dict[str, Any]]:
    """Compare the texts of the ways, pair by pair; the model is left as it came.

    Returns
    -------
    for each pair: `equal` texts, the largest `gap` of the others, and the root mean square
    `noise` of the difference of two logits (each beside its row's mean) before they part
    """
    made: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for way in WAYS:
        switch(model, way)
        made[way] = [continued(model, prompt, new) for prompt in track(prompts, way)]
    switch(model, WAYS[0])
    rows = []
    for reference, subject in PAIRS:
        gaps, errors, compared = [], [], 0
        for (ids, logits), (other_ids, other) in zip(made[reference], made[subject], strict=True):
            differ = (ids != other_ids).nonzero().flatten().tolist()
            end = differ[0] + 1 if differ else new  # the logits there have the same prefix
            error = logits[:end] - other[:end]
            errors.append((error - error.mean(dim=1, keepdim=True)).square().mean(dim=1))
            compared += differ[0] if differ else new
            if differ:
                row = logits[differ[0]]
                gaps.append(float(row[ids[differ[0]]] - row[other_ids[differ[0]]]))
        rows.append(
            {
                "reference": reference,
                "subject": subject,
                "prompts": len(prompts),
                "tokens": new,
                "equal": len(prompts) - len(gaps),
                "equal_tokens": compared,
                "largest_gap": max(gaps, default=0.0),
                "gaps": gaps,
                "noise": float(torch.cat(errors).mean().sqrt()),
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Argument(help="Folder of a causal LM in float.")],
    prompts: Annotated[int, typer.Option(help="How many, of different documents.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 32,
    tokens: Annotated[int, typer.Option(help="That are added to it.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print how far greedy texts are the same."""
    subject, tokenizer = load_source(model)
    batches = token_windows(tokenizer, sq_cpu.texts.calibration(), window=512, windows=16)
    sq_cpu.quantize(subject, calibrate(subject, batches), head="int8")
    texts = token_windows(tokenizer, sq_cpu.texts.evaluation(), window=length, windows=prompts)
    rows = compare(subject.eval(), texts, tokens)
    if as_json:
        typer.echo(json.dumps({"machine": machine.facts(), "greedy": rows}, indent=1))
        return
    print(machine.headline())
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)

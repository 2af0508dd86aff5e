"""What an int8 head costs a quantized model, beside the float head on the same int8 linears.

Where the embedding is tied to the head, it is int8 as well. The two effects are measured one by
one and together, as the divergence of each token's distribution and the perplexity of a text.
"""

from __future__ import annotations

import copy
import json
from typing import Annotated, Any

import machine
import torch
import typer
from divergence import Divergence
from rich.table import Table
from run_int8_cache import text_windows
from torch import Tensor

import sq_cpu
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.sources import load_source
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.progress import track


def quantized(folder: str, scheme: str) -> tuple[Any, Any, Any]:
    """Return a model with int8 linears and a float head, the same with an int8 one; a tokenizer."""
    model, tokenizer = load_source(folder)
    batches = token_windows(tokenizer, sq_cpu.texts.calibration(), window=512, windows=16)
    calibration = calibrate(model, batches)
    other = copy.deepcopy(model)
    for each, head in ((model, "float"), (other, "int8")):
        sq_cpu.quantize(each, calibration, scheme=scheme, head=head)
        each.eval()
    return model, other, tokenizer


def accuracy(of_floats: Any, of_int8: Any, windows: list[Tensor]) -> list[dict[str, Any]]:
    """Compare int8 parts with float ones on windows of ids [1, tokens]; the models are as given."""
    heads = [each.get_output_embeddings() for each in (of_floats, of_int8)]
    embeddings = [each.get_input_embeddings() for each in (of_floats, of_int8)]
    tied = type(embeddings[0]) is not type(embeddings[1])
    kinds = {"head": (0, 1)} | ({"embedding": (1, 0), "both": (1, 1)} if tied else {})
    found = {kind: Divergence() for kind in kinds}

    def logits(ids: Tensor, embedding: int, head: int) -> Tensor:
        of_int8.set_input_embeddings(embeddings[embedding])
        of_int8.set_output_embeddings(heads[head])
        with torch.inference_mode():
            result: Tensor = of_int8(ids).logits[0]
        return result

    try:
        for ids in track(windows, "scoring"):
            reference = logits(ids, 0, 0)
            for kind, which in kinds.items():
                found[kind].add(reference, logits(ids, *which), ids[0])
    finally:
        of_int8.set_input_embeddings(embeddings[1])
        of_int8.set_output_embeddings(heads[1])
    return [{"int8": kind, **each.summary()} for kind, each in found.items()]


def main(
    model: Annotated[str, typer.Argument(help="Folder of a causal LM in float.")],
    windows: Annotated[str, typer.Option(help="COUNTxTOKENS, several by commas.")] = "20x512",
    scheme: Annotated[str, typer.Option(help="Of the linears: O1, O2 or O3.")] = "O1",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what an int8 head costs."""
    of_floats, of_int8, tokenizer = quantized(model, scheme)
    text = "\n".join(sq_cpu.texts.evaluation())
    rows = [
        row
        for each in text_windows(tokenizer, text, windows)
        for row in accuracy(of_floats, of_int8, each)
    ]
    if as_json:
        found = {"machine": machine.facts(), "scheme": scheme, "accuracy": rows}
        typer.echo(json.dumps(found, indent=1))
        return
    print(machine.headline())
    table = Table(*rows[0], title="int8 beside float")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)

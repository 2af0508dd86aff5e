"""One pass over sample text: the range of every input channel of every linear.

The ranges serve every later choice: a smoothing plan divides channel j by s_j > 0, so the range
after smoothing is the range here / s, exactly, and no second pass is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.calibration.gradients import differentiating, sampled_loss
from sq_cpu.calibration.lengths import check_takes_tokens, checked_bucket, checked_lengths
from sq_cpu.calibration.observer import InputRanges
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import make_prefix
from sq_cpu.inference.requests import integers
from sq_cpu.models.calls import Batch, Example, called, copied, evaluating, example_of, model_inputs
from sq_cpu.models.checks import check_model, check_weights, checking_ids
from sq_cpu.models.linears import check_ignore, head_of, linearized, quantizable_linears
from sq_cpu.models.padding import padding_of
from sq_cpu.models.unchanged import unchanged
from sq_cpu.parsing import check_whole

__all__ = [
    "SAMPLED_ROWS",
    "TUNING_ROWS",
    "Calibration",
    "Example",
    "calibrate",
    "no_text_leads",
]

SAMPLED_ROWS = 64
TUNING_ROWS = 384
"""Rows a linear, with gradients, that suffice for `tune`."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    rows: int = SAMPLED_ROWS,
    gradient_rows: int = 0,
    prefix: Sequence[int] = (),
    lengths: Sequence[int] = (),
    progress: bool | None = None,
) -> Calibration:
    """Run `model` over `batches` and record the input range of every linear not ignored.

    Beside the range, each linear keeps a uniform sample of at most `rows` input rows, and of each
    fold (every fourth batch) rows / 4, rounded up, that reach farthest (`Calibration.peaks`): about
    rows * in_features elements each. With `gradient_rows` each batch is also run backward. Each
    linear then keeps at most so many rows together with the gradient of the model's loss with
    respect to its output, which tells `tune` what an error there costs. Rows where it would cost
    most are likelier to be kept, and weights make up for that. They are gradient_rows *
    (in_features + out_features) elements. A batch takes three times the time, and the memory of its
    graph and of a copy of every linear's input and output. Linears that the model runs without
    gradients keep none.

    Linears whose weight the model's own code reads or changes are found, too
    (`Calibration.in_float`); they have no ranges. The head of a model of transformers is observed
    also where `ignore` has it ("lm_head"), without gradients: `Calibration.head`.

    `prefix` are the first tokens of texts (`leading_ids`) whose keys and values are to be those of
    the float model. Where a text begins with them they are not counted, as if they were padding,
    and `quantize` of this calibration gives the model a `Prefix`.

    With `lengths`, in tokens and ascending, as (128, 512, 2048), the calibration has all but the
    gradients a second time by length: `Calibration.for_length`. A batch belongs to the least length
    that its longest sequence, without padding, does not exceed. Of each length that occurs there
    are 2 * rows * in_features elements a linear more.

    A batch is a tensor (the model's one positional argument), a tuple or list (positional
    arguments) or a mapping (keyword arguments). Positions that are padding by the `attention_mask`
    of their sequence (see `padding_of`) are not counted. The model runs in evaluation mode without
    gradients and is left as it was (see `unchanged`). `progress=None` shows a bar when stderr is a
    terminal.

    Raises `SqCpuError` when there is no batch, or a batch is empty, of another type or longer than
    the model's context, when the model's own forward fails, when an activation or gradient is NaN
    or infinite, when the model has no linear, for `rows` or `gradient_rows` that are no number of
    rows, for `lengths` that do not ascend or that a batch exceeds, for an entry of `ignore` that
    matches none, for a `prefix` that the model cannot have (see
    `make_prefix`) or that begins no text of the batches, and for what `check_model` and
    `check_weights` refuse: a model that is compiled, quantized, or not in this machine's memory as
    fp32, bf16 or fp16.
    """
    check_model(model)
    ids = tuple(integers(prefix, "prefix"))
    if ids:
        make_prefix(model, ids)  # which tells whether there can be one
    lengths = checked_lengths(lengths)
    if lengths:
        check_takes_tokens(model)
    with linearized(model):
        return _calibrate(model, batches, ignore, rows, gradient_rows, ids, lengths, progress)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    ignore: tuple[str, ...],
    rows: int,
    gradient_rows: int,
    prefix: tuple[int, ...],
    lengths: tuple[int, ...],
    progress: bool | None,
) -> Calibration:
    check_whole(0, rows=rows, gradient_rows=gradient_rows)
    check_ignore(model, ignore)
    linears = quantizable_linears(model, ignore)
    if not linears:
        raise SqCpuError(f"nothing to calibrate: no Linear in the model beside {ignore}")
    check_weights(linears)
    head = {name: each for name, each in _head(model).items() if name not in linears}
    ranges = InputRanges(model, linears | head, rows, gradient_rows)
    example: Example | None = None
    examples: dict[int, Example] = {}
    leads = False
    labels = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(checking_ids(model))
        stack.enter_context(ranges.watching())
        if gradient_rows:
            stack.enter_context(differentiating(model, linears, ranges.observe_gradients))
        for args, kwargs in model_inputs(model, batches, "calibration", "calibrating", progress):
            padding = padding_of(model, args, kwargs)
            length = checked_bucket(args, kwargs, lengths) if lengths else None
            if example is None or (length is not None and length not in examples):
                found = example_of(args, kwargs, padding)
                example = example or found
                if found is not None and length is not None:
                    examples.setdefault(length, copied(found))  # a file shares no memory
            counted = padding.with_prefix(prefix)
            leads = leads or counted is not padding
            with ranges.batch(counted, length):
                outputs = called(model, (args, kwargs), f"calibration batch {ranges.batches}")
                if gradient_rows:
                    torch.autograd.backward(sampled_loss(outputs, counted, labels))
    if prefix and not leads:
        raise no_text_leads(prefix)

    def whole(calibration: Calibration) -> Calibration:
        calibration = replace(calibration, prefix=prefix)
        return calibration.with_head_apart(*head) if head else calibration

    parts = {length: whole(part) for length, part in ranges.by_length(examples).items()}
    return replace(whole(ranges.calibration(example)), lengths=lengths, by_length=parts)


def no_text_leads(prefix: Sequence[int]) -> SqCpuError:
    """Return the error for batches of which no text begins with a prefix."""
    return SqCpuError(
        f"no text of the batches begins with the prefix {[*prefix]}: give texts that do, as "
        "those of a tokenizer that puts it in front (lead_with)"
    )


def _head(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the model's head by full name, if it is a linear that could be int8."""
    head = head_of(model)
    found = {n: m for n, m in model.named_modules() if m is head and type(m) is nn.Linear}
    try:
        check_weights(found)
    except SqCpuError:  # ignored, it may be anything
        return {}
    return found

"""The work on one checkpoint: quantize one block after another, and write each when it is done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sq_cpu.calibration.calibrate import SAMPLED_ROWS, Calibration, no_text_leads
from sq_cpu.calibration.observer import InputRanges
from sq_cpu.calibration.weight_uses import WeightUses
from sq_cpu.checkpoint.card import write_card
from sq_cpu.checkpoint.config import sha256
from sq_cpu.checkpoint.entries import (
    float_entries,
    int8_layers,
    layer_tensors,
    put_tensor,
    tie,
    ties_of,
)
from sq_cpu.checkpoint.folder import Staging
from sq_cpu.checkpoint.likeness import check_stored
from sq_cpu.checkpoint.save import write_companions, write_index, write_settings, write_shard
from sq_cpu.checkpoint.stored import StoredTensors
from sq_cpu.errors import SqCpuError
from sq_cpu.models.block_chain import BlockCalls, BlockChain
from sq_cpu.models.calls import Example, example_of
from sq_cpu.models.groups import is_down, smoothing_groups
from sq_cpu.models.linears import (
    check_ignore,
    float_linears,
    is_ignored,
    linearize,
    linearized,
    quantizable_linears,
)
from sq_cpu.models.padding import Padding, padding_of
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.progress import track
from sq_cpu.quantization.checks import check_layers, check_quantizes, check_reached
from sq_cpu.quantization.head import find_head
from sq_cpu.quantization.quantize import quantize_part
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.quantization.record import QuantizationRecord, QuantizedPart
from sq_cpu.smoothing.plan import SmoothPlan, check_rotates
from sq_cpu.smoothing.plan_checks import check_groups
from sq_cpu.smoothing.proof import Run, running
from sq_cpu.streaming.loader import Loader
from sq_cpu.streaming.memory import page_out, trim
from sq_cpu.streaming.prefix import StreamedPrefix
from sq_cpu.streaming.tensors import WHOLE, copy_tensors
from sq_cpu.streaming.work_folder import OUTER, Part, State

__all__ = ["Stream"]


class Stream:
    """The work on one checkpoint."""

    def __init__(
        self,
        loader: Loader,
        chain: BlockChain,
        staging: Staging,
        state: State,
        recipe: Recipe,
    ) -> None:
        self.loader = loader
        self.model = model = loader.model
        self.chain = chain
        self.blocks = blocks = chain.names
        self.staging = staging
        self.folder, self.work = staging.folder, staging.work
        self.state = state
        self.recipe = recipe
        self.prefix: StreamedPrefix | None = None
        self.scheme = scheme = recipe.scheme
        self.plan = plan = recipe.plan
        tie(model, ties_of(model))  # as far as is known before the weights are
        with linearized(model):
            check_ignore(model, scheme.ignore)
            head = find_head(model, scheme.ignore) if recipe.head == "int8" else None
            self.head = None if head is None or head.in_float else head
            but = None if self.head is None else self.head.name
            linears = quantizable_linears(model, scheme.ignore, but=but)
            check_layers(linears, plan)
            self.in_float = {} if plan is None else plan.in_float
            self.kept = float_linears(model, scheme.ignore, but=but) | self.in_float
            if head is not None and head.in_float:
                self.kept[head.name] = head.in_float
            self.groups = smoothing_groups(model)
            downs = {n for group in self.groups if is_down(model, group) for n in group.consumers}
        self.names = [name for name in linears if name not in self.in_float]
        check_quantizes(self.names, self.kept)
        check_rotates(recipe.hadamard, downs.intersection(self.names))
        if plan is not None:
            check_groups(plan, self.groups)
        stacks = tuple(f"{block}." for block in blocks)
        self.batches = 0
        self.outer = [name for name in self.names if not name.startswith(stacks)]
        self.outer_float_bytes = sum(
            parameter.nbytes
            for name in self.in_float
            if not name.startswith(stacks)
            for parameter in linears[name].parameters()
        )

    def run(
        self,
        batches: Sequence[Example],
        tokenizer: Any,
        progress: bool | None,
        say_without: Callable[[str], object] | None = None,
    ) -> QuantizationRecord:
        """Do what is not done yet; afterwards the folder is complete.

        `say_without` is told why a model has no prefix after all; None: that is an error.
        """
        state = self.state
        self.batches = len(batches)
        write_companions(self.model, tokenizer, self.folder)  # also makes the files' mode
        with ExitStack() as files:
            self.open_outside(files)
            # The last may be the example that folds are proven with.
            calls: list[BlockCalls] = []
            hidden: list[Tensor] = []
            if batches:
                calls = self.capture([*batches, *self.example(batches)], say_without)
                hidden = [call.take() for call in calls]
                if state.blocks:
                    carried = state.carried()
                    hidden, of_prefix = carried[: len(calls)], carried[len(calls) :]
                    if self.prefix is not None:
                        self.prefix.hidden = of_prefix
            for index in track(range(state.blocks, len(self.blocks)), "quantizing", progress):
                part = self.block(index, calls, hidden)
                state.finish(part, [*hidden, *(self.prefix.hidden if self.prefix else ())])
            parts = list(state.parts)
            if self.outer:
                parts.append(self.quantize_outer(calls, hidden))
                state.parts.append(parts[-1])
        return self.seal(parts, tokenizer)

    def file(self, index: int) -> Path:
        """Return where a part goes: 0 is what is outside of the blocks, then come these."""
        total = len(self.blocks) + 1 + bool(self.outer)
        name = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
        return self.folder / name

    def open_outside(self, files: ExitStack) -> None:
        """Map what is outside of the blocks into the model, from a copy of the right dtype."""
        found, ties = self.loader.outside(self.blocks)
        dtypes = {
            name: (tensor, self.loader.layout.dtype_of(name)) for name, tensor in found.items()
        }
        # A linear that becomes int8 is in a file of its own, unless an embedding shares it that
        # stays in float.
        own = {
            name
            for name in found
            if name.rpartition(".")[0] in (*self.outer, *self.embeddings)
            and (name not in ties.values() or name in self.weights_of_head)
        }
        final, floats = self.file(0), self.work / OUTER
        if not self.state.parts:
            copy_tensors(final, {name: t for name, t in dtypes.items() if name not in own})
            copy_tensors(floats, {name: t for name, t in dtypes.items() if name in own})
            self.state.finish(Part(final.name, sha256(final)), [])
        for path in (final, floats):
            stored = files.enter_context(StoredTensors(path.parent, [path.name]))
            for name in stored.headers:
                put_tensor(self.model, name, stored.read(name))
        tie(self.model, ties)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The embeddings that read the head's weight where that becomes int8."""
        return () if self.head is None else self.head.embeddings

    @property
    def weights_of_head(self) -> set[str]:
        """The names of the head's weight."""
        names = () if self.head is None else (self.head.name, *self.head.embeddings)
        return {f"{name}.weight" for name in names}

    def example(self, batches: Sequence[Example]) -> list[Example]:
        """Return the example that `calibrate` would take, if any."""
        found = (example_of(*batch, padding_of(self.model, *batch)) for batch in batches)
        return list(islice((example for example in found if example is not None), 1))

    def capture(
        self, batches: Sequence[Example], say_without: Callable[[str], object] | None
    ) -> list[BlockCalls]:
        """Run what precedes the blocks; return each batch's calls of them."""
        if not self.state.blocks:
            with self.loaded(0):
                self.state.outputs = self.chain.probe(batches[-1])
                try:
                    if self.state.prefix:
                        StreamedPrefix(self.chain, self.state.prefix).check_first()
                except SqCpuError as error:
                    if say_without is None:
                        raise
                    self.state.prefix = ()
                    say_without(str(error))
        self.chain.outputs = self.state.outputs
        if self.state.prefix:
            self.prefix = StreamedPrefix(self.chain, self.state.prefix)
        stacks = tuple(f"{block}." for block in self.blocks)
        linears = quantizable_linears(self.model)
        uses = WeightUses(self.model, {n: x for n, x in linears.items() if n.startswith(stacks)})
        with uses:
            calls = self.chain.capture(batches)
        if self.prefix is not None:
            leads = False
            for call in calls[: self.batches]:
                counted = call.padding.with_prefix(self.state.prefix)
                leads = leads or counted is not call.padding
                call.padding = counted
            if not leads:
                raise no_text_leads(self.state.prefix)
        if found := uses.found():
            name, why = min(found.items())
            raise SqCpuError(f"{name}: {why} outside of its block; {WHOLE}")
        # A token's row of an embedding brings its neighbours in: up to all of it.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:
                page_out(tensor)
        return calls

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Have a block's float weights in the model, which then has a bare one again."""
        name = self.blocks[index]
        parent, _, key = name.rpartition(".")
        block = self.model.get_submodule(name)
        bare = copy.deepcopy(block)
        trim()
        try:
            self.loader.load(name)
            linearize(block)
            yield block
        finally:
            setattr(self.model.get_submodule(parent), key, bare)

    def block(self, index: int, calls: Sequence[BlockCalls], hidden: list[Tensor]) -> Part:
        """Quantize and write a block; `hidden` becomes what its float weights make of it."""
        name = self.blocks[index]
        with self.loaded(index) as block:
            linears = {
                path: linear
                for path, linear in quantizable_linears(block).items()
                if not is_ignored(self.model, f"{name}.{path}", self.scheme.ignore)
            }
            linears = {f"{name}.{path}": linear for path, linear in linears.items()}

            def call(batch: int, states: Tensor) -> Tensor:
                return self.chain.run(index, calls[batch], states)

            calibration, run = None, None
            if calls:
                ranges = InputRanges(self.model, linears, SAMPLED_ROWS)
                with ranges.watching():
                    for batch in range(self.batches):
                        padding = self.chain.padding(index, calls[batch], hidden[batch])
                        with ranges.batch(padding):
                            hidden[batch] = call(batch, hidden[batch])
                calibration = ranges.calibration()
            padding = Padding()
            if len(calls) > self.batches:
                padding = self.chain.padding(index, calls[-1], hidden[-1])
                example, hidden[-1] = hidden[-1], call(-1, hidden[-1])

                def run() -> list[Tensor]:
                    return [call(-1, example)]

            def folded() -> dict[str, Tensor]:
                if self.prefix is None:
                    return {}
                entries = self.prefix.block(index)
                if index < len(self.blocks) - 1 or self.outer:
                    return entries
                (states, _) = self.prefix.hidden
                with self.chain.replaced(lambda *_: states):
                    return entries | self.prefix.last_hidden()

            return self.part(index + 1, [name], linears, calibration, run, padding, folded)

    def quantize_outer(self, calls: Sequence[BlockCalls], hidden: Sequence[Tensor]) -> Part:
        """Quantize the linears outside of the blocks, in a model whose blocks hand on `hidden`."""
        linearize(self.model)
        linears = {name: self.model.get_submodule(name) for name in self.outer}
        current = 0
        of_prefix: Tensor | None = None

        def take(index: int, before: Tensor, *_: Any) -> Tensor:
            if index < len(self.blocks) - 1:
                return before
            return hidden[current] if of_prefix is None else of_prefix

        def folded() -> dict[str, Tensor]:
            nonlocal of_prefix
            if self.prefix is None:
                return {}
            of_prefix, _ = self.prefix.hidden
            return self.prefix.last_hidden()

        def padding_of_call() -> Padding:
            return self.chain.padding(len(self.blocks) - 1, calls[current], hidden[current])

        calibration, run, padding = None, None, Padding()
        with self.chain.replaced(take):
            if calls:
                ranges = InputRanges(self.model, linears, SAMPLED_ROWS)
                with ranges.watching():
                    for current in range(self.batches):
                        args, kwargs = calls[current].arguments
                        with ranges.batch(padding_of_call()):
                            self.model(*args, **kwargs)
                calibration = ranges.calibration()
            if len(calls) > self.batches:
                current = len(calls) - 1
                run, padding = running(self.model, calls[-1].arguments), padding_of_call()
            index = len(self.blocks) + 1
            modules = (*self.outer, *self.embeddings)
            return self.part(index, modules, linears, calibration, run, padding, folded)

    def part(
        self,
        index: int,
        modules: Sequence[str],
        linears: dict[str, nn.Linear],
        calibration: Calibration | None,
        run: Run | None,
        padding: Padding,
        folded: Callable[[], dict[str, Tensor]],
    ) -> Part:
        """Quantize linears and write the modules, by full name, that are or hold them.

        `folded` makes what else is to be written, of the linears when they are folded.
        """
        entries: dict[str, Tensor] = {}
        names = set(linears)
        before = sum(p.nbytes for linear in linears.values() for p in linear.parameters())
        for name in names.intersection(self.in_float):
            del linears[name]
        groups = [group for group in self.groups if not names.isdisjoint(group.consumers)]
        recipe = self.recipe
        if self.plan is not None:
            own = {group.name for group in groups}
            plan = replace(
                self.plan,
                groups=tuple(group for group in self.plan.groups if group.name in own),
                layers=tuple(layer for layer in self.plan.layers if layer.name in names),
            )
            recipe = replace(recipe, plan=plan)
        done = quantize_part(
            self.model,
            linears,
            calibration,
            recipe,
            groups,
            run,
            padding,
            lambda: entries.update(folded()),
        )
        after = 0
        for name in names:
            for module in self.model.get_submodule(name).modules():
                if isinstance(module, QuantLinear):
                    after += module.nbytes
                else:  # kept in float, or a DecomposedLinear's channels that are
                    held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                    after += sum(each.nbytes for each in held)
        for name in modules:
            module = self.model.get_submodule(name)
            entries |= float_entries(self.model, module, name)
            for stored, layer in int8_layers(module, name):
                entries |= layer_tensors(layer, stored)
        path = self.file(index)
        return Part(
            file=path.name,
            sha256=write_shard(path, entries),
            plan=None if done.plan is None else done.plan.to_dict(),
            layers=done.layers,
            smoothed=done.smoothed,
            decomposed=dict(done.decomposed),
            hadamard=dict(done.hadamard),
            kept=dict(done.kept),
            dtypes=dict(done.dtypes),
            embeddings=dict(done.embeddings),
            misfits=dict(done.misfits),
            tokens=calibration.tokens if calibration else 0,
            float_bytes=before,
            int8_bytes=after,
        )

    def seal(self, parts: Sequence[Part], tokenizer: Any) -> QuantizationRecord:
        """Write what describes the finished files."""
        folder = self.folder
        layers = {name for part in parts for name in part.layers}
        check_reached(bool(layers) and (not self.recipe.needs_calibration or self.state.tokens > 0))
        smoothed = {name for part in parts for name in part.smoothed}
        plans = [SmoothPlan.from_dict(part.plan) for part in parts if part.plan is not None]
        groups = {group.name: group for plan in plans for group in plan.groups}
        if self.plan is None:
            head = "" if self.head is None else self.head.name  # planned last
            order = [group.name for group in self.groups if head not in group.consumers]
        else:
            order = [group.name for group in self.plan.groups]
        ordered = [groups.pop(name) for name in order if name in groups]
        planned = self.plan or SmoothPlan(())
        own = [layer for plan in plans for layer in plan.layers if layer not in planned.layers]
        planned = replace(
            planned, groups=(*ordered, *groups.values()), layers=(*planned.layers, *own)
        )
        done = QuantizedPart(
            plan=planned if plans else None,
            layers=tuple(name for name in self.names if name in layers),
            smoothed=tuple(name for name in self.names if name in smoothed),
            decomposed={name: n for part in parts for name, n in part.decomposed.items()},
            hadamard={name: n for part in parts for name, n in part.hadamard.items()},
            kept={name: why for part in parts for name, why in part.kept.items()},
            dtypes={name: dtype for part in parts for name, dtype in part.dtypes.items()},
            embeddings={name: head for part in parts for name, head in part.embeddings.items()},
            misfits={name: share for part in parts for name, share in part.misfits.items()},
        )
        record = replace(done.record(self.scheme, self.kept), prefix=self.state.prefix)
        with StoredTensors(folder, [part.file for part in parts]) as stored:
            headers = stored.headers
            file_of = {name: stored.path(name).name for name in headers}
        size = sum(header.nbytes for header in headers.values())
        write_index(folder, file_of, {"total_size": size})
        # Again: a quantized head is no longer tied.
        write_companions(self.model, tokenizer, folder)
        check_stored(record, headers, folder, f"load could not rebuild {type(self.model).__name__}")
        write_card(folder, self.staging.target, self.model, record)
        write_settings(self.staging, record, {part.file: part.sha256 for part in parts})
        return record

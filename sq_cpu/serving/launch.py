"""A checkpoint becomes a server: the order in which its parts are made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sq_cpu.checkpoint.sources import check_causal, is_checkpoint, load_tokenizer
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.fusing import FusedDecoder, fuse, fused_of
from sq_cpu.inference.generation import stop_tokens_of
from sq_cpu.inference.pages import pages_of
from sq_cpu.inference.scheduler import Scheduler
from sq_cpu.kernels.paged_attention import PAGE_TOKENS
from sq_cpu.kernels.runtime import available_memory
from sq_cpu.serving.app import make_app
from sq_cpu.serving.engine import Engine
from sq_cpu.serving.prompts import Prompts
from sq_cpu.serving.renderer import Renderer
from sq_cpu.serving.server import listening, run
from sq_cpu.serving.service import Limits, Service
from sq_cpu.serving.watch import Watch

__all__ = ["Settings", "default_threads", "serve"]

_USUAL = 4096  # tokens of a sequence


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs.

    Attributes
    ----------
    name : of the model, for clients
    host, port : where it listens; port 0: any that is free
    key : that clients give; None: none
    sequences : that run at once
    queue : sequences that may wait
    rows : tokens of a step
    cache_bytes : for keys and values; None: for all sequences, of up to 4096 tokens each, but at
        most half of the memory that is free once the model is there
    threads : of the model
    """

    name: str
    host: str
    port: int
    key: str | None
    sequences: int
    queue: int
    rows: int
    cache_bytes: int | None
    threads: int


def default_threads() -> int:
    """Return how many threads the model gets: from four on, one is left for HTTP."""
    threads = torch.get_num_threads()
    return threads - 1 if threads >= 4 and "OMP_NUM_THREADS" not in os.environ else threads


def serve(
    folder: Path,
    settings: Settings,
    *,
    load: Callable[[], tuple[nn.Module, Any]],
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> int:
    """Serve a checkpoint until a signal ends it; returns the exit code, as `server.run`.

    Parameters
    ----------
    folder : that `sq_cpu.save` wrote
    load : gives its model and tokenizer
    trust_remote_code : whether code of the tokenizer's runs
    say : told what happens, in a line

    Raises
    ------
    SqCpuError
        For a folder that is no checkpoint, a model that cannot be fused, too small a cache, and an
        address that cannot be had.
    """
    if not is_checkpoint(folder):
        raise SqCpuError(f"{folder} is no int8 checkpoint; make one with sq-cpu quantize")
    check_causal(folder)
    with ExitStack() as stack:
        # The fork comes first: it copies neither the model nor the socket, which would outlive us.
        renderer = Renderer(load_tokenizer(folder, f"checkpoint {folder}", trust_remote_code))
        stack.callback(renderer.close)
        bound = stack.enter_context(listening(settings.host, settings.port))
        model, tokenizer = load()
        engine = Engine(lambda: _scheduler(model, settings))
        stack.callback(engine.stop)
        prompts = Prompts(tokenizer, renderer)
        stack.callback(prompts.close)

        host, port = bound.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        pages = engine.scheduler.pages
        gigabytes = pages * _fused(model).page_bytes / 1e9
        line = (
            f"serving {settings.name} at http://{host}:{port}/v1: {pages} pages of {PAGE_TOKENS} "
            f"tokens ({gigabytes:.2f} GB), {settings.threads} threads, "
            f"{'with a key' if settings.key else 'without a key'}"
        )

        async def served() -> int:
            service = Service(
                settings.name,
                engine,
                prompts,
                tokenizer,
                stop_tokens_of(model),
                _limits(model, engine.scheduler, settings),
                Watch(model, say),
            )
            app = make_app(service, settings.key)
            return await run(service, app, bound, lambda: say(line), say)

        return asyncio.run(served())


def _scheduler(model: nn.Module, settings: Settings) -> Scheduler:
    torch.set_num_threads(settings.threads)  # of the calling thread's teams
    fuse(model)
    page = _fused(model).page_bytes
    wanted = settings.cache_bytes
    if wanted is None:  # pages that are free keep what prefixes need, so in the end all are written
        longest = min(_positions(model) or _USUAL, _USUAL)
        wanted = min(settings.sequences * pages_of(longest) * page, available_memory() // 2)
    pages = wanted // page
    if pages < 1:
        raise SqCpuError(
            f"the cache has {wanted} bytes, and one page {page}; give more with --kv-cache-gb"
        )
    return Scheduler(model, pages=pages, rows=settings.rows, sequences=settings.sequences)


def _fused(model: nn.Module) -> FusedDecoder:
    fused = fused_of(model)
    assert fused is not None
    return fused


def _limits(model: nn.Module, scheduler: Scheduler, settings: Settings) -> Limits:
    held = scheduler.pages * PAGE_TOKENS
    return Limits(
        sequences=settings.sequences,
        queue=settings.queue,
        positions=min(_positions(model) or held, held),
        vocabulary=_fused(model).base.config.vocab_size,
    )


def _positions(model: nn.Module) -> int | None:
    positions: int | None = getattr(_fused(model).base.config, "max_position_embeddings", None)
    return positions

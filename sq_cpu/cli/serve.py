"""`sq-cpu serve`: a quantized model behind OpenAI's interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sq_cpu.cli.common import StoredDtype, TrustRemoteCode, load_model, model_name, quiet, say
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.files import absolute

_KEY = "SQ_CPU_API_KEY"


def serve_command(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a quantized model.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--model-name", help="What clients call it. [default: the folder's name]"),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, max=4096, help="Sequences that run at once.")
    ] = 256,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; beyond, clients get 429.")
    ] = 256,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Memory for keys and values, in GB. [default: all that the sequences need, at "
            "most half of what is free]",
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, max=65536, help="Tokens of a step; fewer: steadier streams.")
    ] = 512,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="For the model. [default: all cores; from 4 on, all but one]"),
    ] = None,
    keyless: Annotated[
        bool,
        typer.Option("--without-key", help="Let anyone in who reaches an address of the network."),
    ] = False,
    dtype: StoredDtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve the quantized model OUT at /v1/completions and /v1/chat/completions.

    Clients give the key that the environment variable SQ_CPU_API_KEY holds, if it is set.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    from sq_cpu.serving import launch, server

    key = os.environ.get(_KEY)
    if key is not None and not key.strip():
        raise SqCpuError(f"{_KEY} is set, but empty; give a key, or unset it")
    if key is None and not keyless and not server.is_loopback(host):
        raise SqCpuError(
            f"{host} can be reached from the network: set {_KEY}, or give --without-key"
        )
    settings = launch.Settings(
        name=model_name(str(model)) if name is None else name,
        host=host,
        port=port,
        key=key,
        sequences=max_sequences,
        queue=max_queue,
        rows=rows,
        cache_bytes=None if kv_cache_gb is None else int(kv_cache_gb * 1e9),
        threads=launch.default_threads() if threads is None else threads,
    )
    quiet()
    code = launch.serve(
        absolute(model),
        settings,
        load=lambda: load_model(model, dtype, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
        say=say,
    )
    if code:
        raise typer.Exit(code)

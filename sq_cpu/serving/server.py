"""A server from its socket to its last answer: signals, and what is told on the way."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.serving.service import Service

__all__ = ["is_loopback", "listening", "run"]

_PATIENCE = 30  # seconds for clients to read the last of their answers


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind an address; whoever connects is refused until the server runs.

    Raises
    ------
    SqCpuError
        For an address that is none of this machine's, and a port that another has.
    """
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        # What a killed server left in TIME_WAIT holds no port.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        if made is not None:
            made.close()
        raise SqCpuError(
            f"cannot listen at {host} port {port} ({first_line(error)}); give another --port or "
            "--host"
        ) from error
    with made:
        yield made


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
    except (OSError, ValueError, UnicodeError):
        return False  # whoever binds it says why not


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(
    service: Service,
    app: ASGIApp,
    bound: socket.socket,
    on_start: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    """Serve until a signal: then take no more, answer what was taken, and end.

    A second signal ends it at once, as does a failure of the engine.

    Parameters
    ----------
    service, app : that answers, and the routes to it
    bound : from `listening`
    on_start : called when clients can connect
    say : told what happens, in a line

    Returns
    -------
    the exit code: 0 after a signal, 1 after a failure; a second signal's is 128 + its number
    """
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=_PATIENCE,
        ),
        on_start,
    )
    engine = service.engine
    loop = asyncio.get_running_loop()
    code = 0
    draining: asyncio.Task[None] | None = None

    async def drain() -> None:
        await service.drain()
        server.should_exit = True

    def on_signal(signum: int) -> None:
        nonlocal draining
        if draining is None:
            say("shutting down: what was taken is answered; another signal ends it at once")
            draining = loop.create_task(drain())
        else:
            say("ended")
            os._exit(128 + signum)  # neither a step nor a thread is waited for

    def on_failure() -> None:
        nonlocal code
        code = 1
        say(f"error: the engine has failed: {first_line(engine.failure or Exception())}")
        server.should_exit = True

    engine.on_failure = on_failure
    engine.attach()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum)
    await server.serve([bound])
    return code

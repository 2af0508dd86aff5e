"""The console script `xeon-run`: a command on the cores and the memory of one socket."""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from sq_cpu_machine import MachineError, Topology, choose, ranges

__all__ = ["main"]

# Of set_mempolicy(2), which numactl calls, too; the command inherits the policy.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_BIND = 2  # MPOL_BIND: of the nodes, the one beside the core that first touches a page
_MOST_NODES = 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Bind this process as the options say, then become the command."""
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except MachineError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _run(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    command: list[str] = options.command
    if command[:1] == ["--"]:
        del command[0]
    choice = choose(Topology.read(), os.environ, socket=options.socket, cores=options.cores)
    if options.json or options.dry_run:
        _restore_signals()
        as_json = json.dumps(choice.to_dict(), indent=2)
        print(as_json if options.json else "\n".join(choice.lines()))
        return
    if not command:
        _fail("give a command, as in: xeon-run sq-cpu generate OUT PROMPT", 2)
    if shutil.which(command[0]) is None:
        _fail(f"no program {command[0]!r} to run", 127)  # as of a shell
    try:
        os.sched_setaffinity(0, choice.cpus)
    except OSError as error:
        _fail(f"cannot bind to cores {ranges(choice.cpus)}: {error.strerror}", 1)
    if choice.nodes and (why_not := _bind_memory(choice.nodes)):
        choice = replace(choice, reasons={**choice.reasons, "memory": why_not})
    for line in choice.lines():
        _say(line)
    _restore_signals()
    try:
        os.execvpe(command[0], command, {**os.environ, **choice.environment})
    except OSError as error:
        _fail(f"cannot run {command[0]!r}: {error.strerror}", 126)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{' '.join(message.split())}; see --help", 2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="xeon-run",
        description="Run a command on the cores and the memory of one socket, with a thread a "
        "core. What was chosen, and why, is said on stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("--socket", type=int, help="default: that with the most cores")
    parser.add_argument("--cores", type=int, help="how many of its cores; default: all")
    parser.add_argument("--dry-run", action="store_true", help="print the choice, run nothing")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    return parser


def _bind_memory(nodes: Sequence[int]) -> str:
    """Have the memory of this process, and of what it becomes, come from nodes; "" or why not."""
    call = _SET_MEMPOLICY.get(platform.machine())
    if call is None or max(nodes) >= _MOST_NODES:
        return f"not bound: how it is done on {platform.machine()} is not known"
    mask = sum(1 << node for node in nodes).to_bytes(_MOST_NODES // 8, sys.byteorder)
    library = ctypes.CDLL(None, use_errno=True)
    # The kernel takes one bit less than it is told.
    bits = ctypes.c_ulong(_MOST_NODES + 1)
    if library.syscall(ctypes.c_long(call), ctypes.c_long(_BIND), mask, bits) == 0:
        return ""
    code = ctypes.get_errno()
    hint = " (Docker: --cap-add SYS_NICE)" if code == errno.EPERM else ""
    return f"not bound to nodes {ranges(nodes)}: {os.strerror(code)}{hint}"


def _restore_signals() -> None:
    """Have a pipe that nobody reads end this process: Python ignores that, and exec keeps it so."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)


def _say(line: str) -> None:
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"xeon-run: {line}\n".encode("utf-8", "backslashreplace"))


def _fail(message: str, code: int) -> NoReturn:
    shown = message if len(message) <= 200 else f"{message[:197]}..."
    with suppress(OSError):
        os.write(2, f"error: {shown}\n".encode("utf-8", "backslashreplace"))
    sys.exit(code)

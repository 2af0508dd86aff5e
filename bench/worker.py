"""A runtime in a process of its own, asked in lines of JSON over its pipes.

Runtimes bring thread pools of their own, and a pool may spin for a while after its work. Apart, one
at a time is busy; whoever waits for a line sleeps. Nothing hangs: a process that does not answer in
time, that dies or that says something else is killed, and that is told.

    to the process                                  from it
                                                    {"runtime": "what it is"}
    {"do": "prefill", "prompts": [[1, 2], [3, 4]]}  {"seconds": 0.1, "tokens": [5, 6]}
    {"do": "decode", "steps": 2}                    {"seconds": 0.1, "tokens": [[7, 8], [9, 1]]}
    {"do": "logits", "path": "FILE.npy"}            {"written": true}
    {"do": "score", "prompt": [], "tokens": []}     {"log_probability": -1.5}
    {"do": "memory"}                                {"peak_bytes": 123, "weight_bytes": 100}
                                                    {"error": "why not"}
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError

_MAIN = Path(__file__).with_name("worker_main.py")
_LONGEST_LINE = 16 << 20
_LAST_WORDS = 4 << 10  # bytes of a log, in which the reason is looked for

Answer = dict[str, Any]


class WorkerError(SqCpuError):
    """A process that gave no answer, or says that it cannot."""


class Worker:
    """A process that answers, one question at a time.

    Parameters
    ----------
    name : of the variant, for errors
    command : what to run
    log : where its stderr goes
    environment : variables beyond this process's
    limit : seconds until it must have said what it is
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str],
        limit: float,
    ) -> None:
        self.name, self._log = name, log
        self._buffer = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                bufsize=0,
            )
        pipes = self._process.stdin, self._process.stdout
        self._to, self._from = (pipe.fileno() for pipe in pipes if pipe is not None)
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self.runtime = str(self._answer(time.monotonic() + limit, limit).get("runtime", ""))

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any], log: Path, limit: float) -> Worker:
        """Start a runtime of `runtimes.py`; `settings` are those of its constructor."""
        command = [sys.executable, str(_MAIN), json.dumps(settings)]
        environment = {
            "OMP_NUM_THREADS": str(settings["threads"]),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        return cls(name, command, log, environment=environment, limit=limit)

    def ask(self, do: str, limit: float, **more: Any) -> Answer:
        """Ask, and wait for the answer for so many seconds at most.

        Raises
        ------
        WorkerError
            Where there is none. The process has then ended, but for an error that it told.
        """
        deadline = time.monotonic() + limit
        self._write(json.dumps({"do": do, **more}).encode() + b"\n", deadline, limit)
        return self._answer(deadline, limit)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _write(self, data: bytes, deadline: float, limit: float) -> None:
        while data:
            self._wait(deadline, limit, writing=True)
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                continue
            except OSError:
                self._fail(self._end())

    def _answer(self, deadline: float, limit: float) -> Answer:
        while b"\n" not in self._buffer:
            self._wait(deadline, limit, writing=False)
            part = os.read(self._from, 1 << 20)
            if not part:
                self._fail(self._end())
            self._buffer += part
            if len(self._buffer) > _LONGEST_LINE:
                self._fail("its answer has no end")
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(f"its answer is no object of JSON: {line[:80]!r}")
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def _wait(self, deadline: float, limit: float, *, writing: bool) -> None:
        if self._process.stdout is None or self._process.stdout.closed:
            raise WorkerError(f"{self.name}: its process has ended")
        rest = deadline - time.monotonic()
        files = ([], [self._to]) if writing else ([self._from], [])
        if rest <= 0 or not any(select.select(*files, [], rest)):
            self._fail(f"no answer within {limit:.0f} s")

    def _end(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipes"
        words = self._log.read_bytes()[-_LAST_WORDS:].decode(errors="replace").strip()
        last = words.splitlines()[-1] if words else "it wrote nothing to stderr"
        return f"its process ended with status {status}: {last}"

    def _fail(self, why: str) -> None:
        self.close()
        raise WorkerError(f"{self.name}: {why}")

"""The thread that owns the scheduler, and so the model: nothing else calls either.

An OpenMP team belongs to the thread that started it, and a step takes milliseconds to tenths of a
second: on the event loop it would stop every other answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.inference.requests import Request, Token
from sq_cpu.inference.scheduler import Scheduler

__all__ = ["Engine", "Job", "Reader"]


class Reader(Protocol):
    """Who gets the tokens of jobs, on the event loop."""

    def receive(self, job: Job, tokens: list[Token]) -> None:
        """Take a step's tokens of a job."""

    def fail(self, error: SqCpuError) -> None:
        """Take it that no more tokens come."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes
    ----------
    request : what the scheduler runs
    reader : who gets its tokens
    advance : called with each token, on the engine's thread, before the next one is chosen
    """

    request: Request
    reader: Reader
    advance: Callable[[int], None] | None = None
    number: int = field(default=-1, init=False)


class Engine:
    """Runs jobs; its methods are called on the event loop.

    Parameters
    ----------
    build : makes the scheduler; called on the engine's thread

    Raises
    ------
    Exception
        What `build` raised.

    Attributes
    ----------
    scheduler : to be read, not called
    failure : what a step raised; no job runs any more
    on_failure : called on the event loop at a failure
    """

    scheduler: Scheduler

    def __init__(self, build: Callable[[], Scheduler]) -> None:
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] | None = None
        self._build = build
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # the thread's own
        self._open: set[Job] = set()  # the event loop's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._built = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sq_cpu engine", daemon=True)
        try:
            self._thread.start()
            self._built.wait()
        except BaseException:  # of a signal: Python cannot end while a thread is in native code
            self.stop()
            raise
        if self.failure is not None:
            raise self.failure

    def attach(self) -> None:
        """Give tokens to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive() and self.failure is None

    def submit(self, job: Job) -> None:
        """Have a job run."""
        if self.failure is not None:
            job.reader.fail(self._reason())
            return
        self._open.add(job)
        self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Have a job end before the next step; one that has ended is left alone."""
        if job in self._open:
            self._open.discard(job)
            self._commands.put(lambda: self._cancel(job))

    def stop(self) -> None:
        """End the thread after the step that runs; jobs get nothing more."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self.scheduler = self._build()
        except Exception as error:
            self.failure = error
            return
        finally:
            self._built.set()
        try:
            while self._obey():
                if self.scheduler.busy:
                    self._step()
        except Exception as error:  # whatever it is, those who wait for tokens have to know
            self.failure = error
            self._post(self._fail_all)

    def _obey(self) -> bool:
        """Carry out the commands that are there, waiting for one where nothing runs."""
        try:
            while True:
                command = self._commands.get(block=not self.scheduler.busy)
                if command is None:
                    return False
                command()
        except queue.Empty:
            return True

    def _step(self) -> None:
        made: dict[Job, list[Token]] = {}
        for token in self.scheduler.step():
            job = self._jobs[token.request]
            if job.advance is not None and token.finish != "error":
                job.advance(token.id)
            if token.finish is not None:
                del self._jobs[token.request]
            made.setdefault(job, []).append(token)
        if made:
            self._post(lambda: self._hand_out(made))

    def _add(self, job: Job) -> None:
        try:
            job.number = self.scheduler.add(job.request)
        except SqCpuError as refusal:
            error = refusal
            self._post(lambda: self._refuse(job, error))
            return
        self._jobs[job.number] = job

    def _cancel(self, job: Job) -> None:
        if self._jobs.pop(job.number, None) is not None:
            self.scheduler.cancel(job.number)

    def _hand_out(self, made: dict[Job, list[Token]]) -> None:
        for job, tokens in made.items():
            if tokens[-1].finish is not None:
                self._open.discard(job)
            job.reader.receive(job, tokens)

    def _refuse(self, job: Job, error: SqCpuError) -> None:
        self._open.discard(job)
        job.reader.fail(error)

    def _reason(self) -> SqCpuError:
        return SqCpuError(f"the engine has failed: {first_line(self.failure or Exception())}")

    def _fail_all(self) -> None:
        for reader in {job.reader: None for job in self._open}:
            reader.fail(self._reason())
        self._open.clear()
        if self.on_failure is not None:
            self.on_failure()

    def _post(self, call: Callable[[], None]) -> None:
        """Have a call made on the event loop, if it still runs."""
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in between
                self._loop.call_soon_threadsafe(call)

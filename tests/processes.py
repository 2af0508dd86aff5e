"""Workers in processes of their own: started, waited for, killed."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path


def start(work: Callable[..., object], *arguments: object) -> SpawnProcess:
    """Start `work` in a process of its own, which this one outlives."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def kill_at(worker: SpawnProcess, log: Path, lines: int) -> list[str]:
    """Kill a worker that hangs once so many lines are logged; return and delete them."""
    wait_for(worker, log, lines)
    worker.kill()
    worker.join()
    logged = log.read_text().splitlines()
    log.unlink()
    return logged


def wait_for(worker: SpawnProcess, log: Path, lines: int) -> None:
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert worker.is_alive(), "the worker has ended"
        time.sleep(0.1)

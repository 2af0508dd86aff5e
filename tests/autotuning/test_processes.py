"""Which worker is gone."""

import subprocess
import sys
from dataclasses import replace

from sq_cpu.autotuning.processes import WorkerProcess, is_gone


def test_a_process_that_reused_the_id_is_not_the_worker() -> None:
    me = WorkerProcess.this()
    assert not is_gone(me)
    assert is_gone(replace(me, started="1"))
    assert not is_gone(replace(me, started="1", machine="elsewhere"))


def test_a_process_that_ended_is_gone_before_anyone_waits_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    worker = WorkerProcess.of(child.pid)
    assert not is_gone(worker)
    child.kill()
    while not is_gone(worker):
        assert child.returncode is None
    assert is_gone(WorkerProcess.of(child.pid))  # nor is what is looked up too late alive
    child.stdin.close()
    child.wait()
    assert is_gone(worker)

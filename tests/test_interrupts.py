"""An interrupt that Python ignores where it lands is raised again."""

import subprocess
import sys

import pytest

PROGRAM = """
import signal
import time

from sq_cpu.interrupts import raise_ignored_interrupts_again

def interrupt(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt

class Finalized:
    def __del__(self):
        {finalizer}

signal.signal(signal.SIGTERM, interrupt)
raise_ignored_interrupts_again()
try:
    Finalized()  # its exception goes no further
    time.sleep(20)
    print("slept")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("finalizer", "printed", "complaint"),
    [
        ("signal.raise_signal(signal.SIGTERM)", "interrupted", ""),
        ("time.sleep = lambda _: None; raise ValueError('mine')", "slept", "ValueError: mine"),
    ],
)
def test_an_ignored_interrupt_is_raised_again(finalizer: str, printed: str, complaint: str) -> None:
    program = PROGRAM.format(finalizer=finalizer)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == printed
    assert (complaint in result.stderr) if complaint else result.stderr == ""

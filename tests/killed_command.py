"""Commands that are killed at their n-th file event, each forked from one warm process.

As a program it reads a job a line, as JSON, forks, and answers how the child ended and how many
file events it had. An event is about to happen when the child is killed: a file that is opened to
be written, made, renamed, removed, given a mode, or a call of a study's storage that writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_CHANGES = {f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "link", "symlink")}
_CHANGES |= {"os.chmod", "os.chown", "os.truncate", "sqlite3.connect"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_STORAGE = ("create_new_study", "set_study_user_attr", "create_new_trial", "set_trial_param")
_STORAGE += ("set_trial_user_attr", "set_trial_state_values")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    """Its exit code; -9 where it was killed."""
    events: int
    said: str


class Warm:
    """The process that forks the commands; `root` is where they run, and all events are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **{"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"},
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
            "XDG_CACHE_HOME": str(root.parent / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object, kill: int = -1) -> Ended:
        """Run a command, and kill it at an event: 0 is the first; -1: at none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"command": [str(word) for word in command], "root": str(self.root), "kill": kill}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import torch

    torch.set_num_threads(1)  # before there are others, which a fork would lose
    import byte_models

    import sq_cpu
    from sq_cpu import cli
    from sq_cpu.analysis import report
    from sq_cpu.autotuning import autotune, latency, processes, storage, workers
    from sq_cpu.checkpoint import folder

    report.require_report()
    latency._ROUNDS, latency._FLUSHED_BYTES = 1, 1 << 10
    processes.GRACE, processes.HEARTBEAT = 2, 1
    model = sq_cpu.quantize(byte_models.byte_model(), smooth=False)
    tokenizer = byte_models.byte_tokenizer()
    assert autotune
    assert workers

    def run(command: list[str]) -> None:
        if command[0] == "save":
            sq_cpu.save(model, command[1], tokenizer, max_shard_size=200_000)
        else:
            cli.app(command, prog_name="sq-cpu")

    def hooked(event: Callable[[], None]) -> None:
        for module, name in [(folder, "exchange")]:
            setattr(module, name, _counted(getattr(module, name), event))
        for name in _STORAGE:
            setattr(storage.RDBStorage, name, _counted(getattr(storage.RDBStorage, name), event))

    # Libraries keep threads that hold nothing which a child needs; torch's own are one.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryFile() as counter, tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.chdir(job["root"])
                os.environ["TMPDIR"] = tempfile.tempdir = job["root"]
                _exit_with(run, hooked, job, counter)
            _, status = os.waitpid(child, 0)
            counter.seek(0)
            said.seek(0)
            ended = Ended(os.waitstatus_to_exitcode(status), len(counter.read()), said.read())
        print(json.dumps(ended._asdict()), flush=True)


def _exit_with(run: Any, hooked: Any, job: dict[str, Any], counter: Any) -> None:
    root, left = job["root"], job["kill"]

    def event() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        os.write(counter.fileno(), b".")

    def audited(name: str, values: tuple[Any, ...]) -> None:
        if name == "open":
            if isinstance(values[0], int) or not values[2] & _WRITES:
                return
        elif name not in _CHANGES:
            return
        place = values[0]
        if isinstance(place, int) or os.path.abspath(os.fsdecode(place)).startswith(root):
            event()

    hooked(event)
    sys.addaudithook(audited)
    code = 1
    try:
        run(job["command"])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _counted(function: Callable[..., Any], event: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(*values: Any, **more: Any) -> Any:
        event()
        return function(*values, **more)

    return wrapper


if __name__ == "__main__":
    _serve()

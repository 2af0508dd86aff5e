"""The other end of `worker.py`: makes the runtime that its argument describes, and answers."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import runtimes

_LONGEST_ERROR = 300  # characters


def peak_bytes() -> int:
    """Return the most memory that this process had resident."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def told(error: Exception) -> dict[str, str]:
    """Return what is said of an error: one line, the last words of a long one."""
    text = " ".join(str(error).split())
    return {"error": f"{type(error).__name__}: {text[-_LONGEST_ERROR:]}"}


def answer(runtime: runtimes.Runtime, question: dict[str, Any]) -> dict[str, Any]:
    do = question["do"]
    if do == "prefill":
        start = time.perf_counter()
        tokens = runtime.prefill(question["prompts"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}
    if do == "decode":
        # The first step is untimed: what others left in the caches, and threads that slept.
        first = runtime.decode(1)
        start = time.perf_counter()
        following = runtime.decode(question["steps"])
        seconds = runtime.seconds or time.perf_counter() - start
        return {"seconds": seconds, "tokens": first + following}
    if do == "logits":
        return {"written": runtime.write_logits(Path(question["path"]))}
    if do == "score":
        return {"log_probability": runtime.score(question["prompt"], question["tokens"])}
    if do == "memory":
        return {"peak_bytes": peak_bytes(), "weight_bytes": runtime.weight_bytes}
    raise ValueError(f"nobody knows how to {do}")


def main() -> None:
    # Libraries print to stdout: what they say there goes to stderr, and answers to a copy.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        runtime = runtimes.make(json.loads(sys.argv[1]))
    except Exception as error:  # whatever a peer raises is said, in one line
        say(told(error))
        raise
    say({"runtime": runtime.version})
    for line in sys.stdin:
        try:
            say(answer(runtime, json.loads(line)))
        except Exception as error:
            say(told(error))


if __name__ == "__main__":
    main()

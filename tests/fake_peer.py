"""A worker's process that answers as bench/worker.py wants it to, or as its argument says, not.

Its text is always token 3, and its own judgement is that nothing else is likely.
"""

import json
import os
import sys
import time

import numpy as np

VOCABULARY = 64


def main(fault: str, log: str) -> None:
    if fault == "dies":
        sys.exit("no such model")
    elif fault == "is silent":
        time.sleep(60)
    elif fault == "talks garbage":
        print("loading ...", flush=True)
        time.sleep(60)
    elif fault == "says a list":
        print("[1, 2]", flush=True)
    elif fault == "has no end":
        while True:
            os.write(1, b"x" * 65536)
    elif fault == "never listens":
        print(json.dumps({"runtime": "fake"}), flush=True)
        time.sleep(60)
    print(json.dumps({"runtime": "fake"}), flush=True)
    for asked, line in enumerate(sys.stdin, 1):
        question = json.loads(line)
        print(json.dumps(answer(question, fault, asked)), flush=True)
        if log and question["do"] == "prefill":
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(question["prompts"]) + "\n")


def answer(question: dict, fault: str, asked: int) -> dict:  # type: ignore[type-arg]
    if asked > 6 and fault == "dies in the middle":
        os.kill(os.getpid(), 9)
    if asked > 6 and fault == "hangs in the middle":
        time.sleep(60)
    if fault == "refuses":
        return {"error": "out of memory"}
    token = {"leaves the vocabulary": VOCABULARY, "babbles": 5}.get(fault, 3)
    if question["do"] == "prefill":
        return {"seconds": 1e-3, "tokens": [token] * len(question["prompts"])}
    if question["do"] == "decode":
        return {"seconds": 1e-3, "tokens": [[token]] * (question["steps"] + 1)}
    if question["do"] == "logits":
        logits = np.arange(VOCABULARY, dtype=np.float32)[None]
        if fault == "is not finite":
            logits[0, 2] = np.nan
        if fault == "errs":
            logits = logits[:, ::-1]
        np.save(question["path"], logits)
        return {"written": fault != "has no logits"}
    if question["do"] == "score":
        return {"log_probability": -1.0 if set(question["tokens"]) == {3} else -12.0}
    return {"peak_bytes": 1000, "weight_bytes": None}


if __name__ == "__main__":
    main(*sys.argv[1:])

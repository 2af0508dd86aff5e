"""A sample of transformers' model types, through what bench/run_architectures.py asks of all."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import VARIANTS, Finding, examine

# One of a kind, and those that failed once.
TYPES = (
    "bart",  # a tied head over two tied embeddings
    "bert",
    "blip-2",
    "clip",
    "deepseek_v3",  # multi-head latent attention, routed and shared experts
    "falcon_mamba",
    "gemma3",
    "glm_moe_dsa",  # casts an input to its linear's dtype
    "gpt2",
    "jamba",  # a mixture, Mamba and attention
    "llama",
    "llava",
    "mamba",  # reads the weight of a linear that it never calls
    "mamba2",
    "marian",
    "mixtral",
    "opt",
    "qwen2_vl",
    "t5",
    "umt5",  # reads whether its head is tied
    "vit",
    "wav2vec2",
    "whisper",
)


REFUSED = ("big_bird", "rwkv")
"""Their first forward changes them for good, so that no fresh one is the same."""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Finding, Path]]]:
    threads = torch.get_num_threads()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        for model_type in (*TYPES, *REFUSED):
            folder = tmp_path_factory.mktemp(model_type)
            found[model_type] = examine(model_type, folder), folder
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", [*TYPES, *REFUSED])
def test_every_step_is_right_or_refused(
    judged: dict[str, tuple[Finding, Path]], model_type: str
) -> None:
    finding, _ = judged[model_type]
    wrong = {
        name: row["reason"] for name, row in finding.variants.items() if row["verdict"] == "failed"
    }
    verdict = "refused" if model_type in REFUSED else "right"
    assert (finding.verdict, wrong) == (verdict, {}), finding.reason


_ELSEWHERE = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from architectures import reload
print(json.dumps({folder: reload(Path(folder)) for folder in sys.argv[2:]}))
"""


def test_a_fresh_process_loads_what_was_saved(judged: dict[str, tuple[Finding, Path]]) -> None:
    bench = str(Path(__file__).parents[1] / "bench")
    saved = {str(folder): finding for finding, folder in judged.values()}
    command = [sys.executable, "-c", _ELSEWHERE, bench, *saved]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert json.loads(output.splitlines()[-1]) == {
        folder: {name: "" for name in VARIANTS if finding.variants.get(name, {}).get("saved")}
        for folder, finding in saved.items()
    }

"""A sample of transformers' model types, through what bench/run_architectures.py asks of all."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NUDGES, VARIANTS, Finding, beside_nudged, distance, examine
from torch import Tensor, nn
from twins import FakeTwin, NudgedTwin, recording, twin

import sq_cpu

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


class Spoken(nn.Module):
    """Says each token for as long as a linear predicts, in whole frames: a rounded decision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.frames = nn.Linear(256, 256), nn.Linear(256, 1)
        self.decoder = nn.Linear(256, 32)
        self.least = 2.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x).tanh()
        lengths = (self.frames(hidden)[:, 0] + self.least).round().long().clamp(min=1)
        return hidden, self.decoder(hidden.repeat_interleave(lengths, dim=0))


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [*model(x)]


@pytest.fixture(scope="module")
def spoken() -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Outputs in int8, in float, and fake-quantized, of which one decides otherwise than int8."""
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    model = Spoken().eval()
    calibration = sq_cpu.calibrate(model, [(x,)], ignore=(), progress=False)
    quantized = copy.deepcopy(model)
    with recording() as made:
        sq_cpu.quantize(quantized, calibration, scheme="O3", progress=False)
    kinds = [FakeTwin, *(partial(NudgedTwin, seed=seed) for seed in range(NUDGES))]
    fakes = [twin(quantized, made, kind) for kind in kinds]

    def predicted(one: Any) -> Tensor:
        with torch.no_grad():
            return one.frames(one.encoder(x).tanh())[:, 0]

    ours, theirs = predicted(quantized), predicted(fakes[-1])
    row = int((ours - theirs).abs().argmax())
    assert ours[row] != theirs[row]
    for one in (model, quantized, *fakes):
        one.least = 2.5 - float(ours[row] + theirs[row]) / 2  # rounding parts them
    return _outputs(quantized, x), _outputs(model, x), [_outputs(each, x) for each in fakes]


def _is_right(found: list[Tensor], exact: list[Tensor], fakes: list[list[Tensor]]) -> bool:
    error, spread = beside_nudged(found, exact, fakes)
    return error <= 3 * spread < math.inf


Case = tuple[list[Tensor], list[Tensor], list[list[Tensor]]]


def test_a_length_that_one_code_turns_is_right(spoken: Case) -> None:
    found, exact, fakes = spoken
    assert distance(found, fakes[-1]) == math.inf
    assert _is_right(found, exact, fakes)
    # None has this length, but they differ in theirs: what comes before the decision is compared.
    hidden, frames = found
    assert _is_right([hidden, torch.cat([frames, frames])], exact, fakes)


@pytest.mark.parametrize("wrong", ["before", "after", "length", "decided nowhere", "too few"])
def test_a_wrong_output_beside_a_decision_is_failed(spoken: Case, wrong: str) -> None:
    (hidden, frames), exact, fakes = spoken
    found = {
        "before": [hidden * 1.2, frames],
        "after": [hidden, frames * 1.2],
        "length": [hidden[:-1], frames],
        "decided nowhere": [hidden * 1.2, torch.cat([frames, frames])],
        "too few": [hidden],
    }[wrong]
    assert not _is_right(found, exact, fakes)


def test_a_shape_that_no_decision_turns_is_failed(spoken: Case) -> None:
    (hidden, frames), exact, fakes = spoken
    alike = [each for each in fakes if each[1].shape == fakes[0][1].shape]
    longer = torch.cat([alike[0][1], frames])
    assert not _is_right([hidden, longer], [exact[0], alike[0][1]], alike)

"""The shipped texts: whole, apart, and cut where the protocol's windows begin."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from sq_cpu import texts
from sq_cpu.evaluation.perplexity import token_windows

# SHA-256 of the ids (int32, little-endian) of the windows cut from the two whole texts by
# SmolLM2's tokenizer: 16 and 20 windows of 512, number k at k * ((len - 512) // windows).
DIGESTS = {
    "calibration": "52a0189bdd2a177b7e44114d170a37023f29876e9ee64b4c8d2b8fdd0eb0c73e",
    "evaluation": "6fa4facf706dd4d9e9e3f83e793b600ede73b39a6ca9cfbb354918438f039df5",
}


def test_documents() -> None:
    assert len(texts.calibration()) == 16
    assert len(texts.evaluation()) == 20
    for document in (*texts.calibration(), *texts.evaluation()):
        assert 7000 < len(document) <= 7500
        assert "\f" not in document


def test_evaluation_text_is_not_calibrated_on() -> None:
    seen = " ".join(" ".join(texts.calibration()).split())
    for document in texts.evaluation():
        words = document.split()
        for start in range(0, len(words) - 12, 12):
            assert " ".join(words[start : start + 12]) not in seen


@pytest.mark.parametrize("name", DIGESTS)
def test_windows_are_those_of_the_whole_text(name: str, smollm2_folder: Path) -> None:
    documents = getattr(texts, name)()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    windows = token_windows(tokenizer, documents, window=512, windows=len(documents))
    ids = np.concatenate([window.numpy() for window in windows]).astype("<i4")
    assert ids.shape == (len(documents), 512)
    assert hashlib.sha256(ids.tobytes()).hexdigest() == DIGESTS[name]

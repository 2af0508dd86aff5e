"""Recordings as samples at the rate that a model hears."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.extras import require

__all__ = ["SOUND", "read_sound"]

SOUND = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
SECONDS = 30
"""What is read of a recording: as much as Whisper hears at once."""
_RATES = range(1000, 768_001)  # of samples a second: a filter that resamples is as long as one


def read_sound(path: Path, rate: int) -> NDArray[np.float32]:
    """Return the first seconds of a recording as mono samples [samples] at `rate`, resampled.

    Raises `SqCpuError`, which names the file, for what is no recording, is empty, or holds values
    that are not finite; and without the extra "audio".
    """
    require("soundfile", "audio")
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            own = int(file.samplerate)
            if own not in _RATES:
                raise ValueError(f"{own} samples a second")
            samples: Any = file.read(SECONDS * own, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise SqCpuError(
            f"{path} cannot be read as sound ({first_line(error)}): repair it, or leave it out"
        ) from error
    if not len(samples) or not np.isfinite(samples).all():
        what = "values that are not finite" if len(samples) else "no samples"
        raise SqCpuError(f"{path} holds {what}: leave it out")
    mono = samples.mean(axis=1)
    if own != rate:
        require("scipy", "audio")
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        mono = resample_poly(mono, rate // common, own // common)
    return np.asarray(mono, dtype=np.float32)

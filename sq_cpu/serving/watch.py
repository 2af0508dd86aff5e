"""Whether what is served still looks like what the model was calibrated on.

Called on the event loop: the counts are atomic, so that the engine's thread is not asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

from sq_cpu.quantization.drift import Drift, drift

__all__ = ["WINDOW", "Watch"]

WINDOW = 4096
"""Rows of a layer that it is judged by: many requests, so that an odd one is no drift; and few, so
that what a server ran in a year does not hide what it runs today."""
_APART = 1.0  # seconds; a look takes about 6 microseconds a layer


class Watch:
    """Counts the rows of one served model; a model without static layers has none.

    Parameters
    ----------
    model : quantized, fused or not; its counts begin at 0
    say : told once, in a line, when layers drift
    clock : gives seconds

    Attributes
    ----------
    layers : by full name, all rows so far, as of the last look
    drifting : of layers whose last window drifts, that window
    """

    def __init__(
        self,
        model: nn.Module,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        drift(model, reset=True)  # fusing ran some to prove itself
        self.layers = drift(model)
        self.drifting: dict[str, Drift] = {}
        self._begun = dict(self.layers)
        self._model = model
        self._say = say
        self._clock = clock
        self._next = -float("inf")
        self._told = False

    def glance(self) -> None:
        """Look, unless that was a moment ago."""
        if self.layers and self._clock() >= self._next:
            self.look()

    def look(self) -> None:
        """Read the counts, and judge the layers whose windows are full."""
        self.layers = drift(self._model)
        for name, total in self.layers.items():
            window = total.since(self._begun[name])
            if window.rows >= WINDOW:
                self._begun[name] = total
                self.drifting.pop(name, None)
                if window.drifts:
                    self.drifting[name] = window
        self._next = self._clock() + _APART
        if self.drifting and not self._told:
            self._told = True
            self._say(self._warning())

    def _warning(self) -> str:
        name, worst = max(self.drifting.items(), key=lambda each: each[1].share)
        return (
            f"warning: in {len(self.drifting)} of {len(self.layers)} layers over 4 times as many "
            f"rows as in calibration do not fit the static scale ({name}: {worst.share:.1%}, then "
            f"{worst.calibrated:.1%}); calibrate on text of this kind and quantize again"
        )

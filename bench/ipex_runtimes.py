"""IPEX 2.8 as its users ran it, `ipex.llm.optimize`, with the transformers that it was made for.

The folder of that transformers is SQ_CPU_IPEX_TRANSFORMERS; scripts/ipex makes and names it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["SQ_CPU_IPEX_TRANSFORMERS"])

import intel_extension_for_pytorch as ipex
import numpy as np
import torch
import transformers
from runtimes import Runtime
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

ALPHA = 0.8
# As `model_files.py` calibrates ours.
_WINDOWS, _TOKENS = 2, 256


class _Last(LogitsProcessor):  # type: ignore[misc]
    """Keeps the logits of the last step."""

    scores = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        self.scores = scores
        return scores


def load(path: str, dtype: torch.dtype) -> Any:
    """Load a causal LM that transformers 5 wrote."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "rope_parameters"):  # where transformers 5 has it
        config.rope_theta = config.rope_parameters["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, torch_dtype=dtype, local_files_only=True
    )
    model.generation_config.eos_token_id = None  # every sequence goes on
    return model.eval()


def write_recipe(path: str, mapping: Any, recipe: str) -> None:
    """Calibrate IPEX's SmoothQuant on random tokens, as ours is."""
    model = load(path, torch.float32)
    layers = model.config.num_hidden_layers
    vocabulary = model.config.vocab_size
    model = ipex.llm.optimize(
        model, dtype=torch.float32, quantization_config=mapping, inplace=True, deployment_mode=False
    )

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, _TOKENS), generator=generator)
        empty = torch.zeros(1, 0, 0, 1, dtype=torch.long), *(torch.zeros(1, 1, 1, 1),) * 2
        past = (*empty, torch.zeros(1, 1, dtype=torch.long))  # IPEX's own cache, of no tokens
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(_TOKENS)[None],
            "past_key_values": (past,) * layers,
        }

    prepared = ipex.quantization.prepare(
        model, mapping, example_kwarg_inputs=inputs(0), inplace=True
    )
    for window in range(_WINDOWS):
        prepared(**inputs(1 + window))
    prepared.save_qconf_summary(qconf_summary=recipe)


class Ipex(Runtime):
    """A folder of a causal language model by `ipex.llm.optimize`, through its own `generate`."""

    def __init__(self, path: str, threads: int, sequences: int, tokens: int, dtype: str) -> None:
        del sequences, tokens  # its cache grows
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.version = f"ipex {ipex.__version__}, transformers {transformers.__version__}"
        if dtype == "int8":
            mapping = ipex.quantization.get_smooth_quant_qconfig_mapping(alpha=ALPHA)
            with tempfile.TemporaryDirectory() as scratch:
                recipe = str(Path(scratch) / "best_configure.json")
                write_recipe(path, mapping, recipe)
                self._model: Any = ipex.llm.optimize(
                    load(path, torch.float32),
                    dtype=torch.float32,
                    quantization_config=mapping,
                    qconfig_summary_file=recipe,
                    inplace=True,
                )
        else:
            kind = getattr(torch, dtype)
            self._model = ipex.llm.optimize(load(path, kind), dtype=kind, inplace=True)
        self._model.config.token_latency = True
        self._last = _Last()
        self._prompts = torch.empty(0)
        self._made = 0
        for _ in range(2):  # in which its trace is optimized
            self.prefill([[0, 1]])
            self.decode(2)

    def _generate(self, tokens: int) -> tuple[Tensor, list[float]]:
        """Return so many tokens [sequences, tokens] after the prompts, and the seconds of each."""
        made, seconds = self._model.generate(
            self._prompts,
            attention_mask=torch.ones_like(self._prompts),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([self._last]),
        )
        return made[:, self._prompts.shape[1] :], seconds

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute the prompts as one batch."""
        self._prompts, self._made = torch.tensor(prompts), 1
        tokens: list[int] = self._generate(1)[0][:, 0].tolist()
        return tokens

    def decode(self, steps: int) -> list[list[int]]:
        """Generate anew, from the prompts on, and tell the time of the last steps alone."""
        self._made += steps
        made, seconds = self._generate(self._made)
        self.seconds = sum(seconds[-steps:])
        tokens: list[list[int]] = made[:, -steps:].T.tolist()
        return tokens

    def write_logits(self, path: Path) -> bool:
        """Write those of the last step."""
        np.save(path, self._last.scores.float().numpy())
        return True

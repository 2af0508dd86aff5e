"""A program: vLLM generates, in a process of its own, and its layers are held against ours.

python engine.py REQUEST.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from vllm_layers import held_against_ours


def main() -> None:
    """Do what a request asks for."""
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    llm = LLM(request["folder"], **(options | request["options"]))
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    settings = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    # One by one and together: other requests must not matter.
    alone = [llm.generate(prompt, settings, use_tqdm=False)[0] for prompt in prompts]
    together = llm.generate(prompts, settings, use_tqdm=False)
    result: dict[str, Any] = {
        "alone": [list(each.outputs[0].token_ids) for each in alone],
        "together": [list(each.outputs[0].token_ids) for each in together],
    }
    if request["compare"]:
        result["layers"] = llm.apply_model(partial(held_against_ours, request["folder"]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

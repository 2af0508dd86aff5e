"""Other projects' runtimes, which read a GGUF file with weights in Q8_0."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from runtimes import Runtime

PACKAGES = {  # runtime -> module, and what brings it
    "llama.cpp": ("llama_cpp", "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"),
    "openvino": ("openvino_genai", "pip install openvino-genai"),
}


class LlamaCpp(Runtime):
    """llama.cpp through the C calls of llama-cpp-python, with flash attention."""

    _BATCH = 2048  # llama.cpp's own default

    def __init__(self, path: str, threads: int, sequences: int, tokens: int) -> None:
        import llama_cpp as library

        self._library = library
        library.llama_backend_init()
        model = library.llama_model_load_from_file(
            path.encode(), library.llama_model_default_params()
        )
        if not model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        parameters = library.llama_context_default_params()
        parameters.n_ctx = sequences * -(-tokens // 256) * 256
        parameters.n_seq_max = sequences
        parameters.n_batch = self._BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.no_perf = True
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context for {sequences} sequences of {tokens}")
        self._batch = library.llama_batch_init(self._BATCH, 0, 1)
        found = library.llama_print_system_info().decode()
        features = " ".join(re.findall(r"(\w+) = 1", found))
        version = importlib.metadata.version("llama_cpp_python")
        self.version = f"llama-cpp-python {version}: {features}"
        # All of the file but the norms; a tied embedding is read once, as the head.
        self.weight_bytes = library.llama_model_size(model)
        self._logits: NDArray[np.float32] = np.empty((0, self._vocabulary), np.float32)
        self._next: list[int] = []
        self._position = 0

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether its logits are wanted) of each row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama_decode says {status}")

    def _choose(self, rows: int) -> list[int]:
        """Take the likeliest token of each of the last batch's wanted rows."""
        pointer = self._library.llama_get_logits(self._context)
        self._logits = np.ctypeslib.as_array(pointer, (rows, self._vocabulary))
        return [int(row.argmax()) for row in self._logits]

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute prompt after prompt."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
        self._position = len(prompts[0])
        self._next, logits = [], []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), self._BATCH):
                part = prompt[begin : begin + self._BATCH]
                last = len(prompt) - 1
                self._run([(t, begin + i, sequence, begin + i == last) for i, t in enumerate(part)])
            self._next += self._choose(1)
            logits.append(self._logits.copy())
        self._logits = np.concatenate(logits)
        return self._next

    def decode(self, steps: int) -> list[list[int]]:
        """Take the likeliest token of each step."""
        made = []
        for _ in range(steps):
            self._run([(t, self._position, i, True) for i, t in enumerate(self._next)])
            self._position += 1
            self._next = self._choose(len(self._next))
            made.append(self._next)
        return made

    def write_logits(self, path: Path) -> bool:
        """Write those of the last batch."""
        np.save(path, self._logits)
        return True


class OpenVino(Runtime):
    """OpenVINO GenAI's continuous batching, without its prefix cache."""

    def __init__(self, path: str, threads: int, sequences: int, tokens: int) -> None:
        import openvino
        import openvino_genai

        self._genai, self._tensor = openvino_genai, openvino.Tensor
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        # As its own pipeline has it: a prompt is computed at once.
        scheduler.max_num_batched_tokens = max(sequences * tokens, 256)
        scheduler.max_num_seqs = max(sequences, 1)
        block = 32  # tokens
        scheduler.num_kv_blocks = sequences * (-(-tokens // block) + 2)
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.version = f"openvino-genai {openvino_genai.__version__}"
        self._tokens, self._count = tokens, 0
        self._handles: list[openvino_genai.GenerationHandle] = []
        self._made: list[list[int]] = []

    def _take(self) -> list[int]:
        while not all(self._made):
            if not self._pipeline.has_non_finished_requests():
                raise ValueError("a sequence has ended: it has no room for more tokens")
            self._pipeline.step()
            for handle, made in zip(self._handles, self._made, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        made += output.generated_ids
        return [made.pop(0) for made in self._made]

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Add a request each, with room for all that is decoded."""
        for handle in self._handles:
            handle.cancel()
        if self._handles:
            self._pipeline.step()  # which drops them
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = self._tokens - len(prompts[0])
        config.ignore_eos, config.do_sample = True, False
        config.apply_chat_template = False
        self._handles = []
        for prompt in prompts:
            self._count += 1
            ids = self._tensor(np.array([prompt], np.int64))
            self._handles.append(self._pipeline.add_request(self._count, ids, config))
        self._made = [[] for _ in prompts]
        return self._take()

    def decode(self, steps: int) -> list[list[int]]:
        """Take the tokens of so many steps."""
        return [self._take() for _ in range(steps)]

"""sq_cpu inside vLLM on the CPU: its int8 linear kernel, and our folders as a quantization method.

vLLM finds `register` by the entry point ``vllm.general_plugins``.
"""

from sq_cpu.vllm_plugin.registration import register

__all__ = ["register"]

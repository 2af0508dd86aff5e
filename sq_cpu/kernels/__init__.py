"""The C++ library as functions of tensors.

The one place that imports torch before the extension: that uses the OpenMP runtime torch loads.
"""

import torch  # noqa: F401

from sq_cpu.kernels import attention, ops, torch_ops

__all__ = ["attention", "ops", "torch_ops"]

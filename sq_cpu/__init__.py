"""SmoothQuant for Xeon: int8 weights and int8 activations on AVX-512 VNNI and AMX.

calibrate -> smooth -> tune -> quantize -> save -> load -> run; the README shows the whole way.

`__init__.pyi` lists the public names; each is imported when it is first used (PEP 562). What other
libraries look up by name is registered at once: the torch operator `sq_cpu::linear`, and with
transformers the quantization method and the attention "sq_cpu".
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy_loader

from sq_cpu import kernels as _kernels  # noqa: F401  registers the torch operator
from sq_cpu.checkpoint.registration import register_with_transformers as _register

__version__ = _version("sq_cpu")
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)

_register()

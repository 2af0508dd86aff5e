"""The one exception that sq_cpu raises for bad input."""


class SqCpuError(ValueError):
    """Bad input or an unusable file; the message is one line that names the cause and the fix."""

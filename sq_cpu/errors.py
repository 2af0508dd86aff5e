"""The one exception that sq_cpu raises for bad input, and the one to stop it with."""

__all__ = ["SqCpuError", "Terminated", "first_line"]


class SqCpuError(ValueError):
    """Bad input or an unusable file; the message is one line that names the cause and the fix."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, for a handler to raise: it cleans up as Ctrl-C does."""


def first_line(error: BaseException) -> str:
    """Return the first line that another library's error says, or else its type's name."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__

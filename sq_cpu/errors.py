"""The one exception that sq_cpu raises for bad input, and the one to stop it with."""

__all__ = ["SqCpuError", "Terminated", "first_line", "printable"]


class SqCpuError(ValueError):
    """Bad input or an unusable file; the message is one line that names the cause and the fix.

    What a file or its name put into it is shown escaped, as in `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(str(message).splitlines())))


class Terminated(KeyboardInterrupt):
    """SIGTERM, for a handler to raise: it cleans up as Ctrl-C does."""


def first_line(error: BaseException) -> str:
    """Return the first line that another library's error says, or else its type's name."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def printable(text: str) -> str:
    r"""Return one line with what no terminal should get, such as the escape character, as \x1b."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )

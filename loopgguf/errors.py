"""What can go wrong for a user, as exceptions with an exit code each.

An error's text is one line: what, where, got, expected, what to do. `assert` is our bug, `LoopggufError` is the
user's input or machine; anything else keeps its traceback.
"""


def one_line(text: str) -> str:
    """Return `text` as one printable line: what a stranger's file or path put into it neither breaks it nor commands a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class LoopggufError(Exception):
    """A failure with a message for the user; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class QualityError(LoopggufError):
    """The result was made but does not pass its own checks (exit 1)."""

    exit_code = 1


class UsageError(LoopggufError):
    """The request contradicts itself or cannot be met; refused before any work (exit 2)."""

    exit_code = 2


class InputError(LoopggufError):
    """A file that was given is missing, malformed, unsupported or of another model (exit 3)."""

    exit_code = 3


class OutputError(LoopggufError):
    """The output exists, cannot be written or does not fit on the disk (exit 4)."""

    exit_code = 4


class Interrupted(LoopggufError):
    """The user asked to stop; what is done is saved and the same command goes on from there (exit 75, BSD's EX_TEMPFAIL)."""

    exit_code = 75

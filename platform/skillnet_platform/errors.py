"""Exceptions whose message is complete for the user."""

import re
import signal
from collections.abc import Iterable

from skillnet_platform.secret_uri import redact_secrets

#: Frame of a traceback.
_FRAME = re.compile(r'\s*File ".*", line \d+')
#: What SQLAlchemy adds to the message of a database: a link, the statement and its values.
_FOOTNOTE = re.compile(r"\(Background on this error at: |\[SQL: |\[parameters: ")


class UserError(ValueError):
    """User error. The message names the file or key, the expected value and the remedy.

    The command line prints the message without a traceback and exits with 2.
    """


class TerminatedError(KeyboardInterrupt):
    """End of a run after a signal. The message states what was saved and how to resume.

    The command line prints the message and exits with 128 + the signal's number, 143 for SIGTERM.

    Args:
        message: complete for the user.
        number: signal, such as 15 for SIGTERM.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def first_line(error: BaseException, longest: int = 200) -> str:
    """Return the first line of an exception's text that states the cause, without secrets.

    Of a traceback in the text, as Ray's errors have it, this is the line after the last frame.

    Args:
        error: the exception.
        longest: number of characters.
    """
    lines = str(error).splitlines()
    frames = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    if frames:
        # Code lines of the frame are indented.
        after = lines[frames[-1] + 1 :]
        lines = [line for line in after if not line[:1].isspace()] or after
    stated = (line.strip() for line in lines if line.strip() and not _FOOTNOTE.match(line))
    return redact_secrets(next(stated, type(error).__name__))[:longest]


def list_hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a request to the Hugging Face Hub, lost connections included.

    The client of ``huggingface_hub`` depends on its version, and a connection error of httpx is no
    OSError, so the common class is taken from that of the answers.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return HFValidationError, OSError, HfHubHTTPError.__bases__[0]


def find_raising_package(error: BaseException) -> str:
    """Return the top package of the frame that raised; "" without a traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(name).partition(".")[0]


def check_known_names(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """Raise UserError for the first name that is not known, with the nearest known name.

    Args:
        names: names that the user gave.
        known: the valid names.
        where: option or key of the names.
        what: kind of the named thing, such as ``task``.
    """
    valid = list(known)
    for name in names:
        if name not in valid:
            raise UserError(f"{where}: unknown {what} {name!r}{suggest_name(name, valid)}")


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error: ``; did you mean 'dim'?``, or the list of known names."""
    names = sorted(set(known))
    if close := find_nearest_name(name, names):
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def find_nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the known name that a user probably means; "" if none is close.

    A remedy that is a command takes this name, not the name that is wrong.
    """
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)), "")

"""Exceptions whose message is complete for the user."""

from collections.abc import Iterable


class UserError(ValueError):
    """User error. The message names the file or key, the expected value and the remedy.

    The command line prints the message without a traceback and exits with 2.
    """


class TerminatedError(KeyboardInterrupt):
    """End of a run after SIGTERM. The message states what was saved and how to resume.

    The command line prints the message and exits with 143 (128 + SIGTERM).
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error: ``; did you mean 'dim'?``, or the list of known names."""
    from difflib import get_close_matches

    names = sorted(set(known))
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""

"""The exceptions that carry a message for people."""

from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake. The message is complete: which file or key, what was expected, what to do.

    The command line prints it as it is, without a traceback, and exits with 2.
    """


class TerminatedError(KeyboardInterrupt):
    """SIGTERM ended the run in good order. The message says what was kept and how to go on.

    The command line prints it, and exits with 143 (128 + SIGTERM).
    """


def first_line(problem: BaseException) -> str:
    """What a library's exception says, for a message of ours: its first line, 200 characters."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]


def suggest_name(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: ``; did you mean 'dim'?`` or the list of what is known."""
    from difflib import get_close_matches

    names = sorted(set(known))
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""

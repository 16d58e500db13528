"""The error for people who give scores or claims."""

from collections.abc import Iterable
from difflib import get_close_matches


class EvidenceError(ValueError):
    """Wrong scores, claims or options. The message names the place and the remedy."""


def require_known(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """Raise EvidenceError for the first name that is not known, with the nearest known name.

    Args:
        names: names that the user gave.
        known: the valid names.
        where: option or key of the names.
        what: kind of the named thing, such as ``task``.
    """
    valid = sorted(set(known))
    for name in names:
        if name not in valid:
            close = get_close_matches(name, valid, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(valid)}"
            raise EvidenceError(f"{where}: unknown {what} {name!r}{hint if valid else ''}")

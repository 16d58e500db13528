"""Text that is shown: control characters of data are escaped, and a number has its noun.

Titles, file names and error messages can contain data of others. An escape sequence in them could
write to the clipboard (OSC 52), recolour a terminal or hide text. ``console`` and the log of a job
pass all text through this module.
"""

import re

#: A space at which a line of a table ends only if its words do not fit together: before a unit.
NO_BREAK_SPACE = "\u00a0"

#: Control characters except tab and newline; marks that reorder text; halves of a character, which
#: no encoding can print.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}]")
_UNSAFE_IN_LINE = re.compile(f"[\t\n{_CONTROLS}]")
#: Escape sequences that set colours, which do no harm.
_COLOURS = re.compile(r"(\x1b\[[0-9;]{0,32}m)")


def format_plural(number: int, noun: str) -> str:
    """Return a number with its noun: ``2, "seed" -> "2 seeds"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten_text(text: str, longest: int) -> str:
    """Return a text of at most ``longest`` characters; a cut one ends with an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def escape_controls(text: str) -> str:
    r"""Return a text whose control characters are written as ``\u001b``; lines are kept.

    The result of a JSON document is the same document, because JSON has these escapes.
    """
    return _UNSAFE.sub(_escape, text)


def escape_line(text: str) -> str:
    """Return a text in one line: tabs and newlines are escaped too."""
    return _UNSAFE_IN_LINE.sub(_escape, text)


def escape_log(text: str) -> str:
    """Return part of a log with its colours and without other escape sequences."""
    # The odd parts are the sequences of the group.
    parts = _COLOURS.split(text)
    return "".join(part if i % 2 else escape_controls(part) for i, part in enumerate(parts))


def _escape(found: re.Match[str]) -> str:
    return {"\n": r"\n", "\t": r"\t"}.get(found[0], f"\\u{ord(found[0]):04x}")

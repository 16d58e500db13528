"""Layout of tables: the columns that fit a terminal, and lines of cells without broken words.

:func:`draw_table` is called by :mod:`skillnet_platform.console`. A table that is too wide is
divided into blocks of columns:

    name    lr      score         name    text_classification    …
    first   0.001   0.8123        first   0.7915                 …
"""

import re
from collections.abc import Iterable, Sequence
from typing import IO, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skillnet_platform.terminal_text import NO_BREAK_SPACE

#: Columns of a terminal between two columns of a table, and of its two edges.
GAP = 3
EDGES = 4

#: Scripts without spaces, whose lines end after any character.
_WIDE = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
    "\U00020000-\U0003fffd"
)
_WORDS = re.compile(f"[ \t{NO_BREAK_SPACE}]*(?:[{_WIDE}]|[^ \t{NO_BREAK_SPACE}{_WIDE}]+)")
_BLANKS_AT_END = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)
_PHRASES = re.compile(f"[ \t]*(?:[{_WIDE}]|[^ \t{_WIDE}]+)")
#: Space between a number and its per cent sign.
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=%)")


def draw_table(
    stream: IO[str],
    title: str,
    columns: Sequence[Sequence[str]],
    numeric: Sequence[bool],
    caption: str,
    width: int,
) -> None:
    """Write a table whose texts have no control characters.

    Args:
        stream: a terminal or a file.
        title: above the table.
        columns: texts of each column, the header first.
        numeric: for each column, whether it is right-aligned.
        caption: below the table; "" for none.
        width: columns of the terminal.
    """
    columns = [[_BEFORE_UNIT.sub(NO_BREAK_SPACE, text) for text in column] for column in columns]
    blocks = arrange_columns(columns, width)
    widest = max((measure_block(block.values()) for block in blocks), default=0)
    screen = Console(file=stream, width=max(width, widest), highlight=False)
    with screen.capture() as drawn:
        _print_lines(screen, title, width, "table.title")
        for block in blocks:
            table = Table(box=box.SIMPLE_HEAD)
            # Plain text has markup such as `[/b]`; only `Text` is shown as it is.
            wrapped = [
                [Text("\n".join(wrap_words(text, room))) for text in columns[number]]
                for number, room in block.items()
            ]
            for (number, room), texts in zip(block.items(), wrapped, strict=True):
                justify: Literal["left", "right"] = "right" if numeric[number] else "left"
                table.add_column(texts[0], justify=justify, width=room)
            for row in zip(*(texts[1:] for texts in wrapped), strict=True):
                table.add_row(*row)
            screen.print(table)
        if caption:
            _print_lines(screen, caption, width, "table.caption")
    # Blanks at the end of a line would fill lines of their own on a narrower terminal.
    stream.write(_BLANKS_AT_END.sub(r"\1", drawn.get()))


def wrap_words(text: str, width: int) -> list[str]:
    """Divide a text into lines; no word is broken, so a longer word makes a longer line.

    Args:
        text: with newlines, and with :data:`NO_BREAK_SPACE` between words of one line.
        width: columns of a line on a terminal.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for phrase in _PHRASES.findall(paragraph):
            is_long = cell_len(phrase.strip()) > width
            for part in _WORDS.findall(phrase) if is_long else (phrase,):
                if line and cell_len(line + part) > width:
                    lines.append(line)
                    line = part.lstrip()
                else:
                    line += part
        lines.append(line)
    return [line.replace(NO_BREAK_SPACE, " ").rstrip() for line in lines]


def arrange_columns(columns: Sequence[Sequence[str]], width: int) -> list[dict[int, int]]:
    """Divide the columns of a table into blocks that fit a width without broken words.

    Args:
        columns: texts of each column, the header first.
        width: columns of the terminal.

    Returns:
        A mapping per block: number of a column -> its width. Later blocks begin with the first
        column, which names the row. Only a word that is too long for ``width`` makes a block wider.
    """
    least = [_find_longest(_WORDS, column) for column in columns]
    unbroken = [_find_longest(_PHRASES, column) for column in columns]
    natural = [
        min(max((_longest_line(text) for text in column), default=0), max(width, least[number]))
        for number, column in enumerate(columns)
    ]
    blocks: list[list[int]] = [[]]
    for number in range(len(columns)):
        together = [*blocks[-1], number]
        if len(together) > 2 and measure_block(least[n] for n in together) > width:
            blocks.append([0, number])
        else:
            blocks[-1] = together
    return [_fit_widths(block, (unbroken, least), natural, width) for block in blocks]


def measure_block(widths: Iterable[int]) -> int:
    """Return the width of a table whose columns have these widths."""
    listed = list(widths)
    return sum(listed) + GAP * (len(listed) - 1) + EDGES


def _fit_widths(
    block: Sequence[int], floors: Sequence[Sequence[int]], natural: Sequence[int], width: int
) -> dict[int, int]:
    widths = {number: natural[number] for number in block}
    # Words of one line part only if all other line breaks do not suffice.
    for least in floors:
        while measure_block(widths.values()) > width:
            wide = [number for number in block if widths[number] > least[number]]
            if not wide:
                break
            # The widest column loses least by one more line break.
            widths[max(wide, key=lambda number: widths[number])] -= 1
    return widths


def _find_longest(pattern: re.Pattern[str], column: Sequence[str]) -> int:
    """Return the columns of the longest match of a pattern in the cells of a table's column."""
    lines = (line for text in column for line in text.split("\n"))
    return max(
        (cell_len(word.strip()) for line in lines for word in pattern.findall(line)), default=0
    )


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _print_lines(screen: Console, text: str, width: int, style: str) -> None:
    screen.print(Text("\n".join(wrap_words(text, width)), style=style), soft_wrap=True)

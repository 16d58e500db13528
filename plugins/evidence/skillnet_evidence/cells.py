"""Tables of texts for every output: terminals, pages and Markdown show one object."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

#: A space at which a line of a table ends only if its words do not fit together: before a unit.
NO_BREAK_SPACE = "\u00a0"


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Args:
        text: the value.
        small: its interval, shown below the value.
        mark: mark of a significant difference.
        is_best: whether the value is the best of its column.
        is_prose: whether the text is a sentence, which the page wraps.
    """

    text: str
    small: str = ""
    mark: str = ""
    is_best: bool = False
    is_prose: bool = False

    def to_lines(self) -> str:
        """Return the cell with the interval on a second line, which keeps columns narrow."""
        # An interval is one word for the layout: a line must not end within it.
        small = self.small.replace(" ", NO_BREAK_SPACE)
        return f"{self.text}{self.mark}" + (f"\n{small}" if small else "")

    def to_line(self) -> str:
        """Return the cell as one line of plain text."""
        interval = f" ({self.small})" if self.small else ""
        return f"{self.text}{self.mark}{interval}"

    def to_html(self) -> str:
        """Return the cell as an escaped element of HTML."""
        kind = "prose" if self.is_prose else "best" if self.is_best else ""
        mark = f'<span class="mark">{escape(self.mark)}</span>' if self.mark else ""
        small = f"<small>{escape(self.small)}</small>" if self.small else ""
        css = f' class="{kind}"' if kind else ""
        return f"<td{css}>{escape(self.text)}{mark}{small}</td>"


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Args:
        title: title of the table.
        columns: column names; the first column names the row.
        rows: cells of each row.
        caption: text below the table.
        collapsed: omit the table on the terminal and in MLflow. The page folds all tables but one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""
    collapsed: bool = False

    def to_markdown(self) -> str:
        """Return the table with its title and caption as Markdown."""
        lines = [[cell.to_line() for cell in row] for row in self.rows]
        parts = [f"#### {self.title}", markdown_table(self.columns, lines), self.caption]
        return "\n\n".join(part for part in parts if part)

    def to_html(self) -> str:
        """Return the table with its caption, without its title, as escaped HTML."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.columns)
        rows = "".join(
            f'<tr><th scope="row">{escape(row[0].text)}</th>'
            f"{''.join(cell.to_html() for cell in row[1:])}</tr>"
            for row in self.rows
        )
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
            f"</table></div>{caption}"
        )


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Iterable[TableCell | str]],
    caption: str = "",
    collapsed: bool = True,
) -> ReportTable:
    """Return a table whose cells may be given as plain texts.

    Args:
        title: title of the table.
        columns: column names; the first column names the row.
        rows: cells of each row.
        caption: text below the table.
        collapsed: omit the table on the terminal and in MLflow.
    """
    cells = [[TableCell(x) if isinstance(x, str) else x for x in row] for row in rows]
    return ReportTable(title, list(columns), cells, caption, collapsed)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: int = 0) -> str:
    """Return a Markdown table.

    Args:
        columns: titles.
        cells: lines of cells; pipe characters are escaped.
        numeric: number of the last columns that are right-aligned.
    """
    marks = ["---"] * (len(columns) - numeric) + ["---:"] * numeric
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (columns, marks, *cells)
    )

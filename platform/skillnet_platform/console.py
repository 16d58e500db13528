"""Terminal output: messages, tables, progress, and the JSON document of ``--json``.

Results go to standard output, everything else to standard error. After :func:`begin_json`, which
``--json`` calls, standard output carries only the document of :func:`emit_json`; the output of
libraries goes to standard error.

Every text can contain data of others, so control characters and markup in it are escaped here.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import IO, Any

from skillnet_platform.secret_uri import redact_secrets
from skillnet_platform.terminal_text import NO_BREAK_SPACE, escape_controls, escape_line, escape_log

#: Columns of a terminal for the bar, the counts, the rate and the remaining time.
COLUMNS_OF_NUMBERS = 60
#: Columns of the shortest label.
LEAST_LABEL = 12

SECONDS_BETWEEN_LINES = 10.0
#: Seconds after which a rate is shown.
SHORTEST_RATED_S = 0.05
#: Columns of a line where no terminal and no variable gives another number.
COLUMNS_OF_FILES = 120
#: See :func:`changed_messages`.
_change: Callable[[str], str] = str


class OutputError(Exception):
    """Standard output cannot take the results. The cause is an ``OSError``."""


class _JsonOutput:
    """State of the redirection of standard output to standard error."""

    stream: IO[str] | None = None
    saved_fd: int | None = None
    saved_stdout: Any = None


def begin_json() -> None:
    """Reserve standard output for :func:`emit_json`; other output goes to standard error."""
    if _JsonOutput.stream is not None:
        return
    sys.stdout.flush()
    _JsonOutput.saved_stdout = sys.stdout
    if _fileno(sys.stdout) == 1:
        # Libraries in C and child processes write to the descriptor, not to sys.stdout.
        _JsonOutput.saved_fd = os.dup(1)
        os.dup2(2, 1)
        _JsonOutput.stream = open(  # noqa: SIM115
            _JsonOutput.saved_fd, "w", encoding="utf-8", closefd=False
        )
    else:
        _JsonOutput.stream = sys.stdout
        sys.stdout = sys.stderr


def end_json() -> None:
    """Undo :func:`begin_json`, if it was called."""
    stream = _JsonOutput.stream
    if stream is None:
        return
    # The reader may have left, but the descriptors must be restored.
    discard_output()
    if _JsonOutput.saved_fd is not None:
        sys.stdout.flush()
        os.dup2(_JsonOutput.saved_fd, 1)
        os.close(_JsonOutput.saved_fd)
    else:
        sys.stdout = _JsonOutput.saved_stdout
    _JsonOutput.stream = _JsonOutput.saved_fd = _JsonOutput.saved_stdout = None


def open_standard_streams() -> None:
    """Replace streams that were closed before this process started (``>&-``), and raw ones.

    The next file that is opened, such as a database, would get the number of the closed stream,
    and libraries would write their messages to it.
    """
    out: Any = sys.stdout
    if sys.stdout is sys.__stdout__ and isinstance(getattr(out, "buffer", None), io.RawIOBase):
        # With PYTHONUNBUFFERED, which images set, Python drops what a nearly full disk or a pipe
        # does not take of one write, without an error.
        sys.stdout = open(  # noqa: SIM115
            out.fileno(), "w", 1, encoding=out.encoding, errors=out.errors, closefd=False
        )
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        # Results that nobody gets are an error; messages that nobody gets are not.
        reads = os.O_WRONLY if name == "stderr" else os.O_RDONLY
        opened = os.open(os.devnull, reads)
        os.set_inheritable(opened, True)
        mode = "w" if number else "r"
        setattr(sys, name, open(opened, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def write_results() -> Iterator[IO[str]]:
    """Provide standard output for results, and write them when the block ends.

    Raises:
        OutputError: they cannot be written, because the disk is full or the reader left.
    """
    stream = _JsonOutput.stream or sys.stdout
    try:
        yield stream
        stream.flush()
    except OSError as error:
        raise OutputError(str(error)) from error


def discard_output() -> None:
    """Discard what a stream cannot take. Python would try to write it again at exit."""
    for stream in (_JsonOutput.stream or sys.stdout, sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()


def print_output(text: str) -> None:
    """Print a text, such as the help of a command, on standard output."""
    with write_results() as stream:
        stream.write(f"{escape_controls(text)}\n")


def json_wanted() -> bool:
    """Return whether the running command got ``--json``."""
    return _JsonOutput.stream is not None


def emit_json(obj: Any) -> None:
    """Write one JSON document to standard output: the result of a command under ``--json``.

    Args:
        obj: dataclasses, mappings, lists, paths and numpy values. NaN and infinities become null.
    """
    with write_results() as stream:
        stream.write(_format_json(obj, indent=2) + "\n")


def print_json_lines(objects: Iterable[Any]) -> None:
    """Print results as JSON, one object per line, on standard output."""
    with write_results() as stream:
        stream.writelines(f"{_format_json(each)}\n" for each in objects)


@contextlib.contextmanager
def changed_messages(change: Callable[[str], str]) -> Iterator[None]:
    """Change the notes, warnings and errors that the process prints in a block.

    Args:
        change: message -> message.
    """
    global _change
    before, _change = _change, change
    try:
        yield
    finally:
        _change = before


def print_note(message: str) -> None:
    """Print a message on standard error."""
    _print_line(message)


def print_warning(message: str) -> None:
    """Print a warning on standard error."""
    _print_line(message, f"{_paint('warning:', '33')} ")


def print_error(message: str) -> None:
    """Print an error on standard error."""
    _print_line(message, f"{_paint('error:', '31')} ")


def print_log(text: str) -> None:
    """Print part of the log of another process, with its colours, where results go."""
    with _show_results() as stream:
        stream.write(escape_log(text))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = ""
) -> None:
    """Print a table: to standard output, or to standard error under ``--json``.

    Columns of numbers (or "–") are right-aligned. Floats keep 4 digits; pass text for others. A
    table that is too wide continues below with the first column, so that no word is broken.

    Args:
        title: above the table.
        columns: names of the columns.
        rows: cells of each row.
        caption: below the table.
    """
    from skillnet_platform.table_layout import draw_table

    cells = [[_cell(value) for value in row] for row in rows]
    texts = [
        [escape_line(column), *(escape_controls(row[index]) for row in cells)]
        for index, column in enumerate(columns)
    ]
    numeric = [
        bool(cells) and all(_is_numeric(row[index]) for row in cells)
        for index in range(len(columns))
    ]
    with _show_results() as stream:
        draw_table(
            stream, escape_line(title), texts, numeric, escape_line(caption), terminal_width(stream)
        )


class ProgressCounter:
    """Running count with a rate, a remaining time and a short text.

    Args:
        label: activity.
        total: number of units; ``None`` if unknown.
        unit: plural of the counted thing.
        done: units of an earlier run.
    """

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        #: Units of a part that began and has not ended.
        self._begun = 0
        self.words = ""
        self.start = time.monotonic()
        self._bar: Any = None
        self._said = self.start
        self._printed: tuple[int, str] | None = None

    def advance(self, count: int = 1, words: str | None = None) -> None:
        """Add ``count`` units, and show a text such as a loss or a file name."""
        self.done += count
        if words is not None:
            self.words = words
        if self._bar is not None:
            speed = ", ".join(self._speed_texts())
            self._bar.show(self.done, self.total, escape_line(speed), escape_line(self.words))
        # Each step would otherwise add a line to the log of a job.
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            # Where nothing was done, the line would be that of before.
            if self._printed != (self.done, self.words):
                self._print_lines()

    def begin_part(self, words: str, count: int, left: int) -> None:
        """Add the units of the part before, and show the name of the next one.

        Args:
            words: name of the part.
            count: units of the part, which :meth:`end_part` or the next call adds.
            left: units of this part and of all that follow; they decide the total.
        """
        before, self._begun = self._begun, count
        self.total = self.done + before + left
        self.advance(before, words)

    def end_part(self) -> None:
        """Add the units of the last part."""
        before, self._begun = self._begun, 0
        if before:
            self.advance(before)

    def found(self, count: int) -> None:
        """Add units of earlier work, which do not count for the rate."""
        self.done += count
        self.first += count

    @property
    def rate(self) -> float:
        """Return the units per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """Return one line: ``training: 40/100 steps, 3.1 steps/s, 0:19 left, loss 2.31``."""
        return ", ".join([self._numbers(), self.words] if self.words else [self._numbers()])

    def _print_lines(self) -> None:
        """Print the line, with the words below the numbers if ``$COLUMNS`` leaves no room."""
        self._printed = (self.done, self.words)
        width, line = _given_columns(), escape_line(self.line())
        if width:
            from skillnet_platform.table_layout import wrap_words

            if len(wrap_words(line, width)) > 1:
                words = wrap_words(escape_line(self.words), width - 2)
                line = "\n  ".join([escape_line(self._numbers()), *words])
        _print_line(line)

    def _numbers(self) -> str:
        done = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        return f"{self.label}: {', '.join([f'{done} {self.unit}', *self._speed_texts()])}"

    def _speed_texts(self) -> list[str]:
        """Return the rate, and the remaining time if it is known."""
        # All units of a short run can be read at once; their rate would be that of the reading.
        if time.monotonic() - self.start < SHORTEST_RATED_S:
            return []
        rate = self.rate
        texts = [f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.2g} {self.unit}/s"]
        if self.total and rate > 0 and self.done < self.total:
            texts.append(f"{_clock((self.total - self.done) / rate)} left")
        return texts


@contextlib.contextmanager
def show_progress(
    label: str, total: int | None = None, unit: str = "steps", done: int = 0
) -> Iterator[ProgressCounter]:
    """Show progress in a block: a bar on a terminal, else a line every 10 s.

    Args:
        label: activity.
        total: number of units; ``None`` if unknown.
        unit: plural of the counted thing.
        done: units of an earlier run.
    """
    state = ProgressCounter(label, total, unit, done)
    if not _is_terminal(sys.stderr):
        yield state
        state.end_part()
        if state.done > state.first and state._printed != (state.done, state.words):
            state._print_lines()
        return
    with _open_bar(escape_line(label), total, done) as bar:
        state._bar = bar
        yield state
        state.end_part()


@contextlib.contextmanager
def show_live_table(
    title: str, columns: Sequence[str]
) -> Iterator[Callable[[Sequence[Sequence[Any]]], None]]:
    """Show a table that changes in a block; give its rows to the function again and again.

    A terminal shows the table in place until the block ends. Elsewhere a line follows each change
    of the second column of a row.

    Args:
        title: above the table.
        columns: names of the columns: the name of a row, its state, and more.
    """
    if not _is_terminal(sys.stderr):
        before: dict[str, str] = {}

        def print_changes(rows: Sequence[Sequence[Any]]) -> None:
            for name, state, *more in ([_cell(value) for value in row] for row in rows):
                if before.get(name) != state:
                    before[name] = state
                    known = [text for text in more if text != "–"]
                    _print_line(escape_line(f"{name}: {', '.join([state, *known])}"))

        yield print_changes
        return
    # As for a bar, rich is imported only where it draws.
    from rich import box
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def draw(rows: Sequence[Sequence[Any]]) -> Table:
        table = Table(*columns, title=Text(escape_line(title)), box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(escape_line(_cell(value))) for value in row))
        return table

    with Live(draw([]), console=Console(stderr=True), transient=True) as live:
        yield lambda rows: live.update(draw(rows))


def _open_bar(label: str, total: int | None, done: int) -> Any:
    """Return a bar with step, rate and remaining time; losses or file names are below it.

    The numbers must stay visible on every terminal, so a long label and the bar give way to them.

    Args:
        label: activity, without control characters.
        total: number of units; ``None`` if unknown.
        done: units of an earlier run.
    """
    # `skillnet --help` draws no bar, and importing rich takes longer than it.
    from rich import progress
    from rich.console import Console, RenderableType
    from rich.table import Column
    from rich.text import Text

    from skillnet_platform.table_layout import wrap_words

    class TerminalBar(progress.Progress):
        words = ""

        def show(self, done: int, total: int | None, speed: str, words: str) -> None:
            self.words = words
            self.update(number, completed=done, total=total, speed=speed)

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if self.words:
                # A line ends between two losses, not between a task and its loss.
                phrases = (part.replace(" ", NO_BREAK_SPACE) for part in self.words.split(", "))
                for line in wrap_words(", ".join(phrases), self.console.width):
                    yield Text(line, no_wrap=True, overflow="ellipsis")

    screen = Console(stderr=True)
    room = max(screen.width - COLUMNS_OF_NUMBERS, LEAST_LABEL)
    label_column = Column(no_wrap=True, overflow="ellipsis", max_width=room)
    bar = TerminalBar(
        # Brackets in the name of a file are no markup.
        progress.TextColumn("{task.description}", markup=False, table_column=label_column),
        progress.BarColumn(None, table_column=Column(ratio=1)),
        progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        # Rich forgets steps after 30 s, so slow runs would have no remaining time.
        progress.TextColumn("{task.fields[speed]}", markup=False),
        console=screen,
    )
    number = bar.add_task(label, total=total, completed=done, speed="")
    return bar


def format_minutes(seconds: float) -> str:
    """Format a duration: ``75 -> "1 min 15 s"``, and with tenths below a minute."""
    rounded = round(seconds)
    return f"{rounded // 60} min {rounded % 60} s" if rounded >= 60 else f"{seconds:.1f} s"


def _print_line(text: str, prefix: str = "") -> None:
    # A lost message, for example on a full disk, must not end the work.
    with contextlib.suppress(OSError):
        line = escape_controls(redact_secrets(_change(text)))
        print(f"{prefix}{line}", file=sys.stderr, flush=True)


def _show_results() -> contextlib.AbstractContextManager[Any]:
    """Return the stream for people: under ``--json``, results for programs have the other one."""
    return contextlib.nullcontext(sys.stderr) if json_wanted() else write_results()


def _format_json(obj: Any, indent: int | None = None) -> str:
    text = json.dumps(to_json_types(obj), ensure_ascii=False, indent=indent, allow_nan=False)
    return escape_controls(text)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)


def _is_numeric(text: str) -> bool:
    bare = text.strip().rstrip("%").replace(",", "")
    try:
        float(bare)
    except ValueError:
        return bare in ("–", "-", "")
    return True


def to_json_types(obj: Any) -> Any:
    """Return an object as JSON types: NaN and infinities become ``None``."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_json_types(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {str(key): to_json_types(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [
            to_json_types(value)
            # The order of a set differs between processes, and the document must not.
            for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)
        ]
    if isinstance(obj, PurePath):
        return str(obj)
    if hasattr(obj, "tolist") and not isinstance(obj, (str, bytes)):
        return to_json_types(obj.tolist())
    # JSON has no NaN: a strict parser would refuse the complete document.
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def _fileno(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def terminal_width(stream: Any) -> int:
    """Return the columns of a line on a stream: ``$COLUMNS``, else of the terminal, else 120."""
    number = _fileno(stream) if _is_terminal(stream) else None
    columns = _given_columns()
    if not columns and number is not None:
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size(number).columns
    # Some terminals have no size.
    return columns or COLUMNS_OF_FILES


def _given_columns() -> int:
    """Return ``$COLUMNS``; 0 if it is no number."""
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and len(given) < 6 else 0


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _paint(text: str, colour: str) -> str:
    if not _is_terminal(sys.stderr) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"

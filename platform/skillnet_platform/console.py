"""What a person sees: notes, tables, progress; and the one JSON document that a program reads.

Results go to standard output, everything else to standard error. After ``begin_json`` (which
``--json`` calls) standard output carries nothing but what ``emit_json`` writes, whatever
libraries print.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import IO, Any

SECONDS_BETWEEN_LINES = 10.0


class _JsonOutput:
    """Where the document goes while standard output is turned to standard error."""

    stream: IO[str] | None = None
    saved_fd: int | None = None
    saved_stdout: Any = None


def begin_json() -> None:
    """Keep standard output for ``emit_json``: whatever else is printed goes to standard error."""
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
    """Undo ``begin_json``; does nothing without it."""
    stream = _JsonOutput.stream
    if stream is None:
        return
    with contextlib.suppress(BrokenPipeError):
        stream.flush()
    if _JsonOutput.saved_fd is not None:
        sys.stdout.flush()
        os.dup2(_JsonOutput.saved_fd, 1)
        os.close(_JsonOutput.saved_fd)
    else:
        sys.stdout = _JsonOutput.saved_stdout
    _JsonOutput.stream = _JsonOutput.saved_fd = _JsonOutput.saved_stdout = None


def json_wanted() -> bool:
    """Whether ``--json`` was given to the command that is running."""
    return _JsonOutput.stream is not None


def emit_json(obj: Any) -> None:
    """Write one JSON document to standard output: the result of a command under ``--json``.

    Takes dataclasses, paths and numpy values; NaN and infinities become null.
    """
    stream = _JsonOutput.stream or sys.stdout
    stream.write(json.dumps(plain(obj), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    stream.flush()


def note(message: str) -> None:
    """Say something to the user, on standard error."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say what may be wrong, on standard error."""
    print(f"{_paint('warning:', '33')} {message}", file=sys.stderr, flush=True)


def error(message: str) -> None:
    """Say what went wrong, on standard error."""
    print(f"{_paint('error:', '31')} {message}", file=sys.stderr, flush=True)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = ""
) -> None:
    """Print a table: to standard output, or to standard error under ``--json``.

    Columns whose cells are all numbers (or "–") are set to the right. Floats keep 4 digits;
    give strings for anything else.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_numeric(row[index]) for row in cells)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(value) for value in row))
    stream = sys.stderr if json_wanted() else sys.stdout
    Console(file=stream, width=None if _is_terminal(stream) else 120, highlight=False).print(drawn)
    stream.flush()


class Progress:
    """A running count, with words beside it."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.words = ""
        self.start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._said = self.start

    def advance(self, count: int = 1, words: str | None = None) -> None:
        """Count ``count`` more; ``words`` (a loss, a file's name) stand beside the bar."""
        self.done += count
        if words is not None:
            self.words = words
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, rate=self._rate_text(), words=self.words
            )
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def found(self, count: int) -> None:
        """Count what was done before and is only seen now: it says nothing of the rate."""
        self.done += count
        self.first += count

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """The plain form: ``training: 40/100 steps, 3.1 steps/s, 0:19 left, loss 2.31``."""
        parts = [
            f"{self.done}/{self.total} {self.unit}" if self.total else f"{self.done} {self.unit}"
        ]
        parts.append(self._rate_text())
        if self.total and self.rate > 0 and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / self.rate)} left")
        if self.words:
            parts.append(self.words)
        return f"{self.label}: {', '.join(parts)}"

    def _rate_text(self) -> str:
        rate = self.rate
        return f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.2g} {self.unit}/s"


@contextlib.contextmanager
def progress(
    label: str, total: int | None = None, unit: str = "steps", done: int = 0
) -> Iterator[Progress]:
    """Show progress with rate and remaining time: a bar on a terminal, else a line every 10 s.

    Args:
        label: what is being done.
        total: how many units there are, or None if nobody knows.
        unit: the plural of what is counted.
        done: units already done before (a resumed run).
    """
    state = Progress(label, total, unit, done)
    if not _is_terminal(sys.stderr):
        yield state
        if state.done > state.first:
            print(state.line(), file=sys.stderr, flush=True)
        return
    from rich import progress as bars
    from rich.console import Console

    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[words]}", markup=False),
        console=Console(stderr=True),
    ) as bar:
        state._bar = bar
        state._task = bar.add_task(label, total=total, completed=done, rate="", words="")
        yield state


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


def plain(obj: Any) -> Any:
    """Dataclasses, paths and numpy values as what JSON knows; NaN and infinities as None."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [
            plain(value) for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)
        ]
    if isinstance(obj, PurePath):
        return str(obj)
    if hasattr(obj, "tolist") and not isinstance(obj, (str, bytes)):
        return plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def _fileno(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _paint(text: str, colour: str) -> str:
    if not _is_terminal(sys.stderr) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"

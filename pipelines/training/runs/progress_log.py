"""Progress file of a run: one JSON line per report, followed by the driver and read by plots."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.training.runs.layout import TRAINED
from skillnet_platform import console, storage

PROGRESS = "progress.jsonl"


class ProgressFile:
    """Progress file that rank 0 appends to.

    A partial last line, left by a full disk or a kill, is removed first: the next line would be
    joined to it, and neither could be read.

    Args:
        path: location of the file on the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
        # No buffer: Python would write a rejected line again at close, and hide the first error.
        self._stream = path.open("ab", buffering=0)

    def append(self, **values: Any) -> None:
        """Append one line of values.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps({"time": time.time(), **values}).encode() + b"\n"
        with storage.disk_guard(self._path):
            while line:
                line = line[self._stream.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@contextlib.contextmanager
def follow_progress(path: Path, steps: int) -> Iterator[None]:
    """Show progress bars from the lines that rank 0 appends, inside a block.

    The first bar counts the steps of the training. After it a second one counts the rows of the
    final evaluation, and a third one those of the source of a growth.

    Args:
        path: location of the progress file.
        steps: in total.
    """
    ended = threading.Event()
    # Lines of an earlier process of this run are not shown again.
    start = path.stat().st_size if path.is_file() else 0
    summary = path.with_name(TRAINED)
    summary_before = _file_state(summary)

    def follow() -> None:
        position, bar, stack = start, None, contextlib.ExitStack()
        is_trained = is_evaluating = False
        left = 0
        with stack:
            while True:
                # Before the lines are read, so that the last line is shown.
                last = ended.is_set() or _file_state(summary) != summary_before
                lines, position = _new_lines(path, position)
                for line in lines:
                    if "evaluating" in line:
                        before, left = left, line.get("left", 0)
                        if bar is None or not is_evaluating or left > before:
                            stack.close()
                            bar = stack.enter_context(
                                console.show_progress("evaluating", None, "rows")
                            )
                            is_trained = is_evaluating = True
                        bar.begin_part(line["evaluating"], line.get("rows", 0), left)
                    elif "losses" in line and not is_trained:
                        if bar is None:
                            bar = stack.enter_context(
                                console.show_progress("training", steps, "steps", done=line["step"])
                            )
                        bar.advance(line["step"] - bar.done, line["losses"])
                        is_trained = bar.done >= steps
                if last:
                    return
                if is_trained and not is_evaluating:
                    # The finished bar must not stay on the screen while rank 0 saves the model.
                    stack.close()
                ended.wait(0.3)

    # A thread follows the file, because the main thread waits for the training.
    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_pace(path: Path, start: int = 0) -> tuple[int, float]:
    """Return the newest step of a progress file, and the steps per second of its last lines.

    Args:
        path: location of the file, which may be missing.
        start: bytes at its beginning that are ignored.

    Returns:
        Step and steps per second, each 0 if unknown.
    """
    if not path.is_file():
        return 0, 0.0
    # The last lines are enough, and the file grows with every step.
    lines, _ = _new_lines(path, max(path.stat().st_size - 4096, start))
    if not lines:
        return 0, 0.0
    first, last = lines[0], lines[-1]
    pace = 0.0
    # A corrupt number may be of any size.
    with contextlib.suppress(OverflowError, ZeroDivisionError):
        pace = (last["step"] - first["step"]) / (last.get("time", 0) - first.get("time", 0))
    return last["step"], pace if pace > 0 else 0.0


def _file_state(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    about = path.stat()
    return about.st_mtime_ns, about.st_size, about.st_ino


def _new_lines(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """Complete lines after a position, and the position after them."""
    if not path.is_file():
        return [], position
    with path.open("rb") as stream:
        stream.seek(position)
        content = stream.read()
    complete = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in complete.splitlines():
        # Skip lines that a disk corrupted.
        # A corrupt line must not end the display of a running training.
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and _is_line(values):
                lines.append(values)
    return lines, position + len(complete)


def _is_line(values: dict[str, Any]) -> bool:
    """Whether a line has the form that :class:`ProgressFile` writes."""
    metrics = values.get("metrics", {})
    return (
        type(values.get("step")) is int
        and isinstance(values.get("time", 0), (int, float))
        and isinstance(values.get("losses", ""), str)
        and isinstance(values.get("evaluating", ""), str)
        and type(values.get("rows", 0)) is int
        and type(values.get("left", 0)) is int
        and isinstance(metrics, dict)
        and all(isinstance(value, (int, float)) for value in metrics.values())
    )


def read_metric_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return metric -> (step, value) pairs; the later line wins where a step is written twice."""
    history: dict[str, dict[int, float]] = {}
    for line in _new_lines(path, 0)[0]:
        for name, value in line.get("metrics", {}).items():
            history.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in history.items()}

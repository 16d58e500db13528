"""The progress file of a run: a line for each metric, which the driver follows and plots read."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillnet_platform import console, storage

PROGRESS = "progress.jsonl"


class ProgressFile:
    """What rank 0 appends to, a line at a time.

    A line that a full disk or a kill cut short is taken away first: the next one would be joined
    to it, and none of the two could be read.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
        # Without a buffer: what did not fit would be tried again at the end, and hide the reason.
        self._stream = path.open("ab", buffering=0)

    def say(self, **values: Any) -> None:
        """Append a line.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps({"time": time.time(), **values}).encode() + b"\n"
        with storage.disk_guard(self._path):
            while line:
                line = line[self._stream.write(line) :]

    def close(self) -> None:
        """Nothing is left to write."""
        self._stream.close()


@contextlib.contextmanager
def followed(path: Path, steps: int) -> Iterator[None]:
    """Show the lines that rank 0 appends to the progress file, while a block runs."""
    ended = threading.Event()
    # Lines of an earlier part of this run are not news.
    place = path.stat().st_size if path.is_file() else 0

    def follow() -> None:
        position, bar, shown = place, None, contextlib.ExitStack()
        with shown:
            while True:
                last = ended.is_set()
                lines, position = _new_lines(path, position)
                for line in lines:
                    if "words" not in line:
                        continue
                    if bar is None:
                        bar = shown.enter_context(
                            console.progress("training", steps, "steps", done=line["step"])
                        )
                    bar.advance(line["step"] - bar.done, line["words"])
                if last:
                    return
                ended.wait(0.3)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _new_lines(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines after a position, and the position after them."""
    if not path.is_file():
        return [], position
    with path.open("rb") as stream:
        stream.seek(position)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    told = []
    for line in whole.splitlines():
        # Two lines in one, from before cut ones were taken away, and what a disk altered.
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and _is_line(values):
                told.append(values)
    return told, position + len(whole)


def _is_line(values: dict[str, Any]) -> bool:
    """Whether :class:`ProgressFile` may have written it."""
    metrics = values.get("metrics", {})
    return (
        type(values.get("step")) is int
        and isinstance(values.get("words", ""), str)
        and isinstance(metrics, dict)
        and all(isinstance(value, (int, float)) for value in metrics.values())
    )


def history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of a progress file; of a step written twice the later one."""
    found: dict[str, dict[int, float]] = {}
    for line in _new_lines(path, 0)[0]:
        for name, value in line.get("metrics", {}).items():
            found.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items()}

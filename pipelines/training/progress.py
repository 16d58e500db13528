"""The progress file of a run: a line for each metric, which the driver follows and plots read."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillnet_platform import console

PROGRESS = "progress.jsonl"


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
    return [json.loads(line) for line in whole.splitlines()], position + len(whole)


def history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of a progress file; of a step written twice the later one."""
    found: dict[str, dict[int, float]] = {}
    for line in _new_lines(path, 0)[0]:
        for name, value in line.get("metrics", {}).items():
            found.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items()}

"""A sample of the media of a corpus, decoded before the corpus is prepared.

``skillnet inspect`` describes the sample; ``skillnet prepare`` checks it before Ray starts.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.corpora import ExternalCorpus
from pipelines.data.corpora.base import Row
from pipelines.data.io.media import MediaReadError, read_media
from pipelines.data.transforms.decode_guard import decode_each
from pipelines.data.transforms.decoder_process import DecoderEndedError, decode_media
from skillnet_platform.storage import human_bytes

#: Media files that are decoded at most, and seconds that decoding may take.
MAX_DECODED, DECODE_TIME_S = 24, 6.0


def describe_media(corpus: ExternalCorpus, rows: list[Row]) -> dict[str, Any]:
    """Return sizes and durations of media files that are spread over the first rows."""
    # Neighbouring rows are often similar, so the decoded rows are spread evenly.
    step = max(1, len(rows) // MAX_DECODED)
    measured: dict[str, list[float]] = {}
    rejections = Counter[str]()
    chosen, start, decoded = rows[::step][:MAX_DECODED], time.monotonic(), 0
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        if time.monotonic() - start > DECODE_TIME_S:
            break
        decoded += 1
        if isinstance(data, MediaReadError):
            rejections[data.reason] += 1
            continue
        facts, reason = measure_media(corpus, data, row)
        if reason is not None:
            rejections[reason] += 1
        if facts is None:
            continue
        for key, value in (facts | {"file size": float(len(data))}).items():
            measured.setdefault(key, []).append(value)
    ranges = {key: format_range(v) for key, v in measured.items() if key != "file size"}
    if "file size" in measured:
        low, high = min(measured["file size"]), max(measured["file size"])
        ranges["file size"] = f"{human_bytes(low)} to {human_bytes(high)}"
    return {"decoded": decoded, **ranges, "rejected": dict(rejections)}


def measure_media(
    corpus: ExternalCorpus, data: bytes, row: Row
) -> tuple[dict[str, float] | None, str | None]:
    """Return facts of a media file, and the reason if prepare would reject its row.

    Args:
        corpus: reader that yields the row.
        data: bytes of the file.
        row: raw row.

    Returns:
        Fact -> number, or None for a file without a readable header; and the reason, or None.
    """
    [(result, error)] = decode_each([row], partial(_check_media, corpus, data))
    return (None, str(error)) if result is None else result


def _check_media(
    corpus: ExternalCorpus, data: bytes, row: Row
) -> tuple[dict[str, float], str | None]:
    """Return facts of a row's media file, and the reason if prepare would reject the row.

    Raises:
        ValueError: the file has no readable header, or its decoder does not return.
    """
    # First in a process of its own: a file that ends its decoder must not end this command.
    try:
        decode_media(corpus.modality, data)
    except DecoderEndedError:
        raise
    # The checks below give the same reason, and the facts of the file.
    except ValueError:
        pass
    facts = corpus.modality_files.measure(data)
    block = pa.Table.from_pylist([row], schema=corpus.raw_schema)
    return facts, corpus.build_columns(block)["rejected"][0].as_py()


def format_range(values: list[Any]) -> str:
    """Return one number if all values are equal, else "1 to 9, median 4"."""
    low, middle, high = (float(np.quantile(values, q)) for q in (0, 0.5, 1))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def run_within(seconds: float, work: Callable[[threading.Event], None]) -> bool:
    """Run work in a thread, and return whether it ended in time.

    After the time limit an event is set. A thread that does not check it is abandoned.
    """
    is_late, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(is_late)
        except BaseException as error:
            errors.append(error)

    # A daemon thread does not keep the process alive if it hangs.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    in_time = not thread.is_alive()
    is_late.set()
    # The thread checks the event after each row. Then its counts no longer change.
    thread.join(0.5)
    if errors:
        raise errors[0]
    return in_time

"""``skillnet prepare --describe``: what a folder holds, found out in seconds, without preparing.

Rows are read as preparing reads them, for ``SECONDS`` at most; the first ones are decoded too.
"""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpora import READERS, PlacedCorpus, guess_reader, place_corpus
from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.media import Unreadable, read_media
from pipelines.places import Place, listing_digest
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes

#: Reading rows stops after so long; what follows is not counted.
SECONDS = 8.0
#: So many media files are decoded, and for so many seconds.
DECODED, DECODING = 24, 6.0


def describe(place: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a folder or URI holds.

    Args:
        place: path or URI, or ``reader:path``.
        options: reader -> its options.

    Returns:
        reader, evidence, modality, task, rows, complete, splits, set_aside, fields, example,
        captions, labels, media, files: plain values.

    Raises:
        UserError: there is nothing, or nothing that is known.
    """
    reader, _, path = place.partition(":")
    if not path or path.startswith("//") or reader not in READERS:
        found = guess_reader(Place(place))
        if found is None:
            raise UserError(
                f"{place}: no known format; known are {', '.join(READERS)}. Name one with "
                f"--describe folder:{place} to be told what it lacks"
            )
        reader, evidence = found
        path = place
    else:
        evidence = "named"
    corpus = place_corpus(reader, f"{reader}:{path}", (options or {}).get(reader))
    splits, reasons, complete, sample = _read(corpus)
    files, size, _ = (1, 0, "") if corpus.place.is_file else listing_digest(corpus.place.walk())
    return {
        "place": corpus.place.uri,
        "reader": reader,
        "evidence": evidence,
        "modality": corpus.modality,
        "task": corpus.task,
        "rows": splits.total() + reasons.total(),
        "complete": complete,
        "splits": dict(sorted(splits.items())),
        "set_aside": dict(reasons.most_common()),
        "fields": {field.name: str(field.type) for field in corpus.columns},
        "captions": _captions(sample),
        "labels": dict(Counter(r["label"] for r in sample if r.get("label")).most_common(20)),
        "media": _media(corpus, sample) if "media" in corpus.raw.names else {},
        "example": _example(sample[0]) if sample else {},
        "files": files,
        "bytes": size,
    }


def show(found: dict[str, Any]) -> None:
    """Print a description for people."""
    more = "" if found["complete"] else " or more"
    size = f", {human_bytes(found['bytes'])}" if found["bytes"] else ""
    lines: list[list[Any]] = [
        ["format", f"{found['reader']} ({found['evidence']})"],
        ["modality, task", f"{found['modality']}, {found['task']}"],
        ["files", f"{found['files']}{size}"],
        ["rows", f"{found['rows']}{more}"],
        ["splits", ", ".join(f"{name} {rows}" for name, rows in found["splits"].items())],
        ["columns made", ", ".join(found["fields"])],
    ]
    if found["captions"]:
        lines.append(["captions", "{per_row} a row, {characters} characters".format_map(
            found["captions"])])  # fmt: skip
    if found["labels"]:
        lines.append(["labels", ", ".join(f"{k} ({v})" for k, v in found["labels"].items())])
    media = found["media"]
    for key in [key for key in ("file size", "seconds", "pixels", "frames") if key in media]:
        lines.append([f"{key} (of {media['decoded']})", media[key]])
    lines += [["", ""]] + [[f"example: {k}", str(v)] for k, v in found["example"].items()]
    console.table(found["place"], ["", ""], lines)
    aside = [[count, reason] for reason, count in found["set_aside"].items()]
    aside += [[f"{n} of {media['decoded']}", why] for why, n in media.get("set_aside", {}).items()]
    if aside:
        console.table("Would be set aside", ["rows", "reason"], aside)
    name = found["reader"]
    console.note(f"to prepare it: skillnet prepare --corpus {name}={found['place']}")


def _read(corpus: PlacedCorpus) -> tuple[Counter[str], Counter[str], bool, list[Row]]:
    """(Rows of each split, reasons, whether all were read, the first rows)."""
    splits, reasons = Counter[str](), Counter[str]()
    sample: list[Row] = []
    start = time.monotonic()
    for number, row in enumerate(corpus.rows(Sources.none())):
        if isinstance(row, Rejected):
            reasons[row.reason] += 1
        else:
            splits[row["split"]] += 1
            if len(sample) < 1000:
                sample.append(row)
        if number % 64 == 0 and time.monotonic() - start > SECONDS:
            return splits, reasons, False, sample
    return splits, reasons, True, sample


def _captions(sample: list[Row]) -> dict[str, Any]:
    counts = [len(row["captions"]) for row in sample if row.get("captions")]
    if not counts:
        return {}
    lengths = [len(caption) for row in sample for caption in row["captions"]]
    return {"per_row": _span(counts), "characters": _span(lengths)}


def _media(corpus: PlacedCorpus, sample: list[Row]) -> dict[str, Any]:
    """Sizes and lengths of some media files, spread over the first rows."""
    step = max(1, len(sample) // DECODED)
    measured: dict[str, list[float]] = {}
    reasons = Counter[str]()
    chosen, start, decoded = sample[::step][:DECODED], time.monotonic(), 0
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        if time.monotonic() - start > DECODING:
            break
        decoded += 1
        if isinstance(data, Unreadable):
            reasons[data.reason] += 1
            continue
        try:
            block = pa.Table.from_pylist([row], schema=corpus.raw)
            facts = _facts(corpus.modality, data)
            why = corpus.finish(block)["rejected"][0].as_py()
        except ValueError as problem:
            reasons[str(problem)] += 1
            continue
        if why is not None:
            reasons[why] += 1
        for key, value in (facts | {"file size": float(len(data))}).items():
            measured.setdefault(key, []).append(value)
    spans = {key: _span(values) for key, values in measured.items() if key != "file size"}
    if "file size" in measured:
        low, high = min(measured["file size"]), max(measured["file size"])
        spans["file size"] = f"{human_bytes(low)} to {human_bytes(high)}"
    return {"decoded": decoded, **spans, "set_aside": dict(reasons)}


def _facts(modality: str, data: bytes) -> dict[str, float]:
    """Length or size of a media file, from its head where that tells."""
    import io

    if modality == "image":
        from pipelines.transforms.image import decode_image

        picture = decode_image(data)
        return {"pixels": float(picture.width), "height": float(picture.height)}
    import av

    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="ignore") as container:
            facts = {"seconds": (container.duration or 0) / av.time_base}
            if modality == "video" and container.streams.video:
                facts["pixels"] = float(container.streams.video[0].width)
                facts["frames"] = float(container.streams.video[0].frames)
            return facts
    except av.FFmpegError as problem:
        raise ValueError(f"cannot be read ({problem.strerror})") from None


def _example(row: Row) -> dict[str, Any]:
    hidden = {"group", "file"} if "media" in row else {"group"}
    shown = {k: v for k, v in row.items() if k not in hidden and v not in (None, [])}
    if "media" in shown:
        shown["media"] = {k: v for k, v in shown["media"].items() if v is not None}
    return {key: _short(value) for key, value in shown.items()}


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > 200:
        return value[:199] + "…"
    return [_short(v) for v in value[:5]] if isinstance(value, list) else value


def _span(values: list[Any]) -> str:
    """``"3"``, or ``"1 to 9, median 4"``."""
    low, middle, high = (float(np.quantile(values, q)) for q in (0, 0.5, 1))
    return f"{low:.3g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"

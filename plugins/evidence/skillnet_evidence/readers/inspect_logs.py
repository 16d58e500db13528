"""Logs of inspect: ZIP archives (``.eval``) or JSON files with the scores of each sample."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.lines import (
    MAX_BYTES,
    PEER_COLUMNS,
    PeerLines,
    ReadOptions,
    ScoreLines,
    list_files,
    load_json,
    name_format,
    parse_json,
    require_dict,
    require_value,
)

#: Grades of inspect's scorers as numbers, as its own mean counts them.
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


#: Place of the seed in a line.
SEED = PEER_COLUMNS.index("seed")
#: Compression of inspect's archives, by its number in ZIP files.
ZSTANDARD = 93


def read_inspect(sources: Sequence[str], options: ReadOptions) -> ScoreLines:
    """Return the scores of samples in logs of inspect; epochs are seeds."""
    found, known = PeerLines(), []
    for path, is_named in list_files(sources, ".eval", ".json"):
        if path.suffix == ".json":
            header = load_json(path)
            if name_format(header) != "inspect":
                if is_named:
                    raise EvidenceError(f"{path}: not a log of inspect; it has no key eval")
                continue
            samples = header.get("samples")
        else:
            header, samples = _open_archive(path)
        about = require_dict(header.get("eval"), f"{path}, eval")
        if header.get("status") != "success":
            state = header.get("status")
            raise EvidenceError(f"{path}: its status is {state}; give logs of finished evaluations")
        task = require_value(about, "task", f"{path}, eval", "key")
        known.append(task)
        if options.tasks and task not in options.tasks:
            continue
        system = require_value(about, options.system or "model", f"{path}, eval", "--system")
        if not samples or not isinstance(samples, list):
            raise EvidenceError(
                f"{path}: no samples; log them (inspect eval without --no-log-samples)"
            )
        for each in samples:
            sample = require_dict(each, f"{path}, samples")
            place = f"{path}, sample {sample.get('id')}, epoch {sample.get('epoch')}"
            name, score = _grade_sample(found, sample, place, task, options)
            unit = None
            if options.unit:
                unit = require_value(sample.get("metadata"), options.unit, place, "--unit")
            values = {"system": system, "seed": sample.get("epoch", 1), "task": task}
            values |= {"row": sample.get("id"), "score": score, "unit": unit, "metric": name}
            found.add(place, values)
    require_known(options.tasks, known, "--tasks", "task")
    if not found.rows:
        raise EvidenceError(f"{sources[0]}: no logs of inspect (.eval or .json)")
    is_repeated = any(row[SEED] != "1" for row in found.rows)
    note = "Epochs of inspect count as seeds: the same model answers again."
    return found.finish(*([note] if is_repeated else []))


def _grade_sample(
    found: PeerLines, sample: Mapping[str, Any], place: str, task: str, options: ReadOptions
) -> tuple[str, float]:
    """Return the name of a sample's scorer and its score."""
    scores = require_dict(sample.get("scores") or {}, place)
    flat: dict[str, Any] = {}
    for scorer, score in scores.items():
        value = require_dict(score, f"{place}, scores.{scorer}").get("value")
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{scorer}.{key}" if key else scorer: each for key, each in parts.items()}
    name = next((name for name in options.metrics or flat if name in flat), None)
    if name is None:
        reason = f"; error: {sample['error']}" if sample.get("error") else ""
        listed = ", ".join(flat) or "none"
        raise EvidenceError(f"{place}: no score; scorers for --metric: {listed}{reason}")
    if others := [each for each in flat if each != name]:
        found.note(f"scored by {name}; --metric takes {', '.join(others)}, too", task)
    value = GRADES.get(flat[name], flat[name]) if isinstance(flat[name], str) else flat[name]
    try:
        return name, float(value)
    except (TypeError, ValueError):
        raise EvidenceError(
            f"{place}, scores.{name}: expected a number or one of {', '.join(GRADES)}, got "
            f"{value!r}"
        ) from None


def _open_archive(path: Path) -> tuple[dict[str, Any], Any]:
    """Return the header and the summaries of the samples of an archive, without unpacking it."""
    try:
        with zipfile.ZipFile(path) as archive:
            trees = []
            for name in ("header.json", "summaries.json"):
                place = f"{path}, {name}"
                trees.append(parse_json(_read_member(archive, path, name), place))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise EvidenceError(f"{path}: a damaged archive ({error})") from None
    except RuntimeError:
        # Python's words name an object of its own, and a method to give the password.
        raise EvidenceError(
            f"{path}: an archive with a password or an unknown compression; inspect writes neither"
        ) from None
    except KeyError as error:
        raise EvidenceError(f"{path}: not a finished log of inspect ({error.args[0]})") from None
    return require_dict(trees[0], f"{path}, header.json"), trees[1]


def _read_member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    """Return the content of a member of at most ``MAX_BYTES``."""
    member = archive.getinfo(name)
    if member.file_size > MAX_BYTES:
        raise EvidenceError(f"{path}, {name}: more than {MAX_BYTES // 2**20} MiB of JSON")
    if member.compress_type != ZSTANDARD:
        with archive.open(member) as stream:
            return stream.read(MAX_BYTES + 1)
    try:
        import pyarrow as pa
    except ModuleNotFoundError:
        raise EvidenceError(
            f"{path}: archives of inspect are packed by Zstandard, which needs pyarrow; in "
            "a clone, pip install './plugins/evidence[parquet]'"
        ) from None
    # Python's zipfile does not know Zstandard: the packed bytes follow the member's own header.
    with path.open("rb") as file:
        file.seek(member.header_offset)
        head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name} has no header")
        file.seek(sum(struct.unpack("<HH", head[26:30])), 1)
        packed = file.read(member.compress_size)
    try:
        content = pa.decompress(packed, member.file_size, codec="zstd", asbytes=True)
    except (OSError, ValueError) as error:
        raise zipfile.BadZipFile(f"{name}: {error}") from None
    if zlib.crc32(content) != member.CRC:
        raise zipfile.BadZipFile(f"{name} has a wrong check sum")
    return bytes(content)

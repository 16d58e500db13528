"""A Hugging Face dataset that was saved with ``save_to_disk``; the library is not needed.

    dataset_dict.json  train/  test/        or the folder of one split alone
    train/state.json  train/dataset_info.json  train/data-00000-of-00002.arrow

Pictures and recordings whose bytes stand in its Arrow files are referred to by their place there;
those that only have a path are read from below the folder. On a disk the files are mapped, not
loaded. In a store they are read front to back, a batch of the library's (1,000 rows or fewer) in
memory at a time: media pass along whenever rows are read, and again to be decoded.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.fielded import (
    ALL,
    MODALITY_OF,
    FieldedCorpus,
    ending_of,
    split_begun,
    split_named,
)
from pipelines.corpora.glance import LOOKED_AT, Glance
from pipelines.corpora.packed import lacking
from pipelines.corpora.placed import aside, bad, key_of
from pipelines.corpora.records import Broken
from pipelines.media import MediaRef
from pipelines.places import Place
from pipelines.source_files import failing, open_stream
from skillnet_platform.errors import UserError

#: Features of the library that hold media.
MEDIA_FEATURES = {"Image": "image", "Audio": "sound", "Video": "video"}


class HfDataset(FieldedCorpus):
    """Rows of a saved dataset."""

    name = "hf_dataset"
    version = 3  # a test without labels is for prediction; a field for splits is heeded

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """The files that ``save_to_disk`` writes."""
        if place.is_file:
            return None
        for name in ("dataset_dict.json", "state.json"):
            if place.exists(name):
                return f"{name} is written by save_to_disk"
        return None

    def locate(self) -> None:
        """Find its splits; see what its features are."""
        self.home = Place(self.options.media) if self.options.media else self.place
        self.folders = _splits(self.place)
        if not self.folders:
            raise lacking(
                self.place,
                "neither dataset_dict.json nor state.json in it; it is made by save_to_disk",
            )
        self.given = frozenset(split for split, _ in self.folders if split)
        if self.options.split is not None and not self.given:
            self.given = ALL
        features = _json(self.place, f"{self.folders[0][1]}dataset_info.json").get("features") or {}
        kinds = {
            name: MEDIA_FEATURES[about["_type"]]
            for name, about in features.items()
            if isinstance(about, dict) and about.get("_type") in MEDIA_FEATURES
        }
        self.media_field = next(iter(kinds), None)
        fields = [name for name in features if name != self.media_field]
        if self.media_field is not None and self.options.modality is None:
            self.options.modality = kinds[self.media_field]
        self.decide(fields, "" if self.media_field is not None else None)
        named = features.get(self.label or "", {})
        if "labels" in self.has and isinstance(named, dict) and named.get("names"):
            self.labels = tuple(named["names"])
        if "test" in self.given and self.options.split is None:
            self.settle_test(self._look())

    def _look(self) -> Glance:
        """At the first rows of the test: its labels may all be -1, for none. Of the training rows'
        it is known what they are, unless they have no names."""
        glance = Glance()
        looked_at = {"test"} if self.labels else {"test", "train"}
        for split, folder in self.folders if self.has else ():
            for file in _files(self.place, folder)[:1] if split in looked_at else ():
                found = (row for row in self._records(file) if isinstance(row, dict))
                for record in islice(found, LOOKED_AT):
                    glance.add(split, record)
        return glance

    def files_of_rows(self) -> int:
        """The Arrow files."""
        return sum(len(_files(self.place, folder)) for _, folder in self.folders) or 1

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Rows in the order of splits and files."""
        for split, folder in self.folders:
            for file in _files(self.place, folder):
                for number, record in enumerate(self._records(file), start=1):
                    key = key_of(f"{file}:{number}")
                    if isinstance(record, Broken):
                        yield bad(key, record.reason, file, number, record.rest)
                        continue
                    try:
                        media = record.pop(self.media_field) if self.media_field else None
                        row = self.row(key, self._named(record), media, split)
                    except ValueError as problem:
                        yield aside(key, problem, file, number)
                        continue
                    yield row | {"file": file, "row": number}

    def _records(self, file: str) -> Iterator[dict[str, Any] | Broken]:
        """Rows of a file; the media field holds a reference."""
        path = self.place.path(file)
        try:
            for batch, origin in (_streamed if self.place.remote else _mapped)(path):
                yield from _rows(batch, self.media_field, path, origin, self.home)
        except FileNotFoundError:
            yield Broken("the Arrow file is missing", rest=True)
        except OSError as problem:
            if problem.errno is not None:
                raise failing(path, problem) from None
            yield Broken("an Arrow file that is cut short or damaged", rest=True)
        except pa.ArrowInvalid:
            yield Broken("an Arrow file that is cut short or damaged", rest=True)

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """Class numbers by their names."""
        value = record.get(self.label or "")
        if self.labels and isinstance(value, int) and 0 <= value < len(self.labels):
            record[self.label or ""] = self.labels[value]
        return record


def _mapped(path: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """(Batch, where in memory byte 0 of the file would be) of a file on a disk."""
    with pa.memory_map(path) as mapped:
        whole = mapped.read_buffer()
        for batch in pa.ipc.open_stream(pa.BufferReader(whole)):
            yield batch, whole.address


def _streamed(path: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The same of a file in a store, one batch at a time."""
    with open_stream(path) as stream:
        messages = pa.ipc.MessageReader.open_stream(stream)
        schema = pa.ipc.read_schema(messages.read_next_message())
        for message in messages:
            if message.type != "record batch":
                raise UserError(
                    f"{path}: columns with a dictionary of their own, which are read from a disk "
                    "alone; copy the dataset there"
                )
            body = message.body
            batch = pa.ipc.read_record_batch(message, schema)
            yield batch, body.address - (stream.tell() - body.size)


def _rows(
    batch: pa.RecordBatch, media: str | None, path: str, origin: int, home: Place
) -> Iterator[dict[str, Any]]:
    names = [name for name in batch.schema.names if name != media]
    plain = batch.select(names)
    found = _references(batch.column(media), path, origin, home) if media else None
    for place in range(batch.num_rows):
        (row,) = plain.slice(place, 1).to_pylist()
        if found is not None:
            row[media or ""] = found[place]
        yield row


def _references(column: pa.Array, path: str, origin: int, home: Place) -> list[MediaRef | None]:
    """Where the bytes of each value of ``struct<bytes, path>`` stand in the file."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    files = column.field("path").to_pylist() if "path" in _fields(column) else [None] * len(column)
    data = column.field("bytes") if "bytes" in _fields(column) else pa.nulls(len(column))
    found: list[MediaRef | None] = []
    wide = pa.types.is_large_binary(data.type)
    for place, file in enumerate(files):
        if not column[place].is_valid:
            found.append(None)
        elif data.null_count < len(data) and data[place].is_valid:
            _, ends, values = data.buffers()
            numbers = memoryview(ends).cast("q" if wide else "i")
            start, end = numbers[data.offset + place], numbers[data.offset + place + 1]
            offset = values.address - origin + start
            found.append(MediaRef(path, offset, end - start))
        else:
            found.append(_beside(home, file))
    return found


def _beside(home: Place, file: str | None) -> MediaRef | None:
    """A file that the dataset only names: below its folder, or below ``media``."""
    try:
        if file and ending_of(file) in MODALITY_OF:
            return MediaRef(home.path(file))
    except ValueError:
        pass  # it leads out of the folder: a saved dataset may come from anywhere
    return None


def _fields(column: pa.Array) -> list[str]:
    return [field.name for field in column.type] if pa.types.is_struct(column.type) else []


def _splits(place: Place) -> list[tuple[str | None, str]]:
    """(Split, folder with a slash behind it or "")."""
    if place.is_file:
        return []
    if place.exists("state.json"):
        return [(None, "")]
    if not place.exists("dataset_dict.json"):
        return []
    names = _json(place, "dataset_dict.json").get("splits") or []
    found = [(split_named(name), str(name)) for name in names]
    if not any(split == "train" for split, _ in found):  # "train.clean.100"
        found = [(split_begun(name), name) for _, name in found]
    return [(split or name, f"{name}/") for split, name in found]


def _files(place: Place, folder: str) -> list[str]:
    listed = _json(place, f"{folder}state.json").get("_data_files") or []
    return [f"{folder}{entry['filename']}" for entry in listed]


def _json(place: Place, file: str) -> dict[str, Any]:
    try:
        with place.open(file) as stream:
            value = json.loads(stream.read().decode("utf-8"))
    except ValueError as problem:
        raise UserError(f"{place.path(file)}: not JSON ({problem})") from None
    return value if isinstance(value, dict) else {}

"""Corpora that the user has: given a place, with options, read in one pass without their media.

A subclass reads one format. Its ``rows`` is cheap and holds no more than a record (and, where files
are looked up by name, their names): it decides keys, splits and groups, and yields references to
media. Decoding happens in ``transform``, on workers, a block at a time.

A further format joins through the entry point group ``skillnet.corpora``; docs/own-corpora.md
shows one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.config.bounds import Ranged, within
from pipelines.corpora.base import Corpus, RejectedRow, Row, SourceArchives, stable_hash
from pipelines.corpora.readers import columns
from pipelines.io.directory import SourceDirectory, digest_listing, to_printable
from pipelines.io.media import MAX_MEDIA_BYTES, MediaRef
from pipelines.transforms import image, sound, video
from skillnet_platform.config import to_dict
from skillnet_platform.errors import UserError

#: Stands for characters that the training transcripts do not hold.
UNKNOWN_SYMBOL = "<unk>"
#: Digits that Python reads as a number, however it is set.
MAX_LABEL_DIGITS = 640
#: Of one thing; the field's corpora have five to twenty.
MAX_CAPTIONS = 1_000
#: Bytes of a shard, about: how many rows it holds follows from it.
TARGET_SHARD_BYTES = 32 * 2**20
TASK_NAMES = {
    ("text", "labels"): "text_classification",
    ("sound", "transcripts"): "speech_recognition",
    ("image", "captions"): "text_to_image",
    ("video", "captions"): "text_to_video",
    ("code", "captions"): "text_to_code",
}
_CHINESE = r"\u2e80-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_SPACE = re.compile(rf"(?<=[{_CHINESE}])\s+|\s+(?=[{_CHINESE}])")


@dataclass
class MediaOptions(Ranged):
    """Media files.

    Args:
        media: folder of the media, where it is another than the corpus' own.
        max_megabytes: a larger media file is set aside without being read.
    """

    media: str | None = None
    max_megabytes: int = within(MAX_MEDIA_BYTES // 2**20, 1)


class ExternalCorpus(Corpus):
    """One format of the user's corpora.

    Args:
        place: path or URI of the corpus.
        options: of the type ``Options``; none takes the defaults.
        name: what to call the prepared corpus; by default the format's name.

    Raises:
        UserError: the place does not exist, or does not hold this format.
    """

    archives = ()
    #: Dataclass of what the user may choose.
    Options: ClassVar[type]
    #: What a row brings beside its media: of "labels", "captions", "transcripts".
    annotations_present: tuple[str, ...] = ()
    #: Captions of a row are alike: each is a query when a model is evaluated, not the first alone.
    captions_equivalent: ClassVar[bool] = False
    #: Splits whose rows have nothing of that: for prediction, or for pretraining.
    unlabelled_splits: tuple[str, ...] = ()
    #: Names of the classes, in the order of their numbers.
    labels: Sequence[str] = ()
    #: CTC symbols, number 1 first.
    symbols: Sequence[str] = ()

    def __init__(self, place: str, options: Any = None, name: str | None = None) -> None:
        self.name = name or type(self).name
        self.source = SourceDirectory(place)
        self.options = options if options is not None else type(self).Options()
        self.discover()
        self.finalize_schema()

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """What in a folder shows that it holds this format, in words; none if nothing does."""
        return None

    def discover(self) -> None:
        """Find the corpus' parts in ``place``.

        Raises:
            UserError: something without which there is nothing to read is not there.
        """

    def finalize_schema(self) -> None:
        """What follows from modality, options and what rows bring."""
        self.raw_schema = columns.raw_columns_schema(self.modality)
        self.columns = columns.shard_columns(self.modality, self.annotations_present, self.options)
        self.text_columns = tuple(
            [self.modality] * (self.modality in ("text", "code"))
            + ["captions"] * ("captions" in self.annotations_present)
        )
        size = columns.estimate_row_bytes(self.modality, self.options)
        self.shard_rows = min(max(TARGET_SHARD_BYTES // size, 64), 8192)
        found = [
            TASK_NAMES[self.modality, what]
            for what in self.annotations_present
            if (self.modality, what) in TASK_NAMES
        ]
        other = f"{self.modality}_classification" if "labels" in self.annotations_present else None
        self.task = found[0] if found else other or f"masked_{self.modality}"

    def can_run_remotely(self) -> bool:
        """Its rows name media, which other hosts find by URI only."""
        return all(each.remote for each in vars(self).values() if isinstance(each, SourceDirectory))

    def scan_labels(self) -> None:
        """Learn what rows alone can tell, before they are prepared: classes and symbols.

        One pass over ``rows``, only where it is needed.
        """
        wants_labels = "labels" in self.annotations_present and not self.labels
        wants_symbols = "transcripts" in self.annotations_present and not self.symbols
        if not wants_labels and not wants_symbols:
            return
        labels: set[str] = set()
        characters: set[str] = set()
        unread = Counter[str]()
        for row in self.rows(SourceArchives.none()):
            if isinstance(row, RejectedRow):
                unread[row.reason] += row.counts_as_error
                continue
            if row["split"] != "train":
                continue
            if wants_labels and row.get("label") is not None:
                labels.add(row["label"])
            if wants_symbols:
                characters.update(row.get("text") or "")
        self.set_labels(sort_labels(labels), sorted(characters), unread)

    def set_labels(
        self,
        labels: Sequence[str],
        characters: Sequence[str],
        unread: Mapping[str, int] | None = None,
    ) -> None:
        """Take classes and the characters of the training transcripts.

        Raises:
            UserError: there are none, so that there is nothing to train for; says why most rows
                of those in ``unread`` (reason -> rows) could not be read.
        """
        (reason, count), *_ = [*Counter(unread).most_common(1), ("", 0)]
        why = f" ({count} × {reason})" if count else ""
        if "labels" in self.annotations_present and not self.labels:
            if not labels:
                raise UserError(f"{self.source.uri}: no training row has a label{why}")
            self.labels = tuple(labels)
        if "transcripts" in self.annotations_present and not self.symbols:
            if not characters:
                raise UserError(f"{self.source.uri}: no training row has a transcript{why}")
            self.symbols = (UNKNOWN_SYMBOL, *characters)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Every row, in an order that only the corpus decides; see ``Corpus.rows``."""
        raise NotImplementedError

    def build_columns(self, block: pa.Table, tokenizer: Any = None) -> dict[str, Any]:
        """What the modality's stem reads of a block, and why a row cannot be finished."""
        limit = getattr(self.options, "max_megabytes", 0) * 2**20 or MAX_MEDIA_BYTES
        made: dict[str, Any] = {
            "text": lambda: columns.build_text_columns(block, tokenizer, self.options),
            "code": lambda: columns.build_code_columns(block, tokenizer, self.options),
            "sound": lambda: columns.build_sound_columns(block, self.options, limit),
            "image": lambda: columns.build_image_columns(block, self.options, limit),
            "video": lambda: columns.build_video_columns(block, self.options, limit),
        }[self.modality]()
        return {"rejected": pa.nulls(block.num_rows, pa.string())} | made

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """The finished columns of a block, row for row."""
        made = self.build_columns(block, tokenizer)
        rejected = made.pop("rejected").to_pylist()
        if "captions" in self.annotations_present:
            made |= columns.build_caption_columns(block, tokenizer, self.options)
        if "transcripts" in self.annotations_present:
            made["text"] = block["text"]
            made["symbols"] = self._numbers(block["text"].to_pylist())
        if "labels" in self.annotations_present:
            number = {name: place for place, name in enumerate(self.labels)}
            found = block["label"].to_pylist()
            made["label"] = pa.array([number.get(label) for label in found], pa.int32())
            for place, label in enumerate(found):
                if label is not None and label not in number and rejected[place] is None:
                    rejected[place] = "a label that no training row has"
        return pa.table(made | {"rejected": pa.array(rejected, pa.string())})

    def schema(self, split: str) -> pa.Schema:
        """Columns of the shards of a split; ``bare`` splits have no labels and captions."""
        whole = super().schema(split)
        if split not in self.unlabelled_splits:
            return whole
        absent = {"label", "captions", "caption_tokens", "symbols"}
        absent |= {"text"} if self.modality != "text" else set()
        return pa.schema([field for field in whole if field.name not in absent])

    def preprocessing(self) -> dict[str, Any]:
        """The reader and its options, and what its media are made into frames or pixels by."""
        chosen = {k: v for k, v in to_dict(self.options).items() if k != "media"}
        more = {"mean": sound.MEAN, "deviation": sound.DEVIATION, "rate": sound.RATE}
        return {
            "reader": type(self).name,
            **chosen,
            **(more if self.modality == "sound" else {}),
            **({"pixels": image.VERSION} if self.modality == "image" else {}),
            **({"pixels": video.VERSION} if self.modality == "video" else {}),
        }

    def facts(self) -> dict[str, Any]:
        """Names of classes and symbols, and what the queries of an evaluation are."""
        made: dict[str, Any] = (
            {"labels": list(self.labels)} if "labels" in self.annotations_present else {}
        )
        if "transcripts" in self.annotations_present:
            made |= {"symbols": list(self.symbols), "blank": 0}
        if "captions" in self.annotations_present and self.captions_equivalent:
            made |= {"queries": "all"}
        return made

    def annotation_files(self) -> list[str]:
        """Files that hold rows rather than media: told by their content."""
        return []

    def num_source_files(self) -> int:
        """The files of annotations."""
        return len(self.annotation_files()) or 1

    def extra_sources(self) -> list[dict[str, str]]:
        """Annotations by their content; media by names and sizes."""
        if self.source.is_file:
            found = [{"file": to_printable(self.source.name), "sha256": self.source.digest("")}]
        else:
            annotations = sorted(self.annotation_files())
            told = set(annotations)
            found = [
                {"file": to_printable(name), "sha256": self.source.digest(name)}
                for name in annotations
            ]
            files, size, digest = digest_listing(
                entry for entry in self.source.walk() if entry.name not in told
            )
            if files:
                found.append({"file": f"{files} files, {size} bytes", "sha256": digest})
        other = getattr(self.options, "media", None)
        if other:
            files, size, digest = digest_listing(SourceDirectory(other).walk())
            found.append({"file": f"media: {files} files, {size} bytes", "sha256": digest})
        return found

    def _numbers(self, transcripts: Sequence[str | None]) -> pa.Array:
        number = {symbol: place for place, symbol in enumerate(self.symbols, start=1)}
        unknown = number.get(UNKNOWN_SYMBOL, 0)
        rows = [[number.get(c, unknown) for c in text or ""] for text in transcripts]
        return pa.array(rows, pa.list_(pa.int32()))


def sort_labels(labels: Collection[str]) -> list[str]:
    """Names of classes in the order of their numbers: by value where all are numbers, else as
    texts. ``"1"`` and ``"01"`` are two names of one value: their texts part them, so that every
    reading gives the same order."""
    if all(label.isdecimal() and len(label) <= MAX_LABEL_DIGITS for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def media_row(
    split: str,
    key: str,
    reference: MediaRef,
    captions: Sequence[str] = (),
    text: str | None = None,
    label: str | None = None,
) -> Row:
    """A raw row of a picture, recording or clip."""
    return {
        "split": split,
        "key": key,
        "group": hash_caption_group(captions),
        "media": reference.row(),
        "text": text,
        "label": label,
        "captions": list(captions),
        "file": str(reference),
    }


def error_row(
    key: str, reason: str, file: str | None = None, row: int | None = None, truncates_file: bool = False
) -> RejectedRow:
    """A row that should have been readable: too large a share of such stops a prepare.

    ``rest`` says that the file cannot be read on behind it.
    """
    return RejectedRow(key, reason, file, row, counts_as_error=True, truncates_file=truncates_file)


class NoAnnotationError(ValueError):
    """A medium that no caption or transcript goes with: set aside by choice, as it says nothing of
    the state of a corpus."""


def rejected_row(key: str, problem: ValueError, file: str | None, row: int | None) -> RejectedRow:
    """A row that cannot be used, and why: held against the corpus unless nothing is said."""
    return RejectedRow(
        key, str(problem), file, row, counts_as_error=not isinstance(problem, NoAnnotationError)
    )


def hash_caption_group(captions: Sequence[str]) -> int:
    """A number that rows with the same first caption share: they are right answers to it alike."""
    return stable_hash("caption", captions[0]) >> 2 if captions else -1


def hash_split(key: str, options: Any) -> str:
    """The split that a key falls into, by a hash of it: the same whatever else there is."""
    share = stable_hash("split", key) / 2**64
    if share < options.test:
        return "test"
    return "validation" if share < options.test + options.validation else "train"


def val_or_test(key: str) -> str:
    """Validation or test, half and half, by a hash of the key."""
    return "test" if stable_hash("half", key) % 2 else "validation"


def clean_text(value: Any) -> str:
    """A text without white space around it.

    Raises:
        ValueError: it is no text, empty, or holds what UTF-8 has no bytes for; says which.
    """
    if not isinstance(value, str):
        raise ValueError("a text is missing")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not UTF-8") from None
    if "\ufffd" in value:
        raise ValueError("not UTF-8")
    if not value.strip():
        raise ValueError("an empty text")
    return value.strip()


def clean_captions(value: Any) -> list[str]:
    """The usable ones of some captions (a list, or one), each once.

    Raises:
        ValueError: none is usable, or there are more than anybody writes of one thing.
    """
    listed = value if isinstance(value, list | tuple) else [value]
    if len(listed) > MAX_CAPTIONS:
        raise ValueError(f"more than {MAX_CAPTIONS} captions")
    found = []
    for caption in listed:
        try:
            found.append(clean_text(caption))
        except ValueError as problem:
            if str(problem) == "not UTF-8":
                raise
    if not found:
        raise ValueError("no caption")
    return list(dict.fromkeys(found))


def normalize_transcript(transcript: str) -> str:
    """A transcript as CTC spells it: white space only between words of other scripts."""
    return _SPACE.sub("", " ".join(transcript.split()))


def make_key(*parts: object) -> str:
    """A key that a person can find the row by, short whatever a file name holds."""
    key = to_printable("/".join(str(part) for part in parts))
    if len(key) <= 512:
        return key
    return f"{key[:400]}…{hashlib.sha256(key.encode()).hexdigest()[:16]}"


class CaptionedCorpus(ExternalCorpus):
    """Media, each with all of its captions, told by annotations that name splits."""

    annotations_present = ("captions",)
    captions_equivalent = True
    files: list[tuple[str, str]]
    media_source: SourceDirectory

    def set_annotation_files(self, files: list[tuple[str, str]]) -> None:
        """Read these annotations, (split, file) each, and the media beside them or elsewhere."""
        self.files = files
        self.media_source = (
            SourceDirectory(self.options.media) if self.options.media else self.source
        )

    @property
    def lacks_test(self) -> bool:
        """Whether the validation rows are parted in halves, for there is no test."""
        return not any(split.startswith("test") for split, _ in self.files)

    def annotation_files(self) -> list[str]:
        """The files of annotations."""
        return [file for _, file in self.files]

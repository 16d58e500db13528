"""TNEWS of CLUE: headlines of Chinese news in 15 classes.

    tnews_public/train.json dev.json test.json [labels.json]

JSON lines (or an array) of
``{"label": "102", "label_desc": "news_entertainment", "sentence": …, "keywords": …}``. The label
can be a number, and some copies have ``label_des`` in place of ``label_desc``.

The public test has no labels: it becomes the split ``unlabelled``, for ``skillnet predict``. Then
``dev`` is the split ``test``, and a share of ``train`` is held out as validation. If the test has
labels, splits are used as given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives, stable_hash
from pipelines.data.corpora.formats.packed_archives import missing_format_error
from pipelines.data.corpora.formats.record_reader import BadRecord, read_records
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.corpora.readers.row_builders import clean_text, error_row
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.modalities.text import TextOptions
from pipelines.data.transforms.text import append_keywords
from skillnet_platform.config.bounds import PartialFraction

#: Code -> description, from ``labels.json`` of CLUE.
LABELS = {
    "100": "news_story",
    "101": "news_culture",
    "102": "news_entertainment",
    "103": "news_sports",
    "104": "news_finance",
    "106": "news_house",
    "107": "news_car",
    "108": "news_edu",
    "109": "news_tech",
    "110": "news_military",
    "112": "news_travel",
    "113": "news_world",
    "114": "news_stock",
    "115": "news_agriculture",
    "116": "news_game",
}
FILES = {"train": "train", "dev": "validation", "test": "test"}
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass
class TnewsOptions(TextOptions):
    """TNEWS.

    Args:
        keywords: append the keywords to the sentence, as some systems do.
        validation: share of ``train`` that is held out for validation if ``dev`` is the test.
    """

    keywords: bool = False
    validation: PartialFraction = 0.05


class TnewsCorpus(ExternalCorpus):
    """Headlines with their classes."""

    name = "tnews"
    modality = "text"
    Options = TnewsOptions
    annotations_present = ("labels",)
    version = 2  # keys without the folder
    unlabelled_splits = ("unlabelled",)
    labels = tuple(f"{code} {description}" for code, description in LABELS.items())

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return a file with sentences and labels of CLUE as evidence."""
        for _, file in _list_parts(source):
            for _, row in islice(read_records(source, file), 1):
                if isinstance(row, dict) and "sentence" in row and _label_code(row) in LABELS:
                    return f"{file} has sentences with labels of TNEWS"
        return None

    def discover(self) -> None:
        """Find the three files; the test is optional."""
        self.files = dict(_list_parts(self.source))
        if "train" not in self.files:
            raise missing_format_error(
                self.source,
                "no train.json in it; TNEWS is a folder with train.json, dev.json and test.json",
            )
        self.has_labelled_test = "test" in self.files and any(
            isinstance(row, dict) and _label_code(row) is not None
            for _, row in islice(read_records(self.source, self.files["test"]), 1)
        )

    def annotation_files(self) -> list[str]:
        """Return the three files."""
        return list(self.files.values())

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield lines in the order of the files."""
        for part, file in self.files.items():
            for number, record in read_records(self.source, file):
                # Without folder and ending: the split that is made must not depend on them.
                key = f"{part}.json:{number}"
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                try:
                    yield self._build_row(part, key, record) | {"file": file, "row": number}
                except ValueError as error:
                    yield error_row(key, str(error), file, number)

    def _build_row(self, part: str, key: str, record: Row) -> Row:
        text = clean_text(record.get("sentence"))
        if self.options.keywords:
            text = append_keywords(text, record.get("keywords"))
        split, code = self._assign_split(part, key), _label_code(record)
        if split != "unlabelled":
            if code is None:
                raise ValueError("no label")
            if code not in LABELS:
                raise ValueError("a label that TNEWS does not have")
        return {
            "split": split,
            "key": key,
            "group": -1,
            "text": text,
            "label": None if split == "unlabelled" else f"{code} {LABELS[code or '']}",
            "captions": [],
        }

    def _assign_split(self, part: str, key: str) -> str:
        if self.has_labelled_test:
            return FILES[part]
        if part == "train":
            is_held_out = stable_hash("tnews", key) / 2**64 < self.options.validation
            return "validation" if is_held_out else "train"
        return "test" if part == "dev" else "unlabelled"


def _list_parts(source: SourceDirectory) -> list[tuple[str, str]]:
    """Return (part, file) of the existing parts; they can lie in ``tnews_public`` or ``tnews``."""
    if source.is_file:
        return []
    for folder in ("", "tnews_public/", "tnews/"):
        found = []
        for part in FILES:
            candidates = (f"{folder}{part}{suffix}" for suffix in SUFFIXES)
            if file := next((each for each in candidates if source.exists(each)), None):
                found.append((part, file))
        if found:
            return found
    return []


def _label_code(record: Row) -> str | None:
    label = record.get("label")
    return None if label is None or label == "" else str(label).strip()

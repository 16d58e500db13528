"""TNEWS of CLUE: headlines of Chinese news in 15 classes.

    tnews_public/train.json dev.json test.json [labels.json]

JSON lines (or an array) of
``{"label": "102", "label_desc": "news_entertainment", "sentence": …, "keywords": …}``; the label
may be a number, ``label_des`` stands for ``label_desc`` in some copies. The public test has ids and
no labels: it becomes the split ``unlabelled``, for ``skillnet predict``; figures are those of
``dev``, as the split ``test``, and a share of ``train`` is held out as validation. Where the test
has labels, splits are as given.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.corpora.base import RejectedRow, Row, SourceArchives, stable_hash
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import BadRecord, NumberedRecord, read_records
from pipelines.corpora.readers.base import ExternalCorpus, clean_text, error_row
from pipelines.corpora.readers.columns import TextOptions
from pipelines.io.directory import SourceDirectory
from pipelines.transforms.text import append_keywords

#: Code -> description, as CLUE's ``labels.json`` has them.
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
        keywords: put the keywords behind the sentence, as some systems do.
        validation: share of ``train`` held out for validation, where ``dev`` is the test.
    """

    keywords: bool = False
    validation: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {self.validation}")


class TnewsCorpus(ExternalCorpus):
    """Headlines, each with its class."""

    name = "tnews"
    modality = "text"
    Options = TnewsOptions
    annotations_present = ("labels",)
    version = 2  # keys without the folder
    unlabelled_splits = ("unlabelled",)
    labels = tuple(f"{code} {description}" for code, description in LABELS.items())

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Lines with a sentence and a label of CLUE's."""
        for _, file in _files(place):
            for _, row in read_records(place, file):
                if isinstance(row, dict) and "sentence" in row and _code(row) in LABELS:
                    return f"{file} has sentences with labels of TNEWS"
                break
        return None

    def discover(self) -> None:
        """Find the three files; a test is not needed."""
        self.files = dict(_files(self.source))
        if "train" not in self.files:
            raise missing_format_error(
                self.source,
                "no train.json in it; TNEWS is a folder with train.json, dev.json and test.json",
            )
        self.labelled_test = "test" in self.files and any(
            isinstance(row, dict) and _code(row) is not None
            for _, row in _first(read_records(self.source, self.files["test"]))
        )

    def annotation_files(self) -> list[str]:
        """The three files."""
        return list(self.files.values())

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Lines in the order of the files."""
        for part, file in self.files.items():
            for number, row in read_records(self.source, file):
                # Not of the folder or the ending: the split that is made must not hang on those.
                key = f"{part}.json:{number}"
                if isinstance(row, BadRecord):
                    yield error_row(key, row.reason, file, number, row.truncates_file)
                    continue
                try:
                    yield self._row(part, key, row) | {"file": file, "row": number}
                except ValueError as problem:
                    yield error_row(key, str(problem), file, number)

    def _row(self, part: str, key: str, row: Row) -> Row:
        text = clean_text(row.get("sentence"))
        if self.options.keywords:
            text = append_keywords(text, row.get("keywords"))
        split, code = self._split(part, key), _code(row)
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

    def _split(self, part: str, key: str) -> str:
        if self.labelled_test:
            return FILES[part]
        if part == "train":
            held_out = stable_hash("tnews", key) / 2**64 < self.options.validation
            return "validation" if held_out else "train"
        return "test" if part == "dev" else "unlabelled"


def _files(place: SourceDirectory) -> list[tuple[str, str]]:
    """(Part, file) of the parts that are there; in ``tnews_public`` or ``tnews`` below, too."""
    if place.is_file:
        return []
    for folder in ("", "tnews_public/", "tnews/"):
        found = [
            (part, next((f for s in SUFFIXES if place.exists(f := f"{folder}{part}{s}")), None))
            for part in FILES
        ]
        if any(file for _, file in found):
            return [(part, file) for part, file in found if file]
    return []


def _code(row: Row) -> str | None:
    label = row.get("label")
    return None if label is None or label == "" else str(label).strip()


def _first(rows: Iterator[NumberedRecord]) -> list[NumberedRecord]:
    return [row for row, _ in zip(rows, range(1), strict=False)]

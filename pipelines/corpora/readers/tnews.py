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

from pipelines.corpora.base import Rejected, Row, Sources, draw
from pipelines.corpora.formats.packed import lacking
from pipelines.corpora.formats.record_reader import Broken, Found, records
from pipelines.corpora.readers.base import PlacedCorpus, bad, clean_text
from pipelines.corpora.readers.columns import TextOptions
from pipelines.io.directory import Place
from pipelines.transforms.text import with_keywords

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


class Tnews(PlacedCorpus):
    """Headlines, each with its class."""

    name = "tnews"
    modality = "text"
    Options = TnewsOptions
    has = ("labels",)
    version = 2  # keys without the folder
    bare = ("unlabelled",)
    labels = tuple(f"{code} {description}" for code, description in LABELS.items())

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """Lines with a sentence and a label of CLUE's."""
        for _, file in _files(place):
            for _, row in records(place, file):
                if isinstance(row, dict) and "sentence" in row and _code(row) in LABELS:
                    return f"{file} has sentences with labels of TNEWS"
                break
        return None

    def locate(self) -> None:
        """Find the three files; a test is not needed."""
        self.files = dict(_files(self.place))
        if "train" not in self.files:
            raise lacking(
                self.place,
                "no train.json in it; TNEWS is a folder with train.json, dev.json and test.json",
            )
        self.labelled_test = "test" in self.files and any(
            isinstance(row, dict) and _code(row) is not None
            for _, row in _first(records(self.place, self.files["test"]))
        )

    def annotations(self) -> list[str]:
        """The three files."""
        return list(self.files.values())

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Lines in the order of the files."""
        for part, file in self.files.items():
            for number, row in records(self.place, file):
                # Not of the folder or the ending: the split that is made must not hang on those.
                key = f"{part}.json:{number}"
                if isinstance(row, Broken):
                    yield bad(key, row.reason, file, number, row.rest)
                    continue
                try:
                    yield self._row(part, key, row) | {"file": file, "row": number}
                except ValueError as problem:
                    yield bad(key, str(problem), file, number)

    def _row(self, part: str, key: str, row: Row) -> Row:
        text = clean_text(row.get("sentence"))
        if self.options.keywords:
            text = with_keywords(text, row.get("keywords"))
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
            held_out = draw("tnews", key) / 2**64 < self.options.validation
            return "validation" if held_out else "train"
        return "test" if part == "dev" else "unlabelled"


def _files(place: Place) -> list[tuple[str, str]]:
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


def _first(rows: Iterator[Found]) -> list[Found]:
    return [row for row, _ in zip(rows, range(1), strict=False)]

"""CodeSearchNet: Python functions with their docstrings.

    python/final/jsonl/{train,valid,test}/python_{split}_N.jsonl.gz

JSON lines with ``repo, path, func_name, original_string, code, docstring, …``. The query is the
docstring's first paragraph without web addresses; the function stands without its docstring. Splits
are as given: they go by repository.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.config.bounds import within
from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.formats.packed import lacking
from pipelines.corpora.formats.record_reader import Broken, json_lines
from pipelines.corpora.readers.base import PlacedCorpus, bad, clean_text, group_of, key_of
from pipelines.corpora.readers.columns import CaptionOptions, CodeOptions
from pipelines.io.directory import Place
from pipelines.transforms.code import summary
from skillnet_platform.errors import UserError

PARTS = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
SUFFIXES = (".jsonl.gz", ".jsonl")
#: So many functions are looked at for their fields.
LOOKED_AT = 100
#: Fields that tell a line of CodeSearchNet.
FIELDS = {"docstring", "code", "func_name"}


@dataclass
class CodePairOptions(CaptionOptions, CodeOptions):
    """Functions and their docstrings.

    Args:
        docstring: field that holds the docstring, or a translation of it.
        code: field that holds the function.
        language: functions of another language are set aside.
        shortest: characters that a docstring's first paragraph has at least.
    """

    docstring: str = "docstring"
    code: str = "code"
    language: str = "python"
    shortest: int = within(4, 0)


class CodeSearchNet(PlacedCorpus):
    """Functions, each with what its docstring says."""

    name = "codesearchnet"
    modality = "code"
    Options = CodePairOptions
    has = ("captions",)
    layout = "python/final/jsonl/train/python_train_0.jsonl.gz"

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """Lines with its fields, none of them PyTorrent's."""
        found = fields_of(place)
        if FIELDS <= found and not {"code_with_docstrings", "summary"} & found:
            return "train, valid and test hold lines with the fields of CodeSearchNet"
        return None

    def locate(self) -> None:
        """Find the files of each split."""
        self.files = list(_files(self.place))
        if not any(split == "train" for split, _ in self.files):
            raise lacking(
                self.place,
                "no folder train with .jsonl.gz files in it or up to four folders below; expected "
                f"{self.layout}",
            )
        self._check_fields()

    def _check_fields(self) -> None:
        """That the first functions have a docstring under the name that is given.

        Raises:
            UserError: they have none; with their fields.
        """
        (file, *_) = (file for split, file in self.files if split == "train")
        found = islice(json_lines(self.place, file), LOOKED_AT)
        names = list(dict.fromkeys(n for _, row in found if isinstance(row, dict) for n in row))
        wanted = self.options.docstring
        if names and wanted not in names:
            likely = next((n for n in names if n.startswith("doc") and "token" not in n), "FIELD")
            raise UserError(
                f"{self.place.path(file)}: no field {wanted!r} with the docstrings; rows have "
                f"{', '.join(names)}. Name it: --options.{self.name}.docstring {likely}"
            )

    def annotations(self) -> list[str]:
        """All of its files."""
        return [file for _, file in self.files]

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Functions in the order of the files."""
        for split, file in self.files:
            for number, row in json_lines(self.place, file):
                key = f"{file}:{number}"
                if isinstance(row, Broken):
                    yield bad(key_of(key), row.reason, file, number, row.rest)
                    continue
                try:
                    yield self._row(split, key, row) | {"file": file, "row": number}
                except ValueError as problem:
                    reason = str(problem)
                    if reason in _CHOSEN:
                        yield Rejected(key_of(key), reason, file, number)
                    else:
                        yield bad(key_of(key), reason, file, number)

    def _row(self, split: str, key: str, row: Row) -> Row:
        options = self.options
        if str(row.get("language") or options.language).lower() != options.language.lower():
            raise ValueError("of another language")
        source = row.get(options.code) or row.get("original_string")
        text = row.get(options.docstring)
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"no field {options.code}")
        if not isinstance(text, str):
            raise ValueError(f"no field {options.docstring}")
        caption = summary(clean_text(text)) if text.strip() else ""
        if len(caption) < options.shortest:
            raise ValueError("a docstring that is too short")
        return {
            "split": split,
            "key": key_of(key),
            "group": group_of([caption]),
            "code": clean_text(source.replace("\r\n", "\n")),
            "label": None,
            "captions": [caption],
        }


#: What a choice leaves out says nothing about the state of a corpus.
_CHOSEN = ("of another language", "a docstring that is too short")


def fields_of(place: Place) -> set[str]:
    """The fields of a place's first line, if it has files in folders train, valid and test."""
    if place.is_file:
        return set()
    for _, file in _files(place):
        for _, row in json_lines(place, file):
            return set(row) if isinstance(row, dict) else set()
    return set()


def _files(place: Place) -> Iterator[tuple[str, str]]:
    """(Split, file), training first."""
    found: dict[str, list[str]] = {split: [] for split in PARTS.values()}
    for folder in place.folders(depth=5):
        part = folder.rpartition("/")[2]
        if part in PARTS:
            found[PARTS[part]] += [
                f"{folder}/{entry.name}"
                for entry in place.entries(folder)
                if not entry.is_folder and entry.name.endswith(SUFFIXES)
            ]
    for split, files in found.items():
        yield from ((split, file) for file in files)

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
from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import BadRecord, read_json_lines
from pipelines.corpora.readers.base import (
    ExternalCorpus,
    clean_text,
    error_row,
    hash_caption_group,
    make_key,
)
from pipelines.corpora.readers.columns import CaptionOptions, CodeOptions
from pipelines.io.directory import SourceDirectory
from pipelines.transforms.code import first_paragraph
from skillnet_platform.errors import UserError

PARTS = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
SUFFIXES = (".jsonl.gz", ".jsonl")
#: So many functions are looked at for their fields.
SAMPLE_FUNCTIONS = 100
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


class CodeSearchNetCorpus(ExternalCorpus):
    """Functions, each with what its docstring says."""

    name = "codesearchnet"
    modality = "code"
    Options = CodePairOptions
    annotations_present = ("captions",)
    layout = "python/final/jsonl/train/python_train_0.jsonl.gz"

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Lines with its fields, none of them PyTorrent's."""
        found = first_record_fields(place)
        if FIELDS <= found and not {"code_with_docstrings", "summary"} & found:
            return "train, valid and test hold lines with the fields of CodeSearchNet"
        return None

    def discover(self) -> None:
        """Find the files of each split."""
        self.files = list(_files(self.source))
        if not any(split == "train" for split, _ in self.files):
            raise missing_format_error(
                self.source,
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
        found = islice(read_json_lines(self.source, file), SAMPLE_FUNCTIONS)
        names = list(dict.fromkeys(n for _, row in found if isinstance(row, dict) for n in row))
        wanted = self.options.docstring
        if names and wanted not in names:
            likely = next((n for n in names if n.startswith("doc") and "token" not in n), "FIELD")
            raise UserError(
                f"{self.source.path(file)}: no field {wanted!r} with the docstrings; rows have "
                f"{', '.join(names)}. Name it: --options.{self.name}.docstring {likely}"
            )

    def annotation_files(self) -> list[str]:
        """All of its files."""
        return [file for _, file in self.files]

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Functions in the order of the files."""
        for split, file in self.files:
            for number, row in read_json_lines(self.source, file):
                key = f"{file}:{number}"
                if isinstance(row, BadRecord):
                    yield error_row(make_key(key), row.reason, file, number, row.truncates_file)
                    continue
                try:
                    yield self._row(split, key, row) | {"file": file, "row": number}
                except ValueError as problem:
                    reason = str(problem)
                    if reason in _CHOSEN:
                        yield RejectedRow(make_key(key), reason, file, number)
                    else:
                        yield error_row(make_key(key), reason, file, number)

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
        caption = first_paragraph(clean_text(text)) if text.strip() else ""
        if len(caption) < options.shortest:
            raise ValueError("a docstring that is too short")
        return {
            "split": split,
            "key": make_key(key),
            "group": hash_caption_group([caption]),
            "code": clean_text(source.replace("\r\n", "\n")),
            "label": None,
            "captions": [caption],
        }


#: What a choice leaves out says nothing about the state of a corpus.
_CHOSEN = ("of another language", "a docstring that is too short")


def first_record_fields(place: SourceDirectory) -> set[str]:
    """The fields of a place's first line, if it has files in folders train, valid and test."""
    if place.is_file:
        return set()
    for _, file in _files(place):
        for _, row in read_json_lines(place, file):
            return set(row) if isinstance(row, dict) else set()
    return set()


def _files(place: SourceDirectory) -> Iterator[tuple[str, str]]:
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

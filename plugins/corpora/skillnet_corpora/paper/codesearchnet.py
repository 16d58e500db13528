"""CodeSearchNet: Python functions with their docstrings.

    python/final/jsonl/{train,valid,test}/python_{split}_N.jsonl.gz

The JSON lines have ``repo, path, func_name, original_string, code, docstring, …``. The query is the
first paragraph of the docstring without web addresses, and the function is read without its
docstring. Splits are used as given: they separate repositories.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.corpora.formats.packed_archives import missing_format_error
from pipelines.data.corpora.formats.record_reader import BadRecord, read_json_lines
from pipelines.data.corpora.readers.base import CaptionOptions, ExternalCorpus
from pipelines.data.corpora.readers.row_builders import (
    clean_text,
    error_row,
    hash_caption_group,
    make_key,
)
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.modalities.code import CodeOptions
from pipelines.data.transforms.code import first_paragraph
from skillnet_platform.config.bounds import NonNegativeCount
from skillnet_platform.errors import UserError

SPLIT_FOLDERS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SUFFIXES = (".jsonl.gz", ".jsonl")
#: Functions whose fields are checked.
SAMPLE_FUNCTIONS = 100
#: Fields that identify a line of CodeSearchNet.
FIELDS = {"docstring", "code", "func_name"}
OTHER_LANGUAGE = "of another language"
SHORT_DOCSTRING = "a docstring that is too short"


@dataclass
class CodePairOptions(CaptionOptions, CodeOptions):
    """Functions and their docstrings.

    Args:
        docstring: field of the docstring, or of its translation.
        code: field of the function.
        language: functions in another language are rejected.
        shortest: minimum length of a docstring's first paragraph in characters.
    """

    docstring: str = "docstring"
    code: str = "code"
    language: str = "python"
    shortest: NonNegativeCount = 4


class CodeSearchNetCorpus(ExternalCorpus):
    """Functions with the first paragraph of their docstrings as query."""

    name = "codesearchnet"
    modality = "code"
    Options = CodePairOptions
    annotations_present = ("captions",)
    layout = "python/final/jsonl/train/python_train_0.jsonl.gz"

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return as evidence that lines have its fields, and none of PyTorrent's."""
        fields = first_record_fields(source)
        if FIELDS <= fields and not {"code_with_docstrings", "summary"} & fields:
            return "train, valid and test hold lines with the fields of CodeSearchNet"
        return None

    def discover(self) -> None:
        """Find the files of each split."""
        self.files = list(_split_files(self.source))
        if not any(split == "train" for split, _ in self.files):
            raise missing_format_error(
                self.source,
                "no folder train with .jsonl.gz files in it or up to four folders below; expected "
                f"{self.layout}",
            )
        self._check_fields()

    def _check_fields(self) -> None:
        """Check that the first functions have the docstring field.

        Raises:
            UserError: they do not; the message lists their fields.
        """
        (file, *_) = (file for split, file in self.files if split == "train")
        first = islice(read_json_lines(self.source, file), SAMPLE_FUNCTIONS)
        names = list(dict.fromkeys(n for _, row in first if isinstance(row, dict) for n in row))
        wanted = self.options.docstring
        if names and wanted not in names:
            likely = next((n for n in names if n.startswith("doc") and "token" not in n), "FIELD")
            raise UserError(
                f"{self.source.path(file)}: no field {wanted!r} with the docstrings; rows have "
                f"{', '.join(names)}. Name it: --options.{self.name}.docstring {likely}"
            )

    def annotation_files(self) -> list[str]:
        """Return all of its files."""
        return [file for _, file in self.files]

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield functions in the order of the files."""
        for split, file in self.files:
            for number, record in read_json_lines(self.source, file):
                key = make_key(f"{file}:{number}")
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                try:
                    yield self._build_row(split, key, record) | {"file": file, "row": number}
                except ValueError as error:
                    reason = str(error)
                    # Rejected by an option, so it does not indicate a damaged corpus.
                    by_choice = reason in (OTHER_LANGUAGE, SHORT_DOCSTRING)
                    yield RejectedRow(key, reason, file, number, counts_as_error=not by_choice)

    def _build_row(self, split: str, key: str, record: Row) -> Row:
        options = self.options
        if str(record.get("language") or options.language).lower() != options.language.lower():
            raise ValueError(OTHER_LANGUAGE)
        # Some copies have the function in ``original_string`` only.
        source = record.get(options.code) or record.get("original_string")
        docstring = record.get(options.docstring)
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"no field {options.code}")
        if not isinstance(docstring, str):
            raise ValueError(f"no field {options.docstring}")
        caption = first_paragraph(clean_text(docstring)) if docstring.strip() else ""
        if len(caption) < options.shortest:
            raise ValueError(SHORT_DOCSTRING)
        return {
            "split": split,
            "key": key,
            "group": hash_caption_group([caption]),
            # The splits of the corpus separate repositories.
            "unit": make_key(record["repo"]) if record.get("repo") else None,
            # Line ends of Windows are not part of the function.
            "code": clean_text(source.replace("\r\n", "\n")),
            "label": None,
            "captions": [caption],
        }


def first_record_fields(source: SourceDirectory) -> set[str]:
    """Return the fields of the first line in the folders train, valid and test, if there is one."""
    if source.is_file:
        return set()
    for _, file in _split_files(source):
        for _, row in read_json_lines(source, file):
            return set(row) if isinstance(row, dict) else set()
    return set()


def _split_files(source: SourceDirectory) -> Iterator[tuple[str, str]]:
    """Yield (split, file), training first."""
    found: dict[str, list[str]] = {split: [] for split in SPLIT_FOLDERS.values()}
    for folder in source.folders(depth=5):
        name = folder.rpartition("/")[2]
        if name in SPLIT_FOLDERS:
            found[SPLIT_FOLDERS[name]] += [
                f"{folder}/{entry.name}"
                for entry in source.entries(folder)
                if not entry.is_folder and entry.name.endswith(SUFFIXES)
            ]
    for split, files in found.items():
        yield from ((split, file) for file in files)

"""Base class of corpora whose annotation files list media with their captions, by split."""

from collections.abc import Callable, Iterator
from typing import Any

from pipelines.data.corpora.base import RejectedRow, Row
from pipelines.data.corpora.formats.record_reader import BadRecord, read_json_entries
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.corpora.readers.row_builders import error_row, make_key, val_or_test
from pipelines.data.io.directory import SourceDirectory


class CaptionedCorpus(ExternalCorpus):
    """Media with several captions each, listed in JSON annotation files that name splits.

    Attributes:
        files: (split, annotation file) in the order in which they are read.
        media_source: the directory of the media.
    """

    annotations_present = ("captions",)
    captions_equivalent = True
    files: list[tuple[str, str]]
    media_source: SourceDirectory

    def set_annotation_files(self, files: list[tuple[str, str]]) -> None:
        """Set the annotation files, (split, file) each, and the directory of the media."""
        self.files = files
        media = self.options.media
        self.media_source = SourceDirectory(media) if media else self.source

    def annotation_files(self) -> list[str]:
        """Return the annotation files."""
        return [file for _, file in self.files]

    def assign_split(self, split: str, name: str) -> str:
        """Return the split of a row; without a test, half of the validation rows become the test.

        Args:
            split: split of the annotation file.
            name: value whose rows must stay in one split.
        """
        has_test = any(each.startswith("test") for each, _ in self.files)
        return split if has_test or split != "validation" else val_or_test(name)

    def annotated_rows(
        self, file: str, build: Callable[[str | None, Any], Row]
    ) -> Iterator[Row | RejectedRow]:
        """Yield the rows of an annotation file; entries that cannot be used as error rows.

        Args:
            file: the annotation file.
            build: makes a row of (key in a JSON object or None, entry); raises ``ValueError``.
        """
        for number, name, record in read_json_entries(self.source, file):
            key = make_key(f"{file}:{number}")
            if isinstance(record, BadRecord):
                yield error_row(key, record.reason, file, number, record.truncates_file)
                continue
            try:
                row = build(name, record)
            except ValueError as error:
                yield error_row(key, str(error), file, number)
                continue
            yield row | {"file": file, "row": number}

"""Third-party corpus of poems: one file each, with the dynasty in the first line as its class."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.corpora.readers import (
    ExternalCorpus,
    FileRecord,
    Row,
    SourceDirectory,
    SplitOptions,
    TextOptions,
    clean_text,
    hash_split,
)


@dataclass
class PoemOptions(SplitOptions, TextOptions):
    """Poems.

    Args:
        verses: lines kept of a poem.
    """

    verses: int = 4


class Poems(ExternalCorpus):
    """Poems with their dynasties."""

    name = "poems"
    modality = "text"
    Options = PoemOptions
    annotations_present = ("labels",)

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return a file that ends in .poem as evidence."""
        found = next((e.name for e in source.walk() if e.name.endswith(".poem")), None)
        return f"{found} is a poem" if found else None

    def read_records(self) -> Iterator[FileRecord]:
        """Yield poems in the order of their names."""
        for entry in self.source.walk():
            if entry.name.endswith(".poem"):
                lines = [
                    each.decode("utf-8", "replace") for _, each in self.source.lines(entry.name)
                ]
                yield FileRecord(entry.name, None, lines, key=entry.name)

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a poem."""
        lines = record.value[: 1 + self.options.verses]
        if len(lines) < 2 or not all(map(str.strip, lines[:2])):
            raise ValueError("a poem without a dynasty or verses")
        return {
            "split": hash_split(record.key, self.options),
            "key": record.key,
            "group": -1,
            "text": clean_text("，".join(lines[1:])),
            "label": clean_text(lines[0]),
            "captions": [],
            "file": record.file,
        }

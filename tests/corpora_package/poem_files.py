"""Third-party corpus of poems: one file each, with the dynasty in the first line as its class."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.corpora.readers import (
    ExternalCorpus,
    RejectedRow,
    Row,
    SourceArchives,
    SourceDirectory,
    SplitOptions,
    TextOptions,
    clean_text,
    error_row,
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

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield poems in the order of their names."""
        for entry in self.source.walk():
            if not entry.name.endswith(".poem"):
                continue
            lines = [line.decode("utf-8", "replace") for _, line in self.source.lines(entry.name)]
            try:
                text = clean_text("，".join(lines[1 : 1 + self.options.verses]))
                yield {
                    "split": hash_split(entry.name, self.options),
                    "key": entry.name,
                    "group": -1,
                    "text": text,
                    "label": clean_text(lines[0]),
                    "captions": [],
                    "file": entry.name,
                }
            except (ValueError, IndexError):
                yield error_row(entry.name, "a poem without a dynasty or verses", entry.name)

"""Annotation files beside media that a reader does not read, so that a command can name them."""

from collections import Counter

#: Endings of files that can hold labels, captions or transcripts.
ANNOTATION_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token", ".parquet", ".xml", ".mat",
    ".pkl", ".npy", ".xls", ".xlsx", ".lst", ".lab", ".textgrid", ".srt", ".vtt",
)  # fmt: skip
#: Names of texts about a corpus.
_DOCUMENTATION = ("readme", "license", "licence", "changelog", "changes", "about", "requirements")
#: Files of a folder that are named; more of them are counted. COCO has six beside its captions.
_MAX_NAMED = 8


def is_annotation_name(file: str) -> bool:
    """Return whether a file can hold annotations, by its name."""
    name = file.rpartition("/")[2].lower()
    is_documentation = name.startswith(_DOCUMENTATION)
    return name.removesuffix(".gz").endswith(ANNOTATION_SUFFIXES) and not is_documentation


class UnreadFiles:
    """Files by folder and ending. A folder can hold one file per image, so few names are kept."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = {}
        self._counts = Counter[tuple[str, str]]()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, file: str) -> None:
        """Add a file by its path."""
        folder, slash, name = file.rpartition("/")
        group = (folder + slash, name.lower().removesuffix(".gz").rpartition(".")[2])
        self._counts[group] += 1
        kept = self._names.setdefault(group, [])
        if len(kept) < _MAX_NAMED:
            kept.append(file)

    def describe(self) -> str:
        """Return the files as ``"a.json, b.json, labels/*.xml (5,011 files)"``."""
        parts = []
        for (folder, extension), count in self._counts.items():
            if count <= _MAX_NAMED:
                parts += self._names[folder, extension]
            else:
                parts.append(f"{folder}*.{extension} ({count:,} files)")
        return ", ".join(parts)

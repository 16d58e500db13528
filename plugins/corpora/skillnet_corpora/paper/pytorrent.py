"""PyTorrent: Python functions of packages on PyPI with their docstrings.

    both/{train,valid,test}/*.jsonl.gz

The lines have the fields of CodeSearchNet, and ``code_with_docstrings`` and ``summary``. The query
is the first paragraph of the docstring. For translated docstrings, name the field:
``--options.pytorrent.docstring docstring_zh``.
"""

from pipelines.data.io.directory import SourceDirectory
from skillnet_corpora.paper.codesearchnet import (
    FIELDS,
    CodeSearchNetCorpus,
    first_record_fields,
)


class PyTorrentCorpus(CodeSearchNetCorpus):
    """Functions with the first paragraph of their docstrings as query."""

    name = "pytorrent"
    layout = "both/train/….jsonl.gz"

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return as evidence that lines have CodeSearchNet's fields and those of PyTorrent."""
        fields = first_record_fields(source)
        # Without "docstring": a translated docstring can have another name, given as an option.
        if FIELDS - {"docstring"} <= fields and {"code_with_docstrings", "summary"} & fields:
            return "train, valid and test hold lines with the fields of PyTorrent"
        return None

    def discover(self) -> None:
        """Find the files of each split: those in ``both``, if there are other selections."""
        super().discover()
        both = [(split, file) for split, file in self.files if "both/" in file]
        self.files = both or self.files

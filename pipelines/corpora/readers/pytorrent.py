"""PyTorrent: Python functions of packages on PyPI with their docstrings.

    both/{train,valid,test}/*.jsonl.gz

The fields of CodeSearchNet, with ``code_with_docstrings`` and ``summary``. The query is the
docstring's first paragraph; where docstrings were translated, name the field:
``--options.pytorrent.docstring docstring_zh``.
"""

from pipelines.corpora.readers.codesearchnet import FIELDS, CodeSearchNetCorpus, first_record_fields
from pipelines.io.directory import SourceDirectory


class PyTorrentCorpus(CodeSearchNetCorpus):
    """Functions, each with what its docstring says."""

    name = "pytorrent"
    layout = "both/train/….jsonl.gz"

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Lines with CodeSearchNet's fields and its own."""
        found = first_record_fields(place)
        # Without its docstring, too: it may have a name that must be given.
        if FIELDS - {"docstring"} <= found and {"code_with_docstrings", "summary"} & found:
            return "train, valid and test hold lines with the fields of PyTorrent"
        return None

    def discover(self) -> None:
        """Find the files of each split: those in ``both``, where there are other selections."""
        super().discover()
        both = [(split, file) for split, file in self.files if "both/" in file]
        self.files = both or self.files

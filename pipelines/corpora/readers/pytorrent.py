"""PyTorrent: Python functions of packages on PyPI with their docstrings.

    both/{train,valid,test}/*.jsonl.gz

The fields of CodeSearchNet, with ``code_with_docstrings`` and ``summary``. The query is the
docstring's first paragraph; where docstrings were translated, name the field:
``--options.pytorrent.docstring docstring_zh``.
"""

from pipelines.corpora.readers.codesearchnet import FIELDS, CodeSearchNet, fields_of
from pipelines.io.directory import Place


class PyTorrent(CodeSearchNet):
    """Functions, each with what its docstring says."""

    name = "pytorrent"
    layout = "both/train/….jsonl.gz"

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """Lines with CodeSearchNet's fields and its own."""
        found = fields_of(place)
        # Without its docstring, too: it may have a name that must be given.
        if FIELDS - {"docstring"} <= found and {"code_with_docstrings", "summary"} & found:
            return "train, valid and test hold lines with the fields of PyTorrent"
        return None

    def locate(self) -> None:
        """Find the files of each split: those in ``both``, where there are other selections."""
        super().locate()
        both = [(split, file) for split, file in self.files if "both/" in file]
        self.files = both or self.files

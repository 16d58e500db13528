"""The light files of what a command left, for the repository: no model, no path of a machine."""

import re
from collections.abc import Iterable
from pathlib import Path

#: What a run root is called where nobody names one.
RUN_ROOT = "runs"
#: An absolute path of this machine, in text or tables.
ABSOLUTE = re.compile(r"""(?:^|[\s"'=(,\[])(/[\w.-]+/[^\s"',]*)""", re.MULTILINE)


def keep(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files of a folder of the run root; paths below the root begin with ``runs``.

    Args:
        source: the folder of the run or sweep.
        names: identifiers of files; pictures are copied as they are, all else is text.
        target: the folder to write, made if it is missing.

    Raises:
        ValueError: a text names another place of this machine.
        FileNotFoundError: a file is not there; nothing was written.
    """
    root = str(source.absolute().parent)
    ready: dict[str, bytes] = {}
    for name in names:
        content = (source / name).read_bytes()
        if not name.endswith(".png"):
            text = re.sub(rf"{re.escape(root)}(?![\w.-])", RUN_ROOT, content.decode())
            if found := ABSOLUTE.search(text):
                raise ValueError(f"{source / name} names {found[1]}, a place of this machine alone")
            content = text.encode()
        ready[name] = content
    target.mkdir(parents=True, exist_ok=True)
    for name, content in ready.items():
        (target / name).write_bytes(content)

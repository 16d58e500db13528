"""Guard of a walk through directories against circular symbolic links."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from skillnet_platform.errors import UserError

#: Links that may lead into one directory. A few links that each lead to the next one twice are
#: a thousand paths to the same files.
MAX_LINKS_PER_FOLDER = 16


class SymlinkGuard:
    """Directories between the root and the position of a walk, and links into each directory."""

    def __init__(self) -> None:
        self._ancestors: list[tuple[int, int]] = []
        self._links: Counter[tuple[int, int]] = Counter()

    @contextmanager
    def enter(self, folder: str) -> Iterator[bool]:
        """Enter a local directory while the block runs; yield ``False`` if the walk is in it.

        Args:
            folder: path of the directory.

        Raises:
            UserError: too many links lead to the directory.
            OSError: see ``os.stat``.
        """
        info = os.stat(folder)  # noqa: PTH116 - called for many folders
        identity = info.st_dev, info.st_ino
        if identity in self._ancestors:
            yield False
            return
        if os.path.islink(folder):  # noqa: PTH114 - the same
            self._links[identity] += 1
            if self._links[identity] > MAX_LINKS_PER_FOLDER:
                raise UserError(
                    f"{folder}: more than {MAX_LINKS_PER_FOLDER} links lead to this directory, and "
                    "its files would be read through each of them; remove the links"
                )
        self._ancestors.append(identity)
        try:
            yield True
        finally:
            self._ancestors.pop()

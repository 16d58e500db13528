"""Where a walk through folders is, so that links do not lead it round in circles."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from skillnet_platform.errors import UserError

#: So often links may lead into one folder: a few that each lead on to the next, twice, are a
#: thousand ways.
MAX_LINKS_PER_FOLDER = 16


class SymlinkGuard:
    """The folders on the way down to where a walk is, and how often links led it into which."""

    def __init__(self) -> None:
        self._way: list[tuple[int, int]] = []
        self._linked: Counter[tuple[int, int]] = Counter()

    @contextmanager
    def enter(self, folder: str) -> Iterator[bool]:
        """Within it the walk is in that folder of a disk; false if it was in it already.

        Raises:
            UserError: links lead into it over and over.
            OSError: as of ``os.stat``.
        """
        about = os.stat(folder)  # noqa: PTH116 - called for many folders
        here = about.st_dev, about.st_ino
        if here in self._way:
            yield False
            return
        if os.path.islink(folder):  # noqa: PTH114 - the same
            self._linked[here] += 1
            if self._linked[here] > MAX_LINKS_PER_FOLDER:
                raise UserError(
                    f"{folder}: more than {MAX_LINKS_PER_FOLDER} links lead to this folder, so that its files "
                    "would be read as many times; remove them"
                )
        self._way.append(here)
        try:
            yield True
        finally:
            self._way.pop()

"""Stop signal of a driver for workers that see its disk, in tests without Ray."""

import contextlib
import os
from pathlib import Path

FILE = "leave"


class FileStopSignal:
    """File that stands for the signal, for workers that see the driver's disk.

    Args:
        path: location of the file on the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def set(self) -> None:
        """Create the file."""
        self._path.touch()

    def clear(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def is_set(self) -> bool:
        """Return whether the file exists."""
        # A network file system may cache a lookup by name, but not the listing of the folder.
        with contextlib.suppress(OSError), os.scandir(self._path.parent) as entries:
            return any(entry.name == self._path.name for entry in entries)
        return False

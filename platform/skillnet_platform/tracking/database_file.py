"""Check of a sqlite database before MLflow opens it.

MLflow retries a database that it cannot open for minutes, and its error names no path.
"""

import contextlib
import os
import sqlite3
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage import HOME_VARIABLE

_REMEDY = "Move it away to start with an empty database, or name another one with tracking.uri"


def require_database(path: Path) -> None:
    """Check that a file is a sqlite database, or that it can be created.

    Raises:
        UserError: it is another file, is damaged, or cannot be opened or created.
    """
    if not path.exists():
        folder = next(each for each in path.parents if each.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{path}: the database cannot be created, because {folder} is not writable. "
                f"Set {HOME_VARIABLE} or tracking.uri to a writable directory."
            )
        return
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read this database. {_REMEDY}.")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        # Another process may migrate it; MLflow waits for that.
        if "locked" not in str(error):
            raise UserError(f"{path}: {error}. {_REMEDY}.") from None

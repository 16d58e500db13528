"""Artifacts of a run root that was moved or copied.

MLflow stores absolute locations of artifacts in its database. The database of a run root and its
artifacts move together, so :func:`relocate_artifacts` writes the new location. It is called by
:func:`skillnet_platform.tracking.backend.create_client`.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

from skillnet_platform.errors import UserError

#: Table -> columns with locations of artifacts.
LOCATION_COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location",),
}
#: Seconds that a query waits for another process.
LOCK_PATIENCE_S = 30.0


def relocate_artifacts(
    database: Path,
    artifacts: Path,
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> list[str]:
    """Let a database of MLflow find its artifacts beside it, after its run root was moved.

    A location is replaced if its folder cannot be reached, or if ``artifacts`` has its runs: the
    run root was copied. Another path to the same folder, such as a symbolic link, stays.

    Args:
        database: sqlite file in the run root.
        artifacts: folder of artifacts in the same run root.
        turn: context in which one process changes the database at a time.

    Returns:
        Replaced locations.

    Raises:
        UserError: the database must be changed, but is read-only.
    """
    if not database.is_file():
        return []
    with contextlib.closing(sqlite3.connect(database, timeout=LOCK_PATIENCE_S)) as connection:
        if not _find_moved(connection, artifacts):
            return []
        try:
            with turn(), connection:
                moved = _find_moved(connection, artifacts)
                for old in moved:
                    _replace_location(connection, old, artifacts.as_uri())
                return moved
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):
                raise  # such as a full disk
            raise UserError(
                f"{database}: its run root was reached by another path before, and the new "
                f"location of its artifacts cannot be written ({error}). Make the database "
                "writable, or use the earlier path"
            ) from error


def _find_moved(connection: sqlite3.Connection, artifacts: Path) -> list[str]:
    """Return the locations of other run roots whose artifacts are in ``artifacts``."""
    query = "SELECT DISTINCT artifact_location FROM experiments"
    try:
        found = [row[0] for row in connection.execute(query)]
    except sqlite3.OperationalError:
        return []  # MLflow has not created its tables yet
    scheme, name = "file://", artifacts.name
    others = [
        each
        for each in found
        if each and each.startswith(scheme) and each.rpartition("/")[2] == name
    ]
    others = [each for each in others if each != artifacts.as_uri()]
    return [each for each in others if _is_moved(connection, each, artifacts)]


def _is_moved(connection: sqlite3.Connection, location: str, artifacts: Path) -> bool:
    from urllib.request import url2pathname

    before = Path(url2pathname(location.removeprefix("file://")))
    try:
        if not before.is_dir():
            return True
        if artifacts.is_dir() and artifacts.samefile(before):
            return False
    except PermissionError:
        return True
    query = (
        "SELECT runs.run_uuid FROM runs JOIN experiments USING (experiment_id) "
        "WHERE experiments.artifact_location = ?"
    )
    return any((artifacts / row[0]).is_dir() for row in connection.execute(query, (location,)))


def _replace_location(connection: sqlite3.Connection, old: str, new: str) -> None:
    for table, columns in LOCATION_COLUMNS.items():
        for column in columns:
            # Names of tables and columns are constants of this module.
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )

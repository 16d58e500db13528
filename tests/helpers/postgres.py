"""A PostgreSQL of a test's own: a cluster in a temporary folder, behind a Unix socket only."""

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path


def programs() -> Path | None:
    """Folder of Debian's ``initdb`` and ``pg_ctl``, or of those on PATH; none if not installed."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))  # noqa: PTH207 - absolute pattern
    given = shutil.which("initdb")
    if found:
        return Path(found[-1]).parent
    return Path(given).resolve().parent if given else None


def owner() -> str | None:
    """Who runs it: PostgreSQL refuses root, so its package's user then."""
    if os.geteuid() != 0:
        return None
    return pwd.getpwnam("postgres").pw_name


class Postgres:
    """A cluster with the database and the user ``mlflow``. Close it to end and remove it."""

    def __init__(self) -> None:
        place = programs()
        assert place is not None
        self._bin, self._owner = place, owner()
        # Not pytest's folder: that one lets nobody else in. A socket's path must be short, too.
        self.folder = Path(tempfile.mkdtemp(prefix="skillnet-pg-", dir="/tmp"))
        if self._owner:
            shutil.chown(self.folder, self._owner)
        self._data = self.folder / "data"
        self._call("initdb", "-D", self._data, "-U", "mlflow", "-A", "trust", "--no-sync")
        with (self._data / "postgresql.conf").open("a", encoding="ascii") as stream:
            stream.write(
                f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\n"
                "max_connections = 60\n"
            )
        self.start()
        self._call("createdb", "-h", self.folder, "-U", "mlflow", "mlflow")

    @property
    def uri(self) -> str:
        """For SQLAlchemy and for ``skillnet tracker --store``."""
        return f"postgresql://mlflow@/mlflow?host={self.folder}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = self.folder / "log"
        self._call("pg_ctl", "-D", self._data, "-l", log, "-w", "-t", "120", "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it: ``immediate`` is as a crash, after which it recovers from its log."""
        self._call("pg_ctl", "-D", self._data, "-m", mode, "-w", "-t", "120", "stop")

    def close(self) -> None:
        """End it and remove it."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, program: str, *words: object) -> None:
        subprocess.run(
            [str(self._bin / program), *map(str, words)],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._owner,
            cwd=self.folder,
            timeout=180,
        )

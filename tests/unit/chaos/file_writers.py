"""Commands that write files in one way each, for tests of crash points."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import sys, time
with open(sys.argv[1], "w", buffering=1) as stream:
    for number in range(10):
        stream.write(f"{number}\\n")
        time.sleep(0.02)
"""


def write_with_python(root: Path) -> None:
    """Replace a file atomically."""
    folder = root / "folder"
    folder.mkdir(exist_ok=True)
    with (folder / "temporary").open("wb", buffering=0) as stream:
        stream.write(bytes(100))
        os.fsync(stream.fileno())
    (folder / "temporary").rename(folder / "final")
    (folder / "final").unlink()


def write_copies(root: Path) -> None:
    """Copy a file, inside the kernel where Python does so."""
    with tempfile.NamedTemporaryFile() as source:
        source.write(bytes(100_000))
        source.flush()
        shutil.copyfile(source.name, root / "copy")


def write_arrow(root: Path) -> None:
    """Write an Arrow file as shards are written."""
    import pyarrow as pa

    table = pa.table({"a": list(range(1000))})
    with pa.OSFile(str(root / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)


def write_safetensors(root: Path) -> None:
    """Write a tensor file."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1000)}, root / "a.safetensors")


def write_sqlite(root: Path) -> None:
    """Commit one transaction."""
    with sqlite3.connect(root / "a.db") as connection:
        connection.execute("create table a (b)")
        connection.execute("insert into a values (1)")
    connection.close()


def write_in_two_processes(root: Path) -> None:
    """Write from a child process and from this one at the same time."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root / "child")])
    while child.poll() is None:
        (root / "parent").write_bytes(bytes(10))
        time.sleep(0.02)


def write_elsewhere(root: Path) -> None:
    """Write outside the run root."""
    with tempfile.NamedTemporaryFile() as target:
        target.write(bytes(100))


WRITERS = {
    "python": write_with_python,
    "copies": write_copies,
    "arrow": write_arrow,
    "safetensors": write_safetensors,
    "sqlite": write_sqlite,
    "processes": write_in_two_processes,
    "elsewhere": write_elsewhere,
}


def main(argv: list[str]) -> int:
    """Run the writer of that name in the run root."""
    WRITERS[argv[0]](Path(os.environ["SKILLNET_HOME"]))
    return 0

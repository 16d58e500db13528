"""Kill a command at its n-th file-system event, for any n.

An event is the creation or emptying of a file, a write, truncate, rename, link, unlink, mkdir or
fsync below the run root. :mod:`crash_points.c <tests.chaos>` counts them in all processes of the
command: a library that is loaded before libc (LD_PRELOAD). It therefore sees what Python, pyarrow,
safetensors and SQLite do, because all of them call libc. It does not see:

- writes through C's ``FILE`` streams, and system calls without libc (no library here does this);
- writes to memory-mapped files, such as the shared memory of SQLite's journal mode WAL;
- a power loss. A killed process keeps what the kernel has, so a missing fsync is not found.

The kill happens before the event. Two events differ: a write that is the target writes its first
half, and a file that is created stays empty. All processes of the command die at this moment, or at
their next event.

Commands run in children of a process that has loaded the libraries before, which saves seconds for
each kill. Without a C compiler, or on another system than Linux, nothing of this runs.
"""

import contextlib
import json
import mmap
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.namespaces import ROOT

SOURCE = Path(__file__).with_suffix(".c")
CONTROL_BYTES = 3 * 8 + 4096
#: Seconds for a command to end.
PATIENCE_S = 900.0
#: Loaded before the first command. None of them starts a thread on import.
MODULES = (
    "mlflow.tracking",
    "pandas",
    "pipelines.training.evaluation.evaluator",
    "pipelines.finetune",
    "pipelines.data.preprocessing.pipeline",
    "pipelines.register",
    "pipelines.serving.registration",
    "pipelines.training.loop.worker",
    "ray.data",
    "ray.tune",
    "scipy.stats",
    "sweeps.trials.engine",
    "torch",
)


def missing_compiler() -> str:
    """Return why the library cannot be built here; empty if it can."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "crash points need Linux with glibc"
    if shutil.which("cc") is None:
        return "crash points need a C compiler (cc)"
    return ""


@dataclass(frozen=True)
class FileEvent:
    """One event of a command.

    Args:
        number: its position, from 1.
        kind: create, write, truncate, rename, link, unlink, mkdir or fsync.
        path: its file or folder, relative to the run root.
    """

    number: int
    kind: str
    path: str


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended.

    Args:
        code: exit code; negative for a signal.
        events: all that it did below the run root, in order.
        output: its standard output and errors.
    """

    code: int
    events: list[FileEvent]
    output: str


class CrashLab:
    """Run commands in a run root, and kill them at their events.

    Args:
        folder: for the library, the control file and the run root.
        modules: loaded before the first command.
        environment: variables of the commands.
    """

    def __init__(
        self,
        folder: Path,
        modules: Sequence[str] = MODULES,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder.resolve() / "runs"
        self._folder = folder.resolve()
        self._log, self._output = self._folder / "events", self._folder / "output"
        library = build_library(self._folder)
        control = self._folder / "control"
        control.write_bytes(bytes(CONTROL_BYTES))
        with control.open("r+b") as stream:
            self._control = mmap.mmap(stream.fileno(), CONTROL_BYTES)
        ours = [ROOT, ROOT / "platform", ROOT / "tests" / "made_corpora"]
        paths = [*map(str, ours), os.environ.get("PYTHONPATH", "")]
        variables = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SKILLNET_CRASH_CONTROL": str(control),
            "SKILLNET_CRASH_LOG": str(self._log),
            "SKILLNET_HOME": str(self.root),
            **(environment or {}),
        }
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.forked_commands", *modules],
            env=variables,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Sequence[str], kill_at: int = 0) -> CommandEnd:
        """Run a command to its end, or to its death at an event.

        Args:
            words: parts of the command; the first is a module with a ``main``, such as
                ``pipelines.finetune``.
            kill_at: number of the event; 0 for none.
        """
        self._log.unlink(missing_ok=True)
        self._output.unlink(missing_ok=True)
        struct.pack_into("qqq", self._control, 0, 0, kill_at, 0)
        root = os.fsencode(self.root)
        self._control[24:] = root + bytes(CONTROL_BYTES - 24 - len(root))
        stdin, stdout = self._parent.stdin, self._parent.stdout
        assert stdin is not None
        assert stdout is not None
        order = {"words": list(words), "output": str(self._output), "patience": PATIENCE_S}
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        # From here on nothing is counted or killed: the caller looks at the run root.
        self._control[24:] = bytes(CONTROL_BYTES - 24)
        output = self._output.read_text(encoding="utf-8", errors="replace")
        return CommandEnd(code, self._events(), output)

    def close(self) -> None:
        """End the process that commands are forked from."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._parent.communicate(timeout=10)
        self._parent.kill()
        self._parent.wait()

    def _events(self) -> list[FileEvent]:
        if not self._log.is_file():
            return []
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        split = (line.split(" ", 2) for line in lines)
        found = [
            FileEvent(int(number), kind, path.removeprefix(f"{self.root}").lstrip("/"))
            for number, kind, path in split
        ]
        return sorted(found, key=lambda event: event.number)


@contextlib.contextmanager
def crash_lab(
    folder: Path, modules: Sequence[str] = MODULES, **environment: str
) -> Iterator[CrashLab]:
    """Provide a lab for a block; see :class:`CrashLab`."""
    lab = CrashLab(folder, modules, environment)
    try:
        yield lab
    finally:
        lab.close()


def build_library(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "crash_points.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library

"""Ratios of times, measured side by side, and the dated CSV that keeps them.

Absolute times depend on the machine and its other load. Contenders therefore run in turns in one
process. Each round gives one ratio. The report has the median of the ratios with the
smallest and the largest. With one thread the clock is the process' CPU time, which others on
the machine disturb least; with more threads it is the wall's.
"""

import csv
import datetime
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from skillnet_platform import console
from skillnet_platform.storage import data_root
from skillnet_platform.tables import write_csv

RESULTS = Path(__file__).parent / "results"

#: Rows per second that a GPU trains on, and CPU cores beside it. Assumed, not measured.
GPU_ROWS, GPU_CPUS = 1_000, 8

Clock = Callable[[], float]


class Spread(NamedTuple):
    """Median, smallest and largest of some rounds."""

    median: float
    low: float
    high: float


@dataclass
class Result:
    """One measured figure, one row of a CSV.

    Args:
        measured: what was measured.
        against: what stands below the fraction bar; empty for a plain figure.
        unit: ``ratio`` or the figure's unit.
        value, low, high: median, smallest and largest of the rounds.
        target: what the figure should be, as ``<= 1.05`` or ``>= 2.5``; empty without one.
        rounds: number of rounds.
        setting: sizes, in words.
        note: what a reader must know.
    """

    measured: str
    against: str
    unit: str
    value: float
    low: float
    high: float
    target: str = ""
    rounds: int = 1
    setting: str = ""
    note: str = ""
    met: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.target:
            sign, bound = self.target.split()
            good = self.value <= float(bound) if sign == "<=" else self.value >= float(bound)
            self.met = "yes" if good else "no"


def plain(
    measured: str, unit: str, value: float, target: str = "", setting: str = "", note: str = ""
) -> Result:
    """One figure of one round, below no fraction bar."""
    return Result(measured, "", unit, value, value, value, target, 1, setting, note)


def find_corpora(name: str, needed: str = "headings") -> Path | None:
    """Return the folder of prepared corpora; None, with a warning, where one is missing.

    Args:
        name: benchmark that needs them.
        needed: corpus that must be there.
    """
    data = Path(os.environ.get("SKILLNET_BENCHMARK_DATA") or data_root()).absolute()
    if (data / needed / "manifest.json").is_file():
        return data
    console.print_warning(f"{name} needs prepared corpora; there are none in {data}")
    return None


Name = TypeVar("Name")


def alternate(names: Iterable[Name], rounds: int, first: int = 0) -> Iterator[tuple[int, Name]]:
    """Yield each contender in each round, every other round in reverse order."""
    ordered = list(names)
    for number in range(first, rounds):
        for name in ordered if number % 2 == 0 else reversed(ordered):
            yield number, name


def clock_for(threads: int) -> Clock:
    """CPU time of the process for one thread, wall time for several."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every other round runs in reverse order."""
    names = list(runs)
    for name in names * warmup:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _, name in alternate(names, rounds):
        begin = clock()
        runs[name]()
        seconds[name].append(clock() - begin)
    return seconds


class Took(NamedTuple):
    """Seconds that something took: of CPUs, and on the wall."""

    cpu: float
    wall: float


def timed(work: Callable[[], object], without: Sequence[str] = ()) -> Took:
    """Do it; say what it took, of CPUs by ``tree_cpu_time``."""
    cpu, wall = tree_cpu_time(without), time.perf_counter()
    work()
    return Took(tree_cpu_time(without) - cpu, time.perf_counter() - wall)


def time_command(words: Sequence[str], codes: Sequence[int] = (0,), **variables: str) -> Took:
    """Run a program to its end; say what it and its children took.

    Args:
        words: command line.
        codes: exit codes that it may have.
        **variables: environment that the program has beside that of this process.
    """

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    cpu, wall = used(), time.perf_counter()
    done = subprocess.run(words, env=os.environ | variables, capture_output=True)
    if done.returncode not in codes:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}")
    return Took(used() - cpu, time.perf_counter() - wall)


def tree_cpu_time(without: Sequence[str] = ()) -> float:
    """Seconds of CPU of this process, of its descendants, and of those of them that have ended.

    Args:
        without: descendants with one of these words in their command line do not count.
    """
    import psutil

    own, total = psutil.Process(), 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            reported = " ".join(process.cmdline()) if without and process is not own else ""
            if not any(word in reported for word in without):
                total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the rounds' own ratios."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    name = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {count} cores"


def stamp() -> dict[str, str]:
    """Return the date and the machine of a measurement."""
    return {"date": datetime.date.today().isoformat(), "machine": machine()}


def write(
    name: str, results: Sequence[Result], threads: int, folder: Path = RESULTS, clock: str = ""
) -> Path:
    """Write ``<date>-<name>.csv``; an older one of the same day is replaced.

    ``clock`` names the one that was read, where the number of threads does not say it.
    """
    common = describe_setting(threads, clock)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{common['date']}-{name}.csv"
    rows = [rounded(asdict(result)) | common for result in results]
    write_csv(path, rows, digits="")
    return path


def describe_setting(threads: int, clock: str = "") -> dict[str, Any]:
    """Return the columns that all rows of a measurement share.

    Args:
        threads: number of threads.
        clock: the one that was read, where the number of threads does not say it.
    """
    import torch

    return {
        **stamp(),
        "threads": threads,
        "clock": clock or ("cpu" if threads == 1 else "wall"),
        "load": round(os.getloadavg()[0], 1),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
    }


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with four digits of each number."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


# -- CSV files that commands only add rows to, so that an interrupted command resumes ------


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none if it does not exist.

    Args:
        path: place of the CSV.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append_csv_rows(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> None:
    """Append rows to a CSV, with a header if it is new.

    Args:
        path: place of the CSV; its folder is created.
        columns: names of the CSV, in order.
        rows: with a value for each column.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


# -- contenders in processes of their own ---------------------------------------------------
# Neither's threads, caches and memory touch the other's.

#: Makes a contender: it gets its arguments, an empty folder and a stack that ends with it, and
#: returns what is timed.
Maker = Callable[..., Callable[..., object]]


@contextmanager
def side(
    maker: Maker, *arguments: Any, keep: bool = False, without: Sequence[str] = ()
) -> Iterator[Callable[..., Took]]:
    """A contender: call it to have it work, and to hear what that took.

    Args:
        maker: see ``Maker``; of a module, as it is sent by name.
        arguments: for it.
        keep: freed memory stays in the process, as in a training worker.
        without: processes that do not count; see :func:`tree_cpu_time`.
    """
    # Not forked: what this process has set of its memory would be theirs too.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, maker, arguments, keep, without))
    process.start()
    theirs.close()

    def call(*words: Any) -> Took:
        mine.send(words)
        took: Took = mine.recv()
        return took

    try:
        yield call
    finally:
        mine.close()
        process.join(60)
        if process.is_alive():
            process.terminate()


def _serve(
    pipe: Any, maker: Maker, arguments: Sequence[Any], keep: bool, without: Sequence[str]
) -> None:
    if keep:
        from skillnet.precision import keep_freed_memory

        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = maker(*arguments, Path(folder), stack)
        while True:
            try:
                words = pipe.recv()
            except EOFError:
                return
            pipe.send(timed(partial(work, *words), without))


def rounds_of(
    sides: dict[str, Callable[..., Took]], rounds: int, *words: Any
) -> dict[str, list[Took]]:
    """What each took in each round, after one to warm up; every other round in reverse order."""
    took: dict[str, list[Took]] = {name: [] for name in sides}
    for number, name in alternate(sides, rounds + 1):
        one = sides[name](*words)
        if number:
            took[name].append(one)
    return took

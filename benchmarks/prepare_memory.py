"""Memory of a prepare against the number of rows: peaks of a worker, of the driver, of the store.

    python -m benchmarks.prepare_memory MEDIA --kinds sound image video --times 5 20

MEDIA holds folder corpora made by ``benchmarks.media_corpus``, MEDIA/sound and so on. Of each, all
rows are prepared, and its first rows / times, each by a process of its own with a fresh Ray, while
the anonymous memory (RssAnon) of every process is read five times a second. Pages of files and
of Ray's store are no part of it: the kernel takes the first back as it needs, and the store is
bounded and reported separately.

Five gigabytes of a kind are 4,000 rows of sound, 11,700 of image and 7,800 of video:

    python -m benchmarks.media_corpus MEDIA/image --kind image --rows 11700 --processes 2
    python -m benchmarks.media_corpus MEDIA/video --kind video --rows 7800 --processes 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Result, plain, write
from benchmarks.media_corpus import ENDING, link_first

PAUSE = 0.2
#: What is in a process' command line while it decodes and writes shards, or reads rows.
DOING = {"worker": "ray::MapBatches", "reader": "ray::ReadCorpusBlocks"}
#: What the issue asks for: flat within a tenth.
FLAT = 1.10
SIZES: dict[str, dict[str, Any]] = {
    "image": {"size": 224},
    "sound": {"max_seconds": 12},
    "video": {"video_size": 96},
}


class Peaks(threading.Thread):
    """Reads the memory of this process and its descendants until it is stopped.

    Ray names a worker process after its current task, which identifies workers here. Ray's
    dashboard and agents are excluded.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.workers: dict[int, int] = {}
        self.doing: dict[int, str] = {}
        self.driver = self.store = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sample."""
        import psutil

        own = psutil.Process()
        while not self.stopped.wait(PAUSE):
            self.driver = max(self.driver, anonymous(own.pid))
            for child in own.children(recursive=True):
                try:
                    name = child.cmdline()
                except psutil.Error:
                    continue
                reported = " ".join(name)
                for kind, word in DOING.items():
                    if word in reported:
                        self.doing[child.pid] = kind
                if child.pid in self.doing:
                    used = anonymous(child.pid)
                    self.workers[child.pid] = max(self.workers.get(child.pid, 0), used)
                    self.store = max(self.store, resident(child.pid, "RssShmem"))

    def largest(self, kind: str) -> int:
        """Bytes of the largest of those that did this."""
        found = [self.workers[pid] for pid, each in self.doing.items() if each == kind]
        return max(found, default=0)


def anonymous(pid: int) -> int:
    """Bytes of a process that no file stands behind."""
    return resident(pid, "RssAnon")


def resident(pid: int, kind: str) -> int:
    """A figure of /proc/PID/status, in bytes; 0 if the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line for line in status.splitlines() if line.startswith(f"{kind}:"))
    return int(next(lines, f"{kind}: 0 kB").split()[1]) * 1024


def one(folder: Path, kind: str, shard_rows: int, cpus: int) -> dict[str, Any]:
    """Prepare a corpus from this process and say what it took."""
    from skillnet_corpora.readers.folder import FolderCorpus

    corpus = FolderCorpus(
        str(folder), FolderCorpus.Options(validation=0.0, test=0.0, **SIZES[kind])
    )
    corpus.shard_rows = shard_rows  # type: ignore[misc]  # small: a twentieth of the rows is many
    peaks = Peaks()
    with tempfile.TemporaryDirectory(dir=folder.parent) as data:
        rows, shards, seconds = _prepare(corpus, Path(data), cpus, peaks)
    peaks.stopped.set()
    peaks.join()
    reported = {kind: peaks.largest(kind) for kind in DOING}
    reported |= {"driver": peaks.driver, "shared": peaks.store}
    return reported | {"rows": rows, "shards": shards, "seconds": seconds}


def _prepare(corpus: Any, data: Path, cpus: int, peaks: Peaks) -> tuple[int, int, float]:
    """``skillnet prepare``."""
    from pipelines.data.preprocessing.prepare import prepare
    from skillnet_platform.cluster import ensure_ray

    ensure_ray(cpus)
    peaks.start()
    begin = time.monotonic()
    done = prepare([], data, data, cpus, 0.0, [corpus])["folder"]
    seconds = time.monotonic() - begin
    return done["rows_out"], len(list(data.glob("folder/*.arrow"))), seconds


def compare(
    media: Path, kind: str, times: list[int], limit: int, shard_rows: int, cpus: int
) -> list[Result]:
    """A corpus at parts of its rows and at all of them."""
    whole = media / kind
    rows = len((whole / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    if limit and limit < rows:
        whole, rows = media / f"{kind}-{limit}", limit
        link_first(media / kind, whole, rows)
    more = ["--shard-rows", str(shard_rows), "--cpus", str(cpus)]
    many, size = _measure(whole, kind, media, more)
    results = []
    for each in times:
        part = media / f"{kind}-part"
        link_first(whole, part, rows // each)
        few, few_size = _measure(part, kind, media, more)
        setting = (
            f"{few['rows']} rows ({few_size:.2f} GB) and {many['rows']} rows ({size:.2f} GB) "
            f"in shards of {shard_rows}, {cpus} CPUs"
        )
        for name, label in _seen(few, many).items():
            ratio = many[name] / few[name]
            target = f"<= {FLAT}" if name == "worker" else ""
            results.append(Result(f"peak memory of the {label}, {kind}", f"{each} x fewer rows",
                                  "ratio", ratio, ratio, ratio, target, 1, setting))  # fmt: skip
    return [*results, *_all_rows(kind, many, size, f"shards of {shard_rows}, {cpus} CPUs")]


def _measure(folder: Path, kind: str, media: Path, more: list[str]) -> tuple[dict[str, Any], float]:
    """What ``one`` says of a corpus, from a process of its own, and the gigabytes of its media."""
    size = sum(path.stat().st_size for path in folder.glob(f"*/*.{ENDING[kind]}")) / 1e9
    words = [sys.executable, "-m", "benchmarks.prepare_memory", str(media), "--one", kind]
    words += ["--folder", str(folder), *more]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1]), size


def _seen(*each: dict[str, Any]) -> dict[str, str]:
    """The processes whose memory was read in all of these, and what they are called."""
    names = {"worker": "largest worker", "reader": "process that reads", "driver": "driver"}
    # A process that reads few rows is done before it is seen.
    return {
        name: label for name, label in names.items() if all(reported[name] for reported in each)
    }


def _all_rows(kind: str, many: dict[str, Any], size: float, setting: str) -> list[Result]:
    setting = f"{many['rows']} rows ({size:.2f} GB) in {setting}"
    results = []
    peaks = {name: f"peak memory of the {label}" for name, label in _seen(many).items()}
    peaks["shared"] = "peak of Ray's store in a worker"
    for name, label in peaks.items():
        results.append(plain(f"{label}, {kind}", "MiB", many[name] / 2**20, "", setting))
    rate, note = many["rows"] / many["seconds"], "wall time; says nothing where others compute"
    return [*results, plain(f"prepare, {kind}", "rows/s", rate, "", setting, note)]


def main(argv: list[str] | None = None) -> int:
    """Measure; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(ENDING), default=list(ENDING))
    parser.add_argument("--times", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--rows", type=int, default=0, help="of the larger corpus; 0 for all")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=list(ENDING), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    media = given.media.absolute()
    how = (given.shard_rows, given.cpus)
    if given.one:
        print(json.dumps(one(given.folder, given.one, *how)))
        return 0
    results: list[Result] = []
    for kind in given.kinds:
        results += compare(media, kind, given.times, given.rows, *how)
        path = write("prepare-memory", results, 1, given.output, clock="wall")
    for result in results:
        print(f"{result.measured}: {result.value:.3g} {result.unit} {result.met}  {result.setting}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a prepare against the number of rows: peaks of a worker, of the driver, of the store.

    python -m benchmarks.prepare_memory MEDIA --kinds sound image video --times 20

MEDIA holds folder corpora made by ``benchmarks.media_corpus``, MEDIA/sound and so on. Of each, its
first rows / times are prepared, and then all, each by a process of its own with a fresh Ray, while
the anonymous memory (RssAnon) of every process is read twice a second. Pages of files and
of Ray's store are no part of it: the kernel takes the first back as it needs, and the store is
bounded and told beside it.
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

from benchmarks.measure import RESULTS, Result, write
from benchmarks.media_corpus import ENDING, link_first

PAUSE = 0.5
#: What the issue asks for: flat within a tenth.
FLAT = 1.10
SIZES = {"image": {"size": 224}, "sound": {"max_seconds": 12}, "video": {"video_size": 96}}


class Peaks(threading.Thread):
    """Reads the memory of this process and its descendants until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.workers: dict[int, int] = {}
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
                    name = child.cmdline()[:1]
                except psutil.Error:
                    continue
                if name and name[0].startswith("ray::"):
                    used = anonymous(child.pid)
                    self.workers[child.pid] = max(self.workers.get(child.pid, 0), used)
                    self.store = max(self.store, resident(child.pid, "RssShmem"))


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
    """Prepare a corpus in this process and say what it took."""
    from pipelines.corpora.folder import Folder
    from pipelines.prepare import prepare
    from skillnet_platform.cluster import ensure_ray

    corpus = Folder(str(folder), Folder.Options(validation=0.0, test=0.0, **SIZES[kind]))
    corpus.shard_rows = shard_rows  # type: ignore[misc]  # small: a tenth of the rows is many
    peaks = Peaks()
    with tempfile.TemporaryDirectory(dir=folder.parent) as data:
        ensure_ray(cpus)
        peaks.start()
        begin = time.monotonic()
        done = prepare([], Path(data), Path(data), cpus, 0.0, [corpus])["folder"]
        seconds = time.monotonic() - begin
        shards = len(list(Path(data).glob("folder/*.arrow")))
    peaks.stopped.set()
    peaks.join()
    busy = sorted(peaks.workers.values(), reverse=True)[: cpus + 1]  # with the reading one
    told = {"worker": busy[0], "busy": busy, "driver": peaks.driver, "shared": peaks.store}
    return told | {"rows": done["rows_out"], "shards": shards, "seconds": seconds}


def compare(media: Path, kind: str, times: int, shard_rows: int, cpus: int) -> list[Result]:
    """A corpus at a part of its rows and at all of them."""
    whole = media / kind
    rows = len((whole / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    part = media / f"{kind}-part"
    link_first(whole, part, rows // times)
    found, sizes = [], []
    for folder in (part, whole):
        sizes.append(sum(path.stat().st_size for path in folder.glob(f"*/*.{ENDING[kind]}")))
        words = [sys.executable, "-m", "benchmarks.prepare_memory", str(media), "--one", kind]
        words += ["--folder", str(folder), "--shard-rows", str(shard_rows), "--cpus", str(cpus)]
        out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
    few, many = found
    setting = (
        f"{few['rows']} rows ({sizes[0] / 1e9:.2f} GB) and {many['rows']} rows "
        f"({sizes[1] / 1e9:.2f} GB) in shards of {shard_rows}, {cpus} CPUs"
    )
    results = []
    for name, label in (("worker", "largest worker"), ("driver", "driver")):
        ratio = many[name] / few[name]
        label = f"peak memory of the {label}, {kind}"
        against = f"{times} x fewer rows"
        target = f"<= {FLAT}" if name == "worker" else ""
        results.append(Result(label, against, "ratio", ratio, ratio, ratio, target, 1, setting))
        mib = many[name] / 2**20
        results.append(Result(label, "", "MiB", mib, mib, mib, "", 1, setting))
    shared = many["shared"] / 2**20
    label = f"peak of Ray's store in a worker, {kind}"
    results.append(Result(label, "", "MiB", shared, shared, shared, "", 1, setting))
    speed = many["rows"] / many["seconds"]
    label = f"rows prepared, {kind}"
    note = "on a machine that others used at the same time"
    results.append(Result(label, "", "rows/s", speed, speed, speed, "", 1, setting, note))
    return results


def main(argv: list[str] | None = None) -> int:
    """Measure; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(ENDING), default=list(ENDING))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=list(ENDING), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    media = given.media.absolute()
    if given.one:
        print(json.dumps(one(given.folder, given.one, given.shard_rows, given.cpus)))
        return 0
    results: list[Result] = []
    for kind in given.kinds:
        results += compare(media, kind, given.times, given.shard_rows, given.cpus)
        path = write("prepare-memory", results, 1, given.output, clock="wall")
    for result in results:
        print(f"{result.measured}: {result.value:.3g} {result.unit} {result.met}  {result.setting}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

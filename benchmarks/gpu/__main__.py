"""Measure a GPU in parts: ``make gpu``, or ``python -m benchmarks.gpu [part ...]``.

Each part is a process of less than nine minutes. It appends each row to ``gpu-<card>.csv`` as soon
as it is measured, so an hour that ends early keeps what it has seen. A part that fails or takes too
long has a row that says so, and the next part starts. Another call measures what is missing.

No part needs a network. The last one, the demo, needs its corpora: ``skillnet fetch`` and
``skillnet prepare`` before. ``skillnet plan --measurements FILE`` reads the rows.

On a machine without a GPU, ``--rehearse`` runs all parts on the CPU at tiny sizes.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.gpu.bench import GpuBench, MeasuredPart, find_device, last_line
from benchmarks.gpu.part_list import list_parts
from benchmarks.measure import Result, plain, read_csv_rows
from skillnet_platform import console
from skillnet_platform.errors import TerminatedError, UserError
from skillnet_platform.signals import terminate_as_interrupt

#: Row of a part that has ended, and of one that has failed.
FINISHED, FAILED = "finished", "failed"
#: Seconds after which a part is ended: lent machines often end a command after ten minutes.
LIMIT_S = 540.0
ROUNDS = 10


class PartRows:
    """Rows of the parts of one card, in a CSV that commands only add to.

    Args:
        path: the CSV.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._common = measure.describe_setting(1, "wall")

    def append(self, part: str, result: Result) -> None:
        """Append a row.

        Args:
            part: name of the part that measured it.
            result: the row.
        """
        row = {"part": part, **measure.rounded(asdict(result)), **self._common}
        measure.append_csv_rows(self.path, list(row), [row])

    def list_finished(self) -> set[str]:
        """Return the names of the parts that have ended without a failure."""
        rows = read_csv_rows(self.path)
        return {row["part"] for row in rows if row["measured"] == FINISHED}


def run_part(rows: PartRows, name: str, command: Sequence[str], limit_s: float) -> bool:
    """Run the process of a part; append why it failed if it did; return whether it ended well.

    Args:
        rows: receives the row of a failure.
        name: name of the part.
        command: words of the process.
        limit_s: seconds after which it is ended.
    """
    note = ""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=limit_s)
            if process.returncode:
                note = last_line(errors) or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            note = f"not finished after {limit_s:g} s"
        finally:
            # Its ranks, loaders and runs end with it, also if this process is asked to end.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if note:
        rows.append(name, plain(FAILED, "", float("nan"), note=note))
        console.print_warning(f"{name}: {note}")
    return not note


def measure_part(rows: PartRows, bench: GpuBench, name: str, part: MeasuredPart) -> None:
    """Measure a part in this process, and append each row when it is there.

    Args:
        rows: receives the rows.
        bench: device and sizes.
        name: name of the part.
        part: what is measured.
    """
    began = time.perf_counter()
    for result in part(bench):
        rows.append(name, result)
        console.print_output(f"{name}: {result.measured}: {result.value:.4g} {result.unit}")
    rows.append(name, plain(FINISHED, "s", time.perf_counter() - began))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if a part failed or a target is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="parts, or starts of their names")
    parser.add_argument("--list", action="store_true", help="print the names of all parts")
    parser.add_argument("--again", action="store_true", help="repeat finished parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured steps of a task")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of a part")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the rows")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = torch.device("cpu") if options.rehearse else find_device()
    if device is None:
        console.print_error(
            f"make gpu: torch {torch.__version__} finds no GPU on this machine. Run it on a "
            "machine with a GPU and a build of torch for it, or rehearse it: "
            "python -m benchmarks.gpu --rehearse --output FOLDER"
        )
        return 2
    devices = 2 if device.type == "cpu" else torch.cuda.device_count()
    bench = GpuBench(device, options.output, options.rounds, options.rehearse)
    parts = list_parts(devices, bench)
    wanted = [name for name in parts if name.startswith(tuple(options.parts or [""]))]
    unknown = [each for each in options.parts if not any(name.startswith(each) for name in parts)]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(parts)}")
    if options.list:
        console.print_output("\n".join(wanted))
        return 0
    slug = re.sub(r"[^a-z0-9]+", "-", bench.card.name.lower()).strip("-")
    rows = PartRows(options.output / f"gpu-{slug}.csv")
    if options.child:
        (name,) = options.parts
        with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
            bench.scratch = Path(scratch)
            try:
                measure_part(rows, bench, name, parts[name])
            except UserError as error:
                console.print_error(str(error))
                return 1
        return 0
    words = [sys.executable, "-m", "benchmarks.gpu", "--child", "--output", str(options.output)]
    words += ["--rounds", str(options.rounds), *["--rehearse"] * options.rehearse]
    done = set() if options.again else rows.list_finished()
    failed = []
    try:
        with terminate_as_interrupt():
            for number, name in enumerate(wanted, 1):
                if name in done:
                    continue
                console.print_note(f"[{number}/{len(wanted)}] {name}")
                if not run_part(rows, name, [*words, name], options.limit):
                    failed.append(name)
    except (KeyboardInterrupt, TerminatedError):
        console.print_warning(f"ended; {rows.path} keeps what was measured")
        return 130
    missed = [row["measured"] for row in read_csv_rows(rows.path) if row["met"] == "no"]
    console.print_note(f"the rows are in {rows.path}")
    if failed:
        console.print_warning(f"failed: {', '.join(failed)}. Run the same command again")
    if missed:
        console.print_warning(f"missed: {', '.join(missed)}")
    return int(bool(failed or missed))


if __name__ == "__main__":
    sys.exit(main())

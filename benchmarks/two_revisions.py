"""Training of the demo's configuration at two revisions of the code, in turns.

    python -m benchmarks.two_revisions OLD --rounds 5 --steps 200 --data runs/corpora

Each turn is ``skillnet finetune --config quickstart`` in a process of its own, without Ray, with
the code of a revision in a directory of its own and the installed libraries of this environment.
The ratio of a round is that of the seconds that the training loop took, without start, evaluation
and end of the process. Other load disturbs these seconds, so run it on an idle machine.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, ratio, write
from skillnet_platform import console
from skillnet_platform.storage import data_root

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def check_out(revision: str, folder: Path) -> Iterator[Path]:
    """Provide the tree of a revision during a block.

    Args:
        revision: name of a commit.
        folder: empty or absent; removed afterwards.
    """
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--force", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(tree: Path, data: Path, steps: int, threads: int, workers: int = 1) -> dict[str, Any]:
    """Train with the code of a tree, and return the result of the command.

    Args:
        tree: checkout.
        data: prepared corpora.
        steps: optimizer steps.
        threads: number of compute threads of the process.
        workers: value of ``training.workers`` that trains in one process.
    """
    settings = {
        "training.steps": steps,
        "training.workers": workers,
        "training.threads_per_worker": threads,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "evaluate": "false",
        "tracking.register": "false",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tree}:{tree / 'platform'}",
            "SKILLNET_HOME": home,
            "OMP_NUM_THREADS": str(threads),
        }
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pipelines.finetune", "--config", "quickstart"),
                *("--name", "turn", "--data", str(data), "--json", *words),
            ],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(argv: list[str] | None = None) -> int:
    """Compare two revisions, print the ratio and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_revisions", description=__doc__)
    parser.add_argument("old")
    parser.add_argument("--new", default="HEAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="prepared corpora (default: of the run root)")
    parser.add_argument("--old-data", type=Path, help="the same, prepared by the old code")
    parser.add_argument(
        "--old-workers",
        type=int,
        default=1,
        help="0 for a revision before decision 71, where 1 trains under Ray Train",
    )
    options = parser.parse_args(argv)
    workers = {"new": 1, "old": options.old_workers}
    data = {"new": (options.data or data_root()).resolve()}
    data["old"] = options.old_data.resolve() if options.old_data else data["new"]
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    losses: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        trees = {
            name: stack.enter_context(check_out(getattr(options, name), Path(place) / name))
            for name in seconds
        }
        for number in range(options.rounds):
            for name in seconds if number % 2 == 0 else reversed(seconds):
                result = train(
                    trees[name], data[name], options.steps, options.threads, workers[name]
                )
                seconds[name].append(result["seconds"])
                losses[name] = result["losses"]
                console.print_note(f"round {number}, {name}: {result['seconds']:.2f} s")
    difference = max(abs(losses["old"][task] - losses["new"][task]) for task in losses["old"])
    setting = f"{options.steps} steps of --config quickstart"
    note = f"old {options.old}, new {options.new}; largest difference of a loss {difference:.2g}"
    times = ratio(seconds["new"], seconds["old"])
    ratio_of_times = Result(
        *("training loop, new", "old", "ratio", *times, "<= 1.02", options.rounds),
        setting=setting,
        note=note,
    )
    spread = f"{times.median:.4g} ({times.low:.4g} to {times.high:.4g})"
    console.print_note(f"{ratio_of_times.measured}: {spread}")
    write("two-revisions", [ratio_of_times], options.threads, clock="wall")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training of one task in a model of many skills, against a model of seven.

Every further skill has a task of its own, and no step activates it. Each size is a process of its
own, which trains the same task on the built-in headings with checkpoints. Needs prepared corpora.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, alternate, spread
from skillnet_platform.storage import data_root

SIZES = (7, 56, 224, 1000)
STEPS, EVERY, WARMUP = 60, 20, 10


class _Clock:
    """Callback that notes the CPU time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Nothing: a run starts before."""

    def on_step_start(self, step: int) -> None:
        """Note the CPU time of this process."""
        self.seconds.append(time.process_time())


class _PrivateMemory(threading.Thread):
    """Thread that finds the peak of this process's memory that no file backs, in bytes.

    Pages of files are shared by all processes of a machine, and the system may drop them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Read it 20 times a second."""
        while not self._done.wait(0.05):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """End, and return the peak."""
        self._done.set()
        self.join()
        return self.peak


def run(rounds: int, threads: int) -> list[Result]:
    """Train once per size and round, in turns."""
    found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for _, size in alternate(SIZES, min(rounds, 3)):
        words = [sys.executable, "-m", "benchmarks.many_skills", str(size)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[size].append(json.loads(done.stdout.splitlines()[-1]))
    results = []
    few = found[SIZES[0]]
    for size in SIZES[1:]:
        many = found[size]
        for measured, unit, target, figures in (
            ("start", "s more", "<= 10", _pair(many, few, "start", is_ratio=False)),
            ("step", "ratio", "<= 1.05", _pair(many, few, "step")),
            ("bytes of a later checkpoint", "ratio", "<= 1.1", _pair(many, few, "written")),
            ("peak private memory", "ratio", "", _pair(many, few, "memory")),
            ("resumed start", "s more", "", _pair(many, few, "resumed", is_ratio=False)),
        ):
            names = f"{measured}, {size} skills", "7 skills"
            setting = "width 64, 4 layers, 16 rows; one task trained"
            figure = spread(figures)
            results.append(Result(*names, unit, *figure, target, len(figures), setting))
    return results


def _pair(
    many: list[dict[str, float]], few: list[dict[str, float]], key: str, is_ratio: bool = True
) -> list[float]:
    pairs = [(m[key], f[key]) for m, f in zip(many, few, strict=True)]
    return [m / f if is_ratio else m - f for m, f in pairs]


def train(skills: int) -> dict[str, float]:
    """Train a task of a model with a number of skills, and return what it took.

    Args:
        skills: number of skills; those beyond seven have a task each.
    """
    memory = _PrivateMemory()
    memory.start()
    begin = time.process_time()
    from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
    from pipelines.training.loop.loop import train_model
    from pipelines.training.loop.resolved_run import ResolvedRun
    from pipelines.training.runs.checkpoints import list_checkpoint_folders
    from skillnet.config import SkillNetConfig
    from skillnet.skills import DEFAULT_SKILLS, SkillPlan, Task

    further = [f"extra{number}" for number in range(skills - len(DEFAULT_SKILLS))]
    plans = {"text_classification": SkillPlan(("general", "text"), "text")}
    plans |= {f"task_{name}": SkillPlan((name, "general"), "text") for name in further}
    tasks = {
        name: Task("classification", {"input": plan}, outputs=15) for name, plan in plans.items()
    }
    config = FinetuneConfig(
        name="many",
        data=os.environ.get("SKILLNET_BENCHMARK_DATA", str(data_root())),
        model=SkillNetConfig(
            skills=(*DEFAULT_SKILLS, *further),
            dim=64,
            num_layers=4,
            num_heads=2,
            ffn_dim=128,
            embedding_dim=64,
            vocab_size=12000,
            tasks=tasks,
        ),
        tasks={"text_classification": TaskTraining("headings", batch_size=16, max_length=24)},
        training=TrainingConfig(steps=STEPS, checkpoint_every=EVERY, log_every=STEPS),
    )
    clock, again = _Clock(), _Clock()
    with tempfile.TemporaryDirectory() as folder:
        train_model(ResolvedRun(config, folder=Path(folder)), callbacks=[clock], stop_at=STEPS - 1)
        newest, older = list_checkpoint_folders(Path(folder) / "checkpoints")[:2]
        written = sum(
            path.stat().st_size
            for path in newest.iterdir()
            if not (older / path.name).exists()
            or path.stat().st_ino != (older / path.name).stat().st_ino
        )
        peak, resumed = memory.stop(), time.process_time()
        train_model(ResolvedRun(config, folder=Path(folder)), callbacks=[again])
    steps = [
        b - a for a, b in zip(clock.seconds[WARMUP:], clock.seconds[WARMUP + 1 :], strict=False)
    ]
    return {
        "start": clock.seconds[0] - begin,
        "step": statistics.median(steps),
        "written": written,
        "memory": peak,
        "resumed": again.seconds[0] - resumed,
    }


def main(argv: list[str]) -> Any:
    """Print the figures of one size as JSON."""
    from skillnet.precision import keep_freed_memory

    keep_freed_memory()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(train(int(argv[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

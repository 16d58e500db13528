"""Upcycled against random initial weights, at equal steps.

    python -m lab.upcycling --data runs/corpora --output lab/results/DATE-upcycling

For each seed, a dense model is trained for ``--source_steps``. A SkillNet of the same layers then
trains ``--steps`` from copies of it (``upcycled``), from random weights (``scratch``), and from
random weights for the steps of both (``scratch, all steps``). All have one learning rate and one
order of rows. The CSV has the validation metrics of each, and the folder the configuration.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import stamp
from pipelines.finetune import run_end_to_end
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from skillnet.config import SkillNetConfig
from skillnet_platform import console
from skillnet_platform.config import to_yaml
from skillnet_platform.storage import data_root
from skillnet_platform.tables import write_csv
from skillnet_platform.tracking import TrackingConfig

COLUMNS = (
    "arm", "seed", "task", "metric", "value", "low", "high", "steps", "source_steps", "lr", "date",
    "machine",
)  # fmt: skip


def build_base(lr: float, data: Path | None) -> FinetuneConfig:
    """Return the configuration that all arms share: three tasks of the demo, a small model.

    Args:
        lr: learning rate.
        data: prepared corpora; None takes those of the run root.
    """
    return FinetuneConfig(
        data=str(data or data_root()),
        model=SkillNetConfig(dim=96, num_layers=2, num_heads=4, ffn_dim=192, embedding_dim=96),
        tasks={
            "text_classification": TaskTraining("headings", batch_size=48),
            "text_to_image": TaskTraining("drawings", batch_size=32),
            "text_to_code": TaskTraining("functions", batch_size=16, max_length=64),
        },
        training=TrainingConfig(lr=lr, checkpoint_every=0, precision="fp32"),
        tracking=TrackingConfig(register=False, system_metrics=False),
    )


def train_arms(base: FinetuneConfig, seed: int, steps: int, source_steps: int) -> dict[str, Any]:
    """Train all arms of a seed; return arm -> result of its run.

    Args:
        base: model, tasks and corpora.
        seed: start of the random numbers of the runs.
        steps: number of optimizer steps of a SkillNet.
        source_steps: number of optimizer steps of the dense model.
    """

    def train(arm: str, steps: int, **changes: Any) -> dict[str, Any]:
        name = f"upcycling-{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        training = replace(base.training, steps=steps)
        config = replace(base, name=name, seed=seed, training=training, **changes)
        return run_end_to_end(config, "finetune", ["validation"])

    options = {"ffn_dim": base.model.ffn_dim}
    dense = train("dense", source_steps, system="dense", options=options)
    return {
        "dense": dense,
        "upcycled": train("upcycled", steps, init_from=dense["model"]),
        "scratch": train("scratch", steps),
        "scratch, all steps": train("scratch, all steps", steps + source_steps),
    }


def main(argv: list[str] | None = None) -> int:
    """Train all arms and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m lab.upcycling")
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--source_steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(argv)
    base = build_base(options.lr, options.data)
    about = {"lr": options.lr, **stamp()}
    rows = []
    for seed in options.seeds:
        arms = train_arms(base, seed, options.steps, options.source_steps)
        for arm, result in arms.items():
            started = {"upcycled": options.source_steps}.get(arm, 0)
            rows += [
                {"arm": arm, **row, **about, "steps": result["step"], "source_steps": started}
                for row in result["evaluation"]
            ]
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "upcycling.csv", rows, COLUMNS, digits="")
    text = to_yaml(replace(base, data=None))  # no place of this machine
    (options.output / "config.yaml").write_text(text, encoding="utf-8")
    figures: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = (row["task"], row["metric"], row["arm"])
        figures.setdefault(key, []).append(float(row["value"]))
    console.print_table(
        "upcycling",
        ["task", "metric", "arm", "mean over seeds", "each seed"],
        [
            (*key, f"{statistics.mean(values):.3f}", ", ".join(f"{v:.3f}" for v in values))
            for key, values in sorted(figures.items())
        ],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

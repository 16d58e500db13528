"""One task alone, on validation rows: tokens of a function, and rows of its pretraining.

    python -m lab.task_arms length --data runs/corpora --output lab/results/NAME.csv
    python -m lab.task_arms pairs --data runs/corpora --output lab/results/NAME.csv
    python -m lab.task_arms headings --data runs/corpora --output lab/results/NAME.csv

All arms of a comparison train one SkillNet of the headline study's size on ``functions`` or
``headings``, at one learning rate. The arm ``configured`` is the study's setting.

- ``length`` compares its 96 tokens of a function with 192, at equal steps, and with more steps of
  96 tokens (``--longer``). ``--rounds`` also times both in turns, in CPU seconds of one thread.
- ``pairs`` compares pretrainings of equal steps: masked code, two views of a function and words
  with definitions, against the same with half of the steps for pairs of ``functions_packages``.
- ``headings`` compares pretrainings of equal steps for text classification: masked headings and
  definitions of ``headings``, against masked headings of ``headings_unused``, which has no
  definitions and 14,901 headings more for pretraining.

The command appends to the CSV, in the form of :mod:`lab.method_trials`, and does not repeat
a trial that the CSV has.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Result,
    append_csv_rows,
    clock_for,
    in_turns,
    ratio,
    read_csv_rows,
    spread,
    stamp,
    write,
)
from lab.method_trials import COLUMNS, CONFIGURED, summarize_trials
from pipelines.finetune import run_end_to_end
from pipelines.training.config.run import (
    FinetuneConfig,
    PretrainConfig,
    TaskTraining,
    TrainingConfig,
)
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from skillnet.config import SkillNetConfig
from skillnet.skills import pretraining_tasks
from skillnet_platform import console
from skillnet_platform.storage import data_root
from skillnet_platform.tracking import TrackingConfig

#: Task of a comparison -> its metric.
METRICS = {"text_to_code": "recall_at_10", "text_classification": "accuracy"}
LONG_ARM = "192 tokens"


@dataclass(frozen=True)
class TaskArm:
    """One contender of a comparison.

    Args:
        settings: what it changes, in words.
        finetuning: the run that is evaluated.
        pretraining: the run that it starts from; None starts from random weights.
    """

    settings: str
    finetuning: FinetuneConfig
    pretraining: PretrainConfig | None = None

    @property
    def task(self) -> str:
        """The only task of the run that is evaluated."""
        (task,) = self.finetuning.tasks
        return task


def build_finetuning(options: argparse.Namespace, max_length: int, steps: int) -> FinetuneConfig:
    """Return the run of text to code alone.

    Args:
        options: parsed words of the command.
        max_length: tokens of a function.
        steps: number of optimizer steps.
    """
    return FinetuneConfig(
        data=str(options.data or data_root()),
        model=SkillNetConfig(dim=128, num_layers=2, num_heads=4, ffn_dim=256, embedding_dim=128),
        tasks={"text_to_code": TaskTraining("functions", max_length=max_length)},
        training=TrainingConfig(steps=steps, lr=options.lr, checkpoint_every=0),
        tracking=TrackingConfig(register=False, system_metrics=False),
    )


def build_pretraining(
    options: argparse.Namespace, shares: Mapping[str, float], headings: str = "headings"
) -> PretrainConfig:
    """Return a pretraining for text and code.

    Args:
        options: parsed words of the command.
        shares: task -> share of the steps.
        headings: corpus of the masked headings.
    """
    run = build_finetuning(options, options.max_length, options.pretraining_steps)
    helper: dict[str, Any] = {"auxiliary": True, "max_length": options.max_length}
    masked = TaskTraining("functions", split="pretraining", max_length=options.max_length)
    tasks = {
        "masked_code": masked,
        "views_code": TaskTraining("functions", split="pretraining", views=True, **helper),
        "text_to_definition": TaskTraining(
            "headings", split="pretrain", batch_size=128, max_length=24, auxiliary=True
        ),
        "masked_text": TaskTraining(headings, split="pretraining", batch_size=128, max_length=32),
        "pairs_code": TaskTraining("functions_packages", split="pretrain_pairs", **helper),
    }
    return PretrainConfig(
        data=run.data,
        model=replace(run.model, tasks=pretraining_tasks()),
        tasks={name: replace(tasks[name], weight=share) for name, share in shares.items()},
        training=run.training,
        tracking=run.tracking,
        evaluate=False,
    )


def list_length_arms(options: argparse.Namespace) -> dict[str, TaskArm]:
    """Return 96 and 192 tokens at equal steps, and more steps of 96 tokens."""
    longer = round(options.steps * options.longer)
    return {
        CONFIGURED: TaskArm("max_length=96", build_finetuning(options, 96, options.steps)),
        LONG_ARM: TaskArm("max_length=192", build_finetuning(options, 192, options.steps)),
        "96 tokens, longer": TaskArm("max_length=96", build_finetuning(options, 96, longer)),
    }


def list_pair_arms(options: argparse.Namespace) -> dict[str, TaskArm]:
    """Return pretrainings without and with pairs.

    Without pretraining, the run is that of 192 tokens in the other comparison.
    """
    run = build_finetuning(options, options.max_length, options.steps)

    def start(**shares: float) -> TaskArm:
        return TaskArm(_describe(options, shares), run, build_pretraining(options, shares))

    return {
        CONFIGURED: start(masked_code=1, views_code=5, text_to_definition=6),
        "with pairs": start(masked_code=0.5, views_code=2.5, text_to_definition=3, pairs_code=6),
    }


def list_heading_arms(options: argparse.Namespace) -> dict[str, TaskArm]:
    """Return text classification without pretraining, and with that of two sets of headings."""
    code = build_finetuning(options, options.max_length, options.steps)
    task = TaskTraining("headings", batch_size=128, label_smoothing=0.2)
    run = replace(code, tasks={"text_classification": task})
    shares = {"masked_text": 1.0, "text_to_definition": 1.0}
    stated = _describe(options, shares)
    return {
        "no pretraining": TaskArm("none", run),
        CONFIGURED: TaskArm(f"{stated}, headings", run, build_pretraining(options, shares)),
        "with unused headings": TaskArm(
            f"{stated}, headings_unused", run, build_pretraining(options, shares, "headings_unused")
        ),
    }


def _describe(options: argparse.Namespace, shares: Mapping[str, float]) -> str:
    stated = " ".join(f"{name}={share:g}" for name, share in shares.items())
    return f"pretraining of {options.pretraining_steps} steps: {stated}"


COMPARISONS: dict[str, Callable[[argparse.Namespace], dict[str, TaskArm]]] = {
    "length": list_length_arms,
    "pairs": list_pair_arms,
    "headings": list_heading_arms,
}


def train_arm(arm: TaskArm, name: str, seed: int) -> dict[str, object]:
    """Train an arm with one seed; return its steps and metric on validation rows.

    Args:
        arm: the contender.
        name: beginning of the names of its runs.
        seed: start of the random numbers of the weights and of the order of rows, in both runs.
    """
    source = None
    if arm.pretraining is not None:
        given = replace(arm.pretraining, name=f"{name}-pretraining", seed=seed)
        source = run_end_to_end(build_joint_run(given), "pretrain")["model"]
    config = replace(arm.finetuning, name=name, seed=seed, init_from=source)
    result = run_end_to_end(config, "finetune", ["validation"])
    (value,) = [row["value"] for row in result["evaluation"] if row["metric"] == METRICS[arm.task]]
    return {"step": result["step"], "steps": result["step"], "value": round(float(value), 5)}


def time_lengths(arms: Mapping[str, TaskArm], rounds: int, steps: int = 20) -> list[Result]:
    """Return the time of a training step with 192 tokens, over that with 96.

    Args:
        arms: those of the comparison.
        rounds: number of turns of both.
        steps: number of optimizer steps in a round.
    """

    def train(label: str) -> Callable[[], object]:
        run = ResolvedRun(arms[label].finetuning)
        return lambda: train_model(run, stop_at=steps)

    # The start of a training takes time too; it is equal for both and makes the ratio smaller.
    names = {LONG_ARM: LONG_ARM, "96 tokens": CONFIGURED}
    seconds = in_turns({n: train(of) for n, of in names.items()}, rounds, clock_for(1), warmup=1)
    setting = f"{steps} steps with their start, batch 64, width 128, 2 layers"
    found = ratio(seconds[LONG_ARM], seconds["96 tokens"])
    results = [Result(LONG_ARM, "96 tokens", "ratio", *found, rounds=rounds, setting=setting)]
    for name, times in seconds.items():
        own = spread([value / steps for value in times])
        results.append(Result(name, "", "s per step", *own, rounds=rounds, setting=setting))
    return results


def main(argv: list[str] | None = None) -> int:
    """Train all arms, append their rows to the CSV, and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m lab.task_arms", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--steps", type=int, default=250, help="of fine-tuning")
    parser.add_argument("--longer", type=float, default=2.0, help="factor of the longer arm")
    parser.add_argument("--pretraining_steps", type=int, default=300)
    parser.add_argument("--max_length", type=int, default=192, help="tokens of a function in pairs")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=0, help="of the times of a step; 0: none")
    parser.add_argument("--output", type=Path, required=True, help="CSV of the results")
    options = parser.parse_args(argv)
    arms = COMPARISONS[options.comparison](options)
    done = {(row["arm"], row["seed"]) for row in read_csv_rows(options.output)}
    for seed in options.seeds:
        for number, (label, arm) in enumerate(arms.items()):
            if (label, str(seed)) in done:
                continue
            made = train_arm(arm, f"arms-{options.comparison}-{number}-{seed}", seed)
            row = {"task": arm.task, "arm": label, "settings": arm.settings, "seed": seed}
            row |= {"average": 0.0, "metric": METRICS[arm.task], **stamp()}
            append_csv_rows(options.output, COLUMNS, [row | made])
    header = ["arm", "average", "each seed", "mean", "spread", "difference ± standard error"]
    console.print_table(options.comparison, header, summarize_trials(read_csv_rows(options.output)))
    if options.rounds and options.comparison == "length":
        write("code-step-time", time_lengths(arms, options.rounds), 1, options.output.parent)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Text to code from published weights, as skills and in their own library, against random weights.

    skillnet fetch functions_english
    skillnet prepare functions_english --tokenizer FOLDER --data CORPORA
    OMP_NUM_THREADS=1 python -m lab.published_start FOLDER --data CORPORA \\
        --output lab/results/DATE-published-start

FOLDER is a checkpoint of BERT with its ``tokenizer.json`` (docs/tutorials/published-weights.md).
All arms have the corpus, the batches, the steps, the head and the rates in common:

published   SkillNet, each skill a copy of the checkpoint
random      the same SkillNet from random weights
library     a ``BertModel`` of transformers per tower, both from the checkpoint

Seed 0 tries each rate, validation rows choose one per arm, and the other seeds train at it. The
arm ``untrained`` is the checkpoint itself with mean pooling, without a head or a step.

Each training appends a line to ``trials.csv`` and the rank of each test row to ``ranks.csv``. The
command does not repeat a training that the CSV has, so it continues after a kill.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import append_csv_rows, read_csv_rows, stamp
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.setup import build_model
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_config, read_manifest
from skillnet.skills import SkillPlan, Task
from skillnet_hf.dense_start import find_needed_settings
from skillnet_platform import console
from skillnet_platform.storage import run_root
from skillnet_platform.tracking import TrackingConfig
from skillnet_studies.study.system_runs import override_run

TASK, CORPUS = "text_to_code", "functions_english"
ARMS = ("published", "random", "library")
#: The checkpoint without training.
UNTRAINED = "untrained"
RATES = (1e-4, 1e-3)
#: Metrics of validation rows; the second chooses the rate.
METRICS = ("recall_at_1", "recall_at_10")
TRIALS, RANKS = "trials.csv", "ranks.csv"
TRIAL_COLUMNS = (
    "arm", "lr", "seed", "steps", "batch", "code_tokens", "recall_at_1", "recall_at_10",
    "seconds", "date", "machine",
)  # fmt: skip
RANK_COLUMNS = ("arm", "lr", "seed", "row", "unit", "rank")


class SplitReporter(LoopReporter):
    """Evaluation of the last step on validation and test rows.

    Args:
        run: the training.
    """

    def __init__(self, run: ResolvedRun) -> None:
        self._run = run
        #: Metric -> value on validation rows.
        self.validation: dict[str, float] = {}
        self.outcomes = OutcomeTable()

    def needs_evaluation(self, step: int, last: int, settings: TrainingConfig) -> bool:
        return step == last

    def evaluate(self, model: TaskModel, step: int) -> None:
        config = self._run.config
        rows = evaluate_model(
            model,
            str(config.data),
            [TASK],
            ["validation", "test"],
            corpora={TASK: CORPUS},
            limits={TASK: config.tasks[TASK].max_length},
            bootstrap_samples=0,
            outcomes=self.outcomes,
        )
        self.validation = {
            row["metric"]: float(row["value"]) for row in rows if row["split"] == "validation"
        }


def build_arms(folder: Path, options: argparse.Namespace) -> dict[str, FinetuneConfig]:
    """Return the run of each arm, with seed 0.

    Args:
        folder: directory of the checkpoint.
        options: parsed command line.
    """
    # Without the skill of both towers that would start with noise, because it is always active
    # with ``general``: the towers compute the outputs of the checkpoint before the first step.
    towers = {
        "query": SkillPlan(("general", "text"), "text"),
        "candidate": SkillPlan(("general", "code"), "code"),
    }
    task = Task("retrieval", towers, linear_path=True)
    base = FinetuneConfig(
        data=str(options.data),
        run_dir=str(options.runs),
        init_from=str(folder),
        # Equal regularization: the library has dropout where SkillNet drops branches.
        model=SkillNetConfig(
            skills=("general", "text", "code"),
            tasks={TASK: task},
            embedding_dim=384,
            drop_path=0.0,
        ),
        tasks={TASK: TaskTraining(CORPUS, batch_size=options.batch, max_length=options.tokens)},
        training=TrainingConfig(
            steps=options.steps,
            warmup_fraction=0.1,
            precision="fp32",
            augment="none",
            checkpoint_every=0,
            threads_per_worker=1,
        ),
        tracking=TrackingConfig(register=False, system_metrics=False),
    )
    start = Path(str(resolve_run(base).config.init_from))
    source, _, _ = read_config(start, read_manifest(start))
    published = override_run(base, find_needed_settings(base, source), "the checkpoint")
    library = {"checkpoints": {"text": str(folder), "code": str(folder)}}
    random = replace(published, init_from=None)
    return {
        "published": published,
        "random": random,
        "library": replace(random, system="specialist", options=library),
    }


def measure_untrained(config: FinetuneConfig) -> SplitReporter:
    """Evaluate the checkpoint itself: the cosine of mean tokens, computed by its library.

    Args:
        config: run of the arm ``library``.
    """
    task = replace(config.model.tasks[TASK], linear_path=False)
    run = resolve_run(replace(config, model=replace(config.model, tasks={TASK: task})))
    model, reporter = build_model(run.config), SplitReporter(run)
    for side in ("query", "candidate"):
        torch.nn.init.eye_(model.get_parameter(f"heads.{TASK}.{side}.weight"))
    reporter.evaluate(model.eval(), 0)
    return reporter


def train_arm(config: FinetuneConfig) -> SplitReporter:
    """Train a run in this process without a folder; return its evaluation."""
    resolved = resolve_run(config)
    run = ResolvedRun(resolved.config, None, resolved.corpora)
    reporter = SplitReporter(run)
    train_model(run, reporter=reporter)
    return reporter


def choose_rate(trials: Sequence[Mapping[str, str]], arm: str) -> float:
    """Return the rate of an arm with the best validation score of seed 0; the lower of equal ones.

    Args:
        trials: lines of ``trials.csv``.
        arm: name of the arm.
    """
    own = [row for row in trials if row["arm"] == arm and row["seed"] == "0"]
    best = max(own, key=lambda row: (float(row["recall_at_10"]), -float(row["lr"])))
    return float(best["lr"])


def main(argv: list[str] | None = None) -> int:
    """Train all arms and append their lines to both CSV files."""
    parser = argparse.ArgumentParser(prog="python -m lab.published_start")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpora")
    parser.add_argument("--runs", type=Path, default=run_root(), help="for the converted weights")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a function")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(argv)
    arms = build_arms(options.checkpoint, options)

    def add_trial(arm: str, lr: float, seed: int) -> None:
        done = {(r["arm"], float(r["lr"]), int(r["seed"])) for r in read_trials()}
        if (arm, lr, seed) in done:
            return
        started = time.process_time()
        if arm == UNTRAINED:
            found = measure_untrained(arms["library"])
        else:
            training = replace(arms[arm].training, lr=lr)
            found = train_arm(replace(arms[arm], seed=seed, training=training))
        outcomes = found.outcomes[TASK, "test"]
        assert outcomes.rank is not None
        assert outcomes.unit is not None
        key: dict[str, object] = {"arm": arm, "lr": lr, "seed": seed}
        ranks = zip(outcomes.unit.tolist(), outcomes.rank.tolist(), strict=True)
        append_csv_rows(
            options.output / RANKS,
            RANK_COLUMNS,
            [
                {**key, "row": row, "unit": unit, "rank": int(rank)}
                for row, (unit, rank) in enumerate(ranks)
            ],
        )
        # The line of the trial comes last: a kill before it repeats the trial.
        trial = {
            **key,
            "steps": 0 if arm == UNTRAINED else options.steps,
            "batch": options.batch,
            "code_tokens": options.tokens,
            "seconds": round(time.process_time() - started),
            **stamp(),
        }
        trial |= {name: round(found.validation[name], 4) for name in METRICS}
        append_csv_rows(options.output / TRIALS, TRIAL_COLUMNS, [trial])
        console.print_note(" ".join(f"{name} {value}" for name, value in trial.items()))

    def read_trials() -> list[dict[str, str]]:
        return read_csv_rows(options.output / TRIALS)

    add_trial(UNTRAINED, 0.0, 0)
    for lr in options.rates:
        for arm in ARMS:
            add_trial(arm, lr, 0)
    for seed in options.seeds:
        for arm in ARMS:
            add_trial(arm, choose_rate(read_trials(), arm), seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Folders of finished runs with made-up outcomes, for tests of comparisons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy import stats

from pipelines.data.config.folds import FoldConfig
from pipelines.training.evaluation.evaluator import tidy_rows
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
from pipelines.training.evaluation.tables import write_evaluation_csv
from pipelines.training.runs.layout import CONFIG
from skillnet.metrics import ConfidenceInterval
from skillnet_evidence.claims import ClaimsConfig
from skillnet_platform import config as configuration
from skillnet_platform.config import presets
from tests.helpers.small_corpora import small_config

TASKS = (
    "text_classification",
    "speech_recognition",
    "text_to_image",
    "text_to_video",
    "text_to_code",
)
ROWS = 200


def write_run(
    folder: Path,
    system: str = "skillnet",
    seed: int = 0,
    skill: float | Mapping[str, float] = 0.0,
    *,
    pretrained: bool = False,
    start: Path | None = None,
    tasks: Sequence[str] = TASKS,
    activated: int = 1000,
    rows: int = ROWS,
    by_seed: float = 0.05,
    options: Mapping[str, object] | None = None,
) -> Path:
    """A run whose answers follow from how hard each row is, the seed, and the system's skill.

    ``skill`` shifts the share of right answers: 0 is about 0.6, 0.5 about 0.75. One that is
    ``pretrained`` started from the model in ``start``.
    """
    folder.mkdir(parents=True)
    name = f"{system}{pretrained}"
    config = replace(
        small_config(folder.parent / "corpora"),
        name=folder.name,
        run_dir=str(folder.parent),
        seed=seed,
        system=system,
        options=dict(options or {}),
        init_from=str(start or "elsewhere") if pretrained else None,
        evaluate=True,
    )
    (folder / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    outcomes, table = draw_answers(name, system, seed, skill, tasks, activated, rows, by_seed)
    write_evaluation_csv(table, folder / "evaluation.csv")
    write_outcomes(outcomes, folder / OUTCOMES_FILE)
    trained = {"step": 12, "resumed": 0, "seconds": 3.5 + seed, "rows_per_second": 90.0}
    trained["commit"] = "0123456789ab"
    # Seed 0 ran on a machine with products in bf16.
    trained["precision"] = "fp32" if seed else "bf16"
    more = {"world": 1, "seed": seed, "checkpoint": str(folder / "checkpoints/step-00000012")}
    (folder / "trained.json").write_text(json.dumps(trained | more))
    (folder / "model").mkdir()
    save_file(
        {"weight": np.zeros((activated, 2), np.float32)}, folder / "model" / "shared.safetensors"
    )
    result = {"run_id": None, "corpora": {"headings": "a" * 64, "drawings": "b" * 64}}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"time": step, "step": step, "metrics": {f"{task}/loss": 3.0 / step for task in tasks}}
        for step in (4, 8, 12)
    ]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw_answers(
    name: str,
    system: str,
    seed: int,
    skill: float | Mapping[str, float],
    tasks: Sequence[str] = TASKS,
    activated: int = 1000,
    rows: int = ROWS,
    by_seed: float = 0.05,
) -> tuple[OutcomeTable, list[dict[str, object]]]:
    """Made-up answers of a run, and the rows of its evaluation; ``name`` seeds its randomness."""
    outcomes, table = OutcomeTable(), []
    for place, task in enumerate(tasks):
        shift = skill if isinstance(skill, float | int) else skill.get(task, 0.0)
        hard = np.random.default_rng(place).normal(0, 1, rows)
        own = np.random.default_rng([place, seed, *name.encode()])
        right = 0.3 + shift + own.normal(0, by_seed) + hard + own.normal(0, 0.5, rows) > 0
        metric = "accuracy"
        if task == "speech_recognition":
            metric, symbols = "token_error_rate", 1 + np.arange(rows) % 3
            outcomes.add(task, "test", np.where(right, 0, symbols), symbols)
        elif task.startswith("text_to_"):
            metric = "recall_at_10"
            outcomes.add(task, "test", right, np.ones(rows), np.where(right, 3, 40))
        else:
            outcomes.add(task, "test", right, np.ones(rows))
        value = outcomes[task, "test"].value
        table += tidy_rows(
            {metric: ConfidenceInterval(value, value - 0.05, value + 0.05)},
            system=system,
            task=task,
            seed=seed,
            split="test",
            activated_params=activated,
            flops_per_example=100 * activated * (1 + place),
            steps=12,
        )
    return outcomes, table


def set_fold(folder: Path, fold: FoldConfig) -> Path:
    """Give a synthetic run a fold."""
    settings = configuration.load_yaml(folder / CONFIG)
    settings["fold"] = configuration.to_dict(fold)
    (folder / CONFIG).write_text(configuration.to_yaml(settings), encoding="utf-8")
    return folder


def complete_result(folder: Path) -> None:
    """Give the result of a synthetic run what one of a trial has."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    whole = {"name": folder.name, "model": str(folder / "model"), "step": 12, "seconds": 3.5}
    more = whole | {"evaluation": [], "total_params": 7}
    (folder / "result.json").write_text(json.dumps(result | more), encoding="utf-8")


def write_pretraining(folder: Path, seed: int = 0, **training: object) -> Path:
    """What is left of a pretraining; the folder of its model."""
    (folder / "model").mkdir(parents=True)
    config = small_config(folder.parent / "corpora", **training)
    config = replace(config, name=folder.name, seed=seed)
    (folder / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    trained = {"step": 10, "resumed": 5, "seconds": 2.0}
    (folder / "trained.json").write_text(json.dumps(trained), encoding="utf-8")
    return folder / "model"


def write_study(
    root: Path,
    systems: Mapping[str, float | Mapping[str, float]],
    seeds: Sequence[int] = (0, 1, 2, 3),
    **more: object,
) -> list[Path]:
    """Runs of several systems; a label that ends in ``-pretrained`` started from a model."""
    return [
        write_run(
            root / f"{label}-seed{seed}",
            label.removesuffix("-pretrained"),
            seed,
            skill,
            pretrained=label.endswith("-pretrained"),
            **more,  # type: ignore[arg-type]
        )
        for label, skill in systems.items()
        for seed in seeds
    ]


def expected(skill: float, by_seed: float = 0.05) -> float:
    """Share of right answers that a skill comes to in the long run."""
    return float(stats.norm.cdf((0.3 + skill) / np.sqrt(1 + 0.25 + by_seed**2)))


def paper_claims() -> ClaimsConfig:
    """Claims of the preset ``claims/paper``."""
    tree = configuration.load_yaml(presets.find_config("claims/paper"))["claims"]
    built: ClaimsConfig = configuration.build_config(ClaimsConfig, tree)
    return built


def write_curve(folder: Path, scores: Mapping[int, float], tasks: Sequence[str] = TASKS) -> None:
    """Append validation scores of a run, equal for all tasks: step -> score."""
    metrics = {"text_classification": "accuracy", "speech_recognition": "token_error_rate"}
    with (folder / "progress.jsonl").open("a") as stream:
        for step, score in scores.items():
            named = {
                f"{task}/validation_{metrics.get(task, 'recall_at_10')}": (
                    1 - score if task == "speech_recognition" else score
                )
                for task in tasks
            }
            stream.write(json.dumps({"time": step, "step": step, "metrics": named}) + "\n")

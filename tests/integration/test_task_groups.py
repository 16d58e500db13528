"""Groups of ranks train tasks beside each other, and hold only what these need."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import TaskTraining, TrainingConfig
from pipelines.training.loop import loop
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.optimizer import EagerAdamW, build_optimizer
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run import validate_run
from skillnet.multitask_model import TaskModel
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.integration

TWO = ("speech_recognition", "text_to_image")


class Recorder(LoopReporter):
    """Keeper of the logged numbers, and of the weights of each validation."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.validated: list[float] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.values.append(values)

    def evaluate(self, model: TaskModel, step: int) -> None:
        self.validated.append(sum(float(p.detach().abs().sum()) for p in model.parameters()))


def record_rank(rank: int, world: int, config: Any, out: str) -> None:
    made: list[EagerAdamW] = []

    def keep(*arguments: Any) -> EagerAdamW:
        made.append(build_optimizer(*arguments))
        return made[-1]

    loop.build_optimizer = keep
    recorder = Recorder()
    result = train_model(ResolvedRun(config), rank=rank, world=world, reporter=recorder)
    names = {p: name for name, p in result.model.named_parameters()}
    record = {
        "state": sorted(names[p] for p in made[0].state),
        "gradients": [n for p, n in names.items() if p.grad is not None],
        "losses": [
            {k: v for k, v in each.items() if k.endswith("/loss") or "norm" in k}
            for each in recorder.values
        ],
        "validated": recorder.validated,
        "tasks": result.tasks,
        "bytes": result.bytes_reduced,
    }
    Path(f"{out}-{world}-{rank}.json").write_text(json.dumps(record))


def test_a_rank_holds_the_skills_of_its_tasks_and_reports_those_of_all(
    data: Path, tmp_path: Path
) -> None:
    config = small_config(data, tasks_per_step=2, steps=10, evaluate_every=5, ema=0.5)
    config.tasks = {name: config.tasks[name] for name in TWO}
    for world in (1, 2):
        run_ranks(world, record_rank, config, str(tmp_path / "run"))
    alone, first, second = (json.loads(p.read_text()) for p in sorted(tmp_path.iterdir()))
    owned = [set(each["state"]) for each in (first, second)]
    assert owned[0] | owned[1] == set(alone["state"])
    assert any(".sound" in name for name in owned[0] - owned[1])
    assert any(".image" in name for name in owned[1] - owned[0])
    assert all(".general" in name for name in owned[0] & owned[1] if ".weights." in name)
    assert not first["gradients"]
    for each in (first, second):
        assert each["tasks"] == alone["tasks"]
        # Validations see the current weights of all skills.
        assert each["validated"] == pytest.approx(alone["validated"], rel=1e-12)
        for found, expected in zip(each["losses"], alone["losses"], strict=True):
            assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < first["bytes"] == second["bytes"]


def test_settings_that_groups_cannot_have_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks_per_step 2 places weights by task, and .* full"):
        TrainingConfig(tasks_per_step=2, sharding="full")
    config = small_config(data, tasks_per_step=2, workers=12)
    with pytest.raises(UserError, match=r"than training\.workers of a group \(6\).*--training.wo"):
        validate_run(ResolvedRun(config))
    config = small_config(data, tasks_per_step=2)
    config.tasks["text_to_code"] = TaskTraining("functions", weight=1.0, batch_size=6, lr=1e-3)
    with pytest.raises(UserError, match=r"tasks\.text_to_code\.lr: a step has 2 tasks"):
        validate_run(ResolvedRun(config))

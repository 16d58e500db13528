"""Early stopping: training ends without a better validation, with the weights of the best."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.fitting import TrainingData
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop.optimizer import BestWeights
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from sweeps.config.trials import ResourceConfig
from sweeps.trials.engine import check_trial
from sweeps.trials.trial import Trial
from tests.unit.pipelines.fitting.test_class_weights import SIZES, make_rows

#: The learning rate does not depend on the number of steps.
STEADY = {
    "training.schedule": "constant",
    "training.warmup_fraction": 0.0,
    "training.evaluate_every": 2,
    "training.checkpoint_every": 3,
    "tasks.kind.batch_size": 8,
    "evaluate": False,
}
#: Step -> score of the validation: the best is at step 4, and two worse ones follow.
SCORES = {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.9}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    rows = make_rows({"鱼": 30, "鸟": 30})
    folder = tmp_path_factory.mktemp("stopping")
    return TrainingData({"kind": rows}, folder, vocabulary=300)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    add = BestWeights.add_validation

    def add_known(self: BestWeights, weights: Any, score: float, step: int) -> None:
        add(self, weights, SCORES[step], step)

    monkeypatch.setattr(BestWeights, "add_validation", add_known)


def make_model(data: TrainingData) -> SkillNet:
    torch.manual_seed(0)
    return SkillNet(data.config(**SIZES))


def assert_equal_weights(one: SkillNet, other: SkillNet) -> None:
    expected = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_model_has_the_weights_of_the_best_validation(data: TrainingData, ema: float) -> None:
    stopped, short = make_model(data), make_model(data)
    settings = STEADY | {"training.ema": ema, "training.steps": 50, "training.patience": 2}
    result = stopped.fit(data, settings)
    assert (result["step"], result["best_step"]) == (8, 4)
    assert result["stopped_early"].startswith("no better validation in 2 since step 4")
    short.fit(data, STEADY | {"training.ema": ema, "training.steps": 4})
    assert_equal_weights(stopped, short)


@pytest.mark.usefixtures("scores")
def test_the_last_step_gives_the_best_weights_too(data: TrainingData) -> None:
    long, short = make_model(data), make_model(data)
    result = long.fit(data, STEADY | {"training.steps": 8, "training.patience": 5})
    assert (result["step"], result["best_step"], result["stopped_early"]) == (8, 4, None)
    short.fit(data, STEADY | {"training.steps": 4})
    assert_equal_weights(long, short)


class Interruption:
    """Callback that ends the training before a step, as a kill does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        pass

    def on_step_start(self, step: int) -> None:
        if step == self._step:
            raise InterruptedError


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("step", [5, 7])
def test_a_resumed_run_counts_on(data: TrainingData, tmp_path: Path, step: int) -> None:
    settings = STEADY | {"training.steps": 50, "training.patience": 2, "name": "a"}
    whole, cut = make_model(data), make_model(data)
    whole.fit(data, settings, run_dir=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        cut.fit(data, settings, run_dir=tmp_path / "cut", callbacks=[Interruption(step)])
    cut = make_model(data)
    result = cut.fit(data, settings, run_dir=tmp_path / "cut")
    assert (result["resumed"], result["step"], result["best_step"]) == (3 * (step // 3), 8, 4)
    assert_equal_weights(whole, cut)
    # It is finished: the same call trains no step more, and other validations are another run.
    again = make_model(data)
    assert again.fit(data, settings, run_dir=tmp_path / "cut") == result
    assert_equal_weights(again, cut)
    with pytest.raises(UserError, match=r"evaluate_every 2, not 4"):
        make_model(data).fit(
            data, settings | {"training.evaluate_every": 4}, run_dir=tmp_path / "cut"
        )


def test_a_task_that_is_learned_ends_the_run(data: TrainingData) -> None:
    model = make_model(data)
    settings = STEADY | {"training.steps": 400, "training.evaluate_every": 10}
    result = model.fit(data, settings | {"training.patience": 2, "evaluate": True})
    assert result["has_converged"]
    assert result["step"] == result["best_step"] + 20 < 400
    assert {row["value"] for row in result["evaluation"] if row["metric"] == "accuracy"} == {1.0}


def test_settings_that_cannot_stop_are_refused() -> None:
    with pytest.raises(ValueError, match=r"training.evaluate_every is 0"):
        TrainingConfig(patience=2)
    with pytest.raises(ValueError, match=r"training.sharding full"):
        TrainingConfig(patience=2, evaluate_every=1, sharding="full")


def test_a_patience_needs_rows_for_validation(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "pipelines.training.loop.run.check_evaluation_splits",
        lambda run, splits: asked.append(splits),
    )
    settings = STEADY | {"training.steps": 1}
    make_model(data).fit(data, settings)
    assert not asked
    make_model(data).fit(data, settings | {"training.patience": 1})
    assert asked == [["validation"]]


def test_trials_of_a_sweep_have_equal_steps() -> None:
    run = FinetuneConfig(training=TrainingConfig(patience=2, evaluate_every=1))
    with pytest.raises(UserError, match=r"trial a: training.patience.*scheduler: asha"):
        check_trial(Trial("a", run), None, None, None, ResourceConfig())

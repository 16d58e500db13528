"""Separate SkillNets: each task trains as the same SkillNet would train without other tasks."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipelines.training.loop.loop import seed_dropout, train_model
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients, set_learning_rate
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.step import step_loss
from skillnet.accounting import account_task
from skillnet.model import SkillNet
from skillnet.model_merging import remove_task
from skillnet.precision import choose_precision
from skillnet.skills import masked_tasks
from skillnet.systems import build_system
from tests.helpers.small_corpora import small_config as small_run
from tests.helpers.small_corpora import write_corpora
from tests.helpers.small_models import loss_of, small_config


@pytest.mark.parametrize("task", small_config().tasks)
def test_a_task_costs_as_much_as_in_a_joint_model_and_shares_nothing(task: str) -> None:
    config = small_config()
    alone, joint = build_system("alone", config), SkillNet(config)
    one, other = account_task(alone, task), account_task(joint, task)
    assert one.activated == other.activated
    assert one.flops_per_example == other.flops_per_example
    loss_of(alone, task).backward()
    touched = {name for name, p in alone.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in alone.active_parameters(task)}
    assert {alone.file_of(name) for name in touched} == {f"alone-{task}", f"head-{task}"}


def test_training_in_one_module_is_training_alone(tmp_path: Path) -> None:
    """To the bit, with dropout on, against plain SkillNets of one task."""
    config = small_run(write_corpora(tmp_path / "data"), steps=15, max_grad_norm=0.5)
    config.system = "alone"
    config.model.drop_path = 0.2
    together = dict(train_model(ResolvedRun(config)).model.named_parameters())
    start = dict(build_model(config).named_parameters())
    dataloader, device = ResolvedRun(config).dataloader, torch.device("cpu")
    precision = choose_precision("fp64", device)
    for task, spec in config.tasks.items():
        assert spec is not None
        model = SkillNet(SkillNet.config_for(config.model, task)).double().train()
        names = {
            name: name if name.startswith("heads.") else f"models.{task}.{name}"
            for name, _ in model.named_parameters()
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[names[name]])
        active = list(model.active_parameters(task))
        optimizer = build_optimizer(active, config.training)
        for step in range(15):
            if dataloader.batch_spec(step).task != task:
                continue
            batch = dataloader.batch(step).to(device, torch.float64)
            seed_dropout(config.seed, step, 0)
            step_loss(model, config.model.tasks[task], batch, precision, config).backward()
            clip_gradients((p for _, p in active), config.training.max_grad_norm)
            set_learning_rate(optimizer, config.training, step)  # follows the steps of all tasks
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in active:
            assert torch.equal(parameter, together[names[name]]), name


def test_a_task_that_is_taken_off_leaves_no_weights() -> None:
    model = build_system("alone", small_config())
    remove_task(model, "text_to_code")
    assert not any("text_to_code" in name for name, _ in model.named_parameters())


def test_pretraining_is_rejected() -> None:
    config = dataclasses.replace(small_config(), tasks=masked_tasks())
    with pytest.raises(ValueError, match="system alone has no pretraining"):
        build_system("alone", config)

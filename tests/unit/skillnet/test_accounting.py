"""Cost formulas compared with torch's counter and with the parameters of a backward pass."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skillnet.accounting import account_task
from skillnet.flops import plan_flops
from skillnet.modality import modality_names
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan
from tests.helpers.small_models import (
    PLANS,
    batch_of,
    loss_of,
    small_config,
    small_model,
    towers_of,
)

TASKS = tuple(small_config().tasks)
SHAPES: list[dict[str, Any]] = [
    {},
    {"skill_modules": "attention"},
    {"skill_modules": "feedforward", "skill_every": 2, "num_layers": 3},
    {"mel_stack": 4, "tubelet": (4, 8, 2), "patch_size": 2, "video_motion": False},
]


def counted(model: SkillNet, run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def length_of(batch: dict[str, torch.Tensor], modality: str) -> int | None:
    """Tokens or frames of a batch's first row, which is as long as the batch."""
    if modality in ("text", "code"):
        return batch["tokens"].shape[1]
    return batch["log_mel"].shape[1] if modality == "sound" else None


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_flops_equal_torchs_count(changes: dict[str, Any]) -> None:
    model = small_model(**changes).eval()
    for modality in modality_names():
        batch = batch_of(modality, model.config, rows=2)
        for skills in (("general",), ("alignment", "code", "general", "image")):
            plan = SkillPlan(skills, PLANS[modality].modality)
            flops, _ = plan_flops(model, plan, length_of(batch, modality))
            found = counted(model, lambda plan=plan, batch=batch: model.encode(batch, plan))
            assert 2 * flops == found, modality
    for task, spec in model.config.tasks.items():
        towers = towers_of(task, model.config, rows=1)
        found = {tower: length_of(x, spec.towers[tower].modality) for tower, x in towers.items()}
        cost = account_task(model, task, {k: v for k, v in found.items() if v is not None})
        flops = counted(model, lambda task=task, towers=towers: model(task, towers))
        assert cost.flops_per_example == flops, task


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_activated_parameters_are_those_with_a_gradient(changes: dict[str, Any]) -> None:
    model = small_model(**changes)

    def count_touched() -> int:
        touched = sum(p.numel() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        return touched

    for task in TASKS:
        loss_of(model, task).backward()
        cost = account_task(model, task)
        assert cost.activated == count_touched(), task
        assert cost.total == sum(p.numel() for p in model.parameters())


def test_default_lengths_are_the_longest_that_the_model_reads() -> None:
    model = small_model()
    assert plan_flops(model, PLANS["text"])[1] == model.config.max_tokens
    assert plan_flops(model, PLANS["sound"])[1] == -(-model.config.max_frames // 3)
    assert plan_flops(model, PLANS["image"])[1] == 4
    assert plan_flops(model, PLANS["video"])[1] == 8
    assert account_task(model, "text_to_image").tokens == 4 + model.config.max_tokens


def test_growing_costs_an_older_task_nothing() -> None:
    few, many = small_model(), small_model(skills=(*small_config().skills, "depth", "touch"))
    before, after = (account_task(model, "text_classification") for model in (few, many))
    assert after.total > before.total
    assert after[1:] == before[1:]

"""Low-rank skills: whole matrices after merging, less to store, activated with ``general``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.training.loop.sharding import require_sharding
from pipelines.training.loop.worker import remove_untrained_parts
from skillnet.accounting import account_task
from skillnet.layers import SkillLinear
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill, remove_skill
from skillnet.skill_copies import copy_to_skills, is_difference
from skillnet.skill_weights import SkillWeights
from skillnet.skills import SkillPlan, Task
from skillnet.systems import build_system, load_model
from skillnet_platform.errors import UserError
from tests.helpers.small_models import PLANS, batch_of, loss_of, small_config, small_model

RANK = 3
LOW: dict[str, Any] = {"skill_rank": RANK, "bias": True}


def dense_twin(model: SkillNet, **options: Any) -> SkillNet:
    """Return a model of whole matrices that equal those of a low-rank model."""
    twin = small_model(**options)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, SkillWeights):
                theirs = twin.get_submodule(path)
                assert isinstance(theirs, SkillWeights)
                for name in module.names:
                    theirs.weights[name].copy_(module.get(name))
        for name, parameter in model.named_parameters():
            if ".weights." not in name and not is_difference(name):
                twin.get_parameter(name).copy_(parameter)
    return twin


def test_low_rank_skills_are_general_plus_the_product_of_two_factors() -> None:
    torch.manual_seed(0)
    weights = SkillWeights(("text", "general"), 8, 6, std=0.5, rank=RANK).double()
    assert weights.names == ("general", "text")
    assert torch.equal(weights.get("text"), weights.get("general"))  # the right factor is zero
    with torch.no_grad():
        weights.right["text"].add_(1.0)
    expected = weights.weights["general"] + weights.left["text"] @ weights.right["text"]
    torch.testing.assert_close(weights.get("text"), expected, rtol=1e-12, atol=1e-12)
    mean = (expected + weights.weights["general"]) / 2
    merged = weights.merged(("general", "text"), torch.float64)
    torch.testing.assert_close(merged, mean, rtol=1e-12, atol=1e-12)


def test_outputs_and_gradients_equal_those_of_whole_matrices() -> None:
    model = small_model(**LOW)
    twin = dense_twin(model, bias=True)
    for modality, plan in PLANS.items():
        batch = batch_of(modality, model.config)  # type: ignore[arg-type]
        ours, theirs = model.encode(batch, plan), twin.encode(batch, plan)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for each in (model, twin):
        loss_of(each, "text_classification").backward()
    name = "encoder.layers.0.feedforward.up"
    whole = twin.get_parameter(f"{name}.weights.text").grad
    left, right = (model.get_parameter(f"{name}.{side}.text") for side in ("left", "right"))
    assert whole is not None
    torch.testing.assert_close(left.grad, whole @ right.detach().T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(right.grad, left.detach().T @ whole, rtol=1e-10, atol=1e-12)


def test_merged_weights_follow_general_and_both_factors() -> None:
    layer = SkillLinear(("general", "text"), 4, 4, std=0.5, rank=2).eval()
    x = torch.randn(1, 2, 4)
    with torch.no_grad():
        for part in (layer.weight.weights["general"], layer.weight.right["text"],
                     layer.weight.left["text"]):  # fmt: skip
            before = layer(x, ("text",))
            part.add_(1.0)
            assert not torch.equal(layer(x, ("text",)), before)


def test_files_costs_and_loading(tmp_path: Path) -> None:
    model = small_model(**LOW).eval()
    files = model.files_of()
    assert "encoder.layers.0.attention.qkv.weight.left.text" in files["skill-text"]
    # The plan of the retrieval towers has other skills, and all of them need `general`.
    assert "skill-general" in model.required_files("text_to_image")
    model.save_pretrained(tmp_path)
    for task in ("text_classification", "text_to_image"):
        assert isinstance(loaded := load_model(tmp_path, task), SkillNet)
        for plan in model.config.tasks[task].towers.values():
            batch = batch_of(plan.modality, model.config)
            assert torch.equal(loaded.encode(batch, plan), model.encode(batch, plan))
        active = {name for name, _ in model.active_parameters(task)}
        model.zero_grad()
        loss_of(model, task).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == active
        assert model.flops(task) == super(SkillNet, model).flops(task)  # torch's counter
    whole = small_model(bias=True)
    low, full = (account_task(m, "text_classification") for m in (model, whole))
    assert low.activated < full.activated
    assert low.total < full.total
    # A plan without `general` reads it as well.
    alone = {"alone": Task("classification", {"input": SkillPlan(("text",))}, 3)}
    model = small_model(**LOW, tasks=alone)
    size = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".general"))
    assert account_task(model, "alone").activated > size


def test_growth_copies_a_difference_or_starts_from_general() -> None:
    model = small_model(**LOW)
    batch = batch_of("text", model.config)
    expected = {name: model.encode(batch, SkillPlan((name,))) for name in ("general", "text")}
    add_skill(model, "depth")
    add_skill(model, "touch", init_from="text")
    # Vectors of a new skill are a copy as well.
    assert torch.equal(model.encode(batch, SkillPlan(("depth",))), expected["general"])
    assert torch.equal(model.encode(batch, SkillPlan(("touch",))), expected["text"])
    assert torch.equal(model.encode(batch, SkillPlan(("text",))), expected["text"])
    remove_skill(model, "touch")
    assert not [name for name, _ in model.named_parameters() if name.endswith(".touch")]
    with pytest.raises(ValueError, match="differences to the skill general"):
        remove_skill(model, "general")


def test_a_finished_run_keeps_general_for_the_differences_to_it() -> None:
    task = Task("classification", {"input": SkillPlan(("text",), "text")}, outputs=3)
    model = small_model(skill_rank=RANK, tasks={"headlines": task})
    run: Any = SimpleNamespace(config=SimpleNamespace(tasks={}, measured={}), init_report=None)
    remove_untrained_parts(run, model)
    assert model.config.skills == ("general", "text")


@pytest.mark.parametrize("system", ["dense", "moe"])
def test_baselines_have_whole_matrices_of_the_same_size(system: str) -> None:
    config = small_config(dim=32, ffn_dim=48, num_heads=4, skill_rank=4)
    baseline = build_system(system, config)
    assert baseline.config.skill_rank == 0
    sizes = [
        sum(account_task(model, task).activated for task in config.tasks)
        for model in (SkillNet(config), baseline)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_low_rank_skills_start_from_a_dense_model() -> None:
    config = small_config()
    dense = build_system("dense", config, {"ffn_dim": config.ffn_dim}).double().eval()
    model = SkillNet(small_config(skill_rank=RANK)).double().eval()
    fresh = model.load_partial(copy_to_skills(dict(dense.named_parameters()), model))
    assert fresh
    assert all(map(is_difference, fresh))
    batch = batch_of("text", config)
    assert isinstance(dense, SkillNet)
    with torch.no_grad():
        found = model.encode(batch, PLANS["text"])
        expected = dense.encode(batch, SkillPlan(("dense",)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_sharding_and_invalid_ranks_are_rejected() -> None:
    with pytest.raises(UserError, match=r"training\.sharding: low-rank skills"):
        require_sharding(small_model(skill_rank=RANK))
    with pytest.raises(ValueError, match=r"model\.skill_rank 8 is no low rank"):
        small_config(skill_rank=8)
    with pytest.raises(ValueError, match="to the skill general, and model"):
        small_config(skill_rank=2, skills=("text",), tasks={})

"""Low-rank skills: whole matrices after merging, less to store, activated with ``general``."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.training.loop.sharding import require_sharding
from pipelines.training.loop.worker import remove_untrained_parts
from skillnet.accounting import account, account_task
from skillnet.config import MAX_SOURCES, LowRankSkill
from skillnet.layers import SkillLinear
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill, add_task, plan_merge, read_parent, remove_skill
from skillnet.serialization import config_from_dict, config_to_dict
from skillnet.skill_copies import copy_to_skills, is_difference
from skillnet.skill_weights import SkillWeights
from skillnet.skills import SkillPlan, Task
from skillnet.systems import build_system, load_model
from skillnet_platform.errors import UserError
from skillnet_serving.model_export import merge_task_skills
from tests.helpers.small_models import PLANS, batch_of, loss_of, small_config, small_model

RANK = 3
LOW: dict[str, Any] = {"skill_rank": RANK, "bias": True}


def dense_twin(model: SkillNet) -> SkillNet:
    """Return a model of whole matrices that equal those of a low-rank model."""
    twin = SkillNet(dataclasses.replace(model.config, skill_rank=0, low_rank_skills={})).double()
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


def lora_model(rank: int = 2, source: str = "text") -> SkillNet:
    """Return whole skills, and a low-rank one that a task activates without its source."""
    model = add_skill(small_model(bias=True), "depth", source, rank)
    return add_task(
        model, "deep", Task("classification", {"input": SkillPlan(("depth", "general"))}, 3)
    )


@pytest.mark.parametrize("source", ["general", "image"])
def test_a_low_rank_skill_is_its_source_plus_the_product_of_two_factors(source: str) -> None:
    torch.manual_seed(0)
    forms = {"text": LowRankSkill(source, RANK)}
    weights = SkillWeights(("text", source), 8, 6, std=0.5, forms=forms).double()
    assert weights.names == (source, "text")
    assert torch.equal(weights.get("text"), weights.get(source))  # the right factor is zero
    with torch.no_grad():
        weights.right["text"].add_(1.0)
    expected = weights.weights[source] + weights.left["text"] @ weights.right["text"]
    torch.testing.assert_close(weights.get("text"), expected, rtol=1e-12, atol=1e-12)
    mean = (expected + weights.weights[source]) / 2
    merged = weights.merged((source, "text"), torch.float64)
    torch.testing.assert_close(merged, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "skill", "source", "task"),
    [
        (lambda: small_model(**LOW), "text", "general", "text_classification"),
        (lora_model, "depth", "text", "deep"),
    ],
    ids=["rank of the model", "rank of a skill"],
)
def test_outputs_and_gradients_equal_those_of_whole_matrices(
    make: Callable[[], SkillNet], skill: str, source: str, task: str
) -> None:
    """The source is active in the first task, and not in the second."""
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_difference(name):
                parameter.normal_()
    twin = dense_twin(model)
    for modality, plan in {**PLANS, "text": model.config.tasks[task].towers["input"]}.items():
        batch = batch_of(modality, model.config)
        ours, theirs = model.encode(batch, plan), twin.encode(batch, plan)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for each in (model, twin):
        loss_of(each, task).backward()
    lefts = [name for name, _ in model.named_parameters() if name.endswith(f".left.{skill}")]
    assert lefts
    for name in lefts:
        path = name.removesuffix(f"left.{skill}")
        whole = twin.get_parameter(f"{path}weights.{skill}").grad
        own = twin.get_parameter(f"{path}weights.{source}").grad
        left, right = (model.get_parameter(f"{path}{side}.{skill}") for side in ("left", "right"))
        found = model.get_parameter(f"{path}weights.{source}").grad
        assert whole is not None
        for grad, expected in (
            (left.grad, whole @ right.detach().T),
            (right.grad, left.detach().T @ whole),
            (found, whole if own is None else whole + own),
        ):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)


def test_merged_weights_follow_general_and_both_factors() -> None:
    layer = SkillLinear(
        ("general", "text"), 4, 4, std=0.5, forms={"text": LowRankSkill("general", 2)}
    ).eval()
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
    with pytest.raises(ValueError, match="the skill general is needed by"):
        remove_skill(model, "general")


def test_files_counts_and_operations_include_the_source(tmp_path: Path) -> None:
    model = lora_model().eval()
    assert {"skill-depth", "skill-text"} <= model.required_files("deep")
    low = dict(model.named_parameters())
    low = {name: low[name] for name in model.files_of()["skill-depth"] if is_difference(name)}
    config = model.config
    width = 8 * config.dim + 2 * config.ffn_dim  # of four matrices: D x 3D, D x D, and D x F twice
    assert sum(p.numel() for p in low.values()) == config.num_layers * 2 * width
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "deep")
    assert isinstance(loaded, SkillNet)
    assert loaded.config.skills == ("general", "text", "depth")
    batch = batch_of("text", config)
    plan = config.tasks["deep"].towers["input"]
    assert torch.equal(loaded.encode(batch, plan), model.encode(batch, plan))
    loss_of(model, "deep").backward()
    active = {name for name, _ in model.active_parameters("deep")}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == active
    assert account_task(model, "deep").activated == sum(
        model.get_parameter(name).numel() for name in active
    )
    plan_alone = SkillPlan(("depth",))
    model.zero_grad()
    model.encode(batch, plan_alone).sum().backward()
    read = [p for n, p in model.named_parameters() if p.grad is not None]
    assert account(model, plan_alone).activated == sum(p.numel() for p in read)
    assert model.flops("deep") == super(SkillNet, model).flops("deep")  # torch's counter
    dense = merge_task_skills(model, "deep")
    assert not dense.config.low_rank_skills
    torch.testing.assert_close(
        dense.encode(batch, dense.config.tasks["deep"].towers["input"]),
        model.encode(batch, plan),
        rtol=1e-12,
        atol=1e-12,
    )
    with pytest.raises(UserError, match=r"training\.sharding: low-rank skills"):
        require_sharding(model)


def test_ranks_can_follow_each_other_and_mix_with_those_of_the_model() -> None:
    for model in (lora_model(), SkillNet(small_config(**LOW)).double()):
        first = "depth" if "depth" in model.config.skills else "text"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_difference(name):
                    parameter.add_(0.1)
        add_skill(model, "deeper", first, 1)
        add_skill(model, "copied", first)
        batch = batch_of("text", model.config)
        expected = model.encode(batch, SkillPlan((first,)))
        for skill in ("deeper", "copied"):
            assert torch.equal(model.encode(batch, SkillPlan((skill,))), expected)
        spec = Task("classification", {"input": SkillPlan(("deeper",))}, 3)
        add_task(model, "task", spec)
        assert model.flops("task") == super(SkillNet, model).flops("task")
        kept = SkillNet.config_for(model.config, "task")
        assert kept.skills[-1] == "deeper"
        assert len(kept.skills) == 3
        with pytest.raises(ValueError, match=f"the skill {first} is needed by .*deeper"):
            remove_skill(model, first)
        if model.config.skill_rank:
            with pytest.raises(ValueError, match="give the new skill a rank"):
                add_skill(model, "more", "deeper")


def test_parents_of_a_merge_agree_on_ranks(tmp_path: Path) -> None:
    whole = add_skill(small_model(torch.float32, bias=True), "other", "text")
    for name, model in {
        "a": lora_model().float(),
        "b": whole,
        "c": lora_model(3).float(),
    }.items():
        model.save_pretrained(tmp_path / name)
    a, b, c = (read_parent(tmp_path / name, name) for name in "abc")
    forms = plan_merge([a, b], average_shared=True).config.low_rank_skills
    assert forms == {"depth": LowRankSkill("text", 2)}
    renamed = read_parent(tmp_path / "a", "a", {"text": "tent", "depth": "dent"})
    assert renamed.config.low_rank_skills == {"dent": LowRankSkill("tent", 2)}
    with pytest.raises(ValueError, match="depth of c has another rank or source than that of a"):
        plan_merge([a, c], average_shared=True)


WRONG_FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown source": ({"text": {"source": "none", "rank": 1}}, "unknown skill 'none'"),
    "unknown skill": ({"none": {"source": "text", "rank": 1}}, "unknown skill 'none'"),
    "too large": ({"text": {"source": "general", "rank": 8}}, "rank 8 is no low rank"),
    "zero": ({"text": {"source": "general", "rank": 0}}, "rank must be from 1"),
    "itself": ({"text": {"source": "text", "rank": 1}}, "is a difference to itself"),
    "a circle": (
        {"text": {"source": "image", "rank": 1}, "image": {"source": "text", "rank": 1}},
        "is a difference to itself",
    ),
    "no form": ({"text": {"source": "general"}}, "rank"),
}


@pytest.mark.parametrize("wrong", WRONG_FORMS)
def test_a_wrong_form_is_refused(wrong: str) -> None:
    forms, message = WRONG_FORMS[wrong]
    values = config_to_dict(small_config()) | {"low_rank_skills": forms}
    with pytest.raises((ValueError, TypeError), match=message):
        config_from_dict(values)


def test_a_chain_of_differences_ends() -> None:
    names = [f"s{number}" for number in range(MAX_SOURCES + 2)]
    forms = {b: LowRankSkill(a, 1) for a, b in itertools.pairwise(names)}
    options: dict[str, Any] = {"skills": tuple(names), "tasks": {}}
    with pytest.raises(ValueError, match=f"to more than {MAX_SOURCES} skills"):
        small_config(**options, low_rank_skills=forms)
    forms.pop(names[-1])
    config = small_config(**options, low_rank_skills=forms)
    assert config.find_sources([names[-2]]) == tuple(reversed(names[:-1]))
    assert config_from_dict(config_to_dict(config)) == config
    SkillNet(dataclasses.replace(config, skills=tuple(reversed(names))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("depth", None, 2), "name it: skill.init_from"),
        (("depth", "tent", 2), "unknown skill 'tent'; did you mean 'text'"),
        (("depth", "text", 8), "rank 8 is no low rank"),
        (("text", "image", 2), "already has a skill 'text'"),
    ],
)
def test_a_growth_with_a_wrong_rank_changes_nothing(
    given: tuple[str, str | None, int], message: str
) -> None:
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        add_skill(model, *given)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_finished_run_keeps_general_for_the_differences_to_it() -> None:
    task = Task("classification", {"input": SkillPlan(("text",), "text")}, outputs=3)
    model = small_model(skill_rank=RANK, tasks={"headlines": task})
    run: Any = SimpleNamespace(config=SimpleNamespace(tasks={}, measured={}), init_report=None)
    remove_untrained_parts(run, model)
    assert model.config.skills == ("general", "text")


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

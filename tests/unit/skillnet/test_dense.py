"""Dense baseline: its size matches the options, and it is a SkillNet with one skill."""

import dataclasses
from typing import Any

import pytest
import torch

from skillnet.accounting import account_task
from skillnet.baselines import size_matching
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.skills import SkillPlan, Task, default_tasks, masked_tasks
from skillnet.systems import build_system, find_system, load_model, system_names
from tests.helpers.small_models import loss_of, small_config, towers_of

#: Large enough for rounding of the width to weigh little.
SIZES: dict[str, Any] = {"dim": 32, "ffn_dim": 48, "num_heads": 4, "embedding_dim": 32}
TEXT = "text_classification"
SHAPES: list[dict[str, Any]] = [
    {},
    {"skill_modules": "attention"},
    {"skill_modules": "feedforward", "skill_every": 2, "num_layers": 4},
    {"bias": True, "norm_position": "post"},
    {"skill_rank": 4},
]


def mean_activated(model: TaskModel) -> float:
    tasks = default_tasks()
    return sum(model.activated_parameters(task) for task in tasks) / len(tasks)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_sizes_match(changes: dict[str, Any]) -> None:
    config = small_config(**SIZES, **changes)
    ours = SkillNet(config)
    for system in ("dense", "moe"):
        baseline = build_system(system, config)
        assert mean_activated(baseline) == pytest.approx(mean_activated(ours), rel=0.02)
        assert (baseline.config.skill_rank, baseline.config.bias) == (0, config.bias)
        loss_of(baseline.double(), TEXT).backward()
    equal = build_system("dense", config, {"size": "executed"})
    if not config.skill_rank:  # each example has the products of low-rank skills
        assert mean_flops(equal) == pytest.approx(mean_flops(ours), rel=0.01)


@pytest.mark.parametrize("options", [{}, {"feedforward": "modality"}, {"shape": "depth"}], ids=str)
def test_a_dense_model_can_have_as_many_parameters_as_all_skills(options: dict[str, Any]) -> None:
    config = small_config(**SIZES)
    layers = [
        sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder.layers."))
        for model in (
            SkillNet(config),
            build_system("dense", config, options | {"size": "total"}),
        )
    ]
    assert layers[1] == pytest.approx(layers[0], rel=0.02)
    match = find_system("dense").measure_size(config, options | {"size": "total"})
    assert match is not None
    assert abs(match.deviation) < 0.02


def mean_flops(model: TaskModel) -> float:
    return sum(account_task(model, task).flops_per_example for task in model.config.tasks)


@pytest.mark.parametrize("feedforward", ["shared", "modality"])
@pytest.mark.parametrize("shape", ["width", "depth"])
def test_depth_and_networks_per_modality_have_the_size_of_skillnet(
    shape: str, feedforward: str
) -> None:
    # Skills so narrow that a dense model of the same cost is deeper.
    config = small_config(dim=32, ffn_dim=24, num_heads=4, embedding_dim=32)
    ours, options = SkillNet(config), {"shape": shape, "feedforward": feedforward}
    activated = build_system("dense", config, options)
    assert mean_activated(activated) == pytest.approx(mean_activated(ours), rel=0.02)
    executed = build_system("dense", config, options | {"size": "executed"})
    assert mean_flops(executed) == pytest.approx(mean_flops(ours), rel=0.02)
    deeper = (
        activated.config.num_layers > config.num_layers,
        activated.config.ffn_dim < 2 * config.ffn_dim,
    )
    assert deeper == ((True, True) if shape == "depth" else (False, False))


def test_networks_per_modality_share_attention_and_norms() -> None:
    model = build_system("dense", small_config(), {"feedforward": "modality"})
    assert model.config.skills == ("text", "image", "sound", "video", "code")
    active = {name for name, _ in model.active_parameters("text_to_image")}
    layers = {name for name, _ in model.named_parameters() if name.startswith("encoder.layers.0.")}
    assert layers - active == {
        f"encoder.layers.0.feedforward.{part}.weights.{modality}"
        for part in ("up", "down")
        for modality in ("sound", "video", "code")
    }


def test_every_parameter_is_active_but_other_tasks_stems_and_heads() -> None:
    model = build_system("dense", small_config())
    for task in model.config.tasks:
        inactive = {n for n, _ in model.named_parameters()} - {
            n for n, _ in model.active_parameters(task)
        }
        assert {name.partition(".")[0] for name in inactive} == {"stems", "heads"}


def test_equals_a_skillnet_of_one_skill() -> None:
    torch.manual_seed(0)
    dense = build_system("dense", small_config(), {"ffn_dim": 12}).double()
    tasks = {
        name: Task(
            task.objective,
            {tower: SkillPlan(("x",), plan.modality) for tower, plan in task.towers.items()},
            task.outputs,
        )
        for name, task in small_config().tasks.items()
    }
    plain = SkillNet(small_config(skills=("x",), tasks=tasks)).double()
    plain.load_state_dict({k.replace(".dense", ".x"): v for k, v in dense.state_dict().items()})
    for task in tasks:
        batch = towers_of(task, dense.config)
        expected, found = plain(task, batch), dense(task, batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pretraining_and_finetuning_build_the_same_encoder() -> None:
    tasks = small_config().tasks
    for other in (masked_tasks(), masked_tasks() | {"text_to_image": tasks["text_to_image"]}):
        for system, options in (
            ("dense", {}),
            ("dense", {"shape": "depth", "feedforward": "modality"}),
            ("moe", {}),
        ):
            pretraining = small_config(tasks=other, reference_tasks=tasks)
            first = build_system(system, pretraining, options)
            second = build_system(system, small_config(), options)
            fresh = second.load_partial(dict(first.named_parameters()))
            assert {name.partition(".")[0] for name in fresh} <= {"heads"}


def test_the_mean_is_over_the_tasks_of_the_run() -> None:
    config = small_config()
    assert list(size_matching.reference_tasks(config)) == list(default_tasks())
    # Tasks that a run does not train have no part in the size.
    one = dataclasses.replace(config, tasks={"text_classification": default_tasks()[TEXT]})
    assert list(size_matching.reference_tasks(one)) == [TEXT]
    found = [build_system("dense", each).config.ffn_dim for each in (one, config)]
    assert found[1] > 1.2 * found[0]
    own = {"mine": Task("classification", {"input": SkillPlan(("a",), "text")}, 3)}
    other = small_config(skills=("a", "b"), tasks=own | {"m": masked_task("a")})
    assert list(size_matching.reference_tasks(other)) == ["mine"]


@pytest.mark.parametrize("system", ["dense", "moe", "specialist"])
def test_one_task_of_a_joint_run_has_the_size_of_the_joint_run(system: str, tmp_path: Any) -> None:
    joint = small_config(**SIZES, mel_stack=4)
    child = dataclasses.replace(
        joint, tasks={TEXT: joint.tasks[TEXT]}, reference_tasks=dict(joint.tasks)
    )
    model = build_system(system, child).eval()
    assert model.config.ffn_dim == build_system(system, joint).config.ffn_dim
    # The saved model says which tasks its size was matched on.
    model.save_pretrained(tmp_path / "model")
    saved = load_model(tmp_path / "model").config
    assert saved == model.config
    assert saved.reference_tasks == joint.tasks


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("dense", {}),
        ("dense", {"shape": "depth", "feedforward": "modality"}),
        ("dense", {"size": "executed"}),
        ("dense", {"size": "total"}),
        ("moe", {}),
        ("moe", {"size": "executed"}),
        ("specialist", {}),
    ],
)
def test_a_mismatch_above_five_percent_is_measured(system: str, options: dict[str, Any]) -> None:
    config = small_config(**SIZES, mel_stack=4)
    match = find_system(system).measure_size(config, options)
    assert match is not None
    assert abs(match.deviation) < 0.03
    assert not match.is_mismatch
    if options.get("shape") == "depth":
        return
    wide = find_system(system).measure_size(config, options | {"ffn_dim": 4 * config.ffn_dim})
    assert wide is not None
    assert wide.aimed == match.aimed
    assert wide.is_mismatch
    assert wide.describe().startswith(f"{100 * wide.deviation:+.1f} % {match.quantity}")
    # The measured tasks are the reference tasks, also if the model itself trains others.
    masked = dataclasses.replace(config, tasks=masked_tasks(), reference_tasks=config.tasks)
    assert find_system(system).measure_size(masked, options) == match


def test_systems_without_a_size_to_match_have_no_mismatch() -> None:
    assert find_system("skillnet").measure_size(small_config()) is None
    assert find_system("alone").measure_size(small_config()) is None


def masked_task(skill: str) -> Task:
    return Task("masked", {"input": SkillPlan((skill,), "text")})


@pytest.mark.parametrize(
    ("system", "options", "task"),
    [
        ("skillnet", {}, "text_to_image"),
        ("dense", {"size": "executed"}, "text_to_code"),
        ("moe", {"ffn_dim": 6, "experts": 4, "every": 2}, "speech_recognition"),
        ("alone", {}, "text_to_code"),
    ],
)
def test_saved_models_load_by_their_system_as_a_whole_and_by_task(
    system: str, options: dict[str, Any], task: str, tmp_path: Any
) -> None:
    model = build_system(system, small_config(), options).eval()
    model.save_pretrained(tmp_path / "model")
    batch = {
        tower: {name: x.float() if x.is_floating_point() else x for name, x in each.items()}
        for tower, each in towers_of(task, model.config).items()
    }
    expected = model(task, batch)
    for known in (None, task):
        again = load_model(tmp_path / "model", known)
        assert (again.system, again.options) == (system, model.options)
        assert known or again.config == model.config
        found = again(task, batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mistakes_are_named() -> None:
    assert {"dense", "moe", "skillnet"} <= set(system_names())
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        find_system("dens")
    with pytest.raises(ValueError, match="system dense: unknown option 'sise'; did you mean"):
        build_system("dense", small_config(), {"sise": "executed"})
    with pytest.raises(
        ValueError, match=r"options\.size is activated, executed or total, not 'large'"
    ):
        build_system("dense", small_config(), {"size": "large"})
    with pytest.raises(ValueError, match=r"options\.shape is width or depth, not 'deep'"):
        build_system("dense", small_config(), {"shape": "deep"})
    with pytest.raises(ValueError, match="shape depth derives the width"):
        build_system("dense", small_config(), {"shape": "depth", "ffn_dim": 8})
    with pytest.raises(ValueError, match=r"set options\.ffn_dim explicitly"):
        size_matching.solve_width(100, 90, 20, "options.ffn_dim")

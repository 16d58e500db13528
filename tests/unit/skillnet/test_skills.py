"""Plans, tasks and names: accepted values and error messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillnet.config import SkillNetConfig
from skillnet.modality import modality_names
from skillnet.skills import (
    DEFAULT_SKILLS,
    SkillPlan,
    Task,
    check_names,
    check_plan,
    default_tasks,
    known_tasks,
    name_task,
)


@given(st.permutations(DEFAULT_SKILLS), st.integers(1, 7), st.sampled_from(modality_names()))
def test_a_plan_is_the_set_of_its_skills(order: list[str], count: int, modality) -> None:
    chosen = order[:count]
    plan = SkillPlan(tuple(chosen), modality)
    assert plan == SkillPlan(tuple(reversed(chosen)), modality)
    assert hash(plan) == hash(SkillPlan(tuple(reversed(chosen)), modality))
    assert plan.skills == tuple(sorted(chosen))


@pytest.mark.parametrize(
    ("skills", "modality", "message"),
    [
        ((), "text", "at least one skill"),
        (("text", "text"), "text", "named twice"),
        ("text", "text", "not the single name 'text'"),
        (("text",), "smell", "unknown modality 'smell'; Known: text, image"),
    ],
)
def test_plans_that_cannot_be(skills, modality, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillPlan(skills, modality)


def test_a_plan_is_checked_against_the_models_skills() -> None:
    with pytest.raises(ValueError, match=r"here: unknown skill 'imgae'; did you mean 'image'"):
        check_plan(SkillPlan(("general", "imgae")), DEFAULT_SKILLS, "here")


@pytest.mark.parametrize(
    ("objective", "towers", "outputs", "message"),
    [
        ("clasification", ("input",), 3, "unknown objective .*did you mean 'classification'"),
        ("retrieval", ("input",), 0, r"has the towers \['candidate', 'query'\], not \['input'\]"),
        ("ctc", ("query", "candidate"), 3, r"has the towers \['input'\]"),
        ("ctc", ("input",), -1, "outputs"),
    ],
)
def test_tasks_that_cannot_be(objective, towers, outputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(objective, {name: SkillPlan(("text",)) for name in towers}, outputs)


def test_the_default_tasks_use_the_default_skills() -> None:
    tasks = default_tasks()
    assert sorted(tasks) == [
        "speech_recognition",
        "text_classification",
        "text_to_code",
        "text_to_image",
        "text_to_video",
    ]
    for task in tasks.values():
        assert set(task.skills) <= set(DEFAULT_SKILLS)
        assert "general" in task.skills
    assert tasks["text_to_image"].skills == ("alignment", "general", "image", "text")
    assert tasks["text_to_image"].stems == ("patch", "token")
    assert tasks["text_to_code"].stems == ("token",)


def test_names_in_any_script_are_welcome() -> None:
    check_names(("depth", "weights", "标题", "Text2", "norm_3"), "here")


BAD_NAMES = ["", " ", "a.b", "../x", "a/b", "a b", "1a", "_keys", "shared", "x" * 65, "a-b", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_name_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.skills: "):
        SkillNetConfig(skills=(*DEFAULT_SKILLS, name))
    with pytest.raises(ValueError, match=r"model\.tasks: "):
        SkillNetConfig(tasks={**default_tasks(), name: default_tasks()["text_to_code"]})


def test_names_that_a_file_system_may_confuse_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'\w+' occurs twice"):
        SkillNetConfig(skills=(*DEFAULT_SKILLS, "Text"))
    with pytest.raises(ValueError, match="occurs twice"):
        SkillNetConfig(skills=(*DEFAULT_SKILLS, "text"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skills": ()}, r"model\.skills is empty"),
        ({"dim": 10, "num_heads": 4}, r"model\.dim 10 must divide by model\.num_heads 4"),
        ({"num_layers": 0}, r"model\.num_layers must be from 1 to 1024, got 0"),
        ({"patch_size": 0}, r"model\.patch_size must be from 1 to"),
        ({"vocab_size": -1}, r"model\.vocab_size must be from 1 to"),
        ({"patch_size": 7}, r"model\.image_size 48 must divide by model\.patch_size\s+7"),
        ({"tubelet": (3, 8, 8)}, r"model\.tubelet \(3, 8, 8\) must divide"),
        ({"tubelet": (2, 0, 8)}, r"each at least 1"),
        ({"tubelet": (2, 8)}, r"\(frames, height, width\)"),
        ({"drop_path": 1.0}, r"model\.drop_path must be from 0 to below 1, got 1\.0"),
        ({"drop_path": float("nan")}, r"model\.drop_path must be from 0 to below 1, got nan"),
        ({"dim": 10**30}, r"model\.dim must be from 1 to 16777216"),
        ({"dim": 8.0}, r"model\.dim must be from 1 to 16777216, got 8\.0"),
        ({"num_heads": True}, r"model\.num_heads must be from 1 to 16777216, got True"),
        ({"drop_path": -0.1}, r"model\.drop_path must be from 0 to below 1"),
        ({"skill_modules": "all"}, r"both, attention or feedforward, not 'all'"),
        ({"bigram_buckets": -1}, r"model\.bigram_buckets must be from 0 to"),
        ({"skills": ("general", "text")}, r"model\.tasks\.\w+\.towers\.\w+: unknown skill"),
        ({"norm_position": "middle"}, r"model\.norm_position is pre or post, not 'middle'"),
        ({"norm_eps": 0.0}, r"model\.norm_eps must be from above 0 to 0\.1"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillNetConfig(**changes)


@pytest.mark.parametrize("modality", modality_names())
def test_tasks_of_corpora_are_known_tasks(modality: str) -> None:
    for annotations in ((), ("labels",), ("captions",), ("transcripts",), ("captions", "labels")):
        assert name_task(modality, annotations) in known_tasks()
    assert known_tasks() | default_tasks() == known_tasks()

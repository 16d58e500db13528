"""Ablations, similarity and gradient shares of skills, on models with known results."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.training.evaluation.evaluator import evaluate_model
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError
from skillnet_studies.interpret import build_ablation_cells, main
from skillnet_studies.interpretation.ablation import (
    ADD,
    REMOVE,
    SWAP,
    list_plan_changes,
    measure_ablations,
)
from skillnet_studies.interpretation.analysis import find_caption, interpret_model
from skillnet_studies.interpretation.gradient_share import measure_gradient_share
from skillnet_studies.interpretation.similarity import (
    CKA,
    UNTRAINED,
    WEIGHTS,
    compute_linear_cka,
    measure_skill_similarity,
)
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.small_corpora import small_config, write_corpora

FIVE = {
    "text_classification",
    "speech_recognition",
    "text_to_image",
    "text_to_video",
    "text_to_code",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", rows=20, test_rows=12)


@pytest.fixture
def model(data: Path) -> SkillNet:
    torch.manual_seed(0)
    made = SkillNet(small_config(data).model)
    with torch.no_grad():  # without a trained model, larger weights make plans differ
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


# -- ablations


def test_every_change_of_a_plan_is_listed_once() -> None:
    task = Task(
        "retrieval", {"query": SkillPlan(("a", "b")), "candidate": SkillPlan(("a", "c"), "image")}
    )
    found = {(c.kind, c.skill, c.other): c.task for c in list_plan_changes(task, "abcd")}
    assert {key for key in found if key[0] == REMOVE} == {(REMOVE, s, "") for s in "abc"}
    assert {key for key in found if key[0] == ADD} == {(ADD, "d", "")}
    assert {key[1:] for key in found if key[0] == SWAP} == {
        ("a", "d"), ("b", "c"), ("b", "d"), ("c", "b"), ("c", "d"),
    }  # fmt: skip
    left = found[REMOVE, "a", ""]
    assert left.towers["query"] == SkillPlan(("b",))
    swapped = found[SWAP, "b", "c"]
    assert swapped.towers["query"].skills == ("a", "c")
    assert swapped.towers["candidate"].skills == ("a", "c")
    put = found[ADD, "d", ""]
    assert all("d" in plan.skills for plan in put.towers.values())
    alone = Task("classification", {"input": SkillPlan(("a",))}, 3)
    assert next(iter(list_plan_changes(alone, "ab"))).task is None
    assert not [c for c in list_plan_changes(task, "abcd", swaps=False) if c.kind == SWAP]


def test_removing_a_redundant_skill_has_no_effect(data: Path, model: SkillNet) -> None:
    """The mean of two equal skills equals each of them, so removing one has no effect."""
    task = "text_classification"
    differing = measure_ablations(model, data, [task])
    assert any(row["score_drop"] for row in differing if row["change"] == REMOVE)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("weights.text"):
                parameter.copy_(parameters[name.removesuffix("text") + "general"])
    rows = measure_ablations(model, data, [task])
    left = [row for row in rows if row["change"] == REMOVE]
    assert {row["skill"] for row in left} == {"general", "text"}
    # Equal answers on a few units do not prove that all answers are equal.
    assert all(row["score_drop"] == 0 and row["low"] == -row["high"] < 0 for row in left)


def test_ablations_of_zero_weights_have_no_effect(data: Path, model: SkillNet) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".out.weight.weights." in name or ".down.weights." in name:
                parameter.zero_()
    rows = measure_ablations(model, data, ["text_to_image"])
    assert {row["change"] for row in rows} == {REMOVE, ADD, SWAP}
    assert {row["score_drop"] for row in rows} == {0.0}


def test_rows_are_scores_and_the_model_is_unchanged(data: Path, model: SkillNet) -> None:
    before = model.config
    weights = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[tuple[str, int, int]] = []
    rows = measure_ablations(
        model, data, split="validation", swaps=False, on_change=lambda *each: seen.append(each)
    )
    assert [left for *_, left in seen] == [12 * (len(seen) - index) for index in range(len(seen))]
    assert model.config is before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {row["task"] for row in rows} == FIVE
    assert len(rows) == 5 * len(before.skills)
    for row in rows:
        assert row["rows"] == 12
        assert row["score_drop"] == pytest.approx(row["before"] - row["after"])
        assert row["low"] <= row["score_drop"] <= row["high"]
    assert all(row["after"] <= 1 for row in rows if row["task"] == "speech_recognition")


def test_removing_the_only_skill_has_no_score(data: Path, model: SkillNet) -> None:
    task = "text_classification"
    alone = dataclasses.replace(
        model.config.tasks[task], towers={"input": SkillPlan(("text",), "text")}
    )
    model.config = dataclasses.replace(model.config, tasks=model.config.tasks | {task: alone})
    rows = measure_ablations(model, data, [task], swaps=False)
    (left,) = [row for row in rows if row["change"] == REMOVE]
    assert (left["score_drop"], left["after"], left["low"]) == (None, None, None)


def test_ablations_use_all_captions_where_the_evaluation_does(model, tmp_path):
    own = write_corpora(tmp_path / "data", rows=20, test_rows=12)
    change_corpus(own / "drawings", queries="all")
    evaluated = evaluate_model(model, own, ["text_to_image"], ["test"], bootstrap_samples=0)
    (recall,) = (row["value"] for row in evaluated if row["metric"] == "recall_at_10")
    table = measure_ablations(model, own, ["text_to_image"], swaps=False)
    assert [row["before"] for row in table] == pytest.approx([recall] * len(table))


def test_an_unknown_split_is_rejected(data: Path, model: SkillNet) -> None:
    with pytest.raises(UserError, match="'tset'; they have test, train, validation"):
        measure_ablations(model, data, split="tset")


# -- similarity


def test_a_skill_is_similar_to_itself_and_its_copy(data: Path, model: SkillNet) -> None:
    add_skill(model, "twin", init_from="image")
    rows = measure_skill_similarity(model, data, split="validation", tokens=200)
    names = {*model.config.skills, UNTRAINED}
    assert {row["modality"] for row in rows if row["measure"] == CKA} == {
        "text", "sound", "image", "video", "code",
    }  # fmt: skip
    assert {row["layer"] for row in rows} == {1, 2}
    modules = 2 * 2
    assert len(rows) == modules * (5 + 1) * len(names) ** 2
    for row in rows:
        same = row["skill"] == row["other"] or {row["skill"], row["other"]} == {"twin", "image"}
        if same:
            assert row["value"] == pytest.approx(1, abs=1e-5)
        else:
            assert row["value"] < 0.9999
    assert "twin" in model.config.skills
    assert UNTRAINED not in model.config.skills


def test_only_modules_with_skills_are_compared(data: Path) -> None:
    config = dataclasses.replace(
        small_config(data).model, skill_modules="feedforward", skill_every=2
    )
    rows = measure_skill_similarity(SkillNet(config), data, ["text_classification"], tokens=50)
    assert {(row["layer"], row["module"]) for row in rows} == {(2, "feedforward")}


def test_cka_ignores_rotation_and_scale_and_rejects_constants() -> None:
    x = torch.randn(200, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    other = torch.randn(200, 6, dtype=torch.float64)
    made = {"x": x, "turned": 3 * x @ turn + 5, "other": other, "still": torch.ones(200, 6)}
    pairs = compute_linear_cka(made)
    assert pairs["x", "turned"] == pytest.approx(1, abs=1e-5)
    assert pairs["x", "other"] is not None
    assert pairs["x", "other"] < 0.2
    assert pairs["x", "still"] is None
    # The definition with n x n matrices.
    a, b = ((y - y.mean(0)) @ (y - y.mean(0)).T for y in (x, other))
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert pairs["x", "other"] == pytest.approx(expected, rel=1e-4)


def test_zero_weights_have_no_similarity(data: Path, model: SkillNet) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weights.code"):
                parameter.zero_()
    rows = measure_skill_similarity(model, data, ["text_classification"], tokens=50)
    weights = [row for row in rows if row["measure"] == WEIGHTS and row["skill"] == "code"]
    assert weights
    assert all(row["value"] is None for row in weights)


# -- gradient shares


def test_shares_sum_to_one_and_inactive_skills_have_none(data: Path, model: SkillNet) -> None:
    rows = measure_gradient_share(model, data, batches=3, batch=6, bootstrap_samples=20)
    assert all(parameter.grad is None for parameter in model.parameters())
    for task in FIVE:
        mine = [row for row in rows if row["task"] == task]
        assert math.isclose(sum(row["share"] for row in mine), 1, abs_tol=1e-9)
        skills = [row for row in mine if row["kind"] == "skill"]
        assert [row["part"] for row in skills] == list(model.config.skills)
        assert math.isclose(sum(row["of_skills"] for row in skills), 1, abs_tol=1e-9)
        for row in skills:
            active = row["part"] in model.config.tasks[task].skills
            assert (row["share"] > 0) == active
            assert (row["parameters"] > 0) == active
        total = sum(row["parameters"] for row in mine)
        assert total == model.activated_parameters(task)
        assert all(row["low"] <= row["share"] <= row["high"] for row in mine)


def test_frozen_weights_are_included_and_stay_frozen(data: Path, model: SkillNet) -> None:
    expected = measure_gradient_share(
        model, data, ["text_to_code"], batches=2, batch=6, bootstrap_samples=5
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.file_of(name) == "skill-code")
    found = measure_gradient_share(
        model, data, ["text_to_code"], batches=2, batch=6, bootstrap_samples=5
    )
    assert [row["share"] for row in found] == pytest.approx([row["share"] for row in expected])
    assert not model.get_parameter("encoder.norm.weight").requires_grad


# -- files and command


@pytest.mark.slow("test_interpretation.py::test_command_prints_json_and_rejects_errors")
def test_all_files_and_figures_are_written(data: Path, model: SkillNet, tmp_path: Path) -> None:
    made = interpret_model(
        model,
        data,
        ["text_classification", "text_to_image"],
        split="validation",
        name="a <small> model",
    )
    paths = made.write(tmp_path / "out")
    page = paths[0].read_text(encoding="utf-8")
    assert "a &lt;small&gt; model" in page
    assert "http:" not in page
    figures = {path.name for path in paths if path.suffix == ".png"}
    similar = {f"similarity_{part}.png" for part in ("text", "image", "weights")}
    assert figures == {"ablation.png", "swaps.png", "gradient_share.png", *similar}
    assert page.count("<img") == len(figures)
    for name in figures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300
        assert find_caption(name)
    lines = (tmp_path / "out" / "ablation.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(made.ablations)
    assert lines[0].startswith("task,split,change,skill,other,metric")


def test_command_prints_json_and_rejects_errors(data, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--data", str(data), "--output", str(tmp_path / "out")]
    arguments += ["--tasks", "text_classification", "--swaps", "false"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["change"] for row in printed["ablation"]} == {REMOVE, ADD}
    assert printed["files"][0].endswith("interpretation.html")
    assert main([*arguments, "--split", "tset"]) == 2
    assert "split 'tset'" in capsys.readouterr().err
    for option in (["--tasks", "text_clasification"], ["--corpora.text_clasification", "x"]):
        assert main([*arguments, *option]) == 2
        wanted = "unknown task 'text_clasification'; did you mean 'text_classification'?"
        assert f"{option[0].partition('.')[0]}: {wanted}" in capsys.readouterr().err
    columns, cells = build_ablation_cells(printed["ablation"], model.config.skills)
    assert columns == ["task", *model.config.skills]
    (line,) = cells
    bracketed = {skill for skill, cell in zip(columns[1:], line[1:], strict=True) if "(" in cell}
    assert bracketed == set(model.config.skills) - {"general", "text"}

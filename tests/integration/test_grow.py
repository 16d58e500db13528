"""``skillnet grow``: only what is new trains, and the report shows it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import grow as growing
from pipelines import merge as merging
from pipelines.finetune import finetune
from pipelines.growth.growths import grow_model, plan_growths
from pipelines.training.config.growth import GrowConfig, NewSkill
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, read_outcomes
from pipelines.training.growth import verification
from pipelines.training.growth.report import GrowthReport, MergeReport
from pipelines.training.loop.reporter import RunReporter
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend, champion
from tests.helpers.registered_model import Place
from tests.helpers.sixth_corpus import CLASSES, grow_config, write_labelled_clips
from tests.helpers.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.integration

NEW = {"skill-ink", "head-counting"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A run root with small corpora, the sixth among them, and a trained run ``base``."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        data = write_corpora(root / "corpora", rows=20, test_rows=8)
        write_labelled_clips(data)
        write_labelled_clips(data, "unnamed", named=False)
        config = small_config(data, precision="fp32", steps=6)
        config.tasks["text_to_code"].max_length = 9
        config.tracking.register = False
        finetune(replace(config, name="base"))
        yield root


def files(folder: Path) -> dict[str, bytes]:
    # A bundle also holds embeddings of captions and counts of inputs, which are no weights.
    paths = folder.glob("*.safetensors")
    return {
        path.stem: path.read_bytes()
        for path in paths
        if not path.stem.startswith(("captions-", "inputs-"))
    }


@pytest.fixture(scope="module")
def grown(place: Path) -> dict[str, Any]:
    config = grow_config("base", place / "corpora")
    config.references = ["without_skill", "fresh", "everything"]
    return grow_model(config)


def test_every_old_file_is_the_same_to_the_byte(place: Path, grown: dict[str, Any]) -> None:
    before, after = files(place / "base" / "model"), files(place / "grown" / "model")
    assert after.keys() - before.keys() == NEW
    assert all(after[name] == content for name, content in before.items())
    start = files(Path(str(configuration.load_yaml(place / "grown" / "config.yaml")["init_from"])))
    assert all(start[name] != after[name] for name in NEW), "what is new has trained"
    report = grown["growth"]
    assert report["is_unchanged"]
    assert {f["file"]: f["state"] for f in report["files"]} == {
        **dict.fromkeys(before, "same"),
        **dict.fromkeys(NEW, "new"),
    }


def test_every_figure_of_old_tasks_is_the_same(place: Path, grown: dict[str, Any]) -> None:
    report = GrowthReport.from_dict(grown["growth"])
    tasks = {each.task for each in report.tasks}
    assert tasks == set(small_config(place).tasks)
    assert all(each.is_unchanged and each.before == each.after for each in report.tasks)
    assert (report.rows_compared, report.rows_changed) == (5 * 8, 0)
    new = [row for row in grown["evaluation"] if row["task"] == "counting"]
    assert {row["metric"] for row in new} == {"accuracy", "macro_f1"}
    # The limit of the old run still holds, so that a later evaluation gives the same.
    assert model_source.resolve_model("grown").limits["text_to_code"] == 9
    assert model_source.resolve_model("grown").corpora["counting"] == "counts"


def test_frozen_files_have_no_optimizer_state(place: Path, grown: dict[str, Any]) -> None:
    (folder,) = (place / "grown" / "checkpoints").iterdir()
    kept = {path.stem.removeprefix("optimizer-") for path in folder.glob("optimizer-*")}
    assert kept == set(grown["growth"]["optimizer_files"]) == NEW


def test_references_are_trained_as_they_are_called(place: Path, grown: dict[str, Any]) -> None:
    results = {each["system"]: each for each in grown["growth"]["transfer_results"]}
    assert list(results) == ["grown", "without_skill", "fresh", "everything"]
    model = SkillNet.from_pretrained(grown["model"])
    sizes = {
        file: sum(model.get_parameter(name).numel() for name in names)
        for file, names in model.files_of().items()
    }
    assert results["grown"]["trained_params"] == sizes["skill-ink"] + sizes["head-counting"]
    assert results["without_skill"]["trained_params"] == sizes["head-counting"]
    assert results["fresh"]["trained_params"] == model.activated_parameters("counting")
    assert results["everything"]["trained_params"] == model.activated_parameters("counting")
    assert results["grown"]["difference"] == []
    for name in ("without_skill", "fresh", "everything"):
        difference, low, high = results[name]["difference"]
        assert difference == pytest.approx(results["grown"]["value"] - results[name]["value"])
        assert low <= difference <= high
    references = place / "grown" / "references"
    fresh = SkillNet.from_pretrained(references / "grown-fresh" / "model")
    assert list(fresh.config.tasks) == ["counting"]
    changed = files(references / "grown-everything" / "model")
    assert changed["shared"] != files(place / "base" / "model")["shared"]
    assert set(results["everything"]["regressions"]) >= set(small_config(place).tasks)


def test_it_is_recorded_with_its_references_below_it(place: Path, grown: dict[str, Any]) -> None:
    client = backend.create_client(backend.resolve_uri())
    run = client.get_run(grown["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["growth.is_unchanged"] == "true"
    assert "benefit of the new skill" in run.data.tags["mlflow.note.content"]
    kept = {entry.path for entry in client.list_artifacts(grown["run_id"], "growth")}
    assert kept == {"growth/growth.json", "growth/growth.md"}
    below = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{grown['run_id']}'"
    )
    assert {each.info.run_name for each in below} == {
        "grown-without_skill", "grown-fresh", "grown-everything",
    }  # fmt: skip
    assert {each.info.status for each in below} == {"FINISHED"}


@pytest.mark.slow(
    "test_merged_runs.py::test_a_merge_is_registered_if_its_parts_are_or_a_name_is_given"
)
def test_two_growths_merge_with_equal_outputs(
    place: Path, grown: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(grow_config("base", place / "corpora", steps=2), name="second")
    # The same corpus as a second task, whose skill has another name.
    config.skill = NewSkill("tone", "video", rank=2)
    towers = {"input": SkillPlan(("general", "tone"), "video")}
    config.task = replace(config.task, name="tones", towers=towers)
    made = GrowthReport.from_dict(grow_model(config)["growth"])
    assert "benefit of the new skill of rank 2" in made.to_markdown()
    # The same growth of the grown model trains the same bits: all that it reads is frozen.
    grow_model(replace(config, source="grown", name="third"))
    for file in ("skill-tone", "head-tones"):
        assert files(place / "third" / "model")[file] == files(place / "second" / "model")[file]
    words = ["grown", "second", "--name", "both", "--data", str(place / "corpora")]
    assert merging.main([*words, "--tracking.register", "false", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    report = MergeReport.from_dict(result["merge"])
    assert report.is_identical
    assert report.is_exact
    old = set(small_config(place).tasks)
    assert {(each.model, each.task) for each in report.tasks} == {
        *(("grown", task) for task in old | {"counting"}),
        *(("second", task) for task in old | {"tones"}),
    }
    parents = {**files(place / "grown" / "model"), **files(place / "second" / "model")}
    assert files(place / "both" / "model") == parents
    # The outcomes of each task are those of its parent, so that merged models can be compared.
    outcomes = read_outcomes(place / "both" / OUTCOMES_FILE)
    for parent, task in (("grown", "counting"), ("second", "tones")):
        own = read_outcomes(place / parent / OUTCOMES_FILE)[task, "test"]
        assert np.array_equal(outcomes[task, "test"].numerator, own.numerator)
    assert (place / "both" / "evaluation.csv").is_file()
    merged = model_source.resolve_model("both")
    assert merged.corpora["tones"] == "counts"
    assert merged.limits["text_to_code"] == 9
    run = backend.create_client(backend.resolve_uri()).get_run(str(merged.run_id))
    digests = {run.data.tags[f"merged_from.{number}"] for number in (1, 2)}
    assert digests == set(report.parents.values())
    assert merging.main(words) == 0
    said = capsys.readouterr()
    assert "both is finished" in said.err
    assert "identical to the bit" in said.err
    config.task = replace(
        config.task,
        name="joint",
        towers={"input": SkillPlan(("general", "ink", "tone"), "video")},
    )
    tuned = grow_model(replace(config, source="both", name="both-joint", skill=None))
    assert tuned["growth"]["is_unchanged"]
    new = files(place / "both-joint" / "model")
    assert {file: new[file] for file in parents} == parents
    assert new.keys() - parents.keys() == {"head-joint"}
    assert merging.main(["grown", "grown"]) == 2
    assert "a model is named twice" in capsys.readouterr().err
    assert merging.main(["grown", "second", "--name", "base"]) == 2
    assert "a run of this name exists" in capsys.readouterr().err


def write_growth(path: Path, config: GrowConfig, skill: str, task: str, corpus: str) -> str:
    """Write a growth as a file of ``--tasks``; return its path."""
    made = replace(
        config,
        name=None,
        skill=NewSkill(skill, init_from="video"),
        task=replace(
            config.task,
            name=task,
            towers={"input": SkillPlan(("general", "video", skill), "video")},
            training=replace(config.task.training, corpus=corpus),
        ),
    )
    path.write_text(configuration.to_yaml(made), encoding="utf-8")
    return str(path)


@pytest.mark.long
def test_growths_of_one_command_are_the_bits_of_growths_one_by_one(
    place: Path, ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = grow_config("base", place / "corpora", steps=3, threads_per_worker=1)
    words = [
        *("base", "--name", "apart", "--run_dir", str(place), "--training.steps", "2"),
        *("--tasks", write_growth(tmp_path / "a.yaml", config, "ink", "counting", "counts")),
    ]
    other = write_growth(tmp_path / "b.yaml", config, "tone", "tones", "cuonts")
    assert growing.main([*words, other, "--json"]) == 2
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [each["state"] for each in result["growths"]] == ["done", "failed"]
    assert "cuonts: missing. Did you mean 'counts'" in result["growths"][1]["error"]
    assert "counting: done, 2/2" in printed.err
    assert result["union"] is None
    made = (place / "apart-counting").rglob("*.*")
    kept = {path: path.stat().st_mtime_ns for path in made if path.name != ".lock"}
    write_growth(tmp_path / "b.yaml", config, "tone", "tones", "counts")
    assert growing.main([*words, other, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    # What was done is not done again.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert result["union"]["merge"]["is_identical"]
    alone: dict[str, bytes] = {}
    for path in (tmp_path / "a.yaml", Path(other)):
        one = configuration.build_config(GrowConfig, configuration.load_yaml(path))
        one.training.steps = 2
        alone |= files(Path(grow_model(replace(one, name=f"one-{path.stem}"))["model"]))
    assert files(place / "apart" / "model") == alone
    assert alone.keys() - files(place / "base" / "model").keys() == {
        *("skill-ink", "head-counting", "skill-tone", "head-tones")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "2 growths add a task 'counting'"),
        ({"task": "tones"}, "2 growths add a skill 'ink'"),
        ({"task": "tones", "skill": "tone", "seed": 1}, ""),
        ({"task": "tones", "skill": "tone", "source": "grown"}, "source differs between counting"),
        ({"task": "tones", "skill": "tone", "data": "/x"}, "data differs between counting and to"),
        ({"task": "tones", "skill": "tone", "workers": 2}, "a job trains in one process"),
        ({"task": "tones", "skill": "tone", "source": "nowhere"}, "source differs"),
        (None, "--tasks: give at least two files"),
    ],
)
def test_growths_that_do_not_go_together(
    place: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    config = grow_config("base", place / "corpora")
    configs = [config]
    if change is not None:
        names = change.get("skill", "ink"), change.get("task", "counting")
        path = write_growth(tmp_path / "other.yaml", config, *names, "counts")
        other = configuration.build_config(GrowConfig, configuration.load_yaml(path))
        changed = {key: change[key] for key in ("source", "data", "seed") if key in change}
        training = replace(config.training, workers=change.get("workers", 1))
        configs.append(replace(other, training=training, **changed))
    if not message:
        assert [each.name for each in plan_growths([*configs])[1]] != []
        return
    with pytest.raises(UserError, match=message):
        plan_growths(configs)


def test_a_finished_growth_keeps_its_settings(place: Path, grown: dict[str, Any]) -> None:
    config = grow_config("base", place / "corpora", lr=0.5)
    config.references = ["without_skill", "fresh", "everything"]
    with pytest.raises(UserError, match=r"the run grown has training\.lr 0\.01, not 0\.5"):
        grow_model(config)


def test_a_killed_growth_resumes_and_ends_the_same(
    place: Path, grown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(grow_config("base", place / "corpora", checkpoint_every=2), name="killed")
    with monkeypatch.context() as patch:

        def kill(self: RunReporter, path: Path, step: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

        patch.setattr(RunReporter, "checkpoint", kill)
        with pytest.raises(KeyboardInterrupt):
            grow_model(config)
    assert not (place / "killed" / "model").exists()
    done = grow_model(config)
    assert (done["resumed"], done["step"]) == (4, 6)
    assert done["growth"]["is_unchanged"]
    assert files(place / "killed" / "model") == files(place / "grown" / "model")


def test_command_line(
    place: Path, grown: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives the result of the finished growth."""
    path = tmp_path / "grow.yaml"
    config = grow_config("base", place / "corpora")
    config.references = ["without_skill", "fresh", "everything"]
    path.write_text(configuration.to_yaml(config))
    assert growing.main(["--config", str(path), "--name", "grown", "--from", "base"]) == 0
    said = capsys.readouterr()
    assert "skill-ink" in said.out
    assert "unchanged" in said.err
    assert growing.main(["--config", str(path), "--name", "grown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == grown["run_id"]
    assert growing.main(["base", "--config", str(path), "--skill.nam", "x"]) == 2
    assert "skill.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere"}, "nowhere: no folder and no run"),
        ({"skill": NewSkill("ink", init_from="vidoe")}, "unknown skill 'vidoe'; did you mean 'vid"),
        ({"skill": NewSkill("code")}, "base already has a skill 'code'"),
        ({"task.name": "text_to_code"}, "base already has a task 'text_to_code'"),
        (
            {"corpus": "cuonts"},
            "cuonts: missing. Did you mean 'counts', which is prepared?",
        ),
        ({"corpus": "unnamed"}, "the corpus unnamed has no list of labels; give --task.outputs"),
        ({"corpus": "headings"}, "counting reads video, but corpus headings holds text"),
        ({"skills": ("ink", "genral")}, "unknown skill 'genral'"),
        ({"data": "nodata"}, "nodata/counts: missing"),
    ],
)
def test_what_cannot_grow_is_said_before_anything_is_made(
    place: Path, change: dict[str, Any], message: str
) -> None:
    config = replace(grow_config("base", place / "corpora"), name="wrong")
    task = config.task
    if "task.name" in change:
        change = {"task": replace(task, name=change["task.name"])}
    elif "corpus" in change:
        change = {"task": replace(task, training=replace(task.training, corpus=change["corpus"]))}
    elif "skills" in change:
        change = {"task": replace(task, towers={"input": SkillPlan(change["skills"], "video")})}
    elif change.get("skill") == NewSkill("code"):
        towers = {"input": SkillPlan(("general", "code"), "video")}
        change = change | {"task": replace(task, towers=towers)}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        grow_model(replace(config, **change))
    assert not (place / "wrong" / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skill": NewSkill("colour")}, "no tower of task.towers activates the new skill 'colour'"),
        ({"training": "trainable"}, "training.trainable is set by grow"),
        ({"training": "fp64"}, "fp64 would change every file"),
    ],
)
def test_configurations_that_contradict_themselves(
    place: Path, change: dict[str, Any], message: str
) -> None:
    config = grow_config("base", place / "corpora")
    if change.get("training") == "trainable":
        change = {"training": replace(config.training, trainable=["shared"])}
    elif change.get("training") == "fp64":
        change = {"training": replace(config.training, precision="fp64")}
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_change_to_an_old_file_is_found(place: Path, tmp_path: Path) -> None:
    source = model_source.resolve_model("base")
    before = model_source.load_source_model(source)
    assert isinstance(before, SkillNet)
    assert {each.state for each in verification.compare_files(source, before, source.weights)} == {
        "same"
    }
    with torch.no_grad():
        before.get_parameter("encoder.norm.weight")[0] += 1e-7
    before.save_pretrained(tmp_path / "altered")
    states = verification.compare_files(source, before, tmp_path / "altered")
    assert [each.file for each in states if each.state == "changed"] == ["shared"]
    with pytest.raises(RuntimeError, match="shared is changed"):
        verification.assert_files_unchanged(states)
    (tmp_path / "altered" / "stem-patch.safetensors").unlink()
    states = verification.compare_files(source, before, tmp_path / "altered")
    assert [each.file for each in states if each.state == "gone"] == ["stem-patch"]


def test_a_registered_model_grows_into_its_next_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    made = Place(tmp_path)
    write_labelled_clips(made.data)
    config = grow_config("models:/skillnet@champion", made.data, steps=2)
    config.tracking.register = True
    done = grow_model(config)
    assert done["registered"]["version"] == made.made.version + 1
    bundle = model_source.resolve_model(done["registered"]["uri"])
    model = model_source.load_source_model(bundle)
    assert model.config.tasks["counting"].outputs == CLASSES
    before = files(model_source.resolve_model(made.made.uri).weights)
    assert all(files(bundle.weights)[name] == content for name, content in before.items())
    page = (
        backend.create_client(backend.resolve_uri()).get_model_version("skillnet", "2").description
    )
    assert "old files" in page
    # As good on all old tasks, to the digit, and one task more.
    assert done["registered"]["alias"] == champion.CHAMPION
    # A merge with its own base has nothing new, and becomes the next version.
    words = [made.made.uri, done["registered"]["uri"], "--name", "both", "--data", str(made.data)]
    assert merging.main([*words, "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["registered"]["version"] == done["registered"]["version"] + 1
    assert files(Path(merged["model"])) == files(bundle.weights)

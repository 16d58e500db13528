"""The size of a baseline follows the tasks that a run trains, and a mismatch is reported."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.run_evaluation import evaluate_run, find_size_mismatch
from skillnet.skills import default_tasks
from skillnet.systems import build_system, find_system
from skillnet_planning.plan import main
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora


def test_the_reference_tasks_are_those_that_a_run_trains_and_evaluates() -> None:
    config = replace(small_config(Path("corpora")), system="dense")
    assert list(config.joint().model.reference_tasks) == list(default_tasks())
    fewer = dict(list(config.tasks.items())[:3])
    fewer["text_to_image"] = replace(fewer["text_to_image"], auxiliary=True)
    run = replace(config, tasks=fewer).joint()
    assert list(run.model.reference_tasks) == ["text_classification", "speech_recognition"]
    # The run of a run, and tasks that the configuration gives.
    assert run.joint() == run
    assert not replace(run, system="skillnet", model=config.model).joint().model.reference_tasks


def test_a_pretraining_has_the_size_of_the_fine_tuning_that_follows() -> None:
    config = small_config(Path("corpora"))
    pretraining = replace(small_pretraining(Path("corpora")), system="dense").joint()
    assert list(pretraining.model.reference_tasks) == list(default_tasks())
    assert set(pretraining.model.tasks) == set(pretraining.tasks)
    widths = [
        build_system("dense", each.model).config.ffn_dim
        for each in (pretraining, replace(config, system="dense").joint())
    ]
    assert widths[0] == widths[1]


def test_a_run_of_fewer_tasks_keeps_the_size_of_its_initial_weights(tmp_path, run_root):
    config = replace(small_config(write_corpora(tmp_path / "data")), system="dense")
    joint = build_system("dense", config.joint().model)
    joint.save_pretrained(tmp_path / "joint")
    one = {"text_classification": config.tasks["text_classification"]}
    child = replace(config, tasks=one, init_from=str(tmp_path / "joint"))
    run = resolve_run(child)
    assert run.config.model.reference_tasks == joint.config.reference_tasks
    validate_run(run)  # the weights fit
    fresh = resolve_run(replace(child, init_from=None))
    assert list(fresh.config.model.reference_tasks) == ["text_classification"]


def test_a_mismatch_is_a_warning_of_the_run_and_a_line_of_its_plan(tmp_path, run_root, capsys):
    config = replace(small_config(write_corpora(tmp_path / "data")), system="dense")
    assert find_size_mismatch(config.joint()) is None
    wide = dataclasses.replace(config, options={"ffn_dim": 200})
    words = find_size_mismatch(wide.joint())
    assert words.startswith("the layers of dense miss SkillNet's size by +")
    assert "% activated parameters" in words
    assert words.endswith("on average over " + ", ".join(default_tasks()))
    validate_run(resolve_run(wide))
    assert "the layers of dense miss SkillNet's size" in " ".join(capsys.readouterr().err.split())
    said = ["--config", "tiny", "--gpus", "1xL4", "--system", "dense"]
    assert main([*said, "--options.ffn_dim", "2000", "--json"]) == 0
    assert "of dense miss" in json.loads(capsys.readouterr().out)["size_mismatch"]
    assert main([*said, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_mismatch"] == ""


def test_the_rows_of_an_evaluation_have_the_mismatch(tmp_path: Path) -> None:
    one = {"text_classification": small_config(Path()).tasks["text_classification"]}
    config = replace(small_config(write_corpora(tmp_path / "data")), tasks=one)
    for system, options in (("dense", {"ffn_dim": 200}), ("skillnet", {})):
        run = replace(config, system=system, options=options).joint()
        model = build_system(system, run.model, options)
        rows = evaluate_run(run, model, ["test"])
        mismatches = {row["size_mismatch"] for row in rows}
        if system == "skillnet":
            assert mismatches == {None}
        else:
            assert mismatches == {find_system("dense").measure_size(run.model, options).deviation}
            assert min(mismatches) > 0.05

"""Finished runs: reading them, and grouping them by configuration."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from skillnet_evidence.errors import EvidenceError
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import (
    add_defaults,
    compare_runs,
    find_differing_settings,
    find_run,
    label_runs,
    read_run,
)
from skillnet_studies.report.run_tables import build_settings_table
from tests.helpers.synthetic_runs import write_pretraining, write_run
from tests.unit.platform.test_configuration import Example


def test_a_key_that_a_run_lacks_has_its_default(tmp_path: Path):
    """An earlier version had no such key; its runs and new ones are one system."""
    for seed in (0, 1):
        path = write_run(tmp_path / str(seed), seed=seed) / "config.yaml"
        tree = configuration.load_yaml(path)
        if seed:
            for task in tree["model"]["tasks"].values():
                del task["linear_path"]
            path.write_text(configuration.to_yaml(tree))
    runs = [read_run(tmp_path / str(seed)) for seed in (0, 1)]
    assert {run.label for run in label_runs(runs)} == {"skillnet"}
    assert not find_differing_settings([runs[0], replace(runs[1], label="earlier")])


def test_runs_of_other_settings_get_other_labels(tmp_path: Path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "dense", seed, options={"width": "activated"})
        write_run(tmp_path / f"b{seed}", "dense", seed, options={"width": "total"})
    runs = [read_run(tmp_path / name) for name in ("a0", "b0", "a1", "b1")]
    named = label_runs(runs)
    assert [(run.label, run.seed) for run in named] == [
        ("dense", 0),
        ("dense", 1),
        ("dense-2", 0),
        ("dense-2", 1),
    ]
    assert "dense-2: dense with other settings" in capsys.readouterr().err
    assert {run.label for run in label_runs(runs, ["narrow", "wide"])} == {"narrow", "wide"}
    assert find_differing_settings(named) == {
        "options.width": {"dense": "activated", "dense-2": "total"}
    }
    with pytest.raises(UserError, match=r"1 names for 2 configurations: dense \(2 runs\)"):
        label_runs(runs, ["narrow"])
    with pytest.raises(UserError, match="names must differ"):
        label_runs(runs, ["same", "same"])
    with pytest.raises(UserError, match="seed 0 occurs twice"):
        label_runs([runs[0], runs[0]])


def pretrained_runs(root: Path) -> list[Path]:
    """Write two seeds of two configurations; each run has its own pretraining."""
    return [
        write_run(
            root / f"{name}{seed}",
            seed=seed,
            pretrained=True,
            start=write_pretraining(root / f"before-{name}{seed}", seed, lr=rate),
        )
        for name, rate in (("a", 0.1), ("b", 0.2))
        for seed in (0, 1)
    ]


def test_different_pretrainings_are_different_systems(tmp_path: Path, capsys):
    runs = [read_run(path) for path in pretrained_runs(tmp_path)]
    assert [run.pretraining_seconds for run in runs] == [4.0] * 4, (
        "includes the time before the resume"
    )
    named = label_runs(runs)
    assert [(run.label, run.seed) for run in named] == [
        ("skillnet-pretrained", 0),
        ("skillnet-pretrained", 1),
        ("skillnet-pretrained-2", 0),
        ("skillnet-pretrained-2", 1),
    ]
    rates = {"skillnet-pretrained": "0.1", "skillnet-pretrained-2": "0.2"}
    assert find_differing_settings(named) == {"pretraining.training.lr": rates}
    write_run(tmp_path / "plain")
    plain = replace(read_run(tmp_path / "plain"), label="skillnet")
    rows = find_differing_settings([plain, *named])
    assert rows == {"pretraining.training.lr": rates | {"skillnet": "–"}}
    caption = build_settings_table(compare_runs([plain, *named])).caption
    assert "The same holds for the pretrainings" in caption
    assert "unknown" not in caption


def test_an_unknown_pretraining_counts_as_the_only_known_one(tmp_path: Path):
    folders = pretrained_runs(tmp_path)
    shutil.rmtree(tmp_path / "before-a1")
    runs = [read_run(path) for path in folders]
    assert [run.label for run in label_runs(runs[:2])] == ["skillnet-pretrained"] * 2
    assert len({run.label for run in label_runs(runs)}) == 3, "it may be of either"
    shutil.rmtree(tmp_path / "before-a0")
    alone = label_runs([read_run(path) for path in folders[:2]])
    assert {run.label for run in alone} == {"skillnet-pretrained"}
    caption = build_settings_table(compare_runs(alone)).caption
    assert "The pretraining settings of skillnet-pretrained are unknown." in caption


def test_runs_on_different_rows_or_corpora_are_rejected(tmp_path: Path):
    write_run(tmp_path / "a", "skillnet")
    write_run(tmp_path / "b", "dense", rows=199)
    one, other = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    with pytest.raises(
        EvidenceError, match=r"different rows of text_classification test \(199 and 200"
    ):
        compare_runs([one, other])
    altered = replace(one, digests={"headings": "c" * 64}, label="dense")
    with pytest.raises(UserError, match="different versions of the corpus headings"):
        compare_runs([one, altered])


def test_a_run_is_read_from_its_files(tmp_path: Path, run_root: Path):
    write_run(tmp_path / "a", "moe", 4, pretrained=True, activated=70)
    path = tmp_path / "a"
    run = read_run(path)
    assert (run.label, run.seed, run.total_params, run.seconds) == ("moe-pretrained", 4, 140, 7.5)
    trained = json.loads((path / "trained.json").read_text())
    (path / "trained.json").write_text(json.dumps(trained | {"resumed": 6}))
    assert read_run(path).seconds == 15.0
    assert find_run(str(path)) == path
    write_run(run_root / "named", "moe")
    assert find_run("named") == run_root / "named"
    with pytest.raises(UserError, match="no folder and no run in"):
        find_run("nowhere")
    (path / "outcomes.parquet").unlink()
    with pytest.raises(UserError, match=r"has no outcomes\.parquet"):
        read_run(path)


def test_a_damaged_table_is_rejected_with_its_line(tmp_path: Path):
    path = write_run(tmp_path / "a") / "evaluation.csv"
    text = path.read_text()
    lines = text.splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("value")] = "high"
    path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    with pytest.raises(UserError, match="line 2: value is 'high'"):
        read_run(tmp_path / "a")
    path.write_text(text.replace("metric,", "measure,", 1))
    with pytest.raises(UserError, match="line 2 has no metric"):
        read_run(tmp_path / "a")


def test_a_digest_that_is_no_text_is_rejected(tmp_path: Path):
    path = write_run(tmp_path / "a") / "result.json"
    path.write_text(json.dumps({"run_id": None, "corpora": {"headings": []}}))
    with pytest.raises(UserError, match=r"result\.json is damaged: corpora has a digest"):
        read_run(tmp_path / "a")


def test_a_stored_configuration_gets_the_defaults_of_keys_that_it_lacks() -> None:
    stored = {
        "lr": "high",
        "precision": {"bits": 16},
        "unknown": 1,
        "model": {"dim": 64},
        "parts": {"b": {"corpus": "x", "weight": None}, "c": None},
    }
    found = add_defaults(Example, stored)
    defaults = configuration.to_dict(Example())
    kept = {"lr": "high"}  # a wrong value stays; keys that are no more do not
    assert found == defaults | kept | {
        "model": defaults["model"] | {"dim": 64},
        "parts": {"b": {"corpus": "x", "weight": None, "batch": 32}, "c": None},
    }
    assert stored["model"] == {"dim": 64}, "unchanged"

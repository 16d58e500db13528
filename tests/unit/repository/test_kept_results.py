"""What is kept of finished sweeps and growths, and what the pages say of it."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.measure import read_csv_rows
from pipelines.training.growth.report import FileState, GrowthReport, TaskState, TransferResult
from tools.docs import growth_tables as growth_result
from tools.docs import sweep_tables as sweep_result
from tools.docs.kept_results import keep

DAY = {"date": "2026-01-02", "machine": "a machine, 2 cores"}


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_what_is_kept_names_no_place_of_the_machine(tmp_path: Path) -> None:
    run = tmp_path / "home" / "mine"
    run.mkdir(parents=True)
    (run / "a.yaml").write_text(f"run_dir: {run.parent}\ndata: {run.parent}/corpora\n")
    (run / "b.png").write_bytes(b"/not/a/text")
    keep(run, ["a.yaml", "b.png"], tmp_path / "kept")
    assert (tmp_path / "kept/a.yaml").read_text() == "run_dir: runs\ndata: runs/corpora\n"
    assert (tmp_path / "kept/b.png").read_bytes() == b"/not/a/text"
    for text in ("data: /elsewhere/corpora\n", f"data: {run.parent}-2/corpora\n"):
        (run / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"names .*/corpora, a place of this machine"):
            keep(run, ["b.png", "a.yaml"], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def made_sweep(home: Path) -> Path:
    """Two settings crossed, three seeds: one worth two points, the other nothing on the whole."""
    folder, trials = home / "depths", []
    space = {"training.lr": {"choice": [0.1, 0.2]}, "model.skill_every": {"choice": [1, 2]}}
    index = 0
    for rate in (0.1, 0.2):
        for every in (1, 2):
            for seed in range(3):
                noise = 0.004 * (seed - 1) * (1 if rate == 0.1 else -1)
                score = 0.3 + 0.02 * (every == 2) + noise
                trials.append(
                    {
                        "name": f"{index:03d}-seed{seed}",
                        "group": f"{index:03d}",
                        "seed": seed,
                        "training.lr": rate,
                        "model.skill_every": every,
                        # At equal cost the width follows from the rest, and varies with it.
                        "model.ffn_dim": "" if every == 1 else 96,
                        "status": "finished",
                        "score": score,
                        "score/text_to_code": score,
                        "folder": str(folder / "trials" / f"{index:03d}-seed{seed}"),
                        "error": "",
                        "seconds": 30.0,
                        "activated_params": 1.5e6,
                        "flops_per_example": 3e6,
                        "step": 50,
                    }
                )
            index += 1
    trials.append(trials[-1] | {"seed": 9, "status": "failed", "score": "", "seconds": ""})
    write_rows(folder / "trials.csv", trials)
    for trial in trials[:-1]:
        write_rows(folder / "trials" / str(trial["name"]) / "evaluation.csv", [{**DAY}])
    run = {"model": {"dim": 8, "num_layers": 1, "ffn_dim": 64}, "training": {"steps": 50}}
    reported = {"run": run, "space": space, "seeds": [0, 1, 2], "fixed_cost": {"adjust": "ffn_dim"}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(reported, sort_keys=False))
    return folder


def test_a_sweep_is_kept_and_each_setting_weighed_over_all_that_is_alike(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "home")
    with pytest.raises(ValueError, match="no finished sweep"):
        sweep_result.collect(folder, tmp_path)
    (folder / "result.json").write_text("{}")
    kept = sweep_result.collect(folder, tmp_path / "results")
    assert kept.name == "2026-01-02-sweep-depths"
    assert sweep_result.newest(tmp_path / "results") == {"depths": kept}
    rows = read_csv_rows(kept / "trials.csv")
    assert rows[0]["machine"] == DAY["machine"]
    assert not {"folder", "log"} & set(rows[0])

    text = sweep_result.text_of(kept)
    assert "13 trials (12 finished, 1 failed) of 50 steps, seeds 0, 1, 2" in text
    assert "6 minutes of training in total, a machine, 2 cores, 2026-01-02" in text
    lines = text.splitlines()
    # Equal differences have no spread, which is no certainty.
    assert "| skill every | 2 − 1 | +2.0 | too few trials | – |" in lines
    assert "| lr | 0.2 − 0.1 | +0.0 | −2.0 to +2.0 | seeds |" in lines
    assert "4 configurations score 30.0 to 32.0 % on the validation splits" in text
    assert sweep_result.page_text(tmp_path / "results") == f"### depths\n\n{text}"
    assert sweep_result.page_text(tmp_path / "nothing") == "No result is kept yet."


def test_the_page_has_the_newest_of_each_sweep(tmp_path: Path) -> None:
    for name in ("2026-01-02-sweep-b", "2026-01-03-sweep-a", "2026-01-04-sweep-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trials.csv").write_text("name\n")
    assert list(sweep_result.newest(tmp_path).items()) == [
        ("a", tmp_path / "2026-01-03-sweep-a"),
        ("b", tmp_path / "2026-01-04-sweep-b"),
    ]


def test_a_growth_is_kept_and_shown_as_its_report_has_it(tmp_path: Path) -> None:
    report = GrowthReport(
        "base", "", "ink", "counting", "counts", "classification", 7, 3, 10,
        [FileState("shared", "a", "a"), FileState("skill-ink", None, "b")],
        [TaskState("text_to_code", "test", "recall_at_10", 0.5, 0.5, True)],
        1234, 0, ["skill-ink"],
        [
            TransferResult("grown", "test", "accuracy", 0.5, 0.4, 0.6, [], 3456, 1.0),
            TransferResult("grown", "validation", "accuracy", 0.9, 0.8, 1.0, [], 3456, 1.0),
            TransferResult("everything", "test", "accuracy", 0.45, 0.4, 0.5, [0.05, -0.01, 0.11],
                           9, 1.0, {"text_to_code": [0.5, 0.25]}),
        ],
    )  # fmt: skip
    folder = tmp_path / "home" / "grown"
    with pytest.raises(ValueError, match=r"no growth\.json"):
        growth_result.collect(folder, tmp_path)
    row = {"system": "skillnet", "task": "counting", "split": "test", "metric": "accuracy"}
    write_rows(folder / "evaluation.csv", [row | DAY])
    (folder / "growth.json").write_text(json.dumps(report.to_dict()))
    (folder / "grow.yaml").write_text("name: grown\n")
    kept = growth_result.collect(folder, tmp_path / "results")
    assert kept.name == "2026-01-02-growth"
    assert growth_result.newest(tmp_path / "results") == kept
    lines = growth_result.text_of(kept).splitlines()
    assert "skillnet grow base --config grow/stroke-count --name grown" in lines
    new = "| **new skill and head** | **50.0 % (40.0–60.0)** |  | 3,456 |"
    assert lines[lines.index(new) + 1] == (
        "| everything trained further | 45.0 % (40.0–50.0) | +5.0 (-1.0 to +11.0) | 9 |"
    )
    assert not any("90.0 %" in line for line in lines)
    assert "- 1 old files have the same sha256, and 0 differ." in lines
    assert "- 0 of 1 metrics of 1 tasks changed." in lines
    assert "- 0 of 1,234 test rows changed their outcome." in lines
    assert "| `text_to_code` | R@10 | 50.0 % | 25.0 % |" in lines

    simple = row | {"system": "simple_baseline", "value": 0.2, "low": 0.1, "high": 0.3}
    write_rows(folder / "references.csv", [simple, simple | {"split": "validation"}])
    again = growth_result.collect(folder, tmp_path / "results")
    assert growth_result.text_of(again).count("| *simple baseline* | 20.0 % (10.0–30.0) |") == 1

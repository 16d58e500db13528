"""The study of a stream of tasks: equal rows, exact growth, costs counted once, kept results."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import stream_arms
from lab.stream_arms import ArmModels, StreamCell, find_equal_rank, list_arms
from lab.task_stream import (
    RECORD,
    CellPlace,
    StreamConfig,
    StreamPlan,
    StreamStudy,
    tabulate_costs,
)
from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.compare import compare
from skillnet_studies.config.study import StudyConfig, SystemConfig, TuningConfig
from skillnet_studies.study.kept_results import TUNING, KeptStudy, change_kept
from skillnet_studies.study.study import read_study_runs
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.sixth_corpus import write_labelled_clips
from tests.helpers.small_corpora import small_config, write_corpora

ARMS = [arm for group in list_arms() for arm in group]
STEPS = 20
PAGE = Path(__file__).parents[3] / "docs/study/stream.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpora(tmp_path_factory.mktemp("corpora"))
    digest = open_corpus(folder / "strokes").digest
    counts = write_labelled_clips(folder)
    change_corpus(counts, lambda _, table: table, labelled={"corpora": {"strokes": digest}})
    return folder


def build_study(
    data: Path, folder: Path, arms: list[str], shares: Sequence[float] = (1.0,), **plan: Any
) -> StreamConfig:
    """Two tasks over two folds and one pilot fold."""
    run = small_config(data, steps=6, precision="fp32", threads_per_worker=1, checkpoint_every=0)
    tasks = {name: run.tasks[name] for name in ("text_classification", "text_to_video")}
    return StreamConfig(
        name="stream",
        run_dir=str(folder / "runs"),
        keep=str(folder / "kept"),
        seeds=[0],
        folds=2,
        run=replace(run, tasks=tasks, fold=FoldConfig(3)),
        tuning=TuningConfig(seeds=[1000]),
        stream=StreamPlan(
            tasks=["counts", "headings"],
            steps=STEPS,
            batch_size=4,
            arms={arm: list(shares) for arm in arms},
            dense=SystemConfig("dense", {"size": "executed"}),
            **plan,
        ),
    )


def read_records(config: StreamConfig) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = KeptStudy(StreamStudy(config).path).content["stream"]
    return records


@pytest.mark.slow("test_task_stream.py::test_a_fold_stays_on_its_base")
def test_all_arms_read_equal_rows_and_are_kept_and_compared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_study(data, tmp_path, ARMS, [0.5], only_folds=[0])
    rows: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    counts: list[Counter[str]] = []
    load = MultiTaskDataLoader.batch

    def record(loader: MultiTaskDataLoader, step: int, *more: Any) -> Any:
        batch = load(loader, step, *more)
        if batch.task in config.stream.tasks and loader.tasks[batch.task].label_fraction == 0.5:
            index = loader._task_sampler.task_at(step)[1]
            rows.setdefault((batch.task, index), set()).add(tuple(batch.rows))
            counts[-1][batch.task] += 1
        return batch

    def train(run: ResolvedRun) -> Any:
        counts.append(Counter())
        return train_model(run)

    monkeypatch.setattr(MultiTaskDataLoader, "batch", record)
    monkeypatch.setattr(stream_arms, "train_model", train)
    study = StreamStudy(config)
    study.run_cells(study.tune_rates())
    assert {len(each) for each in rows.values()} == {1}
    assert {count for each in counts for count in each.values()} == {STEPS}

    kept = KeptStudy(study.path)
    assert len(kept.runs) == len(ARMS)
    assert all(run["trained.json"]["commit"] for run in kept.runs.values())
    records = {name.partition("-")[0]: each for name, each in kept.content["stream"].items()}
    for arm in ("grow", "merge", "lora", "head"):
        assert records[arm]["before"] == records[arm]["after"], arm
    for arm in ("sequential", "replay", "average", "ties", "joint"):
        assert records[arm]["before"] != records[arm]["after"], arm
    # Grown one after the other, or each from the base: the same bits.
    assert records["grow"]["after"] == records["merge"]["after"]
    assert records["grow"]["order"] == config.stream.order_tasks(0)
    grown, low_rank = (records[arm]["trained"] for arm in ("grow", "lora"))
    assert grown == records["merge"]["trained"]
    assert all(abs(low_rank[task] / grown[task] - 1) < 0.1 for task in grown)
    sizes = {
        name.partition("-")[0]: run["result.json"]["total_params"]
        for name, run in kept.runs.items()
    }
    # Both have the base and two skills with their heads, and a head alone is smaller.
    assert sizes["grow"] == sizes["merge"] == sizes["average"]
    assert sizes["head"] < sizes["lora"] < sizes["grow"] < sizes["full"]

    costs = {
        row[0]: row
        for row in tabulate_costs(
            read_study_runs(study.path), kept.content[RECORD], config.stream.tasks
        )
    }
    assert costs["grow-50"][1] == costs["merge-50"][1] == "0 of 4"
    assert costs["full-50"][1] == "–"
    operations = {
        name.partition("-")[0]: {
            row["task"]: float(row["flops_per_example"])
            for row in csv.DictReader(io.StringIO(run["evaluation.csv"]))
        }
        for name, run in kept.runs.items()
    }
    for task in config.stream.tasks:
        assert operations["head"][task] < operations["grow"][task] == operations["scratch"][task]

    names = {f"{arm}-50" for arm in ARMS}
    report, failed = compare(
        StudyConfig(
            runs=[str(study.path)],
            reference="grow-50",
            interpret=False,
            output=str(tmp_path / "report"),
        )
    )
    assert not failed
    comparison = report.comparison  # type: ignore[union-attr]
    assert set(comparison.systems) == names
    # Old tasks that stay with the base are no score of an arm, so the mean is over added tasks.
    assert set(comparison.common_tasks) == set(config.stream.tasks)
    assert comparison.has_task("text_to_video", "grow-50", "replay-50")
    assert not comparison.has_task("text_to_video", "full-50")


@pytest.mark.slow("test_task_stream.py::test_a_fold_stays_on_its_base")
def test_a_killed_study_continues_elsewhere_with_its_rates(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_study(data, tmp_path, ["head", "grow"], only_folds=[0])
    config = replace(config, tuning=TuningConfig(rates=[1e-4, 1e-3, 1e-2], seeds=[1000]))
    measure = ArmModels.measure
    left = 4

    def fail(self: ArmModels, cell: StreamCell, *more: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return measure(self, cell, *more)

    monkeypatch.setattr(ArmModels, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        StreamStudy(config).tune_rates()
    assert len(KeptStudy(StreamStudy(config).path).content[TUNING]) == 3
    left = 100
    elsewhere = replace(config, run_dir=str(tmp_path / "elsewhere"))
    study = StreamStudy(elsewhere)
    tuning = study.tune_rates()
    assert left == 100 - 3
    study.run_cells(tuning)
    done = dict(KeptStudy(study.path).runs)
    assert len(done) == 2
    rate = done["grow-100-fold0-seed0"]["config.yaml"]["training"]["lr"]
    assert rate == tuning["grow-100"].settings["training.lr"]
    # Nothing is left to do, also on a third machine.
    left = 1
    third = StreamStudy(replace(config, run_dir=str(tmp_path / "third")))
    third.run_cells(third.tune_rates())
    assert KeptStudy(third.path).runs == done


def test_what_another_process_has_ended_is_not_trained_again(data: Path, tmp_path: Path) -> None:
    study = StreamStudy(build_study(data, tmp_path, ["head", "lora"]))
    missing, trained = {"head", "lora"}, []
    place = CellPlace(0, 0, 1.0, 1e-3, "test")
    for arm, _, _ in study.train_missing(dict.fromkeys(missing, place), missing.__contains__):
        trained.append(arm)
        missing.clear()
    assert len(trained) == 1


def test_a_fold_stays_on_its_base(data: Path, tmp_path: Path) -> None:
    config = build_study(data, tmp_path, ["head"], [1.0, 0.5], only_folds=[0])
    study = StreamStudy(config)
    study.run_cells(study.tune_rates())
    records = read_records(config)
    assert len(records) == 2
    # Another plan does not continue the kept cells.
    with pytest.raises(UserError, match=r"stream\.memory 0\.1, not 0\.2"):
        StreamStudy(replace(config, stream=replace(config.stream, memory=0.2)))
    run = tmp_path / "runs" / "stream" / "runs" / "head-50-fold0-seed0"
    (run / "result.json").unlink()
    for record in records.values():
        record["bases"]["skillnet"] = "f" * 64
    with change_kept(study.path) as kept:
        kept.content["stream"] = records
        del kept.runs[run.name]
    with pytest.raises(UserError, match="fold 0 was begun on another base"):
        study.run_cells(study.tune_rates())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 30, "stream.steps: 30 is no multiple of 20"),
        ("arms", {"head": [0.0]}, r"stream\.arms: expected"),
        ("arms", {"grwo": [1.0]}, "no arm is named 'grwo'"),
        ("only_folds", [0, 2], "stream.only_folds: 2 is no fold of the study, which has 2, from 0"),
    ],
)
def test_a_wrong_plan_is_one_message(
    data: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    config = build_study(data, tmp_path, ["head"])
    with pytest.raises(UserError, match=message):
        StreamStudy(replace(config, stream=replace(config.stream, **{key: value})))


def test_rates_wait_for_the_trials_of_another_process(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_study(data, tmp_path, ["head"])
    config = replace(config, tuning=TuningConfig(rates=[1e-4, 1e-3, 1e-2], seeds=[1000]))
    # No training is yielded for a place that is locked.
    monkeypatch.setattr(StreamStudy, "train_missing", lambda *_: iter(()))
    with pytest.raises(UserError, match="another process runs 3 of 3 tuning trials"):
        StreamStudy(config).tune_rates()


def test_a_task_without_classes_is_one_message(data: Path, tmp_path: Path) -> None:
    config = build_study(data, tmp_path, ["head"])
    folder = write_corpora(tmp_path / "corpora")
    change_corpus(folder / "drawings", lambda _, table: table, labels=[])
    plan = replace(config.stream, tasks=["drawings"])
    study = StreamStudy(replace(config, run=replace(config.run, data=str(folder)), stream=plan))
    with (
        pytest.raises(UserError, match=r"stream\.tasks: the corpus drawings lists no classes"),
        study.open_cell(["head"], CellPlace(0, 0, 1.0, 1e-3, "test")),
    ):
        pass


def test_a_low_rank_skill_has_as_many_weights_as_a_whole_one() -> None:
    config = SkillNetConfig(dim=32, ffn_dim=64, num_layers=1, tasks={})
    before = sum(p.numel() for p in SkillNet(config).parameters())
    sizes = [
        sum(p.numel() for p in add_skill(SkillNet(config), "new", "text", rank).parameters())
        - before
        for rank in (0, find_equal_rank(config, "text"))
    ]
    assert abs(sizes[1] / sizes[0] - 1) < 0.03


def test_the_page_states_the_settings_and_claims_of_the_study() -> None:
    config = configuration.parse_config(StreamConfig, ["--config", "studies/stream"], "stream")
    page = PAGE.read_text("utf-8")
    tree = configuration.flatten_tree(configuration.to_dict(config))
    stated = re.findall(r"^\| `([\w.-]+)` \| (.+?) \|$", page, re.MULTILINE)
    settings = {key: text for key, text in stated if "." in key or key in tree}
    assert len(settings) == 15
    for key, text in settings.items():
        assert tree[key] == yaml.safe_load(text), key
    claims = dict(re.findall(r"^\| ([\w ]+) \| ([^|]+) \| [^|]+ \| \d \|$", page, re.MULTILINE))
    assert claims == {name: claim.text for name, claim in config.claims.stated.items()}
    assert config.claims.order == []
    named = {
        x for c in config.claims.stated.values() for p in c.parts for x in (p.system, p.against)
    }
    assert named <= config.systems.keys()
    assert set(config.stream.arms) == set(ARMS)
    for arm in ARMS:
        assert f"`{arm}`" in page

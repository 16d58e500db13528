"""Kept results of a study, and a reserve that is read once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.folds import open_fold
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, UNIT_SUMS_FILE, read_outcomes
from pipelines.training.runs.layout import CONFIG
from pipelines.training.runs.progress_log import PROGRESS
from plugins.studies.tests.kept_studies import CLAIM, keep_study
from skillnet.model import SkillNet
from skillnet_evidence.budget import estimate_budgets
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import SystemComparison
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from skillnet_studies.compare import compare
from skillnet_studies.config.study import (
    NOTICE,
    StudyConfig,
    SystemConfig,
    TuningConfig,
    shift_seed,
)
from skillnet_studies.report.report import (
    ComparisonReport,
    build_report,
    read_validation_curves,
    render_report,
    report_to_dict,
    report_to_markdown,
    show_report,
)
from skillnet_studies.study.kept_results import (
    RESERVE_RECORD,
    RESERVE_SUMS,
    TUNING,
    KeptStudy,
    KeptTuning,
    change_kept,
    keep_results,
    open_study,
    read_study_config,
    restore_results,
)
from skillnet_studies.study.reserve import read_reserve, read_reserve_record, seal_reserve
from skillnet_studies.study.study import (
    build_final_trials,
    check_folds,
    group_replicates,
    list_final_runs,
    read_study_ledger,
    run_study,
    write_study_ledger,
)
from skillnet_studies.study.tuning import TuningResult, build_stage_trials, start_tuning
from sweeps.config.space import SearchDimension
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.trial import Trial, TrialOutcome
from tests.helpers.small_corpora import small_config, write_corpora
from tests.helpers.synthetic_runs import (
    TASKS,
    complete_result,
    write_curve,
    write_pretraining,
    write_run,
    write_study,
)

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker


def study(folder: Path, keep: Path | None, **values: Any) -> StudyConfig:
    common: dict[str, Any] = {
        "name": "s",
        "run_dir": str(folder),
        "keep": str(keep) if keep else None,
        "run": replace(small_config(folder / "corpora"), fold=FoldConfig(2)),
        "seeds": [0, 1],
        "systems": {"skillnet": SystemConfig("skillnet")},
    }
    return StudyConfig(**(common | values))


def test_sums_of_units_give_the_results_of_all_rows(tmp_path: Path):
    start = write_pretraining(tmp_path / "pretraining-1")
    systems = {"skillnet": 0.3, "specialist": 0.0, "dense": -0.2}
    folders = write_study(tmp_path / "runs", systems, (0, 1, 2))
    folders.append(write_run(tmp_path / "runs/more", "moe", pretrained=True, start=start))
    full, kept = compare_kept(folders, tmp_path / "kept")
    assert full.tests == kept.tests
    assert full.scores == kept.scores
    assert full.relative.keys() == kept.relative.keys()
    assert kept.systems["moe-pretrained"][0].source.pretraining["training"]["lr"] == 3e-3
    assert kept.systems["moe-pretrained"][0].pretraining_seconds == 4.0
    # Kept files are committed, so they have no path of the machine.
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert [path.name for path in files] == ["kept.parquet", "kept.yaml"]
    assert str(tmp_path) not in files[1].read_text(encoding="utf-8")
    unpacked = open_study(tmp_path / "kept.yaml") / "runs/more"
    assert not list(unpacked.rglob(OUTCOMES_FILE))
    assert len(read_outcomes(unpacked / UNIT_SUMS_FILE)[TASKS[0], "test"]) == 50
    sums = pq.read_table(files[0])
    assert sums.column_names[:4] == ["run", "system", "fold", "seed"]
    assert set(sums["run"].to_pylist()) == {path.name for path in folders}


def test_kept_runs_give_the_budgets_of_their_validation_curves(tmp_path: Path):
    folders = write_study(tmp_path / "runs", {"skillnet": 0.0, "dense": 0.0}, (0, 1, 2))
    for number, folder in enumerate(folders):
        gain = 0.2 if "skillnet" in folder.name else 0.0
        write_curve(folder, {4: 0.3, 8: 0.5 + gain, 12: 0.6 + gain + number / 100})
    full, kept = (
        estimate_budgets(each, read_validation_curves)["skillnet"]
        for each in compare_kept(folders, tmp_path / "kept")
    )
    assert kept.reached == 3
    assert kept == full
    # The losses of every few steps are not committed.
    lines = (open_study(tmp_path / "kept") / "runs/skillnet-seed0" / PROGRESS).open().readlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    assert "/loss" not in "".join(lines)


def test_a_study_resumes_from_kept_results_alone(tmp_path: Path):
    config = study(tmp_path / "first", tmp_path / "keep")
    tuning = {"skillnet": TuningResult("skillnet", {"training.lr": 0.01})}
    trials = build_final_trials(config, tuning)
    assert [trial.name for trial in trials] == [
        f"skillnet-fold{fold}-seed{seed}" for fold, seed in ((0, 0), (1, 10000), (0, 1), (1, 10001))
    ]
    assert len({trial.config.seed for trial in trials}) == 4, "none shares its initial weights"
    assert [trial.config.fold.number for trial in trials] == [0, 1, 0, 1]
    assert len(group_replicates(trials)) == 4
    outcomes = []
    for trial in trials[:2]:
        folder = write_run(config.folder / "runs" / trial.name, seed=trial.config.seed)
        (folder / CONFIG).write_text(configuration.to_yaml(trial.config), encoding="utf-8")
        complete_result(folder)
        outcomes.append(LedgerEntry(trial, folder).build_outcome("finished"))
    write_study_ledger(config, tuning, outcomes)
    keep_results(config, outcomes)
    # Another machine has other paths and an empty directory.
    other = study(tmp_path / "second", tmp_path / "keep", systems={**config.systems})
    assert restore_results(other) == {trial.name for trial in trials[:2]}
    known, runs = read_study_ledger(other.folder)
    assert known["skillnet"].settings == {"training.lr": 0.01}
    assert [read_run(folder).fold.number for _, folder in runs] == [0, 1]
    changed = replace(other, run=replace(other.run, fold=FoldConfig(3)))
    with pytest.raises(UserError, match=r"keep: .* a study with run\.fold\.count 2, not 3"):
        restore_results(changed)


def test_a_keep_that_is_killed_between_its_files_loses_no_run(tmp_path: Path):
    path = keep_study(tmp_path, "s", {"skillnet": 0.5, "specialist": 0.0})
    files = [path.with_name(f"s.{suffix}") for suffix in ("parquet", "yaml")]
    before = [file.read_bytes() for file in files]
    again = write_run(tmp_path / "again/moe-seed0", "moe", pretrained=False)
    complete_result(again)
    names = set(KeptStudy(path).runs)
    with change_kept(path) as kept:
        kept.add_run("moe", again)
    assert set(KeptStudy(path).runs) == names | {again.name}
    # The Parquet file has a run more than the YAML file: the run counts as not kept.
    files[1].write_bytes(before[1])
    assert {folder.name for _, folder in read_study_ledger(path)[1]} == names
    with change_kept(path) as kept:
        kept.add_run("moe", again)
    assert set(KeptStudy(path).sums["run"].to_pylist()) == names | {again.name}
    assert len(read_run(open_study(path) / "runs" / again.name).outcomes) == len(TASKS)
    # The other way round the files are of two commits.
    files[0].write_bytes(before[0])
    with pytest.raises(UserError, match=r"s\.parquet: no sums of the run moe-seed0"):
        open_study(path)


BOMB = b"a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
)
DAMAGES = {
    "no YAML": (b"runs: [", "no kept study"),
    "no mapping": (b"7", "no kept study"),
    "an object": (b"!!python/object/apply:os.system [true]", "no kept study"),
    "a list of runs": (b"runs: [a]", "no kept study"),
    "a run without a result": (b"runs: {a: {}}", "no kept runs"),
    "a huge tree": (BOMB, "no kept study"),
    "a name that leads out": (b"runs: {../a: {result.json: {}}}", "no kept runs"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_kept_study_is_named(tmp_path: Path, content: bytes, message: str):
    path = keep_study(tmp_path, "s", {"skillnet": 0.5})
    path.with_name("s.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"s\.yaml: .*{message}"):
        open_study(path)


def test_damaged_sums_of_a_kept_study_are_named(tmp_path: Path):
    path = keep_study(tmp_path, "s", {"skillnet": 0.5})
    parquet = path.with_name("s.parquet")
    table = pq.read_table(parquet)
    for damaged in (table.slice(1), pa.concat_tables([table, table])):
        pq.write_table(damaged, parquet)
        with pytest.raises(UserError, match="rows are missing or duplicated"):
            compare(StudyConfig(runs=[str(path)], interpret=False))
    pq.write_table(table.drop_columns("unit"), parquet)
    with pytest.raises(UserError, match=r"s\.parquet: no sums of a study"):
        open_study(path)
    parquet.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"s\.parquet: no sums of a study"):
        open_study(path)


def test_a_lost_machine_costs_the_tuning_trials_that_it_was_training(tmp_path, monkeypatch):
    ran: list[str] = []

    def train(trials: Sequence[Trial], **options: Any) -> list[TrialOutcome]:
        """Train four trials of the tuning, and lose the machine."""
        outcomes: list[TrialOutcome] = []
        if "on_outcome" not in options:
            return outcomes
        for trial in trials:
            if len(ran) == 4:
                raise ConnectionError("the machine is gone")
            ran.append(trial.name)
            scores = {"text_classification": 0.1 * len(ran)}
            report = {"step": 7, "score": 0.1 * len(ran), "scores": scores}
            outcome = TrialOutcome(
                **{"name": trial.name, "group": str(trial.group), "folder": tmp_path / trial.name},
                **{"status": "finished", "settings": dict(trial.settings)},
                result={"step": 7, "seconds": 1.5, "commit": f"c{len(ran)}"},
                reports=[report],
            )
            options["on_outcome"](outcome)
            outcomes.append(outcome)
        return outcomes

    monkeypatch.setattr("sweeps.trials.engine.run_trials", train)
    rates = {"training.lr": SearchDimension(choice=[0.01, 0.02, 0.04])}
    tuning = TuningConfig(3, rates, seeds=[9, 10])
    corpora = write_corpora(tmp_path / "corpora", rows=60, test_rows=20)
    values: dict[str, Any] = {"tuning": tuning, "seeds": [0]}
    values["run"] = replace(small_config(corpora), fold=FoldConfig(2, validation_share=0.3))
    first = study(tmp_path / "first", tmp_path / "keep", **values)
    with pytest.raises(ConnectionError):
        run_study(first, cast("Tracker", None))
    assert len(ran) == 4

    other = study(tmp_path / "second", tmp_path / "keep", **values)
    assert restore_results(other) == set()
    kept, ran = ran, []
    tuned, _ = run_study(other, cast("Tracker", None))
    assert len({*kept, *ran}) == len(kept) + len(ran) == 6
    assert sorted(row["score"] for row in tuned["skillnet"].trials) == pytest.approx(
        [0.1, 0.1, 0.2, 0.2, 0.3, 0.4]
    )
    assert tuned["skillnet"].trials[0]["scores"] == {"text_classification": 0.1}
    # Each trial names the commit that trained it, also after a machine with another one.
    entries = KeptStudy(tmp_path / "keep/s").content[TUNING]
    assert sorted(entry["commit"] for entry in entries) == ["c1", "c1", "c2", "c2", "c3", "c4"]
    commits = {row["commit"] for row in tuned["skillnet"].trials}
    assert commits == {"c1", "c2", "c3", "c4"}
    changed = replace(other, tuning=replace(tuning, seeds=[9, 11]))
    with pytest.raises(UserError, match=r"keep: .* a study with tuning\.seeds"):
        restore_results(changed)

    trial = build_stage_trials(other, "space", start_tuning(other))[0]
    assert KeptTuning(other).find_outcome(trial) is not None
    assert KeptTuning(other).find_outcome(replace(trial, settings={"training.lr": 9.0})) is None
    for damage in ({"name": "x"}, "x", None):
        with change_kept(tmp_path / "keep/s") as kept:
            kept.content[TUNING] = [*entries, damage]
        with pytest.raises(UserError, match=r"s\.yaml: tuning, entry 7: not the record of a trial"):
            KeptTuning(other)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are tests of their own."""
    for name in ("draw_evidence", "draw_plots"):
        monkeypatch.setattr(f"skillnet_studies.report.report.{name}", lambda *_: {})


def test_a_report_of_a_kept_study_has_its_notices(tmp_path: Path, capsys, undrawn):
    folder = keep_study(tmp_path, "old", {"skillnet": 0.5, "specialist": 0.0})
    with change_kept(folder) as kept:
        kept.content[NOTICE] = "Rates <were> low.\n\nA baseline is broken.\n"
    runs = [read_run(path, label) for label, path in read_study_ledger(folder)[1]]
    made = build_report(compare_runs(label_runs(runs)), "old")
    assert report_to_dict(made)["notices"] == ["Rates <were> low.", "A baseline is broken."]
    page = render_report(made)
    assert page.index("A baseline is broken.") < page.index('id="results"')
    assert "Rates &lt;were&gt; low." in page
    assert "**Notice:** A baseline is broken." in report_to_markdown(made)
    show_report(made)
    assert "Notice: A baseline is broken." in capsys.readouterr().err
    # A report of folds says how often simulated ones have a false mark.
    assert "6 to 9 % of the reports of equal systems have a mark" in made.tables[0].caption
    # Another machine that resumes the study has its notices.
    config = replace(read_study_config(folder), keep=str(tmp_path / "results"))
    config = replace(config, run_dir=str(tmp_path / "second"))
    restore_results(config)
    assert (config.folder / NOTICE).read_text(encoding="utf-8").startswith("Rates")


def test_a_pretraining_reads_corpora_that_the_folds_divide(tmp_path: Path):
    run = small_config(write_corpora(tmp_path / "corpora", rows=60, test_rows=20))
    run = replace(run, fold=FoldConfig(2, validation_share=0.3))
    systems = {"skillnet": SystemConfig("skillnet", pretrain=True)}
    check_folds(study(tmp_path, None, run=run, systems=systems))
    run = replace(run, tasks={"text_to_image": run.tasks["text_to_image"]})
    with pytest.raises(UserError, match=r"functions, .* no corpus of run\.tasks"):
        check_folds(study(tmp_path, None, run=run, systems=systems))
    with pytest.raises(UserError, match=r"fold\.count: fold .* no rows"):
        check_folds(study(tmp_path, None, run=replace(run, fold=FoldConfig(100))))


def test_the_reserve_is_read_once_and_recorded(tmp_path: Path):
    write_corpora(tmp_path / "runs/corpora", rows=60, test_rows=20)
    fold = FoldConfig(2, validation_share=0.3, reserve_part=True)
    run = replace(small_config(tmp_path / "runs/corpora"), fold=fold)
    run = replace(run, tasks={"text_to_image": run.tasks["text_to_image"]})
    config = study(tmp_path, None, run=run, name="runs", read_reserve="once")
    runs = []
    for number, seed in ((0, 0), (1, shift_seed(0, 1))):
        folder = write_run(config.folder / f"skillnet-fold{number}", seed=seed)
        own = replace(run, seed=seed, fold=replace(fold, number=number), name=folder.name)
        (folder / CONFIG).write_text(configuration.to_yaml(own), encoding="utf-8")
        runs.append(("skillnet", folder))
    with pytest.raises(UserError, match="2 of 2 final runs have no model"):
        read_reserve(config, runs)
    assert not (config.folder / RESERVE_RECORD).exists()
    for _, folder in runs:
        shutil.rmtree(folder / "model")
        SkillNet(run.model).save_pretrained(folder / "model")
    found = read_reserve(config, runs)
    kept = open_fold(open_corpus(tmp_path / "runs/corpora/drawings"), fold, with_reserve=True)
    weights = {int(each.outcomes["text_to_image", "test"].denominator.sum()) for each in found}
    assert len(weights) == 1
    assert weights.pop() >= kept.splits["reserve"].rows
    # Replicates answer the same rows, so they count as runs of one test set.
    assert [each.seed for each in found] == [0, 10_000]
    assert compare_runs(label_runs(found)).seeds == 2
    (read,) = read_reserve_record(config)
    assert read["finished"]
    assert read["commit"]
    assert read["runs"] == ["skillnet-fold0", "skillnet-fold1"]
    with pytest.raises(UserError, match=r"the reserve was read on .* at commit"):
        read_reserve(config, runs)
    read_reserve(replace(config, read_reserve="again"), runs)
    assert [each["is_repeated"] for each in read_reserve_record(config)] == [False, True]
    with pytest.raises(UserError, match="has no reserve"):
        read_reserve(replace(config, run=small_config(tmp_path)), runs)


def test_a_study_beside_another_runs_some_folds_and_seals_no_reserve(tmp_path: Path):
    run = replace(small_config(tmp_path), fold=FoldConfig(4, reserve_part=True))
    config = study(tmp_path, None, run=run, folds=2, seal_reserve=False)
    trials = build_final_trials(config, {"skillnet": TuningResult("skillnet")})
    assert [trial.config.fold.number for trial in trials] == [0, 1, 0, 1]
    folder = write_run(config.folder / "runs" / trials[0].name)
    (folder / CONFIG).write_text(configuration.to_yaml(trials[0].config), encoding="utf-8")
    seal_reserve(config, [folder])
    assert not (folder / RESERVE_SUMS).exists()
    with pytest.raises(UserError, match=r"does not read its reserve \(seal_reserve: false\)"):
        replace(config, read_reserve="once")
    with pytest.raises(UserError, match=r"seeds: 20000 may be the seed of another fold"):
        replace(config, seeds=[20_000])
    with pytest.raises(UserError, match=r"folds: 5 folds are more than the 4 of run\.fold\.count"):
        replace(config, folds=5)


def test_a_machine_without_the_models_reads_the_sealed_reserve(tmp_path: Path):
    corpora = write_corpora(tmp_path / "corpora", rows=60, test_rows=20)
    run = replace(small_config(corpora), fold=FoldConfig(2, 0, 0.3, reserve_part=True))
    run = replace(run, tasks={"text_to_image": run.tasks["text_to_image"]})
    config = study(tmp_path / "first", tmp_path / "keep", run=run, seeds=[0])
    tuning = {"skillnet": TuningResult("skillnet", {"training.lr": 0.01})}
    outcomes = []
    for trial in build_final_trials(config, tuning):
        folder = write_run(config.folder / "runs" / trial.name, seed=trial.config.seed)
        (folder / CONFIG).write_text(configuration.to_yaml(trial.config), encoding="utf-8")
        complete_result(folder)
        shutil.rmtree(folder / "model")
        SkillNet(run.model).save_pretrained(folder / "model")
        outcomes.append(LedgerEntry(trial, folder).build_outcome("finished"))
    write_study_ledger(config, tuning, outcomes)
    folders = [outcome.folder for outcome in outcomes]
    seal_reserve(config, folders)
    sealed = [(folder / RESERVE_SUMS).stat() for folder in folders]
    seal_reserve(config, folders)
    assert [(folder / RESERVE_SUMS).stat() for folder in folders] == sealed, "evaluated once"
    keep_results(config, outcomes)
    assert not read_reserve_record(config), "evaluating is no reading"
    direct = read_reserve(replace(config, read_reserve="once"), list_final_runs(config))
    with change_kept(tmp_path / "keep/s") as kept:
        assert len(kept.content[RESERVE_RECORD].pop("reads")) == 1
    with pytest.raises(UserError, match=r"s\.yaml: reserve\.json: no reads"):
        read_reserve_record(config)
    with change_kept(tmp_path / "keep/s") as kept:
        del kept.content[RESERVE_RECORD]

    other = study(tmp_path / "second", tmp_path / "keep", run=run, seeds=[0], read_reserve="once")
    restore_results(other)
    assert not list(other.folder.rglob("*.safetensors"))
    found = read_reserve(other, list_final_runs(other))
    assert compare_runs(label_runs(found)).scores == compare_runs(label_runs(direct)).scores
    assert read_reserve_record(other)[0]["finished"]
    with pytest.raises(UserError, match="the reserve was read on"):
        read_reserve(other, list_final_runs(other))
    read_reserve(replace(other, read_reserve="again"), list_final_runs(other))
    (folder := other.folder / "runs" / outcomes[1].name).joinpath(RESERVE_SUMS).unlink()
    with pytest.raises(UserError, match=f"1 of 2 final runs have no model.*{folder.name}"):
        read_reserve(replace(other, read_reserve="again"), list_final_runs(other))


def compare_kept(folders: Sequence[Path], target: Path) -> list[SystemComparison]:
    """Keep runs; the comparisons of the runs themselves and of what was kept."""
    with change_kept(target) as kept:
        for folder in folders:
            group_rows(folder)
            complete_result(folder)
            kept.add_run("any", folder)
    return [
        compare_runs(label_runs([read_run(folder) for folder in place]))
        for place in (folders, [open_study(target) / "runs" / folder.name for folder in folders])
    ]


def group_rows(folder: Path) -> None:
    """Let four rows of each split be a unit."""
    table = pq.read_table(folder / OUTCOMES_FILE)
    unit = pa.array((table["row"].to_numpy() // 4).astype(np.int32))
    table = table.set_column(table.schema.get_field_index("unit"), "unit", unit)
    pq.write_table(table, folder / OUTCOMES_FILE)


def test_the_report_of_a_kept_study_has_its_claims_and_roles(
    tmp_path, run_root, monkeypatch, undrawn
):
    # Pages are tests of their own.
    monkeypatch.setattr("skillnet_studies.compare._write_and_record", lambda *_: None)
    roles = {"reference": "skillnet-long", "specialist": "specialist-long"}
    stated = {"skills": Claim("Skills help.", [Condition(*roles.values())])}
    skills = {"skillnet-long": 0.5, "specialist-long": 0.0}
    long = keep_study(tmp_path, "long", skills, stated=stated, **roles)
    report, _ = compare(StudyConfig(runs=[str(long)], interpret=False))
    assert isinstance(report, ComparisonReport)
    assert [claim.name for claim in report.claims] == ["skills"]
    assert (report.comparison.reference, report.comparison.specialist) == tuple(roles.values())
    # The call's own claims win, and runs of two studies have no common claims.
    stated, other = {"skills": CLAIM}, ClaimsConfig(stated={"other": CLAIM})
    kept = keep_study(tmp_path, "s", {"skillnet": 0.5, "specialist": 0.0}, stated=stated)
    report, _ = compare(StudyConfig(runs=[str(kept)], interpret=False, claims=other))
    assert [claim.name for claim in report.claims] == ["other"]
    report, _ = compare(StudyConfig(runs=[str(kept), str(long)], interpret=False))
    assert not report.claims
    assert report.comparison.reference == "skillnet"

"""``skillnet compare``: systems held against each other, by a study or from finished runs."""

import time
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform import config as configuration
from skillnet_platform import console, tracking
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, run_root, write_json
from skillnet_platform.storage.directories import is_uri
from sweeps.config.resources import request_study
from sweeps.config.study import StudyConfig

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker
    from sweeps.analysis.finished_runs import FinishedRun
    from sweeps.report.report import ComparisonReport
    from sweeps.study.study import TuningResult


def compare(config: StudyConfig) -> tuple["ComparisonReport", int]:
    """Run a study, or read finished runs; write, record and give the report.

    Returns:
        The report, and the number of final runs of the study that failed.

    Raises:
        UserError: runs that do not exist, are not finished or cannot be compared; a study that
            does not fit.
    """
    if config.runs:
        return _compare_runs(config), 0
    if not config.systems:
        raise UserError(
            "nothing to compare: name finished runs (skillnet compare RUN RUN …), or a study "
            "(--config studies/headline)"
        )
    if not config.name:
        raise UserError("a study needs a name, so that it can be gone on with: give --name")
    return _compare_study(config)


def _compare_study(config: StudyConfig) -> tuple["ComparisonReport", int]:
    from sweeps.analysis.finished_runs import read_run
    from sweeps.report.writer import REPORT_FILES
    from sweeps.study.study import START_FILES, check_study, run_study, warn_about_failures
    from sweeps.trials import remote_ledger
    from sweeps.trials.remote_ledger import RUN

    folder, mirror = config.folder, config.mirror
    if mirror is not None:
        remote_ledger.restore_ledger(mirror, START_FILES, ("tuning", "runs"))
    check_study(config)
    with tracking.start(
        str(config.name),
        config,
        config.tracking,
        tags={"run_dir": str(folder), "stage": "study"},
        run_id=tracking.recorded(folder / RUN),
    ) as tracker:
        write_json(folder / RUN, {"run_id": tracker.run_id, "uri": tracker.uri})
        study = run_study(config, tracker)
        warn_about_failures(study)
        runs = [
            read_run(outcome.folder, outcome.group)
            for outcome in study.outcomes
            if outcome.status == "finished"
        ]
        if not runs:
            raise UserError(f"no run of the study finished; see {folder / 'runs'}")
        place = Path(config.output) if config.output else folder
        report = _build_report(config, runs, study.tuning, place)
        report.facts["configuration"] = f"study.yaml, digest {configuration.digest(config)[:12]}"
        report.texts["Configuration of the study"] = configuration.to_yaml(config)
        if study.failed_runs:
            told = [f"{each.name}: {each.error or each.status}" for each in study.failed_runs]
            report.facts["without a result"] = "; ".join(told)
        _write_and_record(report, place, tracker)
        if mirror is not None:
            mirror.upload_files(*REPORT_FILES)
    return report, len(study.failed_runs)


def _compare_runs(config: StudyConfig) -> "ComparisonReport":
    from sweeps.analysis.finished_runs import find_run, label_runs, read_run
    from sweeps.study.study import read_study_ledger
    from sweeps.trials.remote_ledger import STUDY_LEDGER, fetch_finished_runs

    runs: list[FinishedRun] = []
    studies: list[tuple[Path, dict[str, TuningResult]]] = []
    for named in config.runs:
        given = str(fetch_finished_runs(named)) if is_uri(named) else named
        for path in (Path(given).expanduser(), run_root() / given):
            if (path / STUDY_LEDGER).is_file():
                told, members = read_study_ledger(path.absolute())
                studies.append((path.absolute(), told))
                runs += [read_run(folder, label) for label, folder in members]
                break
        else:
            runs.append(read_run(find_run(given, config.tracking.uri)))
    read = {run.folder: run.label for run in runs}
    runs = label_runs(runs, config.names)
    tuned = relabel_tuning(studies, [(run.folder, read[run.folder], run.label) for run in runs])
    name = config.name or time.strftime("compare-%Y%m%d-%H%M%S")
    folder = Path(config.output) if config.output else run_root() / "comparisons" / name
    with tracking.start(
        name,
        None,
        replace(config.tracking, system_metrics=False),
        tags={"run_dir": str(folder.absolute()), "stage": "compare"},
    ) as tracker:
        report = _build_report(replace(config, name=name), runs, tuned, folder)
        _write_and_record(report, folder, tracker)
    return report


def relabel_tuning(
    studies: Sequence[tuple[Path, Mapping[str, "TuningResult"]]],
    runs: Sequence[tuple[Path, str, str]],
) -> dict[str, "TuningResult"]:
    """What was told of tuning, by the labels of the report.

    Two studies may call different systems alike, and the report may call them otherwise.

    Args:
        studies: folder of each, and label there -> what that system got.
        runs: folder of each run, its label in its study, and its label in the report.
    """
    made: dict[str, TuningResult] = {}
    for folder, told in studies:
        new = {old: label for run, old, label in runs if old in told and folder in run.parents}
        for old, own in told.items():
            label, other = new.get(old, old), own.reuse_tuning_of
            entry = replace(own, label=label, reuse_tuning_of=other and new.get(other, other))
            if label in made and made[label] != entry:
                entry = replace(entry, label=f"{label} ({folder.name})")
            made[entry.label] = entry
    return made


def _build_report(
    config: StudyConfig,
    runs: Sequence["FinishedRun"],
    tuned: dict[str, "TuningResult"],
    folder: Path,
) -> "ComparisonReport":
    from sweeps.analysis import comparison
    from sweeps.report import report
    from sweeps.report.tuning_tables import build_tuning_tables

    of = comparison.compare_systems(runs, config.reference, config.specialist)
    made = report.build_report(of, str(config.name), config.claims)
    pretrained = [label for label, runs in of.systems.items() if runs[0].settings.get("init_from")]
    made.tables += build_tuning_tables(tuned, pretrained)
    if config.interpret:
        _add_skill_figures(made, config, folder)
    return made


def _add_skill_figures(report: "ComparisonReport", config: StudyConfig, folder: Path) -> None:
    """Pictures of what the skills of one run of the reference do, if it has skills.

    Its files lie with the report: in the run's folder ``skillnet interpret`` keeps its own.
    """
    from sweeps.analysis.finished_runs import PRETRAINED

    of = report.comparison
    labels = (of.reference + PRETRAINED, of.reference)
    # One is enough, and each look may ask a store.
    found = (
        (label, run, model)
        for label in labels
        for run in of.systems.get(label, ())
        if run.system == "skillnet" and (model := _find_model(run, config)) is not None
    )
    first = next(found, None)
    if first is None:
        return
    label, run, model = first
    from sweeps.interpret import INTERPRETATION, InterpretConfig, interpret_source
    from sweeps.interpretation.analysis import find_caption

    asked = InterpretConfig(
        model=model,
        output=str(folder / INTERPRETATION),
        data=run.settings.get("data"),
        # The test rows are for the comparison alone.
        split="validation",
        log=False,
        tracking_uri=config.tracking.uri,
    )
    try:
        made, files = interpret_source(asked)
    except UserError as problem:
        console.warn(f"no pictures of what the skills do: {problem}")
        return
    report.skills = made.figures()
    report.captions |= {name: find_caption(name) for name in report.skills}
    report.skills_note = (
        f"Of {label}, seed {run.seed}, on the validation rows. The numbers are in "
        f"{files[0].parent.name} beside this page."
    )


def _find_model(run: "FinishedRun", config: StudyConfig) -> str | None:
    """Where the model of a run lies, here or in the study's store; none if it is gone."""
    if (run.folder / "model" / "manifest.json").is_file():
        return str(run.folder)
    if config.mirror is None or config.runs:
        return None
    model = config.mirror.uri_of("runs", run.folder.name)
    return model if directories.is_committed(directories.join(model, "model")) else None


def _write_and_record(report: "ComparisonReport", folder: Path, tracker: "Tracker") -> None:
    from sweeps.report import writer as reporting

    reporting.write_report(report, folder)
    reporting.record_report(report, tracker)


def normalize_arguments(argv: Sequence[str]) -> list[str]:
    """``--runs A B`` as bare words: ``A B``. The names of systems likewise join with commas."""
    words: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word not in ("--runs", "--names"):
            words.append(word)
            continue
        following: list[str] = []
        while queue and not queue[0].startswith("--"):
            following.append(queue.pop(0))
        if word == "--names" and following:
            words += ["--names", ",".join(following)]
        else:
            words += following
    return words


def show_comparison(report: "ComparisonReport") -> None:
    """Print the claims and the main tables."""
    from sweeps.report import report as reporting

    reporting.show_report(report)
    assert report.folder is not None
    console.note(f"the page is {report.folder / 'report.html'}; its figures lie beside it as CSV")


def report_document(report: "ComparisonReport") -> dict[str, Any]:
    """Return the report as a JSON document."""
    from sweeps.report.report import report_to_dict

    return report_to_dict(report)


@command(
    StudyConfig,
    description="Compare systems with intervals over seeds and test rows, paired tests with "
    "one correction, and claims that hold, do not hold or are not decided: by running a "
    "study, which goes on where it ended, or from finished runs.",
    example="skillnet compare --config studies/headline\n"
    "skillnet compare --runs skillnet-0 skillnet-1 dense-0 dense-1 --open\n"
    "skillnet compare headline --json",
    show=lambda result: show_comparison(result[0]),
    to_json=lambda result: report_document(result[0]),
    exit_code=lambda result: int(bool(result[1])),
    rewrite_arguments=normalize_arguments,
    resources=request_study,
)
def main(config: StudyConfig) -> tuple["ComparisonReport", int]:
    """Run ``skillnet compare``."""
    report, failed = compare(config)
    if config.open and report.folder is not None:
        page = (report.folder / "report.html").absolute().as_uri()
        if not webbrowser.open(page):
            console.warn(f"no browser could be started; open {page} by hand")
    return report, failed


if __name__ == "__main__":
    raise SystemExit(main())

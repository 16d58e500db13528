"""``skillnet compare``: compare systems by running a study or from finished runs.

The entry point is :func:`compare`. A study trains its runs first (``skillnet_studies.study``). Both
cases then compute statistics (``skillnet_evidence``) and write a report
(``skillnet_studies.report``).
"""

import time
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.runs.layout import lock_run_folder
from skillnet_platform import config as configuration
from skillnet_platform import console, tracking
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.directories import is_uri
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.study import request_study

if TYPE_CHECKING:
    from skillnet_evidence.power import PowerPlan
    from skillnet_platform.tracking import Tracker
    from skillnet_studies.analysis.finished_runs import FinishedRun
    from skillnet_studies.report.report import ComparisonReport
    from skillnet_studies.study.tuning import TuningResult


def compare(config: StudyConfig) -> tuple["ComparisonReport | PowerPlan", int]:
    """Run a study or read finished runs, then write and record the report.

    Returns:
        The report, and the number of final runs of the study that failed. With ``power``, what
        the study could decide, and 0.

    Raises:
        UserError: a run does not exist, is not finished or cannot be compared, or the study is
            invalid.
    """
    if config.runs:
        return _compare_runs(config), 0
    if not config.systems:
        raise UserError(
            "nothing to compare: name finished runs (skillnet compare RUN RUN …), or a study "
            "(--config studies/headline)"
        )
    if not config.name:
        raise UserError("a study needs a name, by which it can be resumed; give --name")
    check_roles(config, list(config.systems))
    config.claims.check_names(config.systems, [*config.run.tasks])
    if config.power:
        return plan_study_power(config), 0
    with (
        terminate_as_interrupt(),
        lock_run_folder(config.folder, config.mirror.uri if config.mirror else None),
    ):
        if config.read_reserve != "never":
            return _compare_on_reserve(config), 0
        return _compare_study(config)


def check_roles(config: StudyConfig, labels: Sequence[str]) -> None:
    """Raise UserError for an unknown reference or specialist; warn if nothing will be tested.

    Args:
        config: names the roles.
        labels: labels of all systems.
    """
    from skillnet_evidence.comparison import choose_roles, find_variant

    reference, _ = choose_roles(labels, config.reference, config.specialist)
    if find_variant(reference, reference, labels) is None and len(set(labels)) > 1:
        console.print_warning(
            f"no system is named {reference}, so nothing is tested. Give --reference: "
            f"{', '.join(dict.fromkeys(labels))}"
        )


def _compare_study(config: StudyConfig) -> tuple["ComparisonReport", int]:
    from skillnet_studies.analysis.finished_runs import read_run
    from skillnet_studies.config.study import REFERENCES_FILE
    from skillnet_studies.report.references import build_references
    from skillnet_studies.report.report import REPORT_FILES
    from skillnet_studies.study.kept_results import find_kept_path, restore_results, write_document
    from skillnet_studies.study.study import START_FILES, check_study, run_study
    from sweeps.trials import remote_ledger
    from sweeps.trials.remote_ledger import RUN

    folder, mirror = config.folder, config.mirror
    if mirror is not None:
        # The ledger must be local before the check, which compares with earlier runs.
        remote_ledger.restore_ledger(mirror, START_FILES, ("tuning", "runs"))
    restore_results(config)
    check_study(config)
    with tracking.start_run(
        str(config.name),
        config,
        config.tracking,
        tags={"run_dir": str(folder), "stage": "study"},
        record=folder / RUN,
    ) as tracker:
        tuning, outcomes = run_study(config, tracker)
        failed = [each for each in outcomes if each.status != "finished"]
        for each in failed:
            console.print_warning(f"{each.name} {each.status}: {each.error or 'no result'}")
        runs = [read_run(each.folder, each.group) for each in outcomes if each not in failed]
        if not runs:
            raise UserError(f"no run of the study finished; see {folder / 'runs'}")
        output = Path(config.output) if config.output else folder
        report = _build_report(config, runs, tuning, output)
        report.facts["configuration"] = (
            f"study.yaml, digest {configuration.digest_config(config)[:12]}"
        )
        report.texts["Configuration of the study"] = configuration.to_yaml(config)
        if failed:
            errors = [f"{each.name}: {each.error or each.status}" for each in failed]
            report.facts["without a result"] = "; ".join(errors)
        _write_and_record(report, output, tracker)
        if config.keep and report.references:
            # Another machine may not have the corpora on which they were measured.
            references = build_references(report.references, report.comparison)
            write_document(find_kept_path(config), REFERENCES_FILE, references)
        if mirror is not None:
            mirror.upload(*REPORT_FILES)
    return report, len(failed)


def _compare_on_reserve(config: StudyConfig) -> "ComparisonReport":
    """Read the reserve of a finished study, and report the final runs on it."""
    from skillnet_studies.study.reserve import read_reserve
    from skillnet_studies.study.study import list_final_runs

    runs = read_reserve(config, list_final_runs(config))
    name, folder = f"{config.name}, reserve", config.folder / "reserve"
    with tracking.start_run(
        name,
        None,
        replace(config.tracking, system_metrics=False),
        tags={"run_dir": str(folder), "stage": "compare"},
    ) as tracker:
        report = _build_report(replace(config, name=name, interpret=False), runs, {}, folder)
        _write_and_record(report, folder, tracker)
    return report


def plan_study_power(config: StudyConfig) -> "PowerPlan":
    """Return what a study could decide, given the variances of an earlier one.

    Args:
        config: the planned study; ``power`` names the earlier one.

    Raises:
        UserError: a run does not exist or cannot be compared, or its variances are unknown.
    """
    from skillnet_evidence.power import PowerPlan, estimate_time, plan_power, simulate_claims
    from skillnet_studies.analysis.finished_runs import compare_runs, label_runs
    from skillnet_studies.study.system_runs import build_base_run

    runs, _ = _read_named_runs(config.power, config.tracking.uri)
    earlier = compare_runs(label_runs(runs))
    counts = dict.fromkeys(config.systems, len(config.seeds) * len(config.fold_numbers))
    fold = config.run.fold
    overlap = fold.test_to_train if fold.count else None
    tests = plan_power(earlier, config.claims, counts, overlap)
    steps = {label: build_base_run(config, label, 0).training.steps for label in counts}
    time_needed = estimate_time(earlier, counts, steps)
    named = ", ".join(config.power) if len(config.power) < 4 else f"{len(config.power)} runs"
    shares = simulate_claims(tests, config.claims)
    return PowerPlan(str(config.name), named, tests, shares, time_needed)


def _read_named_runs(
    names: Sequence[str], uri: str | None
) -> tuple[list["FinishedRun"], list[tuple[Path, dict[str, "TuningResult"]]]]:
    """Read finished runs and the runs of studies; return the studies with their tuning."""
    from skillnet_studies.analysis.finished_runs import find_run, read_run
    from skillnet_studies.config.study import STUDY_LEDGER
    from skillnet_studies.study.kept_results import fetch_finished_runs, open_study
    from skillnet_studies.study.study import read_study_ledger

    runs: list[FinishedRun] = []
    studies: list[tuple[Path, dict[str, TuningResult]]] = []
    for named in names:
        # Runs in an object store are read from a local copy.
        location = str(fetch_finished_runs(named)) if is_uri(named) else named
        for path in map(open_study, (Path(location).expanduser(), run_root() / location)):
            if (path / STUDY_LEDGER).is_file():
                results, members = read_study_ledger(path.absolute())
                studies.append((path.absolute(), results))
                runs += [read_run(folder, label) for label, folder in members]
                break
        else:
            runs.append(read_run(find_run(location, uri)))
    return runs, studies


def _compare_runs(config: StudyConfig) -> "ComparisonReport":
    from skillnet_studies.analysis.finished_runs import label_runs
    from skillnet_studies.study.kept_results import adopt_study_settings

    runs, studies = _read_named_runs(config.runs, config.tracking.uri)
    config = adopt_study_settings(config, [folder for folder, _ in studies])
    # label_runs may rename systems; tuning results must follow their runs.
    old_labels = {run.folder: run.label for run in runs}
    runs = label_runs(runs, config.names)
    check_roles(config, [run.label for run in runs])
    tuning = relabel_tuning(
        studies, [(run.folder, old_labels[run.folder], run.label) for run in runs]
    )
    name = config.name or time.strftime("compare-%Y%m%d-%H%M%S")
    folder = Path(config.output) if config.output else run_root() / "comparisons" / name
    with tracking.start_run(
        name,
        None,
        replace(config.tracking, system_metrics=False),
        tags={"run_dir": str(folder.absolute()), "stage": "compare"},
    ) as tracker:
        report = _build_report(replace(config, name=name), runs, tuning, folder)
        _write_and_record(report, folder, tracker)
    return report


def relabel_tuning(
    studies: Sequence[tuple[Path, Mapping[str, "TuningResult"]]],
    runs: Sequence[tuple[Path, str, str]],
) -> dict[str, "TuningResult"]:
    """Return the tuning results of several studies under the labels of the report.

    Labels can change because two studies may use one label for different systems.

    Args:
        studies: directory of each study, and its label -> tuning result.
        runs: directory of each run, its label in its study, and its label in the report.
    """
    relabelled: dict[str, TuningResult] = {}
    for folder, results in studies:
        new = {old: label for run, old, label in runs if old in results and folder in run.parents}
        for old, own in results.items():
            label, other = new.get(old, old), own.reuse_tuning_of
            entry = replace(own, label=label, reuse_tuning_of=other and new.get(other, other))
            # Two studies tuned one system differently: both results stay, under different labels.
            if label in relabelled and relabelled[label] != entry:
                entry = replace(entry, label=f"{label} ({folder.name})")
            relabelled[entry.label] = entry
    return relabelled


def _build_report(
    config: StudyConfig,
    runs: Sequence["FinishedRun"],
    tuning: dict[str, "TuningResult"],
    folder: Path,
) -> "ComparisonReport":
    from skillnet_studies.analysis.finished_runs import compare_runs, list_finished
    from skillnet_studies.report.report import build_report
    from skillnet_studies.report.run_tables import build_tuning_tables
    from skillnet_studies.study.reserve import drop_tests

    comparison = compare_runs(runs, config.reference, config.specialist)
    if config.read_reserve != "never":
        comparison = drop_tests(comparison)
    report = build_report(comparison, str(config.name), config.claims)
    pretrained = [
        label
        for label, members in list_finished(comparison).items()
        if members[0].settings.get("init_from")
    ]
    report.tables += build_tuning_tables(tuning, pretrained)
    if config.interpret:
        _add_skill_figures(report, config, folder)
    return report


def _add_skill_figures(report: "ComparisonReport", config: StudyConfig, folder: Path) -> None:
    """Add figures about the skills of one run of the reference, if it has skills.

    The files are written beside the report. ``skillnet interpret`` writes into the run directory.
    """
    from skillnet_evidence.comparison import PRETRAINED
    from skillnet_studies.analysis.finished_runs import list_finished

    comparison = report.comparison
    labels = (comparison.reference + PRETRAINED, comparison.reference)
    # A generator: each lookup of a model may query the object store, and one model is enough.
    candidates = (
        (label, run, model)
        for label in labels
        for run in list_finished(comparison).get(label, ())
        if run.system == "skillnet" and (model := _find_model(run, config)) is not None
    )
    first = next(candidates, None)
    if first is None:
        return
    label, run, model = first
    from skillnet_studies.interpret import INTERPRETATION, InterpretConfig, interpret_source
    from skillnet_studies.interpretation.analysis import find_caption

    interpret_config = InterpretConfig(
        model=model,
        output=str(folder / INTERPRETATION),
        data=run.settings.get("data"),
        # The test rows are reserved for the comparison.
        split="validation",
        log=False,
        tracking_uri=config.tracking.uri,
    )
    try:
        interpretation, files = interpret_source(interpret_config)
    except UserError as error:
        console.print_warning(f"the report has no figures about the skills: {error}")
        return
    report.skills = interpretation.figures()
    report.captions |= {name: find_caption(name) for name in report.skills}
    report.skills_note = (
        f"System {label}, seed {run.seed}, validation rows. The numbers are in the directory "
        f"{files[0].parent.name} beside this page."
    )


def _find_model(run: "FinishedRun", config: StudyConfig) -> str | None:
    """Return the path or URI of a run's model, here or in the study's store; None if missing."""
    if (run.folder / "model" / "manifest.json").is_file():
        return str(run.folder)
    # With ``runs`` the mirror belongs to no study.
    if config.mirror is None or config.runs:
        return None
    model = config.mirror.uri_of("runs", run.folder.name)
    return model if directories.is_committed(directories.join_uri(model, "model")) else None


def _write_and_record(report: "ComparisonReport", folder: Path, tracker: "Tracker") -> None:
    from skillnet_studies.report.report import record_report, write_report

    write_report(report, folder)
    record_report(report, tracker)


def normalize_arguments(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--runs A B`` as positional arguments, and join the values of ``--names``.

    Args:
        argv: arguments of the command line.

    Returns:
        ``["A", "B"]`` for ``--runs A B``; ``["--names", "X,Y"]`` for ``--names X Y``.
    """
    arguments: list[str] = []
    queue = list(argv)
    while queue:
        option = queue.pop(0)
        if option not in ("--runs", "--names"):
            arguments.append(option)
            continue
        values: list[str] = []
        # All values up to the next option belong to this option.
        while queue and not queue[0].startswith("--"):
            values.append(queue.pop(0))
        if option == "--names" and values:
            arguments += ["--names", ",".join(values)]
        else:
            arguments += values
    return arguments


def show_comparison(report: "ComparisonReport | PowerPlan") -> None:
    """Print the claims and the main tables, or the power of a planned study."""
    from skillnet_evidence.power import PowerPlan, build_power_table
    from skillnet_platform.tables import show_table
    from skillnet_studies.report.report import show_report

    if isinstance(report, PowerPlan):
        title = f"{report.study}: what it could decide, with the variances of {report.earlier}"
        show_table(build_power_table(title, report.tests, report.shares))
        console.print_note(report.time.describe())
        return

    show_report(report)
    assert report.folder is not None
    console.print_note(f"report: {report.folder / 'report.html'}; tables: CSV files beside it")


def report_document(report: "ComparisonReport | PowerPlan") -> dict[str, Any]:
    """Return the report, or the power of a planned study, as a JSON document."""
    from skillnet_evidence.power import PowerPlan
    from skillnet_studies.report.report import report_to_dict

    if isinstance(report, PowerPlan):
        return asdict(report)

    return report_to_dict(report)


@command(
    StudyConfig,
    description="Compare systems with intervals over seeds and held-out units, corrected paired "
    "tests, and claims with a verdict. Runs a study (an unfinished one is resumed) or reads "
    "finished runs.",
    example="skillnet compare --config studies/headline\n"
    "skillnet compare --runs skillnet-0 skillnet-1 dense-0 dense-1 --open\n"
    "skillnet compare headline --json",
    show=lambda result: show_comparison(result[0]),
    to_json=lambda result: report_document(result[0]),
    exit_code=lambda result: int(bool(result[1])),
    rewrite_arguments=normalize_arguments,
    resources=request_study,
    essential=(
        "runs",
        "name",
        "run_dir",
        "seeds",
        "reference",
        "power",
        "tuning.trials",
        "interpret",
        "output",
        "open",
        "resources.cpus",
        "resources.gpus",
        "resources.max_concurrent_trials",
        "run.data",
        "keep",
        "read_reserve",
        "run.training.steps",
        "run.training.workers",
        "run.training.use_gpu",
        "tracking.uri",
    ),
)
def main(config: StudyConfig) -> tuple["ComparisonReport | PowerPlan", int]:
    """Run ``skillnet compare``."""
    from skillnet_evidence.power import PowerPlan

    report, failed = compare(config)
    if config.open and not isinstance(report, PowerPlan) and report.folder is not None:
        page = (report.folder / "report.html").absolute().as_uri()
        if not webbrowser.open(page):
            console.print_warning(f"no browser could be started; open {page} in a browser")
    return report, failed


if __name__ == "__main__":
    raise SystemExit(main())

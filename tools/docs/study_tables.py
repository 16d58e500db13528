"""Tables of kept studies for docs/results: ``python -m tools.docs.study_tables``.

The final study, that of many tasks and that of a stream have a page each, and the studies beside
the final one share another. Each block belongs to one question and one or two studies below
``lab/results``. The report is computed again from the sums of units, and its answer and some of its
tables are written between the marks of its page. A block whose studies are not complete says so:
the preregistrations allow no look at a part of a study.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skillnet_evidence.cells import ReportTable
from skillnet_evidence.comparison import MEAN, find_common_replicates
from skillnet_evidence.tables import ReferenceScores
from skillnet_platform.storage import read_json
from skillnet_studies.analysis.finished_runs import FinishedRun, compare_runs, label_runs
from skillnet_studies.config.study import STUDY_FILE, STUDY_LEDGER
from skillnet_studies.report.report import ComparisonReport, build_report, list_notices
from skillnet_studies.study.kept_results import RESERVE_RECORD, open_study, read_study_config
from skillnet_studies.study.reserve import collect_reserve_runs, drop_tests
from skillnet_studies.study.study import build_final_trials, read_study_ledger
from tools.docs.page_marks import put
from tools.docs.study_rates import build_change_table, read_once

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "lab" / "results"
PAGES = ROOT / "docs" / "results"
FINAL_PAGE, BESIDE_PAGE, SCALE_PAGE, STREAM_PAGE = (
    PAGES / f"{name}.md" for name in ("final", "beside", "scale", "stream")
)

#: Facts that are the same on each day. The pages state machine and precision once.
FACTS = ("runs evaluated",)
NOT_COMPLETE = "*Not complete yet.*"
CLAIMS, SCORES, DIFFERENCES = "Claims", "Results on held-out rows", "Differences from the reference"


@dataclass(frozen=True)
class StudyBlock:
    """One block of a page.

    Args:
        studies: kept studies. Runs of several are compared on the folds and seeds that they share.
        tables: titles of the tables.
        systems: labels of the systems; all by default.
        tasks: names in the column of tasks of the rows that are shown; all by default.
        is_reserve: whether the block shows the reserve of the study.
        page: that has the block.
    """

    studies: tuple[str, ...]
    tables: tuple[str, ...]
    systems: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    is_reserve: bool = False
    page: Path = BESIDE_PAGE


#: Columns that repeat another one or the preregistration. The report has them.
OMITTED = ("asked", "relative to specialists", "training", "pretraining", "rows per second")
#: Marks of the table of differences at the rates of both studies.
RATE_CHANGES = "rate-changes"

SCALE = "Score and cost against the number of tasks"
GAINS, MORE_STEPS = "Gain from pretraining", "Differences after more steps"
#: Rows of the second one: what more steps change most, and the mean.
CHANGED = ("text to video", MEAN)

#: Name of the marks -> block, in the order of the pages.
BLOCKS = {
    "final": StudyBlock(("final",), (CLAIMS, SCORES, DIFFERENCES, GAINS, "Cost"), page=FINAL_PAGE),
    "reserve": StudyBlock(("final",), (SCORES,), is_reserve=True, page=FINAL_PAGE),
    "rates": StudyBlock(("rates",), (DIFFERENCES, GAINS)),
    "labels": StudyBlock(("labels",), (GAINS,)),
    "longer": StudyBlock(
        ("rates", "longer"),
        (MORE_STEPS,),
        ("skillnet", "specialist", "skillnet-long", "specialist-long"),
        CHANGED,
    ),
    "longer-pretrained": StudyBlock(
        ("rates", "longer", "longer-pretrained"),
        (MORE_STEPS,),
        ("skillnet", "skillnet-pretrained", "skillnet-long", "skillnet-long-pretrained"),
        CHANGED,
    ),
    "equal-steps": StudyBlock(
        ("equal-steps", "rates"),
        (DIFFERENCES,),
        ("skillnet-equal", "skillnet", "skillnet-pretrained"),
    ),
    "dense": StudyBlock(
        ("rates", "dense"),
        (DIFFERENCES,),
        ("skillnet", "dense-deep", "dense-modality"),
    ),
    "scale": StudyBlock(("scale",), (CLAIMS, SCALE), page=SCALE_PAGE),
    "stream": StudyBlock(("stream",), (CLAIMS,), page=STREAM_PAGE),
    "budget": StudyBlock(("budget",), ("Budget until dense's final score",)),
}


def is_complete(folder: Path) -> bool:
    """Return whether a kept study has all of its final runs.

    Args:
        folder: the kept study.
    """
    folder = open_study(folder)
    # A study that is still being tuned has no ledger of final runs.
    if not all((folder / name).is_file() for name in (STUDY_FILE, STUDY_LEDGER)):
        return False
    config = read_study_config(folder)
    tuning, runs = read_study_ledger(folder)
    wanted = {trial.name for trial in build_final_trials(config, tuning)}
    return wanted <= {path.name for _, path in runs if path.is_dir()}


def build_block_report(block: StudyBlock, results: Path = RESULTS) -> ComparisonReport | None:
    """Return the report of a block; None if a study is not complete or its reserve is closed.

    Args:
        block: tables and studies of a page.
        results: directory of the kept studies.
    """
    folders = [open_study(results / name) for name in block.studies]
    if not all(is_complete(folder) for folder in folders):
        return None
    if block.is_reserve:
        if not is_reserve_open(folders[0]):
            return None
        runs = collect_reserve_runs(read_study_ledger(folders[0])[1])
    else:
        runs = [run for folder in folders for run in read_once(folder)]
    if block.systems:
        runs = select_runs(runs, block.systems)
    config = read_study_config(folders[0])
    has_claims = CLAIMS in block.tables
    comparison = compare_runs(label_runs(runs), config.reference)
    if block.is_reserve:
        comparison = drop_tests(comparison)
    # The kept references are of all folds of one study.
    references: ReferenceScores | None = None if len(folders) == 1 else {}
    rules = config.claims if has_claims else None
    return build_report(comparison, str(config.name), rules, references=references)


def is_reserve_open(folder: Path) -> bool:
    """Return whether the reserve of a kept study was read completely."""
    path = open_study(folder) / RESERVE_RECORD
    return path.is_file() and any(read["finished"] for read in read_json(path)["reads"])


def select_runs(runs: Sequence[FinishedRun], systems: Sequence[str]) -> list[FinishedRun]:
    """Return the runs of some systems on the folds and seeds that all of them have.

    Args:
        runs: finished runs of several studies.
        systems: labels.
    """
    common = find_common_replicates(runs, systems)
    return [run for run in runs if run.label in systems and run.replicate in common]


def render_block(block: StudyBlock, results: Path = RESULTS) -> str:
    """Return the text between the marks of a block.

    Args:
        block: tables and studies of a page.
        results: directory of the kept studies.
    """
    report = build_block_report(block, results)
    if report is None:
        return NOT_COMPLETE
    # The table of claims states the answer. A block of several studies has some of their systems.
    has_notices = len(block.studies) == 1 and not block.is_reserve
    parts = list_notices(report) if has_notices else []
    facts = " · ".join(f"{name} {report.facts[name]}" for name in FACTS)
    parts.append(f"{report.lead}. {facts}.")
    known = {table.title: table for table in report.tables}
    shown = [known[title] for title in block.tables if title in known]
    return "\n\n".join(parts + [shorten_table(table, block.tasks).to_markdown() for table in shown])


def shorten_table(table: ReportTable, tasks: Sequence[str] = ()) -> ReportTable:
    """Return a table without its caption and without columns that say the same in each row.

    The page states once what the captions of its tables state.

    Args:
        table: what the report shows.
        tasks: names in the column of tasks of the rows that are kept; all by default.
    """
    place = table.columns.index("task") if tasks else 0
    rows = [row for row in table.rows if not tasks or row[place].text in tasks]
    kept = [
        n
        for n, name in enumerate(table.columns)
        if name not in OMITTED
        and (name == "verdict" or len(rows) < 2 or len({row[n].text for row in rows} - {"–"}) > 1)
    ]
    cells = [[row[n] for n in kept] for row in rows]
    return replace(table, columns=[table.columns[n] for n in kept], rows=cells, caption="")


def main(argv: list[str] | None = None) -> int:
    """Write the blocks of the pages."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.study_tables", description=__doc__)
    names = [*BLOCKS, RATE_CHANGES]
    parser.add_argument("--block", choices=names, help="all by default")
    options = parser.parse_args(argv)
    if options.block in (None, RATE_CHANGES):
        changes = build_change_table(RESULTS / "final", RESULTS / "rates")
        put(BESIDE_PAGE, RATE_CHANGES, changes.to_markdown())
    for name, block in BLOCKS.items():
        if options.block in (None, name):
            put(block.page, name, render_block(block))
    return 0


if __name__ == "__main__":
    sys.exit(main())

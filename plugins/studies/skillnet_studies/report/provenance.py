"""Facts of a report: when, where, with which software and which commit it was made.

:func:`collect_facts` is called by ``skillnet_studies.report.report``.
"""

import platform
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from skillnet_platform.package_version import find_version
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_studies.analysis.comparison import SPLIT, SystemComparison
from skillnet_studies.analysis.equal_versions import read_equal_versions
from sweeps.trials.remote_ledger import NOTICE

#: Packages whose versions are listed.
PACKAGES = ("skillnet-platform", "torch", "ray", "mlflow", "transformers", "timm", "numpy", "scipy")
#: Facts that the page and the terminal show beside the answer.
MAIN_FACTS = ("runs at commit", "report at commit", "runs evaluated", "machine")


def describe_command() -> str:
    """Return the command line of this process without the secrets of URIs in it."""
    return shlex.join([Path(sys.argv[0]).name, *map(SecretUri, sys.argv[1:])])


def collect_facts(comparison: SystemComparison) -> dict[str, str]:
    """Return name -> value of the provenance of the runs and the report."""
    corpora: dict[str, str] = {}
    for run in comparison.runs:
        corpora |= run.digests
    equal: dict[str, list[str]] = {}
    for study in dict.fromkeys(run.folder.parent.parent for run in comparison.runs):
        for second, first in read_equal_versions(study).items():
            equal.setdefault(first, []).append(second)
    rows = [row for run in comparison.runs for row in run.rows]
    dates = sorted({str(row["date"]) for row in rows})
    # Not every installation has all optional packages.
    versions = [f"{name} {found}" for name in PACKAGES if (found := find_version(name))]
    return {
        "command": describe_command(),
        "report created": time.strftime("%Y-%m-%d %H:%M %Z"),
        "runs at commit": ", ".join(
            dict.fromkeys(str(run.trained.get("commit", "unknown")) for run in comparison.runs)
        ),
        "report at commit": find_source_commit(),
        "runs evaluated": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seeds": "; ".join(
            f"{label}: {', '.join(str(run.seed) for run in runs)}"
            for label, runs in comparison.systems.items()
        ),
        "test rows, queries or symbols": _count_test_rows(comparison),
        "corpora (digests)": ", ".join(
            " = ".join([f"{name} {digest}", *equal.get(digest, ())])
            for name, digest in corpora.items()
        ),
        "machine": "; ".join(dict.fromkeys(str(row["machine"]) for row in rows)),
        "runs by precision": _count_precisions(comparison),
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "MLflow runs": ", ".join(run.run_id for run in comparison.runs if run.run_id) or "–",
    }


def read_notices(comparison: SystemComparison) -> list[str]:
    """Return the lines of ``notice.txt`` of the studies of all runs: limits that were found later.

    Args:
        comparison: computed results.
    """
    studies = dict.fromkeys(run.folder.parent.parent for run in comparison.runs)
    paths = [study / NOTICE for study in studies if (study / NOTICE).is_file()]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.strip() for line in dict.fromkeys(lines) if line.strip()]


def _count_test_rows(comparison: SystemComparison) -> str:
    """Return "text classification 900, ...": the test rows of all folds, each counted once.

    A row of speech counts with its symbols, and one of retrieval with its queries.
    """
    counts: dict[str, dict[int, int]] = {task: {} for task in comparison.tasks}
    for run in comparison.runs:
        for task, folds in counts.items():
            if (task, SPLIT) in run.outcomes:
                folds[run.fold.number] = round(run.outcomes[task, SPLIT].denominator.sum())
    return ", ".join(
        f"{task.replace('_', ' ')} {sum(folds.values()):,}"
        for task, folds in counts.items()
        if folds
    )


def _count_precisions(comparison: SystemComparison) -> str:
    """Return "bf16 6, fp32 3": ``precision: auto`` takes what the machine of a run supports."""
    counts = Counter(str(run.trained.get("precision", "unknown")) for run in comparison.runs)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

"""Measure the simple references of a kept study: ``python -m tools.docs.study_references STUDY``.

A kept study does not know where the corpora of this machine are, so its report cannot measure them.
``--data`` names the prepared corpora, in the versions of the study. The scores are written to the
entry ``references.json`` of the study, which its reports read.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from skillnet_platform.storage import data_root
from skillnet_studies.analysis.finished_runs import compare_runs
from skillnet_studies.config.study import REFERENCES_FILE
from skillnet_studies.report.references import build_references, measure_references
from skillnet_studies.study.kept_results import read_study_config, write_document
from tools.docs.study_rates import read_kept_runs


def main(argv: list[str] | None = None) -> int:
    """Measure the references on each fold of the study, and write their means."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.study_references")
    parser.add_argument("study", type=Path, help="path of the kept study")
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    options = parser.parse_args(argv)
    # Absolute, because the settings of a run name an absolute path.
    data = {"data": str((options.data or data_root()).absolute())}
    runs = read_kept_runs(options.study)
    runs = [replace(run, settings={**run.settings, **data}) for run in runs]
    comparison = compare_runs(runs, read_study_config(options.study).reference)
    scores = measure_references(comparison)
    if not scores:
        parser.error(f"{data['data']} lacks corpora of the study, or has other versions of them")
    write_document(options.study, REFERENCES_FILE, build_references(scores, comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())

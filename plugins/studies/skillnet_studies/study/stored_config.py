"""The configuration that a study stored, and its finished runs in a store: for a report of them.

:func:`adopt_study_settings` is called by ``skillnet compare KEPT-STUDY``, and
:func:`fetch_finished_runs` for a URI.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipelines.training.runs.mirror import RESULT, START, RunMirror
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_json, run_root
from skillnet_studies.analysis.finished_runs import add_defaults
from skillnet_studies.config.study import STUDY_FILE, STUDY_LEDGER, StudyConfig


def read_study_config(folder: Path) -> StudyConfig:
    """Return the configuration of a stored study; a key that it lacks has its default.

    Args:
        folder: directory of a study, or path of its kept results.

    Raises:
        UserError: the file is missing or damaged.
    """
    from skillnet_studies.study.kept_results import open_study

    path = open_study(folder) / STUDY_FILE
    tree = add_defaults(StudyConfig, configuration.load_yaml(path))
    try:
        return configuration.build_config(StudyConfig, tree)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def adopt_study_settings(config: StudyConfig, studies: Sequence[Path]) -> StudyConfig:
    """Return the configuration of a report with the claims and roles of its study.

    Claims belong to a study, so its report has them again. Claims and roles of the call win. Runs
    of several studies, or of none, have no common claims.

    Args:
        config: the call.
        studies: directories of the studies that it names.
    """
    if len(config.runs) != 1 or len(studies) != 1 or not (studies[0] / STUDY_FILE).is_file():
        return config
    stored = read_study_config(studies[0])
    return replace(
        config,
        claims=config.claims if config.claims.stated else stored.claims,
        reference=config.reference or stored.reference,
        specialist=config.specialist or stored.specialist,
    )


def fetch_finished_runs(uri: str) -> Path:
    """Download a finished run, or all finished runs of a study, without models.

    Args:
        uri: URI of the directory of a run or study.

    Returns:
        Local directory of the copy.

    Raises:
        UserError: there is no finished run, or the store rejects the request.
        StoreUnavailableError: the store does not respond.
    """
    cache = run_root() / "cache" / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    ledger = RunMirror(uri, cache / uri.rstrip("/").rpartition("/")[2])
    if not ledger.has(STUDY_LEDGER):
        _fetch_run(ledger)
        return ledger.local
    ledger.download(STUDY_FILE, STUDY_LEDGER)
    for entry in read_json(ledger.local / STUDY_LEDGER)["runs"]:
        # The name comes from the store: it must not lead out of the directory.
        names = PurePosixPath(str(entry["folder"])).parts
        if entry["status"] == "finished" and ".." not in names and "/" not in names:
            _fetch_run(RunMirror(ledger.uri_of(*names), ledger.local.joinpath(*names)))
    return ledger.local


def _fetch_run(run: RunMirror) -> None:
    if not run.has(RESULT):
        raise UserError(f"{run.uri} holds no finished run ({RESULT}) and no study ({STUDY_LEDGER})")
    run.download(*START)
    run.download_results()

"""The configuration that a study stored: for a report of its finished runs.

:func:`adopt_study_settings` is called by ``skillnet compare KEPT-STUDY``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig
from sweeps.trials.remote_ledger import STUDY_FILE


def read_study_config(folder: Path) -> StudyConfig:
    """Return the configuration of a stored study; a key that it lacks has its default.

    Args:
        folder: directory of a study, or path of its kept results.

    Raises:
        UserError: the file is missing or damaged.
    """
    from skillnet_studies.study.kept_results import open_study

    path = open_study(folder) / STUDY_FILE
    tree = configuration.add_defaults(StudyConfig, configuration.load_yaml(path))
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

"""Versions of a corpus that are equal up to rounding errors.

Two processors can round a feature differently, and then prepare one corpus with two digests.
``python -m lab.equal_versions`` compares such versions value by value, and records the
result in the directory of a study. Runs of that study count as runs of one version. Without a
record, ``skillnet compare`` rejects runs of different versions.
"""

from pathlib import Path
from typing import Any

from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record

#: Record, in the directory of a study and of its kept results.
EQUAL_VERSIONS = "equal_versions.json"
REMEDY = "write it again with python -m lab.equal_versions"


def list_equal_versions(study: Path) -> list[dict[str, Any]]:
    """Return the entries of a study's record, one per pair of versions; [] without a record.

    Args:
        study: directory of the study.

    Raises:
        UserError: the record is damaged.
    """
    path = study / EQUAL_VERSIONS
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = read_record(path, {"pairs": list}, REMEDY)["pairs"]
    for entry in entries:
        versions = entry.get("versions") if isinstance(entry, dict) else None
        if not isinstance(versions, list) or len(versions) != 2:
            raise UserError(f"{path} is damaged: a pair has not two versions; {REMEDY}")
    return entries


def read_equal_versions(study: Path) -> dict[str, str]:
    """Return the digest of a second version -> that of the first, of each recorded pair.

    Args:
        study: directory of the study.

    Raises:
        UserError: the record is damaged.
    """
    pairs = (entry["versions"] for entry in list_equal_versions(study))
    return {second: first for first, second in pairs}

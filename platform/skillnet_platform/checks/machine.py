"""Checks of one machine: versions, distributions, disk and tracker."""

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from skillnet_platform import storage
from skillnet_platform.checks import FREE_DISK_BYTES, Finding, Level
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    estimate_checkpoint_bytes,
    runs_directory,
)
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import PACKAGES, find_version
from skillnet_platform.tracking import backend

DISTRIBUTION = "skillnet-platform"
OWN_PACKAGES = ("pipelines", "sweeps", "skillnet")
SCRIPT = "skillnet"

#: Directory that holds ``skillnet_platform``: the site directory, or ``platform`` of a checkout.
OWN_PARENT = Path(__file__).resolve().parents[2]


def check_machine(request: ResourceRequest | None = None) -> list[Finding]:
    """Run all checks of this machine.

    Args:
        request: resources of the run that the checks are for.
    """
    return [
        *check_packages(),
        *check_distributions(),
        *check_disk(request),
        *check_tracker(request),
    ]


def check_packages() -> list[Finding]:
    """Check the versions of Python and of the main packages."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if good else "use Python 3.11, 3.12 or 3.13"
    found = [Finding("python", "ok" if good else "error", platform.python_version(), advice)]
    for name in PACKAGES:
        version = find_version(name)
        if version:
            found.append(Finding(name, "ok", version))
        else:
            found.append(Finding(name, "error", "not installed", "pip install -e '.[train]'"))
    return found


def check_disk(request: ResourceRequest | None = None) -> list[Finding]:
    """Check free space and write permission in the directory of runs."""
    request = request or ResourceRequest()
    root = runs_directory(request.run_dir)
    advice = (
        "give another --run_dir"
        if request.run_dir
        else f"set {storage.HOME_VARIABLE} to a directory that you may write to"
    )
    try:
        if not request.run_dir:
            root.mkdir(parents=True, exist_ok=True)
        while not root.exists():
            root = root.absolute().parent  # a check must not create the directory of runs
        # A real write: permissions do not show a read-only mount or a full disk.
        with storage.atomic_write(root / ".doctor") as stream:
            stream.write(b"x")
        (root / ".doctor").unlink()
    except (OSError, UserError) as error:
        return [Finding("disk", "error", f"{root}: {error}", advice)]
    free, needed = storage.free_bytes(root), estimate_checkpoint_bytes(request)
    seen = f"{storage.human_bytes(free)} free in {root}"
    larger = (
        "free space, keep fewer checkpoints (--training.keep_checkpoints 1), or use a larger disk: "
        + ("another --run_dir" if request.run_dir else storage.HOME_VARIABLE)
    )
    if needed > free:
        seen += f"; the run's checkpoints take {storage.human_bytes(needed)}"
        return [Finding("disk", "error", seen, larger)]
    if free < FREE_DISK_BYTES and not needed:
        return [Finding("disk", "warning", seen, larger)]
    return [Finding("disk", "ok", seen)]


def check_tracker(request: ResourceRequest | None = None) -> list[Finding]:
    """Check that the tracker answers and accepts the credentials.

    Missing credentials are only a warning for a command that does not use the tracker.
    """
    try:
        uri = backend.resolve_uri()
        if not uri.startswith("http"):
            return [Finding("tracker", "ok", uri)]
        backend.require_answer(uri)
    except UserError as error:
        return [Finding("tracker", "error", str(error), f"correct {backend.URI_VARIABLE}")]
    try:
        backend.require_access(uri)
    except UserError as error:
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        level: Level = "error" if request is None or request.uses_tracker else "warning"
        return [Finding("tracker", level, str(error), advice)]
    return [Finding("tracker", "ok", uri)]


def check_distributions() -> list[Finding]:
    """Check that our packages and script belong to this distribution.

    Another package on PyPI, ``skillnet-ai``, also installs a script named ``skillnet``.
    """
    installed = {name: each for each in distributions() if (name := _normalized(each))}
    others = {name: each for name, each in installed.items() if name != DISTRIBUTION}
    findings = [*_check_packages(), *_check_scripts(others)]
    own = f"packages and script of {DISTRIBUTION}"
    return findings or [Finding("distribution", "ok", own)]


def own_directories() -> list[Path]:
    """Return the directories in which our packages may lie."""
    # A checkout keeps skillnet_platform in platform/, the other packages beside it.
    is_checkout = (OWN_PARENT.parent / "pyproject.toml").is_file()
    return [OWN_PARENT.parent if is_checkout else OWN_PARENT]


def _check_packages() -> list[Finding]:
    findings = []
    for name in OWN_PACKAGES:
        spec = find_spec(name)
        found = sorted({Path(each).resolve().parent for each in _locations(spec)})
        if found and not set(found) & set(own_directories()):
            seen = f"the package {name} is that of {found[0]}, not of {DISTRIBUTION}"
            advice = "use an environment without it, or start in the directory of the checkout"
            findings.append(Finding("distribution", "error", seen, advice))
    return findings


def _locations(spec: object) -> list[str]:
    return list(getattr(spec, "submodule_search_locations", None) or [])


def _check_scripts(others: Mapping[str, Distribution]) -> list[Finding]:
    findings = []
    for name, other in sorted(others.items()):
        scripts = other.entry_points.select(group="console_scripts", name=SCRIPT)
        if scripts:
            seen = f"{name} also installs a script named {SCRIPT} in {Path(sys.prefix) / 'bin'}"
            advice = f"use skillnet-platform instead of {SCRIPT}, or pip uninstall {name}"
            findings.append(Finding("distribution", "warning", seen, advice))
    return findings


def _normalized(distribution: Distribution) -> str:
    try:
        name = distribution.metadata["Name"]
    except FileNotFoundError:  # of the backport, see package_version
        name = None
    return str(name or "").lower().replace("_", "-")

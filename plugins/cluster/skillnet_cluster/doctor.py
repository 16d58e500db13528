"""``skillnet doctor``: check this machine, or the cluster of ``RAY_ADDRESS``, before a run."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import skillnet_platform
from skillnet_cluster.checked_command import (
    PACKAGES,
    estimate_checkpoint_bytes,
    request_resources,
    runs_directory,
    split_own_options,
)
from skillnet_cluster.checks import FREE_DISK_BYTES, Finding, Level
from skillnet_cluster.checks.node_probe import require_access
from skillnet_platform import cluster, console, storage
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import find_version
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import backend

DISTRIBUTION = "skillnet-platform"
OWN_PACKAGES = ("pipelines", "sweeps", "skillnet")
SCRIPT = "skillnet"

#: Directory that holds ``skillnet_platform``: the site directory, or ``platform`` of a checkout.
OWN_PARENT = Path(skillnet_platform.__file__).resolve().parents[1]


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
    good = (3, 11) <= sys.version_info[:2] <= (3, 14)
    advice = "" if good else "use Python 3.11 to 3.14"
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
        require_access(uri)
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


@dataclass
class DoctorConfig:
    """Options of ``skillnet doctor``; they precede the command.

    Args:
        entry: command with its options, whose resources are checked.
        only: print ``all`` findings, or only ``problems``.
        env_from: names of variables whose local values the checks on a cluster get.
    """

    entry: list[str] = positional_field([])
    only: Literal["all", "problems"] = "all"
    env_from: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DoctorReport:
    """Findings about this machine or a cluster.

    Args:
        title: heading of the table.
        findings: all of them.
        shown: those that are printed.
    """

    title: str
    findings: list[Finding]
    shown: list[Finding]

    @property
    def failed(self) -> bool:
        """Return whether a finding is an error."""
        return any(finding.level == "error" for finding in self.findings)


def show_findings(report: DoctorReport) -> None:
    """Print the findings as a table."""
    if report.shown:
        rows = [(each.check, each.level, each.seen, each.advice) for each in report.shown]
        console.print_table(report.title, ("check", "state", "seen", "what to do"), rows)
    elif not report.failed:
        console.print_note(f"checked: {len(report.findings)} findings without a problem")


def split_doctor_arguments(argv: Sequence[str]) -> list[str]:
    """Separate doctor's own options from the command to check by ``--``."""
    own, words = split_own_options(argv)
    # Doctor does not run the command, so these options are its own at every position.
    own += [word for word in words if word in ("--json", "--help", "-h")]
    words = [word for word in words if word not in ("--json", "--help", "-h")]
    return [*own, "--", *words]


def _from_inside(entry: list[str], env_from: list[str]) -> list[Finding]:
    """Return the findings of doctor on the cluster, run as a job."""
    from skillnet_cluster import submit

    document = submit.run_job(["doctor", "--json", *entry], env_from)
    return [Finding(**each) for each in document["findings"]]


def _cluster(request: Any) -> list[Finding]:
    from skillnet_cluster.checks.cluster import check_cluster

    try:
        with cluster.ray_session() as ray:
            return check_cluster(ray, request)
    except UserError as error:
        return [Finding("cluster", "error", str(error), "see the lines above")]


@command(
    DoctorConfig,
    description="Check this machine before a run: versions, disk and tracker. With RAY_ADDRESS "
    "set, check every node of that cluster, its GPUs, stores and clocks, and whether it has the "
    "resources of a command.",
    example="skillnet doctor\nskillnet doctor finetune --config small --training.workers 4",
    show=show_findings,
    to_json=lambda report: {
        "ok": not report.failed,
        "findings": [asdict(each) for each in report.shown],
    },
    exit_code=lambda report: int(report.failed),
    rewrite_arguments=split_doctor_arguments,
)
def main(config: DoctorConfig) -> DoctorReport:
    """Run ``skillnet doctor``: 0 if no finding is an error, else 1."""
    request = request_resources(config.entry)
    address = SecretUri(os.environ.get("RAY_ADDRESS", ""))
    if address.startswith(("http://", "https://")):
        # This machine reaches one port of the head, but only a job can see every node.
        title, findings = f"The cluster of {address}", _from_inside(config.entry, config.env_from)
    else:
        title = f"The cluster of {address}" if address else "This machine"
        findings = [*check_machine(request), *(_cluster(request) if address else ())]
    shown = [f for f in findings if config.only == "all" or f.level != "ok"]
    return DoctorReport(title, findings, shown)


if __name__ == "__main__":
    raise SystemExit(main())

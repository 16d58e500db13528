"""``skillnet doctor``: check this machine, or the cluster of ``RAY_ADDRESS``, before a run."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from skillnet_platform import cluster, console
from skillnet_platform.checks import Finding
from skillnet_platform.checks.machine import check_machine
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import (
    request_resources,
    split_own_options,
)
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri


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
    from skillnet_platform import submit

    document = submit.run_job(["doctor", "--json", *entry], env_from)
    return [Finding(**each) for each in document["findings"]]


def _cluster(request: Any) -> list[Finding]:
    from skillnet_platform.checks.cluster import check_cluster

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

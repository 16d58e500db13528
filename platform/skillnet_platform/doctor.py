"""``skillnet doctor``: what to know before a run about this machine, or about the cluster of
``RAY_ADDRESS``, with what to do about it."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from skillnet_platform import cluster, console
from skillnet_platform.checks.finding import Finding
from skillnet_platform.checks.machine import check_state_api, list_machine_checks
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import (
    request_resources,
    split_own_options,
)
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError


@dataclass
class DoctorConfig:
    """Options of ``skillnet doctor``; they stand before the command.

    Args:
        entry: a command with its options: whether the cluster has what it asks for.
        ray: whether to start Ray, run a task and ask the State API (about 8 s).
        only: ``all`` findings, or ``problems``.
        env_from: names of variables that a look at a cluster gets as they are set here, as
            ``skillnet submit`` takes them.
    """

    entry: list[str] = positional_field([])
    ray: bool = True
    only: Literal["all", "problems"] = "all"
    env_from: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DoctorReport:
    """Findings about this machine or a cluster.

    Args:
        title: of the table.
        findings: all of them.
        shown: those that are printed.
    """

    title: str
    findings: list[Finding]
    shown: list[Finding]

    @property
    def failed(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.level == "error" for finding in self.findings)


def show_findings(report: DoctorReport) -> None:
    """Print the findings as a table."""
    if report.shown:
        rows = [(each.check, each.level, each.seen, each.advice) for each in report.shown]
        console.table(report.title, ("check", "state", "seen", "what to do"), rows)
    elif not report.failed:
        console.note(f"checked: {len(report.findings)} findings, none of them a problem")


def split_doctor_arguments(argv: Sequence[str]) -> list[str]:
    """Separate doctor's own options from the command that it is request about, by ``--``."""
    own, words = split_own_options(_named(list(argv)))
    # The command is only request about: these can mean nobody but doctor, wherever they stand.
    own += [word for word in words if word in ("--json", "--help", "-h")]
    words = [word for word in words if word not in ("--json", "--help", "-h")]
    return [*own, "--", *words]


def _named(argv: list[str]) -> list[str]:
    """``--config FILE`` without a command asks about ``finetune``."""
    before, words = split_own_options(argv)
    given = "--config" in before or any(word.startswith("--config=") for word in before)
    if not given or words:
        return argv
    place = next(n for n, word in enumerate(argv) if word.split("=")[0] == "--config")
    return [*argv[:place], "finetune", *argv[place:]]


def _from_inside(entry: list[str], env_from: list[str]) -> list[Finding]:
    """Findings of the same command, run as a job on the cluster."""
    from skillnet_platform import submit

    told = submit.run_job(["doctor", "--json", *entry], env_from)
    return [Finding(**each) for each in told["findings"]]


def _cluster(request: Any) -> list[Finding]:
    from skillnet_platform.checks.cluster import check_cluster

    try:
        with cluster.ray_session() as ray:
            return [check_state_api(), *check_cluster(ray, request)]
    except UserError as problem:
        return [Finding("cluster", "error", str(problem), "see the lines above")]


@command(
    DoctorConfig,
    description="Check this machine before a run: versions, CPUs, memory, disk, ports, "
    "MLflow and Ray. With RAY_ADDRESS set, check every node of that cluster, and whether it "
    "has what a command asks for.",
    example="skillnet doctor --ray false\n"
    "skillnet doctor finetune --config small --training.workers 4",
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
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")) and config.ray:
        title, findings = f"The cluster of {address}", _from_inside(config.entry, config.env_from)
    else:
        title = f"The cluster of {address}" if address else "This machine"
        listed = list_machine_checks(config.ray and not address, request)
        if address and config.ray:
            listed.append(lambda: _cluster(request))
        findings = [finding for check in listed for finding in check()]
    shown = [f for f in findings if config.only == "all" or f.level != "ok"]
    return DoctorReport(title, findings, shown)


if __name__ == "__main__":
    raise SystemExit(main())

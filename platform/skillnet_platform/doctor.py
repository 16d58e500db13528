"""``skillnet doctor``: what to know before a run about this machine, or about the cluster of
``RAY_ADDRESS``, with what to do about it."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from skillnet_platform import cluster, config, console
from skillnet_platform.checks.finding import Finding
from skillnet_platform.checks.machine import _state_api, checks
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import (
    needs,
    split,
)
from skillnet_platform.config import positional
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

    entry: list[str] = positional([])
    ray: bool = True
    only: Literal["all", "problems"] = "all"
    env_from: list[str] = field(default_factory=list)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the findings; 0 if none is an error, else 1."""
    own, words = split(_named(argv or []))
    # The command is only asked about: these can mean nobody but doctor, wherever they stand.
    own += [word for word in words if word in ("--json", "--help", "-h")]
    words = [word for word in words if word not in ("--json", "--help", "-h")]
    options = config.parse(
        DoctorConfig,
        [*own, "--", *words],
        prog="skillnet doctor",
        description="Check this machine before a run: versions, CPUs, memory, disk, ports, "
        "MLflow and Ray. With RAY_ADDRESS set, check every node of that cluster, and whether it "
        "has what a command asks for.",
        example="skillnet doctor --ray false\n"
        "skillnet doctor finetune --config small --training.workers 4",
    )
    asked = needs(options.entry)
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")) and options.ray:
        title, findings = f"The cluster of {address}", _from_inside(options.entry, options.env_from)
    else:
        title = f"The cluster of {address}" if address else "This machine"
        listed = checks(options.ray and not address, asked)
        if address and options.ray:
            listed.append(lambda: _cluster(asked))
        findings = [finding for check in listed for finding in check()]
    failed = any(finding.level == "error" for finding in findings)
    shown = [f for f in findings if options.only == "all" or f.level != "ok"]
    if console.json_wanted():
        console.emit_json({"ok": not failed, "findings": [asdict(each) for each in shown]})
    elif shown:
        rows = [(each.check, each.level, each.seen, each.advice) for each in shown]
        console.table(title, ("check", "state", "seen", "what to do"), rows)
    if not failed and not shown:
        console.note(f"checked: {len(findings)} findings, none of them a problem")
    return int(failed)


def _named(argv: list[str]) -> list[str]:
    """``--config FILE`` without a command asks about ``finetune``."""
    before, words = split(argv)
    given = "--config" in before or any(word.startswith("--config=") for word in before)
    if not given or words:
        return argv
    place = next(n for n, word in enumerate(argv) if word.split("=")[0] == "--config")
    return [*argv[:place], "finetune", *argv[place:]]


def _from_inside(entry: list[str], env_from: list[str]) -> list[Finding]:
    """Findings of the same command, run as a job on the cluster."""
    from skillnet_platform import submit

    told = submit.ask(["doctor", "--json", *entry], env_from)
    return [Finding(**each) for each in told["findings"]]


def _cluster(asked: Any) -> list[Finding]:
    from skillnet_platform.checks.cluster import cluster_findings

    try:
        with cluster.session() as ray:
            return [_state_api(), *cluster_findings(ray, asked)]
    except UserError as problem:
        return [Finding("cluster", "error", str(problem), "see the lines above")]


if __name__ == "__main__":
    raise SystemExit(main())

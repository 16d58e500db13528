"""Check that our packages and script belong to this distribution.

Another package on PyPI, ``skillnet-ai``, also installs a script named ``skillnet``.
"""

import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from skillnet_platform.checks.finding import Finding

DISTRIBUTION = "skillnet-platform"
PACKAGES = ("pipelines", "sweeps", "skillnet")
SCRIPT = "skillnet"

#: Directory that holds ``skillnet_platform``: the site directory, or ``platform`` of a checkout.
OWN_PARENT = Path(__file__).resolve().parents[2]


def check_distributions() -> list[Finding]:
    """Return a finding per package or script that another distribution provides."""
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
    for name in PACKAGES:
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

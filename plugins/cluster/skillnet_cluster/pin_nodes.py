"""``skillnet pin-nodes``: pin the project's dependencies, which cluster nodes install.

The command writes ``platform/deploy/requirements.txt``. The names come from ``pyproject.toml``, the
versions from the environment that runs the command. Nodes therefore run the tested versions, and
nodes that start days apart run the same versions. The project's own code is not pinned: each job
uploads it.
"""

import sys
from collections import deque
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import find_version
from skillnet_platform.storage import open_output

PROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
REQUIREMENTS = Path("platform/deploy/requirements.txt")

#: Extras of ``pyproject.toml`` that nodes get if they are installed here: for the autoscaler on
#: AWS, object stores and a tracking server.
EXTRAS = ("cluster", "s3", "gs", "azure", "tracker")


@dataclass
class PinNodesConfig:
    """Options of ``skillnet pin-nodes``.

    Args:
        output: file to write; by default platform/deploy/requirements.txt of the checkout.
    """

    output: str | None = positional_field(None)


def show_pins(result: dict[str, Any]) -> None:
    """Print the number of pinned packages and the path of the file."""
    console.print_note(f"{result['output']}: {result['packages']} packages pinned")


@command(
    PinNodesConfig,
    description="Pin the packages that cluster nodes install: the dependencies of pyproject.toml "
    "at the versions of this environment. Run it before `ray up`.",
    example="skillnet pin-nodes",
    show=show_pins,
)
def main(config: PinNodesConfig) -> dict[str, Any]:
    """Run ``skillnet pin-nodes``."""
    path = Path(config.output) if config.output else PROJECT.parent / REQUIREMENTS
    text = format_requirements()
    with open_output(path, "w") as stream:
        stream.write(text)
    return {"output": str(path), "packages": text.count("==")}


def read_dependencies(project: Path = PROJECT) -> list[str]:
    """Return the requirements of training, with those of ``EXTRAS`` that are installed here.

    Raises:
        UserError: the file is missing: this is an installation, not a checkout.
    """
    import tomllib

    try:
        content = tomllib.loads(project.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{project}: no such file; a cluster gets its code from a checkout of the repository"
        ) from None
    extras = content["project"].get("optional-dependencies", {})
    # Nodes get the code of local distributions from the checkout, and need what these require.
    sources = content.get("tool", {}).get("uv", {}).get("sources", {})
    direct = [line for line in content["project"]["dependencies"] if _name(line) not in sources]
    for source in sources.values():
        inner = (project.parent / source["path"] / "pyproject.toml").read_text(encoding="utf-8")
        direct += tomllib.loads(inner)["project"]["dependencies"]
    optional = [line for name in EXTRAS for line in extras.get(name, [])]
    # An extra may include another one of this project, whose code nodes get from the checkout.
    own = _name(content["project"].get("name", ""))
    return [
        *map(str, direct),
        *map(str, extras.get("train", [])),
        *(str(line) for line in optional if _name(line) != own and find_version(_name(line))),
    ]


def pin_packages(requirements: list[str]) -> dict[str, str]:
    """Return name -> installed version of packages and their dependencies.

    Args:
        requirements: requirement lines.

    Raises:
        UserError: a package is not installed, or has another version than required.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    waiting = deque((Requirement(line), True) for line in requirements)
    while waiting:
        wanted, direct = waiting.popleft()
        name = canonicalize_name(wanted.name)
        version = find_version(name)
        if not version:
            if direct:
                raise UserError(
                    f"{wanted} is not installed here; pip install -e plugins/evidence -e '.[train]'"
                )
            continue  # a requirement of another platform, or an optional one
        if direct and not wanted.specifier.contains(version, prereleases=True):
            raise UserError(f"{wanted} is needed, {version} is installed here")
        found[name] = version.partition("+")[0]  # +cpu, +cu128: depends on the node
        for extra in ["", *sorted(wanted.extras)]:
            if (name, extra) not in done:
                done.add((name, extra))
                waiting.extend((need, False) for need in _needs(distribution(name), extra))
    return dict(sorted(found.items()))


def format_requirements(project: Path = PROJECT) -> str:
    """Return the text of ``requirements.txt``: pinned versions, and the version of Python."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = [
        f"# python {python}",
        "# Written by `skillnet pin-nodes`: names from pyproject.toml, versions from the installed",
        "# packages.",
    ]
    pinned = [
        f"{name}=={version}" for name, version in pin_packages(read_dependencies(project)).items()
    ]
    return "\n".join([*head, *pinned]) + "\n"


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return canonicalize_name(Requirement(requirement).name)


def _needs(installed: Distribution, extra: str) -> list["Requirement"]:  # type: ignore[name-defined]  # noqa: F821
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in installed.requires or []]
    if not extra:
        return [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return [need for need in needs if need.marker and need.marker.evaluate({"extra": extra})]


if __name__ == "__main__":
    raise SystemExit(main())

"""``skillnet pin-nodes``: write the pinned requirements that the nodes of a cluster install."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.cluster.node_requirements import PROJECT, REQUIREMENTS, format_requirements
from skillnet_platform.config import positional_field
from skillnet_platform.storage import open_output


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


if __name__ == "__main__":
    raise SystemExit(main())

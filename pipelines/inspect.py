"""``skillnet inspect``: report the content of a directory, file or URI before it is prepared."""

from dataclasses import dataclass, field
from typing import Any

from skillnet_platform.cli import command
from skillnet_platform.config import positional_field


@dataclass
class InspectConfig:
    """Options of ``skillnet inspect``.

    Args:
        path: directory, file or URI, or ``FORMAT:PATH`` if the format is known.
        options: format -> its options, listed in docs/own-corpora.md.
    """

    path: str = positional_field()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


def print_report(report: dict[str, Any]) -> None:
    """Print the report of an inspected path."""
    from pipelines.data.preprocessing.inspection import show_inspection

    show_inspection(report)


@command(
    InspectConfig,
    description="Report the format, splits, columns, examples and media of a directory or URI in "
    "seconds. Nothing is prepared or written.",
    example="skillnet inspect /data/unknown\n"
    "skillnet inspect folder:s3://bucket/images --options.folder.validation 0.2",
    show=print_report,
)
def main(config: InspectConfig) -> dict[str, Any]:
    """Run ``skillnet inspect``."""
    # Decoders load here, so that --help stays fast.
    from pipelines.data.preprocessing.inspection import inspect_corpus

    return inspect_corpus(config.path, config.options)


if __name__ == "__main__":
    raise SystemExit(main())

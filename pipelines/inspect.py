"""``skillnet inspect``: report the content of a directory, file or URI before it is prepared."""

import json
from dataclasses import dataclass, field
from typing import Any

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output


@dataclass
class InspectConfig:
    """Options of ``skillnet inspect``.

    Args:
        path: directory, file or URI, or ``FORMAT:PATH`` if the format is known.
        options: format -> its options, listed in docs/own-corpora.md.
        croissant: file for the Croissant description of ``path``, the directory or URI of a
            prepared corpus.
        licence: URL or SPDX name of the licence of the data, for ``croissant``; built-in corpora
            state theirs.
    """

    path: str = positional_field()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    croissant: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and self.croissant is None:
            raise UserError("--licence: only --croissant states a licence. Give both")


def print_report(report: dict[str, Any]) -> None:
    """Print the report of an inspected path."""
    if "croissant" in report:
        return
    from pipelines.data.preprocessing.inspection import show_inspection

    show_inspection(report)


def write_croissant(path: str, file: str, licence: str | None) -> dict[str, Any]:
    """Write the Croissant description of a prepared corpus; return its file and facts.

    Args:
        path: directory or URI of the corpus.
        file: to write.
        licence: URL or SPDX name; None takes those of built-in corpora.

    Raises:
        UserError: the path is no prepared corpus, or its licence is not known.
    """
    from pipelines.data.shards.croissant import describe_corpus
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.serving.bundle import list_licences

    corpus = open_corpus(path)
    licences = [licence] if licence else list_licences(corpus.source_names)
    if not licences:
        raise UserError(
            f"{path}: the licence of its data is not known; state it, such as --licence CC-BY-4.0"
        )
    document = describe_corpus(corpus, licences)
    with open_output(file, "w") as stream:
        json.dump(document, stream, ensure_ascii=False, indent=2)
    console.print_note(f"{file}: the Croissant description of {corpus.name}")
    return {"croissant": file, "corpus": corpus.name, "licences": licences}


@command(
    InspectConfig,
    description="Report the format, splits, columns, examples and media of a directory or URI in "
    "seconds. Nothing is prepared. Of a prepared corpus, write the Croissant description.",
    example="skillnet inspect /data/unknown\n"
    "skillnet inspect runs/corpora/mine --croissant mine.json --licence CC-BY-4.0\n"
    "skillnet inspect folder:s3://bucket/images --options.folder.validation 0.2",
    show=print_report,
)
def main(config: InspectConfig) -> dict[str, Any]:
    """Run ``skillnet inspect``."""
    if config.croissant is not None:
        return write_croissant(config.path, config.croissant, config.licence)
    # Decoders load here, so that --help stays fast.
    from pipelines.data.preprocessing.inspection import inspect_corpus

    return inspect_corpus(config.path, config.options)


if __name__ == "__main__":
    raise SystemExit(main())

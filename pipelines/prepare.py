"""``skillnet prepare``: convert downloads and external corpora into verified Arrow shards."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.config.corpus_options import check_pairs, rewrite_corpus_options
from pipelines.data.config.label_rule import LABELS_FORMAT, read_label_rule
from pipelines.data.corpora import DEMO, is_built_in, open_external_corpus, parse_reader_prefix
from pipelines.data.corpora.base import JOINED_ROW
from pipelines.data.preprocessing.prepare import (
    MAX_ERROR_RATE,
    list_rejections,
    prepare,
    summarize_manifest,
)
from pipelines.data.preprocessing.remote_staging import stage_locally
from pipelines.data.tokenizer import training as tokenizers
from skillnet_platform import console, storage
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveCount, ProcessorCount, UnitFraction
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import parse_location, require_local_folder
from skillnet_platform.terminal_text import NO_BREAK_SPACE


@dataclass
class PrepareConfig:
    """Options of ``skillnet prepare``.

    Args:
        corpora: names of built-in corpora; by default all of them, or none with ``corpus``.
        corpus: NAME=PATH of an external corpus, a directory or URI; repeatable. The name is its
            format, or any name with the format before the path:
            ``--corpus mine=folder:/data/mine``. Formats: tnews, aishell1, aic_icc, vatex,
            pytorrent, codesearchnet, folder, webdataset, hf_dataset, and ``hf:owner/name`` of the
            Hugging Face Hub. ``NAME=labels:CORPUS`` labels the rows of a prepared corpus by a rule
            in ``options``.
        pair: NAME=FIRST+SECOND; repeatable. Joins two prepared corpora of different media to one
            whose rows have both, for retrieval between them. Rows pair by equal labels of
            ``task: pairs``, or by equal first captions, within each split.
        options: name of an external corpus -> options of its format, listed in
            docs/own-corpora.md.
        tokenizer: tokenizer.json, or directory of a saved transformers tokenizer, such as that of
            weights to start from; ``learn`` trains a new one on external corpora. By default the
            existing tokenizer, or a new one if none exists.
        vocabulary: number of tokens of a tokenizer that is trained on external corpora.
        data: directory or URI of the prepared corpora; by default ``corpora`` under the run root.
        archives: directory of the downloads; by default ``archives`` under the run root.
        cpus: CPUs of the embedded Ray, or processes for texts; by default all. The result does not
            depend on it.
        max_error_rate: fraction of a corpus' rows that may be damaged, too large or
            contradictory. Such rows are always rejected. At a higher rate the run stops with a
            summary.
    """

    corpora: list[str] = positional_field([])
    corpus: dict[str, str] = field(default_factory=dict)
    pair: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    vocabulary: PositiveCount = tokenizers.VOCABULARY_SIZE
    data: str | None = None
    archives: str | None = None
    cpus: ProcessorCount | None = None
    max_error_rate: UnitFraction = MAX_ERROR_RATE


def show_corpora(result: dict[str, Any]) -> None:
    """Print a table of the prepared corpora."""
    console.print_table(
        "Corpora",
        ["corpus", "state", "rows in", "rows out", "rejected", "splits", "size"],
        [_make_table_row(name, entry) for name, entry in result["corpora"].items()],
        caption=console.format_minutes(result["seconds"]),
    )
    list_rejections(result["corpora"])


def find_labelled_corpora(corpora: Mapping[str, str]) -> dict[str, str]:
    """Return name -> prepared corpus of the corpora that a rule labels.

    Args:
        corpora: values of ``--corpus``.

    Raises:
        UserError: such a corpus has the name of a built-in one.
    """
    found = {}
    for name, place in corpora.items():
        kind, path = parse_reader_prefix(place) or ("", place)
        if kind == LABELS_FORMAT:
            if is_built_in(name):
                raise UserError(f"--corpus {name}: a built-in corpus; choose another name")
            found[name] = path
    return found


def _make_table_row(name: str, entry: dict[str, Any]) -> list[Any]:
    # A line ends between two splits, not between a split and its rows.
    splits = ", ".join(f"{split}{NO_BREAK_SPACE}{rows}" for split, rows in entry["splits"].items())
    # Joined rows are not lost: their captions are in the row of their media file.
    joined = entry["quarantine"].get(JOINED_ROW, 0)
    rejected: Any = entry["rows_in"] - entry["rows_out"] - joined
    if joined:
        rejected = f"{rejected}, {joined} joined"
    size = storage.human_bytes(entry["bytes"])
    return [name, entry["state"], entry["rows_in"], entry["rows_out"], rejected, splits, size]


@command(
    PrepareConfig,
    description="Convert downloaded archives or external corpora into Arrow shards, each corpus "
    "with a manifest. Current corpora are reused.",
    example="skillnet prepare headings syllables\n"
    "skillnet prepare --corpus tnews=/data/tnews_public --corpus vatex=s3://bucket/vatex\n"
    "skillnet prepare --corpus mine=folder:/data/mine --options.mine.max_seconds 12\n"
    "skillnet prepare --config prepare/stream\n"
    "skillnet prepare --pair seen_and_heard=drawings+sounds",
    show=show_corpora,
    rewrite_arguments=rewrite_corpus_options,
    resources=lambda config: ResourceRequest(locations=(config.data,) if config.data else ()),
)
def main(config: PrepareConfig) -> dict[str, Any]:
    """Run ``skillnet prepare``."""
    start = time.monotonic()
    # A mistyped name would otherwise prepare the corpus with default options.
    if unknown := sorted(set(config.options) - set(config.corpus)):
        raise UserError(f"options.{unknown[0]}: no such corpus is given with --corpus")
    # Checked before the preparation, which may take hours.
    built_in = {name for name in config.pair if is_built_in(name)}
    check_pairs(config.pair, {*config.corpora, *config.corpus, *DEMO, *built_in})
    labelled = find_labelled_corpora(config.corpus)
    rules = {name: read_label_rule(name, config.options.get(name, {})) for name in labelled}
    external = [
        open_external_corpus(name, path, config.options.get(name))
        for name, path in config.corpus.items()
        if name not in labelled
    ]
    destination = parse_location(config.data, storage.data_root())
    if (config.pair or labelled) and isinstance(destination, str):
        given = "--pair" if config.pair else f"--corpus NAME={LABELS_FORMAT}:CORPUS"
        raise UserError(f"--data {destination}: {given} writes to a directory only. Give one")
    names = config.corpora or ([] if config.corpus or config.pair else list(DEMO))
    # Shards are written to a local disk; an object store has no atomic rename.
    with stage_locally(destination) as data:
        done = prepare(
            names,
            data,
            require_local_folder(config.archives, storage.archive_root(), "archives"),
            config.cpus,
            config.max_error_rate,
            external,
            config.tokenizer,
            config.vocabulary,
            store=destination if isinstance(destination, str) else None,
        )
        for name, place in labelled.items():
            from pipelines.data.preprocessing.labelled_corpus import write_labelled_corpus

            manifest = write_labelled_corpus(name, place, rules[name], data)
            done[name] = summarize_manifest(manifest, "labelled")
        for name, pair in config.pair.items():
            # torch loads with it, which --help does not need.
            from pipelines.data.preprocessing.paired_corpus import write_paired_corpus

            done[name] = summarize_manifest(write_paired_corpus(name, pair, data), "paired")
    return {"seconds": round(time.monotonic() - start, 2), "corpora": done}


if __name__ == "__main__":
    raise SystemExit(main())

"""``skillnet prepare``: turn downloads, and corpora that the user has, into Arrow shards."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.corpora import BUILT_IN, place_corpus
from pipelines.preprocessing.prepare import MAX_BAD, prepare
from pipelines.preprocessing.remote_staging import staged
from pipelines.tokenizer import training as tokenizers
from skillnet_platform import config, console, storage
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import local_folder, place


@dataclass
class PrepareConfig:
    """What to prepare, from where, to where.

    Args:
        corpora: names of corpora; none means all built-in ones, or only those of ``corpus``.
        corpus: name=path of a corpus that you have, a folder or a URI; may be given again. The
            name is that of its format, or your own with the format before the path:
            ``--corpus mine=folder:/data/mine``. Formats: tnews, aishell1, aic_icc, vatex,
            pytorrent, codesearchnet, folder, webdataset, hf_dataset.
        options: name of a corpus -> options of its format, listed in docs/own-corpora.md.
        tokenizer: tokenizer.json, or the folder of a saved transformers tokenizer, for your
            corpora; ``learn`` learns one from them anew. By default the one that is there, else
            a learnt one.
        vocabulary: tokens of a tokenizer that is learnt from your corpora.
        describe: say what a folder or URI holds, and prepare nothing.
        data: directory or URI of the prepared corpora; by default ``corpora`` under the run root.
        archives: directory of the downloads; by default ``archives`` under the run root.
        cpus: CPUs of the embedded Ray; by default all. The result does not depend on it.
        max_bad: share of a corpus' rows that may be bad, that is damaged, too large or
            contradictory. More of them stop the run with a summary. Bad rows never get through.
    """

    corpora: list[str] = positional([])
    corpus: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    vocabulary: int = tokenizers.VOCABULARY
    describe: str | None = None
    data: str | None = None
    archives: str | None = None
    cpus: int | None = None
    max_bad: float = MAX_BAD


@command
def main(argv: list[str] | None = None) -> int:
    """Prepare corpora; see ``--help``."""
    settings = config.parse(
        PrepareConfig,
        named_corpora(argv or []),
        prog="skillnet prepare",
        description="Turn downloaded archives, or corpora that you have, into Arrow shards, each "
        "with a manifest. A corpus that is there and unchanged is left as it is.",
        example="skillnet prepare headings syllables\n"
        "skillnet prepare --corpus tnews=/data/tnews_public --corpus vatex=s3://bucket/vatex\n"
        "skillnet prepare --corpus mine=folder:/data/mine --options.mine.max_seconds 12\n"
        "skillnet prepare --describe /data/unknown",
    )
    if settings.describe is not None:
        from pipelines.preprocessing.describe import describe, show

        found = describe(settings.describe, settings.options)
        if console.json_wanted():
            console.emit_json(found)
        else:
            show(found)
        return 0
    start = time.monotonic()
    if unknown := sorted(set(settings.options) - set(settings.corpus)):
        raise UserError(f"options.{unknown[0]}: no such corpus is given with --corpus")
    placed = [
        place_corpus(name, place, settings.options.get(name))
        for name, place in settings.corpus.items()
    ]
    where = place(settings.data, storage.data_root())
    with staged(where) as data:
        done = prepare(
            settings.corpora or ([] if placed else list(BUILT_IN)),
            data,
            local_folder(settings.archives, storage.archive_root(), "archives"),
            settings.cpus,
            settings.max_bad,
            placed,
            settings.tokenizer,
            settings.vocabulary,
            store=where if isinstance(where, str) else None,
        )
    seconds = time.monotonic() - start
    if console.json_wanted():
        console.emit_json({"seconds": round(seconds, 2), "corpora": done})
    else:
        console.table(
            "Corpora",
            ["corpus", "state", "rows in", "rows out", "set aside", "splits", "size"],
            [_table_row(name, entry) for name, entry in done.items()],
            caption=f"{seconds:.1f} s",
        )
    return 0


def named_corpora(words: Sequence[str]) -> list[str]:
    """``--corpus tnews=PATH`` as ``--corpus.tnews PATH``, which the configuration reads."""
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--corpus" and rest:
            word = f"--corpus={rest.pop(0)}"
        if word.startswith("--corpus="):
            name, equals, place = word.removeprefix("--corpus=").partition("=")
            if not equals or not place or not re.fullmatch(r"[\w-]+", name):
                raise UserError(
                    f"command line: --corpus {name}: expected NAME=PATH, for example "
                    "--corpus tnews=/data/tnews_public"
                )
            if f"--corpus.{name}" in out:
                raise UserError(
                    f"command line: --corpus {name} is given twice; name one of them otherwise: "
                    f"--corpus NAME=FORMAT:{place}"
                )
            out += [f"--corpus.{name}", place]
        else:
            out.append(word)
    return out


def _table_row(name: str, entry: dict[str, Any]) -> list[Any]:
    splits = ", ".join(f"{split} {rows}" for split, rows in entry["splits"].items())
    aside = entry["rows_in"] - entry["rows_out"]
    size = storage.human_bytes(entry["bytes"])
    return [name, entry["state"], entry["rows_in"], entry["rows_out"], aside, splits, size]


if __name__ == "__main__":
    raise SystemExit(main())

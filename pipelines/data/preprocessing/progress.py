"""Driver-side progress of one corpus: finished shards, error rate, and the final manifest."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.data.corpora.base import Corpus
from pipelines.data.preprocessing import staging
from pipelines.data.preprocessing.blocks import ReadSummary
from pipelines.data.shards.format import FORMAT_VERSION, write_corpus_manifest
from pipelines.data.shards.row_checks import ROW_CHECKS, check_rows
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import find_version
from skillnet_platform.storage import atomic_write, write_json

if TYPE_CHECKING:
    from pipelines.data.preprocessing.jobs import CorpusJob

#: Packages whose versions the manifest records.
MADE_WITH = ("pyarrow", "numpy", "pillow", "resvg_py", "av", "tokenizers", "ray")
#: A corpus with fewer rows is read completely, so that one message lists all of its bad rows.
MIN_ROWS_TO_STOP = 10_000
#: Above this error rate the message does not advise to raise the limit.
MAX_ADVISED_RATE = 0.5
MOSTLY_BAD_ADVICE = (
    "At this rate, fix the files, or their names and layout: see docs/own-corpora.md"
)
#: A manifest counts this number of reasons by name, the most frequent ones.
MAX_REASONS = 100


@dataclass
class CorpusProgress:
    """Progress of one corpus in the driver.

    Args:
        job: corpus that is prepared.
        finished_before: entries of shards that an earlier run finished, by stem.
        summary: counts of all rows, once the reading task has ended.
        units: blocks of this run, once the reading task has ended.
        stems: shards that this run finished.
        rows: rows of finished shards, accepted and rejected.
        errors: reason -> rows that the transform rejected.
    """

    job: "CorpusJob"
    finished_before: dict[str, dict[str, Any]]
    summary: ReadSummary | None = None
    units: int = 0
    stems: set[str] = field(default_factory=set)
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # The file of an earlier run would end this run's reading too early.
        (self.job.staging_dir / staging.READ_SUMMARY).unlink(missing_ok=True)
        for entry in self.finished_before.values():
            self.rows += len(entry["rejected"]) + (entry["file"] or {"rows": 0})["rows"]
            self.errors.update(row["reason"] for row in entry["rejected"])

    def add_result(self, result: dict[str, Any]) -> int:
        """Count the result of one task; return its number of rows."""
        if "summary" in result:
            self.summary, self.units = ReadSummary(**result["summary"]), result["units"]
            return 0
        self.stems.add(result["stem"])
        if result["entry"] is not None:  # another node wrote the shard and uploaded it
            write_json(self.job.staging_dir / f"{result['stem']}.json", result["entry"])
        self.errors.update(result["bad"])
        self.rows += result["rows"]
        return int(result["rows"])

    def count_rows(self) -> int | None:
        """Return the number of rows that are to be transformed, once all were read."""
        read = self._find_read_summary()
        return read and sum(read[0].split_rows.values())

    def is_complete(self) -> bool:
        """Return whether all blocks were read and all of their shards are finished."""
        return self.summary is not None and len(self.stems) == self.units

    def check_error_rate(self, max_error_rate: float) -> None:
        """Stop the run once it is certain that too many rows are bad.

        Bad rows may lie close together, so the rate of a part of the rows says little. The rate
        is checked once all rows are read, which is long before all of them are decoded. It is
        checked earlier only if most of many rows could not be decoded.

        Args:
            max_error_rate: allowed fraction of bad rows.

        Raises:
            UserError: states the number of bad rows and the reasons.
        """
        if (read := self._find_read_summary()) is None:
            bad = self.errors.total()
            limit = max(max_error_rate, MAX_ADVISED_RATE)
            if self.rows >= MIN_ROWS_TO_STOP and bad > limit * self.rows:
                advice = f"{MOSTLY_BAD_ADVICE}. If only the first rows are bad: --max_error_rate 1"
                first = f"{bad} of the first {self.rows}"
                self._stop(max_error_rate, first, bad / self.rows, self.errors, advice)
            return
        summary, units = read
        if message := summary.truncation_error(max_error_rate):
            raise UserError(f"{self.job.corpus.name}: {message}")
        reasons = self.errors + Counter(summary.errors)
        bad = reasons.total()
        complete = len(self.stems) == units
        if bad <= max_error_rate * summary.rows or (
            summary.rows < MIN_ROWS_TO_STOP and not complete
        ):
            return
        share = bad / summary.rows
        at_least = "" if complete else "at least "
        if not complete:
            advice = "Fix them; some rows were not checked yet"
        elif share > MAX_ADVISED_RATE:
            advice = MOSTLY_BAD_ADVICE
        else:
            advice = f"Fix them, or raise the limit: --max_error_rate {share + 0.005:.2f}"
        count = f"{at_least}{bad} of {summary.rows}"
        self._stop(max_error_rate, count, share, reasons, advice)

    def _stop(
        self, max_error_rate: float, count: str, share: float, reasons: Counter[str], advice: str
    ) -> NoReturn:
        with atomic_write(self.rejected_path, "w") as stream:
            stream.writelines(staging.iter_rejected_lines(self.job.staging_dir))
        raise make_rate_error(
            self.job.corpus.name, max_error_rate, count, share, reasons, self.rejected_path, advice
        )

    def _find_read_summary(self) -> tuple[ReadSummary, int] | None:
        """Return the summary and the number of units, if reading has ended.

        The reading task writes both to a file, because the unit that carries them may wait in Ray
        long after reading has ended.
        """
        if self.summary is not None:
            return self.summary, self.units
        try:
            text = (self.job.staging_dir / staging.READ_SUMMARY).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        recorded = json.loads(text)
        return ReadSummary(**recorded["summary"]), recorded["units"]

    @property
    def rejected_path(self) -> Path:
        """Path of the rejected rows, for a corpus that was not prepared."""
        return self.job.final_dir.with_name(f"{self.job.corpus.name}.rejected.jsonl")

    def finish(self) -> dict[str, Any]:
        """Write the manifest and publish the corpus; return the manifest.

        Raises:
            UserError: no row is left to train on.
        """
        assert self.summary is not None
        job, corpus = self.job, self.job.corpus
        splits = sorted(self.summary.split_rows)
        parts, reasons, rejected = staging.gather_entries(
            job.staging_dir, self.summary.split_shards
        )
        rows_in = self.summary.rows
        rows_out = sum(entry["rows"] for entry in parts.values())
        # A lost row would be a bug that no later check could detect.
        if rows_in != rows_out + rejected:
            raise RuntimeError(
                f"{corpus.name}: {rows_in} rows in, but {rows_out} out and {rejected} rejected; "
                "nothing was published"
            )
        # Rows rejected while reading and by the transform are counted together.
        reasons.update(self.summary.rejections)
        if not any(parts[name]["rows"] for name in {"train", *corpus.pretraining} & parts.keys()):
            counts = {name: entry["rows"] for name, entry in parts.items()}
            raise make_unusable_error(corpus.name, counts, rows_in, reasons)
        schemas = [corpus.schema(split) for split in splits]
        # Keys and their values decide the digest of the corpus; do not rename them.
        manifest = {
            "format_version": FORMAT_VERSION,
            "corpus": corpus.name,
            "modality": corpus.modality,
            "task": corpus.task,
            "pretraining": [name for name in corpus.pretraining if name in parts],
            "schema": {f.name: str(f.type) for schema in schemas for f in schema},
            "splits": parts,
            **job.identity,
            **corpus.facts(),
            "rows_in": rows_in,
            "rows_out": rows_out,
            "quarantine": count_reasons(reasons),
            **(
                {"truncated_files": self.summary.truncated_files}
                if self.summary.truncated_files
                else {}
            ),
            ROW_CHECKS: check_rows(
                partial(staging.iter_shard_digests, job.staging_dir, self.summary.split_shards),
                rows_out,
            ),
            "made_with": {name: find_version(name) for name in MADE_WITH},
        }
        manifest = write_corpus_manifest(job.staging_dir, manifest)
        if job.remote is not None:
            job.remote.commit(job.staging_dir, manifest)
        else:
            staging.commit_corpus(job.staging_dir, job.final_dir)
        self.rejected_path.unlink(missing_ok=True)
        return manifest


def check_first_rows(
    corpus: Corpus, summary: ReadSummary, max_error_rate: float, rejected: Path
) -> None:
    """Check a corpus whose rows were all read before Ray starts, and none decoded.

    The error rate decides here only if most rows are bad. Otherwise the rows are decoded first, so
    that one message lists all bad rows.

    Args:
        corpus: that was read.
        summary: counts of its rows.
        max_error_rate: allowed fraction of bad rows.
        rejected: file of the rejected rows, for the message.

    Raises:
        UserError: most rows are bad, too many files are truncated, or no row is left to train on.
    """
    if message := summary.truncation_error(max_error_rate):
        raise UserError(f"{corpus.name}: {message}")
    errors = Counter(summary.errors)
    bad = errors.total()
    if bad > max(max_error_rate, MAX_ADVISED_RATE) * summary.rows:
        count, share = f"{bad} of {summary.rows}", bad / summary.rows
        raise make_rate_error(
            corpus.name, max_error_rate, count, share, errors, rejected, MOSTLY_BAD_ADVICE
        )
    if not any(summary.split_rows.get(name) for name in {"train", *corpus.pretraining}):
        reasons = Counter(summary.rejections)
        raise make_unusable_error(corpus.name, summary.split_rows, summary.rows, reasons)


def make_rate_error(
    name: str,
    max_error_rate: float,
    count: str,
    share: float,
    reasons: Counter[str],
    rejected: Path,
    advice: str,
) -> UserError:
    """Return the error that too many rows of a corpus are bad.

    Args:
        name: folder of the corpus below the prepared corpora.
        max_error_rate: allowed fraction of bad rows.
        count: number of bad rows, "12 of 20".
        share: fraction of bad rows.
        reasons: reason -> bad rows.
        rejected: file of the rejected rows.
        advice: last sentence.
    """
    return UserError(
        f"{name}: {count} rows ({share:.1%}) were rejected; the limit is {max_error_rate:.1%} "
        f"(max_error_rate). {_list_frequent(reasons)}. See {rejected}. {advice}"
    )


def make_unusable_error(
    name: str, split_rows: Mapping[str, int], rows_in: int, reasons: Counter[str]
) -> UserError:
    """Return the error that no row of a corpus is left to train on.

    Args:
        name: folder of the corpus below the prepared corpora.
        split_rows: split -> usable rows.
        rows_in: rows that were read.
        reasons: reason -> rejected rows.
    """
    counts = ", ".join(f"{split} {rows}" for split, rows in split_rows.items())
    return UserError(
        f"{name}: no row is left to train on, so it was not published. "
        f"{sum(split_rows.values())} of {rows_in} rows can be used ({counts or 'none'}), and "
        f"{reasons.total()} were rejected{': ' * bool(reasons)}{_list_frequent(reasons)}. Fix the "
        "rows, or the options that choose rows and splits"
    )


def _list_frequent(reasons: Counter[str]) -> str:
    return "; ".join(f"{count} × {why}" for why, count in reasons.most_common(5))


def count_reasons(reasons: Counter[str]) -> dict[str, int]:
    """Return the rows of each reason, sorted by name; sum up rare reasons if there are many."""
    if len(reasons) <= MAX_REASONS:
        return dict(sorted(reasons.items()))
    frequent = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MAX_REASONS]
    rest = reasons.total() - sum(count for _, count in frequent)
    return dict(sorted([*frequent, ("other reasons", rest)]))

"""A corpus in the making, as the driver sees it: what is done, whether too much of it is bad, and
the manifest that puts it in place."""

import json
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from pipelines.preprocessing import staging
from pipelines.preprocessing.blocks import Summary
from pipelines.preprocessing.datasource import Order
from pipelines.preprocessing.remote_staging import Delivery
from pipelines.shards.format import FORMAT_VERSION, MANIFEST, manifest_digest
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, write_json

MADE_WITH = ("pyarrow", "numpy", "pillow", "resvg_py", "av", "tokenizers", "ray")
#: A corpus of fewer rows is looked at whole, so that all of its bad rows are told at once.
WORTH_STOPPING = 10_000
#: With a share of bad rows above this nobody is told to go on without them.
MOST_ADVISED = 0.5
ASTRAY = "With so many, mend the files, or how they are named and laid out: see docs/own-corpora.md"
#: A manifest counts so many reasons by name, the most frequent.
MOST_REASONS = 100


@dataclass
class Making:
    """A corpus in the making: how far it is.

    Args:
        order: the corpus.
        folder: of its shards.
        before: entries of shards that an earlier run finished, by stem.
        delivery: where the shards go, if that is a store.
    """

    order: Order
    folder: Path
    before: dict[str, dict[str, Any]]
    delivery: Delivery | None = None
    summary: Summary | None = None
    units: int = 0
    done: set[str] = field(default_factory=set)
    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        (self.folder / staging.READ).unlink(missing_ok=True)
        for entry in self.before.values():
            self.rows += len(entry["rejected"]) + (entry["file"] or {"rows": 0})["rows"]
            self.bad.update(row["reason"] for row in entry["rejected"])

    def count(self, done: dict[str, Any]) -> int:
        """Take note of what a task did; returns how many rows that were."""
        if "summary" in done:
            self.summary, self.units = Summary(**done["summary"]), done["units"]
            return 0
        self.done.add(done["stem"])
        if done["entry"] is not None:  # it was written on whichever host
            write_json(self.folder / f"{done['stem']}.json", done["entry"])
        self.bad.update(done["bad"])
        self.rows += done["rows"]
        return int(done["rows"])

    def is_complete(self) -> bool:
        """Whether all blocks were read and all of them are done."""
        return self.summary is not None and len(self.done) == self.units

    def judge(self, max_bad: float) -> None:
        """Stop once it is certain that more than that share of all rows is bad.

        Bad rows may stand close together, so a share of some of the rows says little: it is
        judged from when all rows are read, which is long before all of them are decoded. Only
        where most of many rows could not be decoded it is not worth reading to the end.

        Raises:
            UserError: saying how many, and why.
        """
        if (over := self._read()) is None:
            bad = self.bad.total()
            if self.rows >= WORTH_STOPPING and bad > max(max_bad, MOST_ADVISED) * self.rows:
                advice = f"{ASTRAY}. If only the first rows are like that: --max_bad 1"
                first = f"{bad} of the first {self.rows}"
                self._stop(max_bad, first, bad / self.rows, self.bad, advice)
            return
        read, units = over
        if told := read.too_broken(max_bad):
            raise UserError(f"{self.order.corpus.name}: {told}")
        reasons = self.bad + Counter(read.bad)
        bad = reasons.total()
        complete = len(self.done) == units
        if bad <= max_bad * read.rows or (read.rows < WORTH_STOPPING and not complete):
            return
        share = bad / read.rows
        least = "" if complete else "at least "
        if not complete:
            advice = "Mend them; not all rows were looked at yet"
        elif share > MOST_ADVISED:
            advice = ASTRAY
        else:
            advice = f"Mend them, or go on without them: --max_bad {share + 0.005:.2f}"
        self._stop(max_bad, f"{least}{bad} of {read.rows}", share, reasons, advice)

    def _stop(
        self, max_bad: float, bad: str, share: float, reasons: Counter[str], advice: str
    ) -> NoReturn:
        with atomic_write(self.told, "w") as stream:
            stream.writelines(staging.rejected_lines(self.folder))
        most = "; ".join(f"{count} × {why}" for why, count in reasons.most_common(5))
        raise UserError(
            f"{self.order.corpus.name}: {bad} rows cannot be used, {share:.1%}; at most "
            f"{max_bad:.1%} may be (max_bad). {most}. Each of them stands in {self.told}. {advice}"
        )

    def _read(self) -> tuple[Summary, int] | None:
        """What reading gave and in how many units, if it is over: that may be long before the
        unit that tells of it has its turn."""
        if self.summary is not None:
            return self.summary, self.units
        try:
            told = (self.folder / staging.READ).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        found = json.loads(told)
        return Summary(**found["summary"]), found["units"]

    @property
    def told(self) -> Path:
        """Where a person finds the bad rows of a corpus that was not prepared."""
        return self.order.final.with_name(f"{self.order.corpus.name}.rejected.jsonl")

    def finish(self) -> dict[str, Any]:
        """Write the manifest and put the corpus in place; returns the manifest.

        Raises:
            UserError: there is no row to train on.
        """
        assert self.summary is not None
        corpus, splits = self.order.corpus, sorted(self.summary.counts)
        parts, reasons, set_aside = staging.gather(self.folder, self.summary.shards)
        rows_in = self.summary.rows
        rows_out = sum(entry["rows"] for entry in parts.values())
        if rows_in != rows_out + set_aside:
            raise RuntimeError(
                f"{corpus.name}: {rows_in} rows in, but {rows_out} out and {set_aside} set aside; "
                "nothing was put in place"
            )
        reasons.update(self.summary.reasons)
        if not any(parts[name]["rows"] for name in {"train", *corpus.pretraining} & parts.keys()):
            rest = ", ".join(f"{name} {entry['rows']}" for name, entry in parts.items())
            why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
            raise UserError(
                f"{corpus.name}: no row is left to train on, so it was not put in place. Of "
                f"{rows_in} rows {rows_out} can be used ({rest or 'none'}), and {set_aside} were "
                f"set aside{': ' * bool(why)}{why}. Mend them, or the options that choose rows and "
                "splits"
            )
        schemas = [corpus.schema(split) for split in splits]
        manifest = {
            "format_version": FORMAT_VERSION,
            "corpus": corpus.name,
            "modality": corpus.modality,
            "task": corpus.task,
            "pretraining": [name for name in corpus.pretraining if name in parts],
            "schema": {f.name: str(f.type) for schema in schemas for f in schema},
            "splits": parts,
            **self.order.identity,
            **corpus.facts(),
            "rows_in": rows_in,
            "rows_out": rows_out,
            "quarantine": counted(reasons),
            **({"broken_off": self.summary.broken} if self.summary.broken else {}),
            "made_with": {name: version(name) for name in MADE_WITH},
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json(self.folder / MANIFEST, manifest)
        if self.delivery is not None:
            self.delivery.commit(self.folder, manifest)
        else:
            staging.commit(self.folder, self.order.final)
        self.told.unlink(missing_ok=True)
        return manifest


def counted(reasons: Counter[str]) -> dict[str, int]:
    """Reasons by name, each with its number of rows; rare ones together if there are many."""
    if len(reasons) <= MOST_REASONS:
        return dict(sorted(reasons.items()))
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MOST_REASONS]
    rest = reasons.total() - sum(count for _, count in most)
    return dict(sorted([*most, ("other reasons", rest)]))

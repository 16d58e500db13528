"""The work of one shard: a block of raw rows is transformed, and what is good of it written."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.corpora.base import Corpus
from pipelines.io.media import MEDIA, MediaRef
from pipelines.preprocessing import staging
from pipelines.preprocessing.blocks import PLACES
from pipelines.preprocessing.datasource import AWAY, MISTAKE, Job
from pipelines.preprocessing.spool import unpack
from pipelines.tokenizer import training as tokenizers
from pipelines.transforms import decode_guard
from skillnet.malloc import keep_freed_memory
from skillnet_platform.cli import users_mistake
from skillnet_platform.storage.directories import StoreUnavailable

#: The column of a transform that says why a row goes nowhere.
REJECTED = "rejected"


def write_block(jobs: Sequence[Job], session: str, unit: pa.Table) -> pa.Table:
    """Do a unit of work: transform its block and write its shard. Returns what was done."""
    keep_freed_memory()  # what decoders give back they want again at once: a tenth of their time
    try:
        done = _write_block(jobs, session, unit)
    except StoreUnavailable as problem:
        done = {"away": str(problem)}  # Ray would wrap either beyond recognition
    except Exception as problem:
        message = users_mistake(problem)
        if message is None:
            raise
        done = {"mistake": message}
    return pa.table({"done": [json.dumps(done)]})


def _write_block(jobs: Sequence[Job], session: str, unit: pa.Table) -> dict[str, Any]:
    number, split, shard = (unit[name][0].as_py() for name in ("corpus", "split", "shard"))
    job = jobs[number]
    if shard in (MISTAKE, AWAY):
        kind = "mistake" if shard == MISTAKE else "away"
        return {kind: unit["raw"][0].as_py().decode()}
    if split is None:
        summary = json.loads(unit["raw"][0].as_py())
        return {"corpus": number, "summary": summary, "units": unit["units"][0].as_py()}
    block, stem = unpack(unit), staging.stem_of(split, shard)
    tokenizer = job.delivery.tokenizer() if job.delivery is not None else job.tokenizer
    with decode_guard.watched(session, f"{number}-{stem}"):
        made = transform_block(job.corpus, tokenizer, block)
    good, rejected = split_rejected(made, block)
    schema = job.corpus.schema(split)
    table = good.select(schema.names).cast(schema)
    folder = job.folder if job.delivery is None else job.delivery.workplace(job.folder)
    keys = unit["keys"][0].as_py()
    entry = staging.write_entry(folder, split, shard, table, rejected, keys)
    if job.delivery is not None:
        job.delivery.send(folder, stem)
    return {
        "corpus": number,
        "stem": stem,
        "entry": entry if job.delivery is not None else None,
        "rows": block.num_rows,
        "bad": Counter(row["reason"] for row in rejected),
    }


def transform_block(corpus: Corpus, tokenizer: Path | None, block: pa.Table) -> pa.Table:
    """The finished block: the columns of the corpus, key, group, and why a row is rejected."""
    made = corpus.transform(block, tokenizers.load(tokenizer) if tokenizer else None)
    assert made.num_rows == block.num_rows, f"{corpus.name}: the transform lost rows"
    if REJECTED not in made.column_names:
        made = made.append_column(REJECTED, pa.nulls(made.num_rows, pa.string()))
    for name in ("key", "group"):
        made = made.append_column(name, block[name])
    return made


def split_rejected(made: pa.Table, block: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The good rows of a finished block, and a line of the quarantine for each other one."""
    bad = pa.compute.is_valid(made[REJECTED])
    if not pa.compute.any(bad).as_py():
        return made, []
    rows = block.select(_places(block)).filter(bad).to_pylist()
    for row in rows:
        if row.get("media") is not None:
            row["media"] = str(MediaRef(**row["media"]))
    reasons = made[REJECTED].filter(bad).to_pylist()
    lines = [
        {key: value for key, value in row.items() if value is not None} | {"reason": reason}
        for row, reason in zip(rows, reasons, strict=True)
    ]
    return made.filter(pa.compute.invert(bad)), lines


def _places(block: pa.Table) -> list[str]:
    """What the quarantine tells of a row: its place, and the medium that it refers to."""
    wanted = [*PLACES, *(f.name for f in block.schema if f.name == "media" and f.type == MEDIA)]
    return ["key", *(name for name in wanted if name in block.column_names)]

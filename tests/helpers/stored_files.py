"""Files that commands read, whole, and what reads them: for tests that damage them."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import SHARD_TABLE
from pipelines.data.tokenizer.guarded_loader import (
    largest_token_id,
    parse_tokenizer,
    read_tokenizer_tree,
)
from pipelines.data.tokenizer.selection import convert_tokenizer
from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.data.transforms.text import encode_texts
from pipelines.serving.bundle import check_tasks
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import checkpointing
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import find_finished_result
from pipelines.training.runs import checkpoints, model_source
from pipelines.training.runs.bundle_manifest import (
    BUNDLE_FORMAT,
    compute_bundle_digest,
    read_bundle_manifest,
)
from skillnet import systems
from skillnet.serialization import write_manifest, write_parts
from skillnet_corpora.archives import iter_members
from skillnet_platform import config
from skillnet_serving.retrieval.vector_index import read_index, write_index
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from sweeps.search import ranking
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.trial import TRIAL, Trial
from sweeps.trials.trial import read_trial as read_order
from tests.helpers import prepared_corpora, readable_corpora
from tests.helpers.archive_files import packaged, tarred, zipped
from tests.helpers.small_models import reseal_model, small_model
from tests.helpers.synthetic_runs import write_run

ROOT = Path(__file__).parents[2]
TEXTS = ["红色的方块", "readFile(path, 42)", "", "a" * 3000, "🎉 \u0301 \ufdfa", " \n\t"]
VECTORS = np.eye(6, dtype=np.float32)


@dataclass(frozen=True)
class StoredFiles:
    """A folder that a command wrote.

    Args:
        write: fills an empty folder.
        reads: what commands do with (the folder, a file of it); each ends with a value or an error.
        budget: damaged folders, in every test run and in a round of ``make fuzz``; None for files
            whose texts alone are replaced: see ``test_fuzz_module_names.py``.
        files: globs of the files that are damaged.
        trees: globs of the files with a JSON value per line, of which a value is replaced.
        seal: (folder, altered file) -> writes hashes that agree with it, as an attacker can.
        is_limited: a library in C or Rust reads it: in a child with limits of memory and time.
        whole: what the first of ``reads`` gives for the undamaged folder; None for anything.
    """

    write: Callable[[Path], object]
    reads: Sequence[Callable[[Path, Path], object]]
    budget: tuple[int, int] | None = (20, 200)
    files: tuple[str, ...] = ("*",)
    trees: tuple[str, ...] = ()
    seal: Callable[[Path, Path], object] | None = None
    is_limited: bool = False
    whole: object = None

    def list_files(self, folder: Path, globs: Sequence[str]) -> list[Path]:
        """Return the files of a folder that match, in the order of the globs."""
        found = [path for glob in globs for path in sorted(folder.glob(glob))]
        return [path for path in found if path.is_file()]


def read_trees(path: Path) -> list[Any]:
    """Return the JSON value of a file, or of each of its lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(each) for each in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def write_trees(path: Path, trees: Sequence[Any]) -> None:
    """Write a JSON value per line."""
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees), encoding="utf-8")


def write_json(folder: Path, files: dict[str, list[Any]]) -> None:
    """Write files of JSON values."""
    for name, trees in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_trees(folder / name, trees)


# -- configurations, archives and corpora ----------------------------------


def copy_presets(folder: Path) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        shutil.copy(path, folder)


def write_archives(folder: Path) -> None:
    files = {f"folder/{n}.json": bytes(range(n, 250)) for n in range(5)}
    for name, pack in (("a.zip", zipped), ("b.tar.gz", tarred), ("c.deb", packaged)):
        (folder / name).write_bytes(pack(files))


def write_corpus(folder: Path) -> None:
    """Write a corpus of one shard with each sort of column."""
    columns = {
        "key": [f"字{n}" for n in range(20)],
        "tokens": pa.array([[1, 2, 3]] * 20, pa.list_(pa.int32())),
        "captions": pa.array([["one", "two"], []] * 10, pa.list_(pa.string())),
    }
    about = {"labels": ["a"], "preprocessing": {"reader": "folder"}, "source": {"uri": "x"}}
    prepared_corpora.write_corpus(folder, {"train": [pa.table(columns)]}, **about)


def seal_corpus(folder: Path, path: Path) -> None:
    with suppress(ValueError):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if path.suffix == ".arrow":
            data = path.read_bytes()
            hashes = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
            if path.name != SHARD_TABLE:

                def seal_shard(whole: dict[str, Any]) -> None:
                    whole["splits"]["train"]["shards"][0] |= hashes

                prepared_corpora.change_corpus(folder, change=seal_shard)
                return
            manifest["shards"] |= hashes
        prepared_corpora.write_manifest(folder, manifest)


def read_corpus(folder: Path, _: Path) -> None:
    for split in open_corpus(folder, verify=True).splits.values():
        split.table().to_pylist()


# -- tokenizers, models and checkpoints ----------------------------------


@cache
def tokenizer_text() -> str:
    return train_tokenizer(TEXTS[:2], [], size=300)


def load_tokenizer(_: Path, path: Path) -> None:
    made = parse_tokenizer(read_tokenizer_tree(path))
    rows = encode_texts(made, TEXTS, 64).to_pylist()
    assert max((max(row, default=0) for row in rows), default=0) <= largest_token_id(made)


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint of a tiny model of one task."""
    small_model(torch.float32, num_layers=1).save_pretrained(folder / "model")
    model = systems.load_model(folder / "model", "text_classification")
    optimizer = build_optimizer(model.named_parameters(), TrainingConfig())
    tensors = checkpointing.CheckpointTensors(model, optimizer, None)
    made = checkpointing.write_checkpoint(folder / "run", 1, tensors, {}, keep=1)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    for name in ("model", "run"):
        shutil.rmtree(folder / name)


def seal_model(folder: Path, path: Path) -> None:
    if path.name != "manifest.json":
        reseal_model(folder)


def write_model(folder: Path) -> None:
    write_manifest(folder, write_parts(small_model(), folder))


#: What is read of a model's folder before its weights: of a run, and of a bundle.
SETTINGS = {"seed": 3, "tasks": {"text_to_code": {"corpus": "functions", "max_length": 96}}}
FOUND = ("a", 4, 3, {"text_to_code": "functions"})


def serving_manifest(**entries: Any) -> dict[str, Any]:
    """Return the manifest of a bundle with its digest."""
    made = {"format": BUNDLE_FORMAT, "package": "0.1.0", "weights_digest": "a", "run_id": "a"}
    made |= {"settings": SETTINGS, "steps": 4, "evaluation": [], "tasks": {}}
    made |= {"files": {"tokenizer.json": {"bytes": 1, "sha256": "0" * 64}}, **entries}
    whole = {"format": 3, "files": {}, "serving": made}
    return whole | {"serving": made | {"digest": compute_bundle_digest(whole)}}


def served_tasks() -> dict[str, Any]:
    """Return the manifest of a bundle with all tasks."""
    preprocessing = {"max_tokens": 48, "fit": "pad", "trim": True, "max_seconds": 3.5}
    entry = {"corpus": "headings", "corpus_digest": "0" * 64, "licences": []}
    entry |= {"limit": 48, "preprocessing": preprocessing}
    tasks = {
        name: entry | {"names": [f"红{number}" for number in range(task.outputs or 0)]}
        for name, task in readable_corpora.config().tasks.items()
    }
    return serving_manifest(tasks=tasks, run_id=None)


def read_served(folder: Path, _: Path) -> None:
    check_tasks(folder, read_bundle_manifest(folder), readable_corpora.config())


def find_model(folder: Path, _: Path) -> tuple[Any, ...]:
    """Do what every command that takes a model does first."""
    source = model_source.resolve_model(str(folder))
    assert source.seed is not None
    assert source.auxiliary <= set(source.corpora) == set(source.limits)
    return source.run_id, source.steps, source.seed, source.corpora


def read_vectors(_: Path, path: Path) -> None:
    assert np.array_equal(read_index(path, "key", (6, 6)), VECTORS), "a silent change"


# -- runs and trials ----------------------------------

RUN = {"run_id": "a", "uri": "sqlite:///a.db"}
MODEL_OF_RUN = {
    "model/manifest.json": [{}],
    "model/config.json": [{}],
    "config.yaml": [SETTINGS],
    "trained.json": [{"step": 4}],
    "run.json": [RUN],
}
#: What a trial leaves, as the driver reads it.
STOPPED = {
    "outcome.json": [{"status": "stopped", "error": None, "score": 0.5, "step": 4}],
    "reports.jsonl": [
        {"step": step, "score": 0.4, "scores": {"text_to_code": 0.4}, "flops_per_example": 1e6}
        for step in (2, 4)
    ],
    "run.json": [RUN],
    "progress.jsonl": [{"step": 4, "time": 1.0, "key": "training/loss", "value": 2.0}],
}
RESULT = {"name": "000", "step": 4, "seconds": 1.5, "model": "model", "evaluation": []}
FINISHED = STOPPED | {"result.json": [RESULT | {"run_id": "a"}]}
ORDER: dict[str, Any] = {"name": "x", "config": config.to_dict(FinetuneConfig()), "group": "x"}
ORDER |= {"splits": ["test"], "settings": {"a": "b"}, "brief": True, "score": {"tasks": ["x"]}}


def read_trial(folder: Path, _: Path) -> tuple[Any, ...] | None:
    """Read a trial's folder as a resumed sweep does, up to its table."""
    entry = LedgerEntry(Trial("000", FinetuneConfig()), folder)
    settled = entry.load_settled()
    if settled is not None:
        ranking.build_ranking_table(ranking.rank_configurations([settled]))
    entry.steps_done()
    return settled and (settled.status, settled.step, settled.score, settled.run_id)


def read_compared(folder: Path, _: Path) -> None:
    """Do what ``compare`` does with each run before it computes."""
    runs = label_runs([read_run(folder)])
    compare_runs(runs)
    assert runs[0].seconds is not None


def write_compared(folder: Path) -> None:
    folder.rmdir()
    write_run(folder, rows=20)


def write_own_run(folder: Path) -> None:
    write_json(folder, {"config.yaml": [config.to_dict(_own_run(folder))]})  # JSON is YAML


def read_own_run(folder: Path, _: Path) -> None:
    find_finished_result(resolve_run(_own_run(folder)))


def _own_run(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(name=folder.name, run_dir=str(folder.parent), init_from=None)


def _writes(name: str, content: Callable[[], Any]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        value = content()
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    return write


STORED = {
    "presets": StoredFiles(
        copy_presets,
        [lambda _, path: config.check_keys(FinetuneConfig, config.load_layer(path), str(path))],
        (40, 200),
    ),
    "configuration": StoredFiles(
        write_own_run,
        [
            lambda _, path: config.parse_config(FinetuneConfig, ["--config", str(path)], prog="x"),
            read_own_run,
        ],
        (8, 200),
        trees=("*",),
    ),
    "archives": StoredFiles(
        write_archives, [lambda _, path: list(iter_members(path, lambda name: True))], (150, 200)
    ),
    "corpus": StoredFiles(
        write_corpus,
        [read_corpus],
        (100, 200),
        files=("*.arrow",),
        trees=("manifest.json",),
        seal=seal_corpus,
    ),
    "tokenizer": StoredFiles(
        _writes("tokenizer.json", tokenizer_text),
        [load_tokenizer, lambda _, path: convert_tokenizer(path)],
        (15, 200),
        trees=("*",),
        is_limited=True,
    ),
    "checkpoint": StoredFiles(
        write_checkpoint,
        [
            lambda folder, _: checkpoints.verify_checkpoint(folder),
            lambda folder, _: systems.load_model(folder),
        ],
        (60, 200),
        seal=seal_model,
    ),
    "served tasks": StoredFiles(
        _writes("manifest.json", served_tasks), [read_served], trees=("*",), is_limited=True
    ),
    "index": StoredFiles(
        lambda folder: write_index(folder / "a.index", "key", VECTORS),
        [read_vectors],
        is_limited=True,
    ),
    "bundle": StoredFiles(
        _writes("manifest.json", serving_manifest),
        [find_model],
        (60, 1000),
        trees=("*",),
        whole=FOUND,
    ),
    "model of a run": StoredFiles(
        partial(write_json, files=MODEL_OF_RUN),
        [find_model],
        (60, 1000),
        trees=("*",),
        whole=FOUND,
    ),
    "finished trial": StoredFiles(
        partial(write_json, files=FINISHED),
        [read_trial],
        (30, 1000),
        trees=("*",),
        whole=("finished", 4, 0.4, "a"),
    ),
    "stopped trial": StoredFiles(
        partial(write_json, files=STOPPED),
        [read_trial],
        (30, 1000),
        trees=("*",),
        whole=("stopped", 4, 0.4, "a"),
    ),
    "compared run": StoredFiles(
        write_compared, [read_compared], (40, 500), trees=("trained.json", "result.json")
    ),
    "order of a trial": StoredFiles(
        _writes(TRIAL, lambda: ORDER), [lambda folder, _: read_order(folder)], None, trees=(TRIAL,)
    ),
    "model": StoredFiles(
        write_model,
        [lambda folder, _: systems.load_model(folder)],
        trees=("config.json",),
        seal=seal_model,
    ),
}

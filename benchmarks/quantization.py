"""What a trained model loses with vectors of 8 bits and signs, and with weights of 8 bits.

For each retrieval task the share of the ten best rows of float32 vectors that a search with
``--vectors int8`` and ``binary`` finds, and the bytes of its index. For each task its primary
metric on the split ``test``, in float32 and by the graphs of ``export --to onnx-int8``. Needs a
trained run (``--model``) and its prepared corpora (``--data``).
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Result, find_corpora, plain
from pipelines.serving.bundle import find_bundle, open_predictor
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.runs.model_source import ModelSource, load_trained_tasks, resolve_model
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective
from skillnet_platform import console
from skillnet_platform.storage import read_json
from skillnet_serving.model_export import GRAPH_MANIFEST, export_bundle
from skillnet_serving.retrieval.corpus_search import CorpusSearch
from skillnet_serving.retrieval.vector_index import VectorCode

CODES: tuple[VectorCode, ...] = ("float32", "int8", "binary")
SPLIT = "test"


def run(rounds: int, threads: int) -> list[Result]:
    """Recall of encoded vectors, bytes of indexes and graphs, and metrics of graphs."""
    del rounds, threads
    address = os.environ.get("SKILLNET_BENCHMARK_MODEL")
    data = find_corpora("quantization")
    if address is None or data is None:
        console.print_warning("quantization needs a trained run; name it with --model")
        return []
    source = resolve_model(address)
    # Indexes and bundles of this measurement stay apart.
    with tempfile.TemporaryDirectory(prefix="skillnet-") as home:
        os.environ["SKILLNET_HOME"] = home
        return [*_measure_indexes(source, data), *_measure_graphs(source, data, Path(home))]


def _measure_indexes(source: ModelSource, data: Path) -> list[Result]:
    predictor, results = open_predictor(source, data), []
    for task, spec in predictor.model.config.tasks.items():
        if not find_objective(spec.objective).pairs_towers or task not in predictor.tasks:
            continue
        for code in CODES:
            search = CorpusSearch(predictor, source, data, task, code=code)
            vectors = search.embed_rows()
            setting = f"{search.num_rows} rows of {search.corpus.name}"
            name = f"{task}, {code}"
            results.append(plain(f"{name}, index", "bytes", vectors.nbytes, "", setting))
            if search.index.recall is not None:
                found = plain(f"{name}, ten best rows", "share", search.index.recall, "", setting)
                results.append(found)
    return results


def _measure_graphs(source: ModelSource, data: Path, home: Path) -> list[Result]:
    bundle, manifest = find_bundle(source, data)
    model, results = load_trained_tasks(source), []
    for task in manifest["tasks"]:
        exact = _measure_task(model, source, data, task)
        folder = home / task
        export_bundle(bundle, manifest, folder, "onnx-int8", task)
        graphs = _replace_outputs(load_trained_tasks(source), folder)
        small = _measure_task(graphs, source, data, task)
        for name, value in exact.items():
            setting = f"{SPLIT} of {task}"
            results.append(plain(f"{task}, float32", name, value, "", setting))
            results.append(plain(f"{task}, onnx-int8", name, small[name], "", setting))
        size = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        results.append(plain(f"{task}, onnx-int8 graphs", "bytes", size))
    return results


def _measure_task(model: TaskModel, source: ModelSource, data: Path, task: str) -> dict[str, float]:
    """Return the primary metric of a task by its name."""
    rows = evaluate_model(
        model,
        data,
        [task],
        [SPLIT],
        corpora=source.corpora,
        limits=source.limits,
        # The graphs compute in float32.
        precision="fp32",
        bootstrap_samples=0,
        fold=source.fold,
    )
    wanted = find_objective(model.config.tasks[task].objective).primary.name
    return {row["metric"]: row["value"] for row in rows if row["metric"] == wanted}


def _pad_input(values: np.ndarray, shape: Sequence[int | None]) -> np.ndarray:
    """Append zeros where a graph takes one size only, as of sounds."""
    missing = [
        (0, max(0, (wanted or have) - have))
        for wanted, have in zip(shape, values.shape, strict=True)
    ]
    return np.pad(values, missing)


def _replace_outputs(model: TaskModel, folder: Path) -> TaskModel:
    """Return the model with the outputs of the graphs of one task in place of its own."""
    import onnxruntime

    towers: dict[str, Any] = read_json(folder / GRAPH_MANIFEST)["towers"]
    runs: dict[str, Callable[[Batch], dict[str, Tensor]]] = {}
    for tower, about in towers.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(folder / about["file"]), options, providers=["CPUExecutionProvider"]
        )

        def run(batch: Batch, session: Any = session, about: Any = about) -> dict[str, Tensor]:
            feed = {
                name: _pad_input(np.asarray(batch[name]), each["shape"])
                for name, each in about["inputs"].items()
            }
            found = session.run(about["outputs"], feed)
            return dict(zip(about["outputs"], map(torch.from_numpy, found), strict=True))

        runs[tower] = run

    def embed(task: str, tower: str, batch: Batch) -> Tensor:
        return runs[tower](batch)["vectors"]

    def forward(task: str, batches: dict[str, Batch]) -> dict[str, Tensor]:
        ((tower, batch),) = batches.items()
        return runs[tower](batch)

    vars(model).update(embed=embed, forward=forward)
    return model

"""The preset ``paper`` at its real sizes: preparing media, loading batches, and training steps.

``benchmarks.paper_corpora`` makes the five corpora in the paper's layouts from the built-in
ones. ``skillnet prepare --config paper`` prepares them. The data loader is measured with pixels
that its threads change, and with stored pixels that a GPU would change. Then one process trains
``STEPS`` steps of ``finetune --config paper`` on the CPU, with small batches. Each part is a
process of its own, whose memory is read.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, in_turns, spread

ROWS, STEPS = 60, 20
#: Rows of a batch in training, by corpus; the width of the model is that of BERT base.
BATCHES = {"tnews": 16, "aishell1": 2, "aic_icc": 4, "vatex": 2, "pytorrent": 4}
#: Rows of a batch of the loader, and its rounds at most.
LOADED, MOST_ROUNDS = 32, 5
CLOCK = "cpu for the loader, else wall"
MIB = 2**20


def run(rounds: int, threads: int) -> list[Result]:
    """Time and memory of all parts, one after the other."""
    from skillnet_platform import storage

    archives, begin = storage.archive_root(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [
            *_in_process(_make, folder, archives),
            *_in_process(_prepare, folder, archives, threads),
            *_in_process(_load, folder, min(rounds, MOST_ROUNDS)),
            *_in_process(_train, folder, threads),
        ]
    total = time.monotonic() - begin
    return [Result("all parts", "", "s", total, total, total, "<= 600"), *results]


def _in_process(work: Callable[..., list[Result]], *arguments: Any) -> list[Result]:
    """Return the results of a function that runs in a process of its own."""
    # Not forked: memory that this process has touched would count for the part.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def _make(folder: Path, archives: Path) -> list[Result]:
    from benchmarks.paper_corpora import make_corpora
    from pipelines.data.corpora import DEMO
    from skillnet_corpora.fetch import fetch

    fetch(list(DEMO), archives)
    begin = time.monotonic()
    make_corpora(folder / "given", ROWS, archives)
    size = sum(path.stat().st_size for path in (folder / "given").rglob("*") if path.is_file())
    return [
        _plain("making media", "s", time.monotonic() - begin, f"{ROWS} training rows a corpus"),
        _plain("making media", "MiB", size / MIB, "all files"),
    ]


def _prepare(folder: Path, archives: Path, threads: int) -> list[Result]:
    from benchmarks.prepare_memory import Peaks
    from pipelines import prepare

    words = [f"--corpus={name}={folder / 'given' / name}" for name in BATCHES]
    words += ["--config", "paper", "--data", str(folder / "corpora"), "--archives", str(archives)]
    peaks, begin = Peaks(), time.monotonic()
    peaks.start()
    if prepare.main([*words, "--cpus", str(threads), "--json"]):
        raise SystemExit("the corpora could not be prepared")
    seconds = time.monotonic() - begin
    peaks.stopped.set()
    peaks.join()
    setting = f"skillnet prepare --config paper, five corpora, Ray with {threads} CPUs"
    return [
        _plain("preparing", "s", seconds, setting),
        _plain("preparing, largest worker", "MiB", peaks.largest("worker") / MIB, setting),
        _plain("preparing, driver", "MiB", peaks.driver / MIB, setting),
    ]


def _load(folder: Path, rounds: int) -> list[Result]:
    """Rates of batches whose pixels are changed, and of batches of stored pixels, on one core."""
    import torch

    from pipelines.data.shards.row_threads import limit_row_threads
    from pipelines.training.config.data import AUGMENTATIONS
    from pipelines.training.loading.dataloader import MultiTaskDataLoader

    torch.set_num_threads(1)
    limit_row_threads(1)
    config, results = _read_config(folder), []
    for task in ("text_to_image", "text_to_video"):
        chosen = {task: replace(config.tasks[task], batch_size=LOADED)}
        corpora = _open_corpora(folder)
        loader = MultiTaskDataLoader(
            corpora, chosen, config.model, 0, AUGMENTATIONS[config.training.augment]
        )
        step = iter(range(1 << 30))
        contenders = {
            "changed by the loader": lambda each=loader, n=step: each.batch(next(n)),
            "stored, for a GPU": lambda each=loader, n=step: each.batch(next(n), for_gpu=True),
        }
        took = in_turns(contenders, rounds, time.process_time, warmup=1)
        for name, seconds in took.items():
            batch = contenders[name]()
            size = sum(x.nbytes for x in (*batch.targets.values(), *_tensors(batch.towers)))
            setting = f"batches of {LOADED} rows, JPEG of {_describe_input(config.model, task)}"
            label = f"loading {task}, pixels {name}"
            rates = [LOADED / each for each in seconds]
            results += [
                Result(label, "", "rows/s per core", *spread(rates), "", rounds, setting),
                _plain(label, "KiB/row", size / LOADED / 1024, setting),
            ]
    return results


def _train(folder: Path, threads: int) -> list[Result]:
    import torch

    from pipelines.training.loop.loop import train_model
    from pipelines.training.loop.resolved_run import ResolvedRun

    torch.set_num_threads(threads)
    run = ResolvedRun(_read_config(folder))
    clock = StepClock()
    begin = time.monotonic()
    result = train_model(run, callbacks=[clock])
    total = time.monotonic() - begin
    clock.on_step_start(STEPS)
    config, seconds = run.config, defaultdict(list)
    for step, took in enumerate(clock.durations()):
        seconds[run.dataloader.batch_spec(step).task].append(took)
    weights = sum(parameter.numel() for parameter in result.model.parameters())
    setting = f"finetune --config paper, {STEPS} steps, one process, {config.training.precision}, "
    setting += f"{threads} threads, {weights / 1e6:.0f} million weights"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = [
        _plain("training, with the building of the model", "s", total, setting),
        _plain("training, largest resident memory", "MiB", peak, setting),
    ]
    for task, each in seconds.items():
        rows = config.tasks[task].batch_size
        rate = rows / statistics.median(each)
        note = f"batches of {rows}, {_describe_input(config.model, task)}; {len(each)} steps"
        results += [
            Result(f"training {task}", "", "s/step", *spread(each), "", len(each), setting, note),
            _plain(f"training {task}", "rows/s", rate, setting, note),
            _plain(f"training {task}", "loss", result.losses[task], setting, note),
        ]
    return results


class StepClock:
    """Callback that reads the clock at the start of each step."""

    def __init__(self) -> None:
        self._starts: list[float] = []

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Do nothing."""

    def on_step_start(self, step: int) -> None:
        """Read the clock."""
        self._starts.append(time.monotonic())

    def durations(self) -> list[float]:
        """Return the seconds of all steps but the one that has not ended."""
        return [after - before for before, after in pairwise(self._starts)]


def _read_config(folder: Path) -> Any:
    """Return the configuration of ``finetune --config paper`` with small batches on the CPU."""
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop.resolved_run import resolve_model_tasks
    from skillnet_platform.config import parser

    words = ["--config", "paper", "--data", str(folder / "corpora")]
    words += ["--training.steps", str(STEPS), "--training.lr", "1e-4"]
    words += ["--training.precision", "bf16", "--training.log_every", "1", "--evaluate", "false"]
    config = parser.parse_config(FinetuneConfig, words, "skillnet finetune", "Train.")
    manifests = {name: corpus.manifest for name, corpus in _open_corpora(folder).items()}
    # As ``skillnet finetune`` does: the manifests give the numbers of classes and symbols.
    config = resolve_model_tasks(config, manifests)
    for task in config.tasks.values():
        task.batch_size, task.weight = BATCHES[task.corpus], 1.0
    return config


def _open_corpora(folder: Path) -> dict[str, Any]:
    from pipelines.data.shards.dataset import open_corpus

    return {name: open_corpus(folder / "corpora" / name) for name in BATCHES}


def _tensors(towers: dict[str, dict[str, Any]]) -> list[Any]:
    return [x for tensors in towers.values() for x in tensors.values()]


def _describe_input(model: Any, task: str) -> str:
    """Return the largest input of a task's own modality in words."""
    return {
        "text_to_image": f"{model.image_size} x {model.image_size}",
        "text_to_video": f"{model.video_frames} coloured frames of {model.video_size} x "
        f"{model.video_size}",
        "speech_recognition": f"up to {model.max_frames / 100:g} s of sound",
    }.get(task, f"up to {model.max_tokens} tokens")


def _plain(measured: str, unit: str, value: float, setting: str, note: str = "") -> Result:
    return Result(measured, "", unit, value, value, value, "", 1, setting, note)

"""What share of a training step waits for data, with encoded pictures of 224 x 224.

The corpus is prepared by ``skillnet prepare`` and read by the training loop's own loader, with
augmentation and captions. The step is simulated, for there is no GPU here: it sleeps, and leaves
the CPUs to the loader as a step on a GPU would. How long is an assumption, that of docs/scale.md:
a GPU takes ``GPU_ROWS`` rows a second and has ``GPU_CPUS`` cores beside it. With fewer cores here
than that, the step is as much longer.
"""

import os
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import GPU_CPUS, GPU_ROWS, Result, spread
from benchmarks.media_corpus import PICTURE, files
from pipelines.training.config.data import AUGMENTATIONS
from pipelines.training.loading.dataloader import MultiTaskDataLoader, prefetch_batches

PICTURES, BATCH, STEPS = 256, 64, 40
#: Largest number of rounds: each takes as long as its steps sleep.
MOST_ROUNDS = 6
CLOCK = "wall; cpu where the row says so"


def run(rounds: int, threads: int) -> list[Result]:
    """The share, and what the loader takes and could give."""
    cores = len(os.sched_getaffinity(0))
    rate = GPU_ROWS * min(1.0, cores / GPU_CPUS)
    rounds = min(rounds, MOST_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        media = files("image", PICTURES)[0].parent.parent
        stream = open_pictures(Path(folder), media, BATCH)
        ahead = _first()
        _steps(stream, 0, 4, 0.0)
        starts = [4 + number * (STEPS + 1) for number in range(rounds + 1)]
        shares, costs = [], []
        for start, stop in pairwise(starts):
            waited, wall, cpu = _steps(stream, start, stop, BATCH / rate)
            shares.append(waited / wall)
            costs.append(cpu / (STEPS * BATCH))
        alone = []
        for start, stop in pairwise(starts):
            _, wall, _ = _steps(stream, start, stop, 0.0)
            alone.append(STEPS * BATCH / wall)
    setting = (
        f"batches of {BATCH} JPEG of {PICTURE} x {PICTURE} with augmentation and captions, "
        f"{STEPS} steps of {BATCH / rate * 1e3:.0f} ms, {rate:.0f} rows/s, {cores} cores"
    )
    note = f"the step sleeps: {GPU_ROWS} rows/s beside {GPU_CPUS} cores, brought down to {cores}"
    note += "; the loader before the machine's other work" * ahead
    name, loop = "waiting for data, simulated step", "time in the loop"
    return [
        Result(name, loop, "share", *spread(shares), "<= 0.05", rounds, setting, note),
        Result("loader", "", "s/row", *spread(costs), "", rounds, setting, "cpu time"),
        Result("loader, without a step", "", "rows/s", *spread(alone), "", rounds, setting),
    ]  # fmt: skip


def open_pictures(folder: Path, media: Path, batch_size: int) -> MultiTaskDataLoader:
    """Prepare pictures with captions at 224 x 224, and return the batches of the training loop.

    Args:
        folder: receives the prepared corpus.
        media: pictures, and their captions in ``metadata.jsonl``.
        batch_size: rows of a batch.
    """
    from pipelines.data.preprocessing.prepare import prepare
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.training.config.run import FinetuneConfig, TaskTraining
    from skillnet_corpora.readers.folder import FolderCorpus
    from skillnet_platform import cluster

    options = FolderCorpus.Options(size=PICTURE, validation=0.0, test=0.0)
    corpus = FolderCorpus(str(media), options, "pictures")
    with cluster.ray_session():
        prepare([], folder, folder, external=[corpus])
    config = FinetuneConfig()
    opened = {"pictures": open_corpus(folder / "pictures")}
    words = int(opened["pictures"].manifest["tokenizer"]["vocab_size"])
    model = replace(config.model, image_size=PICTURE, patch_size=16)
    model = replace(model, vocab_size=max(words, model.vocab_size))
    tasks = {"text_to_image": TaskTraining("pictures", batch_size=batch_size)}
    return MultiTaskDataLoader(opened, tasks, model, 0, AUGMENTATIONS[config.training.augment])


def _first() -> bool:
    """Put this thread and those that it starts before the machine's other work, where that may be:
    a machine that is shared then answers as one that is not. Whether it took."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (AttributeError, OSError):
        return False
    return True


def _steps(
    stream: MultiTaskDataLoader, start: int, stop: int, seconds: float
) -> tuple[float, float, float]:
    """(Waited, all, CPU) seconds of steps that take so long; the first batch is not counted."""
    with prefetch_batches(stream, start, stop) as batches:
        iterator = iter(batches)
        next(iterator)
        begin, cpu, waited = time.monotonic(), time.process_time(), 0.0
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                break
            waited += time.monotonic() - asked
            time.sleep(seconds)
        return waited, time.monotonic() - begin, time.process_time() - cpu

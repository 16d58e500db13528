"""Figures of pretraining: validation rows in the original, masked, and as the model restores them.

Only masked tokens are restored; visible tokens are drawn as read. The model predicts tokens
without their mean and variance (:func:`pipelines.training.loading.masking.normalise_tokens`); the
figures take these from the original, as the figures of MAE do (He et al. 2022). Training runs call
:func:`log_reconstructions` at each evaluation.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.folds import open_fold
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.inference import InferenceRunner
from pipelines.training.evaluation.masked import (
    masked_batches,
    open_masked_rows,
    predict_masked_tokens,
)
from pipelines.training.loading.audio_units import find_sound_units
from pipelines.training.loading.masking import VARIANCE_FLOOR, normalise_tokens
from pipelines.training.loading.task_columns import PRETRAINING, resolve_splits
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.stems import (
    cut_tubelets,
    join_tubelets,
    patchify,
    scale_to_signed,
    stack_frames,
    unpatchify,
    unstack_frames,
)
from skillnet_platform.storage.location import join_location, parse_location
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECONSTRUCTIONS_FOLDER = "reconstructions"
#: Rows of each modality in a figure.
ROWS_PER_TASK = 4
#: Columns of the figure.
VIEWS = ("original", "hidden", "restored")
#: Arrays (rows, ...) ready to draw: original, masked, restored.
ReconstructionTriple = tuple[np.ndarray, np.ndarray, np.ndarray]


def log_reconstructions(
    config: FinetuneConfig, model: TaskModel, run: Path, tracker: "Tracker | None", step: int
) -> Path | None:
    """Write the figure of a step to the run's folder and to its MLflow run.

    Args:
        config: of the run.
        model: on the device to run on.
        run: folder of the run.
        tracker: of the MLflow run, or None.
        step: training step, in the title and the file name.

    Returns:
        Path of the figure; None if the run has no masked task of images, audio or video.
    """
    figure = draw_reconstructions(config, model, f"step {step}")
    if figure is None:
        return None
    path = run / RECONSTRUCTIONS_FOLDER / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    if tracker is not None:
        tracker.artifact(path, RECONSTRUCTIONS_FOLDER)
    return path


def draw_reconstructions(
    config: FinetuneConfig, model: TaskModel, title: str = ""
) -> "Figure | None":
    """Draw rows of each masked task of images, audio and video.

    Args:
        config: of the run.
        model: on the device to run on.
        title: appended to the title of each part.

    Returns:
        The figure; None if there is no such task.
    """
    from matplotlib.figure import Figure

    triples = {
        modality: reconstruct_rows(config, model, name)
        for name, modality in _drawn_tasks(config).items()
    }
    if not triples:
        return None
    row_heights = {"image": 1.0, "sound": 0.55, "video": 1.35}
    heights = [row_heights[modality] * ROWS_PER_TASK + 0.6 for modality in triples]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(triples), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (modality, triple) in zip(parts, triples.items(), strict=True):
        part.suptitle(f"{modality}: {', '.join(VIEWS)}" + (f" · {title}" if title else ""), size=10)
        _draw_triple(part, modality, triple)
    return figure


def load_drawn_tasks(config: FinetuneConfig, model: TaskModel) -> None:
    """Take part in the loading of weights for a figure, on a rank that draws none.

    Args:
        config: of the run.
        model: of this rank.
    """
    for name in _drawn_tasks(config):
        model.require_weights(name)


def _drawn_tasks(config: FinetuneConfig) -> dict[str, str]:
    """Return masked task -> modality, in the order of a figure."""
    return {
        name: modality
        for modality in ("image", "sound", "video")
        for name in config.measured
        if (spec := config.model.tasks[name]).objective == "masked"
        and spec.towers["input"].modality == modality
    }


def reconstruct_rows(config: FinetuneConfig, model: TaskModel, task: str) -> ReconstructionTriple:
    """Return rows of a masked task in the original, masked, and restored.

    Args:
        config: of the run.
        model: on the device to run on.
        task: a masked task of images, audio or video.

    Returns:
        Images (rows, H, W, 3) and video (rows, frames, H, W, 3) in [0, 1]; audio (rows, mel bins,
        frames), NaN after the end of a recording.
    """
    model.require_weights(task)
    settings, masks = config.tasks[task], config.training.masking
    location = join_location(parse_location(config.data, Path()), settings.corpus)
    corpus = open_fold(open_corpus(location), config.fold)
    split = "validation" if "validation" in corpus.splits else next(iter(corpus.splits))
    rows = _evenly_spaced_rows(corpus, split)
    runner = InferenceRunner(model, config.training.precision)
    # A figure has fewer rows than a batch of masked_batches, so there is exactly one batch.
    (batch,) = masked_batches(model, task, corpus, split, masks, settings.max_length, rows)
    predicted_MP = predict_masked_tokens(runner, batch).float().cpu()
    masked_BT = batch.targets["masked"].cpu()
    dataset = open_masked_rows(model, task, corpus, split, masks, settings.max_length)
    # The batch contains masked inputs only, so the originals are read again.
    original = {
        key: x.float() if x.is_floating_point() else x
        for key, x in dataset.load_inputs(rows).items()
    }
    hidden = {key: x.float().cpu() for key, x in batch.towers["input"].items()}
    modality = config.model.tasks[task].towers["input"].modality
    if modality == "sound" and model.config.sound_units:
        # A sound unit is drawn as the mean of its frames.
        splits = resolve_splits(corpus, PRETRAINING)
        units = find_sound_units(corpus, splits, model.config.mel_stack, model.config.sound_units)
        predicted_MP = normalise_tokens(units.centres_KP[predicted_MP.argmax(1)])
    restore = {"image": _restore_images, "video": _restore_videos, "sound": _restore_audio}
    return restore[modality](model.config, original, hidden, masked_BT, predicted_MP)


def _restore_images(
    config: SkillNetConfig,
    original: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    x = scale_to_signed(original["pixels"], torch.float32)
    cut = _fill_masked(patchify(x, config.patch_size), masked_BT, predicted_MP)
    out = unpatchify(cut, config.patch_size, config.image_size)
    return _pixels(x), hidden["pixels"].numpy(), _pixels(out)


def _restore_videos(
    config: SkillNetConfig,
    original: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    frames = original["frames"]
    # Frames may have one channel; the figure draws RGB.
    x = scale_to_signed(frames, torch.float32).expand(*frames.shape[:-1], 3)
    cut = _fill_masked(cut_tubelets(x, config.tubelet), masked_BT, predicted_MP)
    out = join_tubelets(cut, config.tubelet, config.video_frames, config.video_size)
    return _pixels(x), hidden["frames"].expand(x.shape).numpy(), _pixels(out)


def _restore_audio(
    config: SkillNetConfig,
    original: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    x = original["log_mel"]
    cut = _fill_masked(stack_frames(x, config.mel_stack), masked_BT, predicted_MP)
    out = unstack_frames(cut, config.mel_stack, x.shape[1])
    ended = torch.arange(x.shape[1]) >= original["frames"][:, None]
    # Matplotlib leaves NaN blank, so that padding is not drawn as silence.
    views = [y.masked_fill(ended[..., None], torch.nan) for y in (x, hidden["log_mel"], out)]
    return tuple(y.transpose(1, 2).numpy() for y in views)  # type: ignore[return-value]


def _fill_masked(cut_BTP: Tensor, masked_BT: Tensor, predicted_MP: Tensor) -> Tensor:
    """Replace masked tokens by predictions, scaled to the original's mean and deviation."""
    masked_MP = cut_BTP[masked_BT]
    # With the floor of normalise_tokens, a perfect prediction restores the original.
    std_M1 = (masked_MP.var(-1, keepdim=True, unbiased=False) + VARIANCE_FLOOR).sqrt()
    # Cutting may return a view of the original, which is drawn too.
    cut_BTP = cut_BTP.clone()
    cut_BTP[masked_BT] = predicted_MP * std_M1 + masked_MP.mean(-1, keepdim=True)
    return cut_BTP


def _pixels(x: Tensor) -> np.ndarray:
    # Predictions are unbounded, but imshow expects values in [0, 1].
    return ((x + 1) / 2).clamp(0, 1).numpy()


def _evenly_spaced_rows(corpus: PreparedCorpus, split: str) -> np.ndarray:
    """Return a few evenly spaced row numbers of a split."""
    # Fixed rows make the figures of different steps comparable.
    count = corpus.splits[split].rows
    return np.unique(np.linspace(0, count - 1, min(ROWS_PER_TASK, count)).astype(np.int64))


def _draw_triple(part: Any, modality: str, triple: ReconstructionTriple) -> None:
    rows = len(triple[0])
    if modality == "video":
        # A video is drawn as a strip of frames; its three strips are below one another.
        axes = part.subplots(3 * rows, 1, squeeze=False)
        for row in range(rows):
            for view, videos in enumerate(triple):
                axes[3 * row + view, 0].imshow(np.concatenate(list(videos[row]), axis=1))
                axes[3 * row + view, 0].set_ylabel(VIEWS[view], size=6, rotation=0, ha="right")
    else:
        axes = part.subplots(rows, 3, squeeze=False)
        for row in range(rows):
            for view, images in enumerate(triple):
                if modality == "image":
                    axes[row, view].imshow(images[row])
                else:
                    # All views share the limits of the original, so their brightness can be
                    # compared. Percentiles ignore single loud bins.
                    low, high = np.nanpercentile(triple[0][row], (1, 99))
                    axes[row, view].imshow(
                        images[row], origin="lower", aspect="auto", vmin=low, vmax=high
                    )
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])

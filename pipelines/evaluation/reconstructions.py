"""A picture of what a model restores: rows of validation whole, with a part hidden, and restored.

Only hidden tokens are restored; the others are shown as they were read. Tokens are predicted
without their mean and deviation (see ``pipelines.loading.masking.normalised``): those are taken from the
original, as MAE's own pictures do.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.config.run import FinetuneConfig
from pipelines.evaluation.inference import InferenceRunner
from pipelines.evaluation.masked import masked_batches, pretrained_modality, restored_inputs
from pipelines.loading.audio_units import units_of
from pipelines.loading.masking import FLAT, normalised
from pipelines.loading.task_dataset import PRETRAINING, splits_of
from pipelines.shards.dataset import PreparedCorpus, open_corpus
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
from skillnet_platform.storage.location import below, place
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "reconstructions"
ROWS = 4
WAYS = ("original", "hidden", "restored")
#: Whole, with a part hidden, restored: (rows, ...) arrays ready to show.
ReconstructionTriple = tuple[np.ndarray, np.ndarray, np.ndarray]


def log_reconstructions(
    config: FinetuneConfig, model: TaskModel, run: Path, tracker: "Tracker | None", step: int
) -> Path | None:
    """Draw the picture of a step into the run's folder and its record; none without such a task."""
    figure = draw_reconstructions(config, model, f"step {step}")
    if figure is None:
        return None
    path = run / FOLDER / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    if tracker is not None:
        tracker.artifact(path, FOLDER)
    return path


def draw_reconstructions(
    config: FinetuneConfig, model: TaskModel, title: str = ""
) -> "Figure | None":
    """Rows of each masked task of pictures, sound and clips; none if there is no such task."""
    from matplotlib.figure import Figure

    found = {
        modality: reconstruct_rows(config, model, name)
        for modality in ("image", "sound", "video")
        for name in config.measured
        if (spec := config.model.tasks[name]).objective == "masked"
        and spec.towers["input"].modality == modality
    }
    if not found:
        return None
    tall = {"image": 1.0, "sound": 0.55, "video": 1.35}
    heights = [tall[modality] * ROWS + 0.6 for modality in found]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (modality, three) in zip(parts, found.items(), strict=True):
        part.suptitle(f"{modality}: {', '.join(WAYS)}" + (f" · {title}" if title else ""), size=10)
        _show(part, modality, three)
    return figure


def reconstruct_rows(config: FinetuneConfig, model: TaskModel, task: str) -> ReconstructionTriple:
    """Rows of a masked task whole, with a part hidden, and restored.

    Returns:
        Pictures (rows, H, W, 3) and clips (rows, frames, H, W, 3) in [0, 1]; sound (rows, mel
        bins, frames), not a number where a recording has ended.
    """
    settings, masks = config.tasks[task], config.training.masking
    corpus = open_corpus(below(place(config.data, Path()), settings.corpus))
    split = "validation" if "validation" in corpus.splits else next(iter(corpus.splits))
    rows = _evenly(corpus, split)
    runner = InferenceRunner(model, config.training.precision)
    (batch,) = masked_batches(model, task, corpus, split, masks, settings.max_length, rows)
    predicted_MP = restored_inputs(runner, batch).float().cpu()
    masked_BT = batch.targets["masked"].cpu()
    source = pretrained_modality(model, task, corpus, split, masks, settings.max_length)
    whole = {
        key: x.float() if x.is_floating_point() else x for key, x in source.inputs(rows).items()
    }
    hidden = {key: x.float().cpu() for key, x in batch.towers["input"].items()}
    modality = config.model.tasks[task].towers["input"].modality
    if modality == "sound" and model.config.sound_units:
        # A unit is shown as what it stands for: the mean of its frames.
        readable = splits_of(corpus, PRETRAINING)
        units = units_of(corpus, readable, model.config.mel_stack, model.config.sound_units)
        predicted_MP = normalised(units.centres_KP[predicted_MP.argmax(1)])
    restore = {"image": _pictures, "video": _clips, "sound": _recordings}
    return restore[modality](model.config, whole, hidden, masked_BT, predicted_MP)


def _pictures(
    config: SkillNetConfig,
    whole: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    x = scale_to_signed(whole["pixels"], torch.float32)
    cut = _filled(patchify(x, config.patch_size), masked_BT, predicted_MP)
    out = unpatchify(cut, config.patch_size, config.image_size)
    return _pixels(x), hidden["pixels"].numpy(), _pixels(out)


def _clips(
    config: SkillNetConfig,
    whole: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    frames = whole["frames"]
    x = scale_to_signed(frames, torch.float32).expand(*frames.shape[:-1], 3)
    cut = _filled(cut_tubelets(x, config.tubelet), masked_BT, predicted_MP)
    out = join_tubelets(cut, config.tubelet, config.video_frames, config.video_size)
    return _pixels(x), hidden["frames"].expand(x.shape).numpy(), _pixels(out)


def _recordings(
    config: SkillNetConfig,
    whole: dict[str, Tensor],
    hidden: dict[str, Tensor],
    masked_BT: Tensor,
    predicted_MP: Tensor,
) -> ReconstructionTriple:
    x = whole["log_mel"]
    cut = _filled(stack_frames(x, config.mel_stack), masked_BT, predicted_MP)
    out = unstack_frames(cut, config.mel_stack, x.shape[1])
    ended = torch.arange(x.shape[1]) >= whole["frames"][:, None]
    shown = [y.masked_fill(ended[..., None], torch.nan) for y in (x, hidden["log_mel"], out)]
    return tuple(y.transpose(1, 2).numpy() for y in shown)  # type: ignore[return-value]


def _filled(cut_BTP: Tensor, masked_BT: Tensor, predicted_MP: Tensor) -> Tensor:
    """The tokens with the hidden ones as predicted, at the original's mean and deviation."""
    asked_MP = cut_BTP[masked_BT]
    spread_M1 = (asked_MP.var(-1, keepdim=True, unbiased=False) + FLAT).sqrt()
    cut_BTP = cut_BTP.clone()
    cut_BTP[masked_BT] = predicted_MP * spread_M1 + asked_MP.mean(-1, keepdim=True)
    return cut_BTP


def _pixels(x: Tensor) -> np.ndarray:
    return ((x + 1) / 2).clamp(0, 1).numpy()


def _evenly(corpus: PreparedCorpus, split: str) -> np.ndarray:
    """A few row numbers spread over a split."""
    count = corpus.splits[split].rows
    return np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(np.int64))


def _show(part: Any, modality: str, three: ReconstructionTriple) -> None:
    rows = len(three[0])
    if modality == "video":
        # A clip is a strip of frames; its three strips stand below one another.
        axes = part.subplots(3 * rows, 1, squeeze=False)
        for row in range(rows):
            for way, clips in enumerate(three):
                axes[3 * row + way, 0].imshow(np.concatenate(list(clips[row]), axis=1))
                axes[3 * row + way, 0].set_ylabel(WAYS[way], size=6, rotation=0, ha="right")
    else:
        axes = part.subplots(rows, 3, squeeze=False)
        for row in range(rows):
            for way, images in enumerate(three):
                if modality == "image":
                    axes[row, way].imshow(images[row])
                else:
                    low, high = np.nanpercentile(three[0][row], (1, 99))
                    axes[row, way].imshow(
                        images[row], origin="lower", aspect="auto", vmin=low, vmax=high
                    )
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])

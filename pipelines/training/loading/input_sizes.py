"""Comparison of the sizes of a corpus' images and videos with those of a model.

:class:`pipelines.training.loading.task_dataset.TaskDataset` calls :func:`require_pixel_sizes`.
"""

from collections.abc import Sequence

from skillnet.config import SkillNetConfig
from skillnet_platform.errors import UserError


def require_pixel_sizes(
    modality: str, shape: Sequence[int], model: SkillNetConfig, location: str
) -> None:
    """Check that a model reads images or videos of a shape.

    Args:
        modality: ``image`` or ``video``.
        shape: dimensions of a row: (H, W, 3), or (N, H, W, C).
        model: sizes of its inputs.
        location: corpus and split, for the message.

    Raises:
        UserError: it reads other sizes; names the settings of the model and of the corpus.
    """
    if modality == "image":
        sizes = {"size": (shape[0], model.image_size, "image_size")}
    else:
        sizes = {
            "frames": (shape[0], model.video_frames, "video_frames"),
            "video_size": (shape[1], model.video_size, "video_size"),
        }
    wrong = {name: each for name, each in sizes.items() if each[0] != each[1]}
    if not wrong:
        return
    corpus = location.split("/")[0]
    found = ", ".join(f"{name} {stored}" for name, (stored, _, _) in wrong.items())
    settings = ", ".join(f"model.{key} {stored}" for stored, _, key in wrong.values())
    options = " ".join(
        f"--options.{corpus}.{name} {wanted}" for name, (_, wanted, _) in wrong.items()
    )
    raise UserError(
        f"{location}: {modality}s were prepared with {found}, which the model does not read. Set "
        f"{settings}, or prepare the corpus with {options}"
    )

"""Changes of images and videos: their numbers are drawn by the loader, their pixels on any device.

The random numbers of a row depend on (seed, step, row), so they are drawn on the host. The change
itself is a few tensor operations on each pixel. Beside a CPU, threads of the loader apply it. For a
GPU, the loader sends the stored bytes, a quarter of the size of floats, and the GPU runs the same
code. :meth:`pipelines.training.loading.task_dataset.TaskDataset.load` draws, and
:func:`apply_changes` applies.

Shapes: B rows, N frames (1 for images), H height, W width, C channels, T tokens, M masked tokens of
all rows, P values of a token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.data.shards.row_threads import map_row_slices
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.pixels import hide_pixels
from skillnet.modalities.tensors import PixelScale

#: Drawn numbers beside the pixels of a tower: (B, 3) in [-1, 1] for size and position, (B, 3)
#: factors of the channels, (B, T) flags of masked tokens, and (M,) their places among B T tokens.
GEOMETRY, TINT, MASKED, PLACES = "geometry", "tint", "masked", "places"
#: Bytes of floats that a GPU changes at a time; the intermediate results take a few times as much.
SLICE_BYTES = 64 * 2**20

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PixelChange:
    """Change of the images or videos of a tower; its drawn numbers are beside the pixels.

    Args:
        column: ``pixels`` of images, or ``frames`` of videos.
        shift: largest shift in pixels.
        scale: largest change of the size, as a fraction.
        tubelet: (frames, height, width) of a token of masked rows; None without masks.
        has_targets: the rows belong to a masked task, which predicts their masked tokens.
    """

    column: str
    shift: float = 0.0
    scale: float = 0.0
    tubelet: tuple[int, int, int] | None = None
    has_targets: bool = False

    def apply(self, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensors:
        """Return the inputs of the model, and the ``values`` (M, P) of masked tokens.

        Args:
            tensors: pixels, uint8, and drawn numbers of a tower, on one device.
            targets: expected answers of the rows; with ``masked`` flags in a masked task.
        """
        stored = tensors[self.column]
        x_BNHWC = stored if stored.ndim == 5 else stored[:, None]
        out_BNHWC = torch.empty(x_BNHWC.shape, device=stored.device)
        masked_BT = targets[MASKED] if self.has_targets else tensors.get(MASKED)
        parts: dict[int, Tensor] = {}

        def change(part: slice) -> None:
            out_BNHWC[part] = self._augment(x_BNHWC[part], tensors, part)
            if masked_BT is not None and self.tubelet is not None:
                places = None
                if self.has_targets:
                    # All rows of a batch have as many masked tokens.
                    count = masked_BT.shape[1]
                    places_Bm = tensors[PLACES].view(len(masked_BT), -1)[part]
                    places = places_Bm.flatten() - part.start * count
                hidden = hide_pixels(out_BNHWC[part], masked_BT[part], self.tubelet, places)
                out_BNHWC[part], values = hidden
                if values is not None:
                    parts[part.start] = values

        _map_slices(x_BNHWC, change)
        found = {self.column: out_BNHWC.view(stored.shape)}
        if self.has_targets:
            found[PLACES] = tensors[PLACES]
            found["values"] = torch.cat([parts[start] for start in sorted(parts)])
        return found

    def _augment(self, stored_BNHWC: Tensor, tensors: Mapping[str, Tensor], part: slice) -> Tensor:
        """Return rows in [0, 1], float32, shifted, resized and tinted."""
        _, N, H, W, C = stored_BNHWC.shape
        x = stored_BNHWC.permute(0, 1, 4, 2, 3).reshape(-1, N * C, H, W).float() / 255
        if GEOMETRY in tensors:
            x = _shift_and_scale(x, tensors[GEOMETRY][part], self.shift, self.scale)
        if TINT in tensors:
            x = (x * tensors[TINT][part][:, :, None, None]).clamp_(0, 1)
        return x.view(-1, N, C, H, W).permute(0, 1, 3, 4, 2)


#: Tower -> change of its pixels.
PixelChanges = dict[str, PixelChange]


def draw_change(
    column: str, largest: PixelScale, random: BatchRandom
) -> tuple[PixelChange, Tensors]:
    """Draw shift, size and tint of pixels: a change and its numbers.

    All frames of a video change equally.

    Args:
        column: pixels of a row.
        largest: limits of the changes.
        random: random numbers of these rows, keyed by seed, step and row.
    """
    change = PixelChange(column, largest.shift, largest.scale)
    drawn = {}
    if change.shift or change.scale:
        drawn[GEOMETRY] = torch.from_numpy(2 * random.uniform("place", 3) - 1)
    if largest.colour:
        tint_B3 = 1 + largest.colour * (2 * random.uniform("colour", 3) - 1)
        drawn[TINT] = torch.from_numpy(tint_B3)
    return change, drawn


def apply_changes(
    towers: Mapping[str, Tensors], targets: Mapping[str, Tensor], changes: PixelChanges
) -> tuple[dict[str, Tensors], Tensors]:
    """Apply the changes of all towers, on the device of their tensors: new towers and targets.

    Args:
        towers: tower -> tensors, with the drawn numbers of its change.
        targets: expected answers of the rows.
        changes: tower -> its change.
    """
    inputs, found = dict(towers), dict(targets)
    for tower, change in changes.items():
        inputs[tower] = change.apply(towers[tower], targets)
        if change.has_targets:
            found["values"] = inputs[tower].pop("values")
    return inputs, found


def _map_slices(x_BNHWC: Tensor, change: Callable[[slice], None]) -> None:
    """Call ``change`` for slices of the rows, in threads of the CPU or one after the other."""
    rows = len(x_BNHWC)
    if x_BNHWC.device.type == "cpu":
        map_row_slices(rows, change)
        return
    step = max(SLICE_BYTES // (4 * x_BNHWC[0].numel()), 1)
    for start in range(0, rows, step):
        change(slice(start, min(start + step, rows)))


def _shift_and_scale(x_BCHW: Tensor, draw_B3: Tensor, shift: float, scale: float) -> Tensor:
    B, _, H, W = x_BCHW.shape
    columns, lines = (torch.arange(size, device=x_BCHW.device) for size in (W, H))
    size = (1 + scale * draw_B3[:, :1]).reciprocal()
    # Pixel centres in [-1, 1], in the convention of grid_sample with align_corners=False.
    across_BW = size * ((2 * columns + 1) / W - 1) + draw_B3[:, 1:2] * 2 * shift / W
    down_BH = size * ((2 * lines + 1) / H - 1) + draw_B3[:, 2:] * 2 * shift / H
    grid = torch.stack(
        [across_BW[:, None].expand(B, H, W), down_BH[:, :, None].expand(B, H, W)], dim=-1
    )
    return F.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)

"""Tensor half of a modality: stem, lengths, batches, augmentation and masks of its rows.

:class:`ModalityTensors` is the base class; ``pixels``, ``sound`` and ``tokens`` beside
this module hold the built-in ones. The model, the data loader, inference, export and the planner
ask the instance that :attr:`skillnet.modality.Modality.tensor_half` loads.

Shapes: B batch, T tokens, D model width, M masked tokens of all rows, P values of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modality import Modality

Batch = dict[str, Tensor]
Tokens = tuple[Tensor, Tensor | None]

#: Token id of padding. The tokenizer, the mask and the loss rely on it.
PAD = 0
#: Added to the variance of a token's values, which are of the order of 1, before the division.
#: MAE's 1e-6 is for photographs: in a flat patch of a drawing it would amplify rounding errors.
VARIANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class RowAugmentation:
    """Random change of the rows of a batch, before they become tensors.

    Args:
        settings: ``pipelines.training.config.data.AugmentConfig``.
        random: random numbers of these rows; ``uniform(name, *shape)`` returns (B, *shape) in [0,
            1).
        limit: largest length of a row of the task; it does not depend on the batch.
        model: sizes of the inputs.
        deviation: divisor of the values in the corpus.
    """

    settings: Any
    random: Any
    limit: int
    model: SkillNetConfig
    deviation: float = 1.0


@dataclass(frozen=True)
class RowMasking:
    """Masks of the rows of a masked task, or of views.

    Args:
        model: grid of tokens.
        settings: ``pipelines.training.config.data.MaskConfig``.
        share: fraction of the tokens to mask.
        vocab_size: size of the vocabulary from which replacement words are drawn.
        longest: largest number of tokens of a text or code row; it does not depend on the batch.
        units: maps (B, T, P) values of tokens to the number of their unit (B, T); None if the
            values themselves are predicted.
    """

    model: SkillNetConfig
    settings: Any
    share: float
    vocab_size: int
    longest: int
    units: Any = None


@dataclass(frozen=True)
class PixelScale:
    """Largest changes of pixels: shift in pixels, size and colour as fractions."""

    shift: float = 0.0
    scale: float = 0.0
    colour: float = 0.0


class ModalityTensors:
    """Base class of tensor halves. A subclass has at least ``stem_class`` and the first methods.

    Rows of one size have one tensor, the column of the shards. Rows of several lengths are padded;
    their lengths are the second tensor, if the declaration names one.

    Args:
        modality: the declaration.
    """

    #: Module that maps (batch, name of the modality) to tokens and their mask. It is built from the
    #: configuration of the model.
    stem_class: ClassVar[type[nn.Module]]
    #: Whether a device changes the rows, and masks them after their change: rows of pixels.
    has_pixels: ClassVar[bool] = False
    #: Padded lengths are multiples of this, for even kernels and few shapes.
    pad_to: ClassVar[int] = 1
    #: CPU seconds that load one element of a row, see :meth:`count_elements`.
    seconds_per_element: ClassVar[float] = 0.0

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    # -- sizes -----------------------------------------------------------------------------

    def options(self, config: SkillNetConfig) -> Any:
        """Return the sizes of ``model.inputs.NAME``, as an instance of the declared options."""
        return self.modality.build_options(config.inputs.get(self.modality.name, {}))

    def find_longest(self, config: SkillNetConfig) -> int | None:
        """Return the longest row in its own unit, or None if all rows have one size."""
        return None

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> Any:
        """Return the tokens of a row in the encoder.

        Args:
            config: sizes of the inputs.
            length: number of units of the row in its own unit, a number or an array; None takes the
                longest.
        """
        raise NotImplementedError

    def count_values(self, config: SkillNetConfig) -> int:
        """Return the number of input values of one token, P, which a masked task predicts."""
        raise ValueError(f"no masked task can read {self.modality.name}")

    def count_classes(self, config: SkillNetConfig) -> int:
        """Return the number of units that a masked task predicts, or 0 if it predicts values."""
        return 0

    def count_outputs(self, config: SkillNetConfig) -> int:
        """Return the outputs of a masked task per token: its units, or its values."""
        return self.count_classes(config) or self.count_values(config)

    def count_elements(self, config: SkillNetConfig, length: int | None = None) -> int:
        """Return what the loader reads of a row: tokens, frames or pixels.

        Args:
            config: sizes of the inputs.
            length: number of units of the row in its own unit; None for rows of one size.
        """
        return length or 0

    def count_stem_flops(self, config: SkillNetConfig, stem: nn.Module, length: int | None) -> int:
        """Return the operations of the stem for one row; by default torch counts them.

        Args:
            config: sizes of the inputs.
            stem: module of the model.
            length: number of units of the row; None takes the longest.
        """
        from torch.utils.flop_counter import FlopCounterMode

        batch = self.make_example(config, 1, length)
        device = next(stem.parameters()).device
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            stem({name: x.to(device) for name, x in batch.items()}, self.modality.name)
        return counter.get_total_flops()

    # -- batches ---------------------------------------------------------------------------

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        """Return a batch that the model can read, to count and to trace.

        Args:
            config: sizes of the inputs.
            rows: B.
            length: number of units of the rows; None takes the longest.
            draw: source of random values, and of random lengths after the first row; None gives
                constant values.
            settings: preprocessing of a corpus.
        """
        raise NotImplementedError

    def make_batch(self, values: np.ndarray, lengths: np.ndarray | None = None) -> Batch:
        """Return rows as the tensors of a batch.

        Args:
            values: (B, …) rows, padded if they differ in length.
            lengths: (B,) of padded rows; None for rows of one size.
        """
        names = self.modality.batch
        batch = {names[0]: torch.from_numpy(values)}
        if lengths is not None and len(names) > 1:
            batch[names[1]] = torch.from_numpy(lengths.astype(np.int64, copy=False))
        return batch

    def count_units(self, batch: Batch) -> Tensor | None:
        """Return the (B,) units of each row in its own unit, or None if all rows have one size.

        Args:
            batch: tensors of :meth:`make_batch`.
        """
        names = self.modality.batch
        return batch[names[1]] if len(names) > 1 else None

    def check_shape(self, shape: tuple[int, ...], config: SkillNetConfig) -> dict[str, int]:
        """Return the key of each size of the model that differs from rows of one size.

        Args:
            shape: sizes of a row.
            config: sizes of the inputs.

        Returns:
            Key of the model's configuration -> size of the rows.
        """
        return {}

    # -- changes of training rows ----------------------------------------------------------

    def augment(
        self, values: np.ndarray, lengths: np.ndarray | None, change: RowAugmentation
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return changed rows and their lengths; by default the rows.

        Args:
            values: (B, …) rows.
            lengths: (B,) of padded rows; None for rows of one size.
            change: its settings and random numbers.
        """
        return values, lengths

    def scale_pixels(self, settings: Any) -> PixelScale:
        """Return the largest changes of pixels, which a device applies.

        Args:
            settings: ``pipelines.training.config.data.AugmentConfig``.
        """
        return PixelScale()

    def find_tubelet(self, config: SkillNetConfig) -> tuple[int, int, int]:
        """Return (frames, height, width) of a token of pixels."""
        raise NotImplementedError

    def draw_mask(self, inputs: Batch, masking: RowMasking, random: Any) -> np.ndarray:
        """Return the (B, T) flags of masked tokens; by default random tokens.

        Args:
            inputs: batch of these rows.
            masking: fraction and grid.
            random: see :class:`RowAugmentation`.
        """
        x, T = inputs[self.modality.column], self.count_tokens(masking.model)
        chance_BT, lengths_B = random.uniform("mask", T), np.full(len(x), T)
        for name in self.modality.batch[1:]:
            # The numbers of a row must not depend on the longest row of its batch.
            chance_BT = chance_BT[:, : self.count_tokens(masking.model, x.shape[1])]
            lengths_B = self.count_tokens(masking.model, inputs[name].numpy())
        return sample_mask(chance_BT, lengths_B, masking.share)

    def cut(self, x: Tensor, config: SkillNetConfig) -> Tensor:
        """Cut rows into the values of their tokens, (B, …) -> (B, T, P)."""
        raise ValueError(f"no masked task can read {self.modality.name}")

    def join(self, x_BTP: Tensor, shape: torch.Size, config: SkillNetConfig) -> Tensor:
        """Invert :meth:`cut`.

        Args:
            x_BTP: values of tokens, or one flag per value.
            shape: sizes of the rows.
            config: sizes of the inputs.
        """
        raise ValueError(f"no masked task can read {self.modality.name}")

    def find_visible(self, inputs: Batch) -> Tensor | None:
        """Return which values of padded rows are real, with one axis after the rows' length."""
        return None

    def mask(self, inputs: Batch, masking: RowMasking, random: Any) -> tuple[Batch, Batch]:
        """Mask a part of the rows; the values are those of the tokens, normalised, or their units.

        Args:
            inputs: batch of these rows.
            masking: fraction, grid and units.
            random: see :class:`RowAugmentation`.

        Returns:
            Masked inputs, with the ``places`` (M,) of masked tokens among the B T tokens of the
            batch; and ``masked`` (B, T) with the original ``values`` (M, …).
        """
        x = inputs[self.modality.column]
        masked_BT = torch.from_numpy(self.draw_mask(inputs, masking, random))
        cut_BTP = self.cut(x, masking.model)
        cover = self.join(spread_flags(masked_BT, cut_BTP.shape[2]), x.shape, masking.model)
        real = self.find_visible(inputs)
        left = None if real is None else ~cover & real
        shown = inputs | {self.modality.column: fill_masked(x, cover, left)}
        values = masking.units(cut_BTP) if masking.units else normalise_tokens(cut_BTP)
        return add_targets(shown, masked_BT, values)


def make_positions(count: int, dim: int) -> nn.Parameter:
    """Return learned positions (T, D) with BERT's initial scale."""
    # In place: on the meta device torch would import its compiler for a new tensor.
    return nn.Parameter(torch.randn(count, dim).mul_(0.02))


def build_stem_norm(config: SkillNetConfig) -> nn.Module:
    """Return the norm of a stem's tokens."""
    return nn.LayerNorm(config.dim, config.norm_eps) if config.stem_norm else nn.Identity()


def draw_lengths(longest: int, rows: int, draw: Generator) -> Tensor:
    """Return (B,) random lengths, the first one the longest."""
    shorter = torch.randint(1, longest + 1, (rows - 1,), generator=draw)
    return torch.cat([torch.tensor([longest]), shorter])


def sample_mask(chance_BT: np.ndarray, lengths_B: np.ndarray, share: float) -> np.ndarray:
    """Return a (B, T) mask of the tokens with the smallest numbers, at least one per row.

    Args:
        chance_BT: random numbers.
        lengths_B: real tokens of each row.
        share: fraction of the tokens to mask.
    """
    positions = np.arange(chance_BT.shape[1])
    real = positions < lengths_B[:, None]
    order = np.argsort(np.where(real, chance_BT, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(positions, order.shape), 1)
    return real & (rank < _count_masked(lengths_B, share)[:, None])


def sample_span_mask(
    chance_BT: np.ndarray, lengths_B: np.ndarray, share: float, span: int
) -> np.ndarray:
    """Return a (B, T) mask of spans of tokens, at least one token per row.

    As in wav2vec 2.0 (Baevski et al. 2020) spans start anywhere and may overlap. Here they are
    placed in the order of their random numbers until the fraction is reached; the last span is
    cut there (ours).

    Args:
        chance_BT: random numbers.
        lengths_B: real tokens of each row.
        share: fraction of the tokens to mask.
        span: tokens of one span.
    """
    B, T = chance_BT.shape
    positions = np.arange(T)
    # The last start is one span before the end; later starts would mask the end less often.
    starts_B = np.maximum(lengths_B - span, 0) + 1
    order = np.argsort(np.where(positions < starts_B[:, None], chance_BT, np.inf), 1, kind="stable")
    target_B = _count_masked(lengths_B, share)
    masked = np.zeros((B, T), dtype=bool)
    real = positions < lengths_B[:, None]
    for index in range(int(starts_B.max(initial=0))):
        missing = target_B - masked.sum(1)
        if not (missing > 0).any():
            break
        start = order[:, index, None]
        new = real & ~masked & (positions >= start) & (positions < start + span)
        new &= (index < starts_B)[:, None]
        masked |= new & (np.cumsum(new, 1) <= missing[:, None])
    return masked


def list_places(masked_BT: Tensor) -> Tensor:
    """Return the (M,) numbers of masked tokens among the B T tokens of a batch.

    The model selects tokens by number: a GPU would have to count the True values of a mask.
    """
    return masked_BT.flatten().nonzero()[:, 0]


def normalise_tokens(x_BTP: Tensor) -> Tensor:
    """Normalise the values of each token to mean 0 and deviation 1 (MAE, He et al. 2022)."""
    mean = x_BTP.mean(-1, keepdim=True)
    return (x_BTP - mean) / (x_BTP.var(-1, keepdim=True, unbiased=False) + VARIANCE_FLOOR).sqrt()


def _count_masked(lengths_B: np.ndarray, share: float) -> np.ndarray:
    count_B = np.rint(share * lengths_B).astype(np.int64)
    # At least one token stays visible, as context of the masked ones.
    return np.clip(count_B, 1, np.maximum(lengths_B - 1, 1))


def spread_flags(masked_BT: Tensor, count: int) -> Tensor:
    """Repeat the flag of a token for each of its values, (B, T) -> (B, T, count)."""
    return masked_BT[..., None].expand(-1, -1, count)


def fill_masked(x: Tensor, cover: Tensor, left: Tensor | None = None) -> Tensor:
    """Return ``x`` (B, …, C) with covered positions at the mean of the others, by row and channel.

    A constant grey, which no row has, would mark masked positions by brightness. The stem would
    learn this first, and rows without masks would look alike to the layers above.
    """
    positions = tuple(range(1, x.ndim - 1))
    left = (~cover if left is None else left).to(x.dtype)
    mean = (x * left).sum(positions, keepdim=True) / left.sum(positions, keepdim=True).clamp(min=1)
    return torch.where(cover, mean, x)


def add_targets(inputs: Batch, masked_BT: Tensor, values_BT: Tensor) -> tuple[Batch, Batch]:
    """Return masked inputs with the places of masked tokens, and their targets."""
    places_M = list_places(masked_BT)
    targets = {"masked": masked_BT, "values": values_BT.flatten(0, 1)[places_M]}
    return inputs | {"places": places_M}, targets

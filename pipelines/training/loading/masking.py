"""Masks of self-supervised rows: tokens, patches, tubelets and spans of frames.

Masks depend on random numbers of their rows
(:class:`pipelines.training.loading.augment.BatchRandom`), so on (seed, step, row) and not on the
number of workers. They lie on the model's grid of tokens. The *input* is masked, so that masking is
equal for every system: tokens as in BERT (80/10/10); patches, tubelets and frames take the mean of
the rest of their row, by channel or mel bin.

Shapes: B rows, T tokens, N frames, M masked tokens of all rows, P values of a token.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.training.config.data import MaskConfig
from pipelines.training.loading.audio_units import SoundUnits
from pipelines.training.loading.augment import MASK_TOKEN, BatchRandom
from skillnet.config import SkillNetConfig
from skillnet.stems import (
    cut_tubelets,
    join_tubelets,
    scale_to_signed,
    stack_frames,
    unstack_frames,
)

#: First id of a word; the ids below are padding, unknown, mask and class.
FIRST_WORD = 4
#: Fractions of the masked tokens that become the mask token, and another word (BERT).
TO_MASK, TO_RANDOM = 0.8, 0.1
#: Added to the variance of a token's values, which are of the order of 1, before the division.
#: MAE's 1e-6 is for photographs: in a flat patch of a drawing it would amplify rounding errors.
VARIANCE_FLOOR = 1e-3

Tensors = dict[str, Tensor]
MaskedInputs = tuple[Tensors, Tensors]


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


def sample_tube_mask(chance_BS: np.ndarray, times: int, share: float) -> np.ndarray:
    """Return a (B, times * S) mask of equal positions in all frames (VideoMAE, Tong et al. 2022).

    Args:
        chance_BS: random numbers of the S positions of a frame.
        times: frames, in tokens.
        share: fraction of the positions to mask.
    """
    B, S = chance_BS.shape
    return np.tile(sample_mask(chance_BS, np.full(B, S), share), (1, times))


class InputMasker:
    """Masking of the inputs of a batch.

    Args:
        model: grid of tokens.
        config: fractions to mask.
        vocab_size: size of the vocabulary from which replacement words are drawn.
        longest: largest number of tokens of a text or code row; it does not depend on the batch.
        units: targets of masked sound; None takes its frames.
    """

    def __init__(
        self,
        model: SkillNetConfig,
        config: MaskConfig,
        vocab_size: int,
        longest: int,
        units: SoundUnits | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._vocab_size, self._longest = vocab_size, longest
        self._units = units

    def __call__(self, modality: str, inputs: Tensors, random: BatchRandom) -> MaskedInputs:
        """Mask a part of text, code or sound.

        Args:
            modality: medium of the rows; :func:`hide_pixels` masks images and videos.
            inputs: batch of the model's tower.
            random: random numbers of these rows, keyed by seed, step and row.

        Returns:
            Masked inputs, with the ``places`` (M,) of masked tokens among the B T tokens of the
            batch; and ``masked`` (B, T) with the original ``values`` (M, …).
        """
        if modality == "sound":
            return self.mask_frames(inputs["log_mel"], inputs["frames"], random)
        share = self._config.text if modality == "text" else self._config.code
        return self.mask_tokens(inputs["tokens"], share, random)

    def mask_tokens(self, tokens_BT: Tensor, share: float, random: BatchRandom) -> MaskedInputs:
        """Mask tokens as BERT does: 80 % become the mask token and 10 % another word.

        The values (M,) are the original tokens.
        """
        tokens = tokens_BT.numpy()
        T = tokens.shape[1]
        chance, fate, word = (
            random.uniform(f"mask {purpose}", self._longest)[:, :T]
            for purpose in ("place", "fate", "word")
        )
        masked = sample_mask(chance, (tokens != 0).sum(1), share)
        other_word = FIRST_WORD + np.floor(word * (self._vocab_size - FIRST_WORD)).astype(np.int64)
        shown = np.where(masked & (fate < TO_MASK), MASK_TOKEN, tokens)
        shown = np.where(
            masked & (fate >= TO_MASK) & (fate < TO_MASK + TO_RANDOM), other_word, shown
        )
        flags = torch.from_numpy(masked)
        return _with_targets({"tokens": torch.from_numpy(shown)}, flags, tokens_BT)

    def draw_pixel_mask(self, modality: str, rows: int, random: BatchRandom) -> Tensor:
        """Return the (B, T) mask of random patches of images, or tubelets of videos.

        Args:
            modality: ``image`` or ``video``.
            rows: B.
            random: random numbers of these rows, keyed by seed, step and row.
        """
        times, across = self._model.video_frames // self._model.tubelet[0], self._model.video_size
        positions = (across // self._model.tubelet[1]) * (across // self._model.tubelet[2])
        if modality == "image":
            times, positions = 1, (self._model.image_size // self._model.patch_size) ** 2
        elif self._config.video_tubes:
            chance = random.uniform("mask", positions)
            return torch.from_numpy(sample_tube_mask(chance, times, self._config.video))
        share = self._config.image if modality == "image" else self._config.video
        T = times * positions
        masked = sample_mask(random.uniform("mask", T), np.full(rows, T), share)
        return torch.from_numpy(masked)

    def find_tubelet(self, modality: str) -> tuple[int, int, int]:
        """Return (frames, height, width) of a token of images or videos."""
        side = self._model.patch_size
        return (1, side, side) if modality == "image" else self._model.tubelet

    def mask_frames(
        self, log_mel_BNM: Tensor, frames_B: Tensor, random: BatchRandom
    ) -> MaskedInputs:
        """Mask spans of audio; the values are its frames, normalised per stack, or its units.

        A token with an incomplete stack at the end of the audio is masked only if it is the only
        token.
        """
        stack, N = self._model.mel_stack, log_mel_BNM.shape[1]
        complete_B = np.maximum(frames_B.numpy() // stack, 1)
        chance = random.uniform("mask", -(-self._model.max_frames // stack))[:, : -(-N // stack)]
        masked = sample_span_mask(chance, complete_B, self._config.sound, self._config.sound_span)
        flags = torch.from_numpy(masked)
        cover = unstack_frames(_spread(flags, stack), stack, N)
        left = ~cover & (torch.arange(N) < frames_B[:, None])[..., None]
        shown = {"log_mel": _fill_masked(log_mel_BNM, cover, left), "frames": frames_B}
        stacks_BTP = stack_frames(log_mel_BNM, stack)
        values = self._units(stacks_BTP) if self._units else normalise_tokens(stacks_BTP)
        return _with_targets(shown, flags, values)


def hide_pixels(
    x_BNHWC: Tensor,
    masked_BT: Tensor,
    tubelet: tuple[int, int, int],
    places_M: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mask tokens of images or videos; the values are their normalised pixels, with 3 channels.

    Args:
        x_BNHWC: rows in [0, 1]; an image is one frame.
        masked_BT: flags of the masked tokens.
        tubelet: (frames, height, width) of a token.
        places_M: masked tokens among the B T tokens; None returns no values.

    Returns:
        Masked rows, and (M, P) values or None.
    """
    frames, size = x_BNHWC.shape[1:3]
    f, h, w = tubelet
    cover = join_tubelets(_spread(masked_BT, f * h * w), tubelet, frames, size)
    values_MP = None
    if places_M is not None:
        signed = scale_to_signed(x_BNHWC, x_BNHWC.dtype).expand(*x_BNHWC.shape[:-1], 3)
        values_MP = normalise_tokens(cut_tubelets(signed, tubelet).flatten(0, 1)[places_M])
    return _fill_masked(x_BNHWC, cover), values_MP


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


def _spread(masked_BT: Tensor, count: int) -> Tensor:
    """(B, T) -> (B, T, count): the flag of a token for each of its values."""
    return masked_BT[..., None].expand(-1, -1, count)


def _fill_masked(x: Tensor, cover: Tensor, left: Tensor | None = None) -> Tensor:
    """``x`` (B, …, C) with covered positions at the mean of the others, by row and channel.

    A constant grey, which no row has, would mark masked positions by brightness. The stem would
    learn this first, and rows without masks would look alike to the layers above.
    """
    positions = tuple(range(1, x.ndim - 1))
    left = (~cover if left is None else left).to(x.dtype)
    mean = (x * left).sum(positions, keepdim=True) / left.sum(positions, keepdim=True).clamp(min=1)
    return torch.where(cover, mean, x)


def _with_targets(inputs: Tensors, masked_BT: Tensor, values_BT: Tensor) -> MaskedInputs:
    places_M = list_places(masked_BT)
    targets = {"masked": masked_BT, "values": values_BT.flatten(0, 1)[places_M]}
    return inputs | {"places": places_M}, targets

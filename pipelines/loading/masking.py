"""Masks of self-supervised rows: tokens, patches, tubelets and spans of frames.

Masks depend on random numbers of their rows (:class:`pipelines.loading.augment.BatchRandom`), so on
(seed, step, row) and not on the number of workers. They lie on the model's grid of tokens. The
*input* is masked, so that masking is equal for every system: tokens as in BERT (80/10/10); patches,
tubelets and frames take the mean of the rest of their row, by channel or mel bin.

Shapes: B rows, T tokens, N frames, M masked tokens of all rows, P values of a token.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import MaskConfig
from pipelines.loading.audio_units import SoundUnits
from pipelines.loading.augment import MASK_TOKEN, BatchRandom
from skillnet.config import SkillNetConfig
from skillnet.stems import (
    cut_tubelets,
    join_tubelets,
    patchify,
    scale_to_signed,
    stack_frames,
    unpatchify,
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
        """Mask a part of the inputs.

        Args:
            modality: of the rows.
            inputs: of the model's tower.
            random: of these rows.

        Returns:
            Masked inputs, with the ``places`` (M,) of masked tokens among the B T tokens of the
            batch; and ``masked`` (B, T) with the original ``values`` (M, …).
        """
        if modality == "image":
            return self.mask_patches(inputs["pixels"], random)
        if modality == "video":
            return self.mask_tubelets(inputs["frames"], random)
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

    def mask_patches(self, pixels_BHWC: Tensor, random: BatchRandom) -> MaskedInputs:
        """Mask random patches of images; the values are their normalised pixels."""
        x, size, side = _to_float(pixels_BHWC), self._model.image_size, self._model.patch_size
        B, T = len(x), (size // side) ** 2
        masked = sample_mask(random.uniform("mask", T), np.full(B, T), self._config.image)
        flags = torch.from_numpy(masked)
        cover = unpatchify(_spread(flags, side * side), side, size)
        values = normalise_tokens(patchify(scale_to_signed(x, x.dtype), side))
        return _with_targets({"pixels": _fill_masked(x, cover)}, flags, values)

    def mask_tubelets(self, frames_BNHWC: Tensor, random: BatchRandom) -> MaskedInputs:
        """Mask tubelets of videos; the values are their normalised pixels, with 3 channels."""
        x, size, count = _to_float(frames_BNHWC), self._model.video_size, self._model.video_frames
        tubelet, B = self._model.tubelet, len(x)
        f, h, w = tubelet
        times, positions = count // f, (size // h) * (size // w)
        if self._config.video_tubes:
            masked = sample_tube_mask(random.uniform("mask", positions), times, self._config.video)
        else:
            T = times * positions
            masked = sample_mask(random.uniform("mask", T), np.full(B, T), self._config.video)
        flags = torch.from_numpy(masked)
        cover = join_tubelets(_spread(flags, f * h * w), tubelet, count, size)
        three = scale_to_signed(x, x.dtype).expand(*x.shape[:-1], 3)
        values = normalise_tokens(cut_tubelets(three, tubelet))
        return _with_targets({"frames": _fill_masked(x, cover)}, flags, values)

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


def _to_float(x: Tensor) -> Tensor:
    """Pixels as floats in [0, 1], because a mean is not a multiple of 1/255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _with_targets(inputs: Tensors, masked_BT: Tensor, values_BT: Tensor) -> MaskedInputs:
    # The model selects tokens by number: a GPU would have to count the True values of a mask.
    places_M = masked_BT.flatten().nonzero()[:, 0]
    targets = {"masked": masked_BT, "values": values_BT.flatten(0, 1)[places_M]}
    return inputs | {"places": places_M}, targets

"""What a self-supervised row hides: masks of tokens, patches, tubelets and spans of frames.

Masks hang on draws made for their rows (see ``augment.Draws``), so on (seed, step, row)
and on no number of workers. They lie on the model's own grid of tokens; hiding is done to the
*input*, so that it is the same for every system: tokens as BERT's 80/10/10; patches, tubelets and
frames take the mean of what is left of their row, by channel or mel bin.

Shapes: B rows, T tokens, N frames, M masked tokens of all rows, P values of a token.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import MaskConfig
from pipelines.loading.audio_units import SoundUnits
from pipelines.loading.augment import MASK_TOKEN, Draws
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

#: Ids below are padding, unknown, mask and class: never put in a word's place.
FIRST_WORD = 4
#: Of the chosen tokens so many become the mask token, and so many another word (BERT).
TO_MASK, TO_RANDOM = 0.8, 0.1
#: Added to a token's variance, of values of the order of 1, before it is divided out. MAE's 1e-6
#: is for photographs: in a drawing's flat patch it would blow rounding up to full size.
FLAT = 1e-3

Inputs = dict[str, Tensor]
Masked = tuple[Inputs, dict[str, Tensor]]


def pick(chance_BT: np.ndarray, lengths_B: np.ndarray, share: float) -> np.ndarray:
    """(B, T) the ``share`` of a row's tokens with the smallest draws, at least one."""
    places = np.arange(chance_BT.shape[1])
    real = places < lengths_B[:, None]
    order = np.argsort(np.where(real, chance_BT, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(places, order.shape), 1)
    return real & (rank < _how_many(lengths_B, share)[:, None])


def pick_spans(chance_BT: np.ndarray, lengths_B: np.ndarray, share: float, span: int) -> np.ndarray:
    """(B, T) spans of ``span`` tokens that hide a ``share`` of a row, at least one token.

    As in wav2vec 2.0 (Baevski et al. 2020) spans start anywhere and may overlap; here they are
    laid in the order of their draws until the share is reached, and the last one is cut there.
    """
    B, T = chance_BT.shape
    places = np.arange(T)
    # A span that reaches over the end would favour no token there: the last start ends at the end.
    starts_B = np.maximum(lengths_B - span, 0) + 1
    order = np.argsort(np.where(places < starts_B[:, None], chance_BT, np.inf), 1, kind="stable")
    wanted = _how_many(lengths_B, share)
    hidden = np.zeros((B, T), dtype=bool)
    real = places < lengths_B[:, None]
    for index in range(int(starts_B.max(initial=0))):
        missing = wanted - hidden.sum(1)
        if not (missing > 0).any():
            break
        start = order[:, index, None]
        new = real & ~hidden & (places >= start) & (places < start + span)
        new &= (index < starts_B)[:, None]
        hidden |= new & (np.cumsum(new, 1) <= missing[:, None])
    return hidden


def pick_tubes(chance_BS: np.ndarray, times: int, share: float) -> np.ndarray:
    """(B, times * S) the same places of a clip in all its frames (VideoMAE, Tong et al. 2022)."""
    B, S = chance_BS.shape
    return np.tile(pick(chance_BS, np.full(B, S), share), (1, times))


class Hider:
    """Hides a part of a batch's rows.

    Args:
        model: the grid of tokens that masks lie on.
        config: how much is hidden.
        words: size of the vocabulary that words are drawn from.
        longest: most tokens that a text or code row may have; it does not hang on the batch.
        units: what hidden sound is asked for as; none asks for its frames.
    """

    def __init__(
        self,
        model: SkillNetConfig,
        config: MaskConfig,
        words: int,
        longest: int,
        units: SoundUnits | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._words, self._longest = words, longest
        self._units = units

    def __call__(self, modality: str, inputs: Inputs, draws: Draws) -> Masked:
        """(inputs with a part hidden, ``masked`` (B, T) and the ``values`` that stood there)."""
        if modality == "image":
            return self.patches(inputs["pixels"], draws)
        if modality == "video":
            return self.tubelets(inputs["frames"], draws)
        if modality == "sound":
            return self.frames(inputs["log_mel"], inputs["frames"], draws)
        share = self._config.text if modality == "text" else self._config.code
        return self.tokens(inputs["tokens"], share, draws)

    def tokens(self, tokens_BT: Tensor, share: float, draws: Draws) -> Masked:
        """BERT's masking: of the chosen tokens 80 % become the mask, 10 % another word.

        Values (M,) are the tokens that stood there.
        """
        tokens = tokens_BT.numpy()
        T = tokens.shape[1]
        chance, fate, word = (
            draws.uniform(f"mask {what}", self._longest)[:, :T]
            for what in ("place", "fate", "word")
        )
        masked = pick(chance, (tokens != 0).sum(1), share)
        random = FIRST_WORD + np.floor(word * (self._words - FIRST_WORD)).astype(np.int64)
        shown = np.where(masked & (fate < TO_MASK), MASK_TOKEN, tokens)
        shown = np.where(masked & (fate >= TO_MASK) & (fate < TO_MASK + TO_RANDOM), random, shown)
        flags = torch.from_numpy(masked)
        return _together({"tokens": torch.from_numpy(shown)}, flags, tokens_BT)

    def patches(self, pixels_BHWC: Tensor, draws: Draws) -> Masked:
        """Random patches of pictures blanked; values are their normalised pixels."""
        x, size, side = _floats(pixels_BHWC), self._model.image_size, self._model.patch_size
        B, T = len(x), (size // side) ** 2
        masked = pick(draws.uniform("mask", T), np.full(B, T), self._config.image)
        flags = torch.from_numpy(masked)
        cover = unpatchify(_spread(flags, side * side), side, size)
        values = normalised(patchify(scale_to_signed(x, x.dtype), side))
        return _together({"pixels": _blanked(x, cover)}, flags, values)

    def tubelets(self, frames_BNHWC: Tensor, draws: Draws) -> Masked:
        """Tubelets of clips blanked; values are their normalised pixels, 3 channels."""
        x, size, count = _floats(frames_BNHWC), self._model.video_size, self._model.video_frames
        tubelet, B = self._model.tubelet, len(x)
        f, h, w = tubelet
        times, places = count // f, (size // h) * (size // w)
        if self._config.video_tubes:
            masked = pick_tubes(draws.uniform("mask", places), times, self._config.video)
        else:
            T = times * places
            masked = pick(draws.uniform("mask", T), np.full(B, T), self._config.video)
        flags = torch.from_numpy(masked)
        cover = join_tubelets(_spread(flags, f * h * w), tubelet, count, size)
        three = scale_to_signed(x, x.dtype).expand(*x.shape[:-1], 3)
        values = normalised(cut_tubelets(three, tubelet))
        return _together({"frames": _blanked(x, cover)}, flags, values)

    def frames(self, log_mel_BNM: Tensor, frames_B: Tensor, draws: Draws) -> Masked:
        """Spans of recordings blanked; values are their frames, normalised stack by stack, or
        their units.

        A token whose stack of frames the end of the recording cuts short is hidden only where
        it is the only one.
        """
        stack, N = self._model.mel_stack, log_mel_BNM.shape[1]
        whole_B = np.maximum(frames_B.numpy() // stack, 1)
        chance = draws.uniform("mask", -(-self._model.max_frames // stack))[:, : -(-N // stack)]
        masked = pick_spans(chance, whole_B, self._config.sound, self._config.sound_span)
        flags = torch.from_numpy(masked)
        cover = unstack_frames(_spread(flags, stack), stack, N)
        left = ~cover & (torch.arange(N) < frames_B[:, None])[..., None]
        shown = {"log_mel": _blanked(log_mel_BNM, cover, left), "frames": frames_B}
        stacks_BTP = stack_frames(log_mel_BNM, stack)
        values = self._units(stacks_BTP) if self._units else normalised(stacks_BTP)
        return _together(shown, flags, values)


def normalised(x_BTP: Tensor) -> Tensor:
    """Each token's values less their mean, over their deviation (MAE, He et al. 2022)."""
    mean = x_BTP.mean(-1, keepdim=True)
    return (x_BTP - mean) / (x_BTP.var(-1, keepdim=True, unbiased=False) + FLAT).sqrt()


def _how_many(lengths_B: np.ndarray, share: float) -> np.ndarray:
    wanted = np.rint(share * lengths_B).astype(np.int64)
    # Something has to be left to tell the rest from.
    return np.clip(wanted, 1, np.maximum(lengths_B - 1, 1))


def _spread(masked_BT: Tensor, count: int) -> Tensor:
    """(B, T) -> (B, T, count): a token's flag for each of its places."""
    return masked_BT[..., None].expand(-1, -1, count)


def _blanked(x: Tensor, cover: Tensor, left: Tensor | None = None) -> Tensor:
    """``x`` (B, …, C) with covered places at the mean of those that are left, by row and channel.

    Mid grey, which no row has, would make brightness the sign of what is hidden: the stem learns
    it before all else, and all rows that hide nothing look alike to what is built on them.
    """
    places = tuple(range(1, x.ndim - 1))
    left = (~cover if left is None else left).to(x.dtype)
    mean = (x * left).sum(places, keepdim=True) / left.sum(places, keepdim=True).clamp(min=1)
    return torch.where(cover, mean, x)


def _floats(x: Tensor) -> Tensor:
    """Pixels as floats in [0, 1]: a mean is no whole number of 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _together(inputs: Inputs, masked_BT: Tensor, values_BT: Tensor) -> Masked:
    return inputs | {"masked": masked_BT}, {"masked": masked_BT, "values": values_BT[masked_BT]}

"""Configuration of the changes and masks of training rows."""

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Interval

from skillnet_platform.config.bounds import PartialFraction, UnitFraction, require_bounds

PixelShift = Annotated[float, Interval(ge=0, le=4096)]
FrameCount = Annotated[int, Interval(ge=0, le=100_000)]
#: A mask leaves something to see, and something to predict.
MaskedFraction = Annotated[float, Interval(gt=0, lt=1)]


@dataclass
class AugmentConfig:
    """Random changes of training rows, keyed by (seed, step, row). Zero turns a change off.

    Args:
        image_shift: largest shift of an image in each direction, in pixels.
        image_scale: largest relative change of the size of an image.
        image_colour: largest relative change of each colour channel.
        video_shift: largest shift of a video, in pixels, equal for all its frames.
        video_scale: largest relative change of the size of a video.
        sound_pad: largest number of silent frames added before the audio, and after it.
        sound_gain: largest change of level, in units of the normalised log power.
        sound_noise: largest level of added noise, as a fraction of the mean power of the audio.
        time_masks: spans of frames silenced per row (SpecAugment, Park et al. 2019).
        time_mask_frames: longest of these spans, in frames; at most a fifth of the audio.
        frequency_masks: bands of mel bins silenced per row.
        frequency_mask_bins: widest of these bands, in bins.
        token_dropout: fraction of the tokens of a text replaced by the mask token, for
            classification.
        caption_dropout: the same for captions. A caption has few tokens, and without one of
            them it may describe another row.
        code_dropout: fraction of code tokens replaced by the mask token.
    """

    image_shift: PixelShift = 3.0
    image_scale: PartialFraction = 0.1
    image_colour: UnitFraction = 0.1
    video_shift: PixelShift = 1.5
    video_scale: PartialFraction = 0.08
    sound_pad: FrameCount = 6
    sound_gain: Annotated[float, Interval(ge=0, le=100)] = 0.2
    sound_noise: Annotated[float, Interval(ge=0, le=100)] = 0.05
    time_masks: FrameCount = 1
    time_mask_frames: FrameCount = 10
    frequency_masks: FrameCount = 1
    frequency_mask_bins: FrameCount = 12
    token_dropout: PartialFraction = 0.1
    caption_dropout: PartialFraction = 0.0
    code_dropout: PartialFraction = 0.05

    def __post_init__(self) -> None:
        require_bounds(self, "training.augment.")


@dataclass
class MaskConfig:
    """Fractions of a row that masked tasks mask, keyed by (seed, step, row).

    Args:
        text: fraction of the tokens of a text (BERT, Devlin et al. 2019: 0.15).
        code: the same for code.
        image: fraction of the patches of an image (SimMIM, Xie et al. 2022: 0.6 with small
            patches).
        video: fraction of the tubelets of a video (VideoMAE, Tong et al. 2022: 0.75 to 0.9).
        video_tubes: mask the same positions in all frames, as VideoMAE does; else any tubelets.
        sound: fraction of the audio (wav2vec 2.0, Baevski et al. 2020: about a half).
        views: fraction of the tokens masked in each of the two views of a row.
        sound_span: tokens of one masked span of sound. A token is ``model.mel_stack`` frames of
            10 ms; spans of wav2vec 2.0 last 200 ms.
    """

    text: MaskedFraction = 0.15
    code: MaskedFraction = 0.15
    image: MaskedFraction = 0.6
    video: MaskedFraction = 0.75
    video_tubes: bool = True
    sound: MaskedFraction = 0.5
    sound_span: Annotated[int, Interval(ge=1, le=100_000)] = 5
    views: MaskedFraction = 0.25

    def __post_init__(self) -> None:
        require_bounds(self, "training.masking.")

    def for_views(self) -> "MaskConfig":
        """Return the masks of views: an equal fraction of every modality, without tubes."""
        share = self.views
        return replace(
            self, text=share, code=share, image=share, video=share, sound=share, video_tubes=False
        )

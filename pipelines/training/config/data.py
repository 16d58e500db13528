"""Changes and masks of training rows, and the names by which a run chooses them.

``training.augment`` is a name of :data:`AUGMENTATIONS`, ``training.masking`` one of :data:`MASKS`.
"""

from dataclasses import dataclass, replace
from typing import Literal

AugmentationName = Literal["none", "light", "default", "strong"]
MaskingName = Literal["default", "short_sound", "small"]


@dataclass(frozen=True)
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
        token_dropout: fraction of the tokens of a text replaced by the mask token. A caption keeps
            its few tokens: without one of them it may describe another row.
        code_dropout: fraction of code tokens replaced by the mask token.
    """

    image_shift: float = 3.0
    image_scale: float = 0.1
    image_colour: float = 0.1
    video_shift: float = 1.5
    video_scale: float = 0.08
    sound_pad: int = 6
    sound_gain: float = 0.2
    sound_noise: float = 0.05
    time_masks: int = 1
    time_mask_frames: int = 10
    frequency_masks: int = 1
    frequency_mask_bins: int = 12
    token_dropout: float = 0.1
    code_dropout: float = 0.05


#: ``light`` is for images of few pixels and rows of few tokens; ``strong`` hides every fifth token
#: of a text. ``none`` changes nothing.
AUGMENTATIONS: dict[AugmentationName, AugmentConfig | None] = {
    "none": None,
    "light": AugmentConfig(image_shift=1.0, video_shift=0.5, token_dropout=0.0, code_dropout=0.0),
    "default": AugmentConfig(),
    "strong": AugmentConfig(token_dropout=0.2),
}


@dataclass(frozen=True)
class MaskConfig:
    """Fractions of a row that masked tasks mask, keyed by (seed, step, row).

    A mask leaves something to see, and something to predict.

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

    text: float = 0.15
    code: float = 0.15
    image: float = 0.6
    video: float = 0.75
    video_tubes: bool = True
    sound: float = 0.5
    sound_span: int = 5
    views: float = 0.25

    def for_views(self) -> "MaskConfig":
        """Return the masks of views: an equal fraction of every modality, without tubes."""
        share = self.views
        return replace(
            self, text=share, code=share, image=share, video=share, sound=share, video_tubes=False
        )


_SHORT_SOUND = MaskConfig(sound=0.4, sound_span=2)
#: ``short_sound``: one span of 200 ms masks a large part of a recording of half a second. ``small``
#: also is for videos of few positions per frame, of which masking tubes would leave one.
MASKS: dict[MaskingName, MaskConfig] = {
    "default": MaskConfig(),
    "short_sound": _SHORT_SOUND,
    "small": replace(_SHORT_SOUND, video=0.5, video_tubes=False),
}

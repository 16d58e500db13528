"""Stems: embed the input of each modality as tokens of the model's width.

Shapes: B batch, T tokens, D model width, M mel bins, N frames, C channels, p side of a patch,
f frames of a tubelet.

Every stem maps the batch of its tower (a dict of tensors) to ``(x_BTD, mask_BT)``. The mask is
True at real tokens, and None if all tokens are real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig

Batch = dict[str, Tensor]
Tokens = tuple[Tensor, Tensor | None]

#: Token id of padding. The tokenizer, the mask and the loss rely on it.
PAD = 0


def _positions(count: int, dim: int) -> nn.Parameter:
    # Learned positions, with BERT's initial scale.
    # In place: on the meta device torch would import its compiler for a new tensor.
    return nn.Parameter(torch.randn(count, dim).mul_(0.02))


def _build_stem_norm(config: SkillNetConfig) -> nn.Module:
    return nn.LayerNorm(config.dim, config.norm_eps) if config.stem_norm else nn.Identity()


class TokenStem(nn.Module):
    """Token embedding of text and code. Batch: ``tokens`` (B, T) int64; 0 is padding.

    With ``bigram_buckets``, a hashed table adds an embedding of each pair of adjacent tokens (the
    idea of fastText's n-gram features).
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        self.buckets = config.bigram_buckets
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.buckets:
            self.bigram = nn.Embedding(self.buckets, config.dim)
            nn.init.normal_(self.bigram.weight, std=0.02)
        self.position = _positions(config.max_tokens, config.dim)
        # Text and code share the stem; these vectors tell the layers which one is read.
        self.modality = nn.ParameterDict(
            {name: torch.zeros(config.dim) for name in ("text", "code")}
        )
        self.norm = _build_stem_norm(config)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        tokens_BT = batch["tokens"]
        T = tokens_BT.shape[1]
        if self.max_tokens < T:
            raise ValueError(
                f"a sequence of {T} tokens is longer than model.max_tokens {self.max_tokens}; "
                "truncate it or raise model.max_tokens"
            )
        mask_BT = tokens_BT != PAD
        x_BTD = self.embedding(tokens_BT)
        if self.buckets:
            following = F.pad(tokens_BT[:, 1:], (0, 1))
            # Multiplicative hash. 1_000_003 is prime, so pairs spread over the buckets.
            x_BTD = x_BTD + self.bigram((tokens_BT * 1_000_003 + following) % self.buckets)
        x_BTD = x_BTD + self.position[:T] + self.modality[modality]
        return self.norm(x_BTD), mask_BT


class PatchStem(nn.Module):
    """Patch embedding of images. Batch: ``pixels`` (B, H, W, 3), uint8 or floats in [0, 1].

    T = (H/p)(W/p), and one more with ``class_token``, which comes first.
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.size, self.patch = config.image_size, config.patch_size
        count = (self.size // self.patch) ** 2
        self.project = nn.Linear(3 * self.patch**2, config.dim)
        self.position = _positions(count, config.dim)
        self.class_token = nn.Parameter(torch.zeros(config.dim)) if config.class_token else None
        self.norm = _build_stem_norm(config)

    def patches(self, pixels_BHWC: Tensor) -> Tensor:
        """Cut images into patches with values in [-1, 1], (B, H, W, 3) -> (B, T, p*p*3).

        Raises:
            ValueError: images of another size than ``model.image_size``.
        """
        H, W, C = pixels_BHWC.shape[1:]
        if (H, W, C) != (self.size, self.size, 3):
            raise ValueError(
                f"images are {H}x{W}x{C}, the model reads {self.size}x{self.size}x3; "
                "prepare them at model.image_size"
            )
        return patchify(scale_to_signed(pixels_BHWC, self.position.dtype), self.patch)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.patches(batch["pixels"])) + self.position
        if self.class_token is not None:
            first_B1D = self.class_token.expand(len(x_BTD), 1, -1)
            x_BTD = torch.cat([first_B1D.to(x_BTD.dtype), x_BTD], 1)
        return self.norm(x_BTD), None


class TubeletStem(nn.Module):
    """Tubelet embedding of video. Batch: ``frames`` (B, N, H, W, C), C 1 or 3.

    T = (N/f)(H/h)(W/w). With ``video_motion``, three more channels of each frame hold its
    difference to the previous frame (ours). A tubelet then sees changes across its own border in
    time.
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.count, self.size = config.video_frames, config.video_size
        self.tubelet = config.tubelet
        f, h, w = self.tubelet
        tokens = (self.count // f) * (self.size // h) * (self.size // w)
        self.motion = config.video_motion
        self.project = nn.Linear((6 if self.motion else 3) * f * h * w, config.dim)
        self.position = _positions(tokens, config.dim)
        self.norm = _build_stem_norm(config)

    def tubelets(self, frames_BNHWC: Tensor) -> Tensor:
        """Cut videos into tubelets with values in [-1, 1], (B, N, H, W, C) -> (B, T, f*h*w*3 or 6).

        Grey frames are repeated to 3 channels.

        Raises:
            ValueError: videos of another size than ``model.video_frames`` and ``model.video_size``.
        """
        B, N, H, W, C = frames_BNHWC.shape
        if (N, H, W) != (self.count, self.size, self.size) or C not in (1, 3):
            raise ValueError(
                f"videos are {N} frames of {H}x{W}x{C}, the model reads {self.count} frames of "
                f"{self.size}x{self.size} with 1 or 3 channels; prepare them at "
                "model.video_frames and model.video_size"
            )
        x = scale_to_signed(frames_BNHWC, self.position.dtype).expand(B, N, H, W, 3)
        return cut_tubelets(with_motion(x) if self.motion else x, self.tubelet)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.tubelets(batch["frames"])) + self.position
        return self.norm(x_BTD), None


class LogMelStem(nn.Module):
    """Convolutional embedding of sound. Batch: ``log_mel`` (B, N, M), ``frames`` (B,) real frames.

    Two convolutions over time, as in Whisper's stem. The second one maps ``mel_stack`` frames to
    one token: T = ceil(N / mel_stack).
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.stack, self.max_frames = config.mel_stack, config.max_frames
        # An odd kernel is symmetric, so a token is centred on its frames.
        width = self.stack + (self.stack + 1) % 2
        self.first = nn.Conv1d(config.n_mels, config.dim, 3, padding=1)
        self.second = nn.Conv1d(
            config.dim, config.dim, width, stride=self.stack, padding=width // 2
        )
        self.position = _positions(-(-config.max_frames // self.stack), config.dim)
        self.norm = _build_stem_norm(config)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BNM, frames_B = batch["log_mel"], batch["frames"]
        N = x_BNM.shape[1]
        if self.max_frames < N:
            raise ValueError(
                f"audio of {N} frames is longer than model.max_frames {self.max_frames}; "
                "truncate it or raise model.max_frames"
            )
        # Padding is zeroed before each convolution, so a row does not depend on its batch.
        real_B1N = (torch.arange(N, device=x_BNM.device) < frames_B[:, None])[:, None]
        x = self.first(x_BNM.to(self.position.dtype).transpose(1, 2) * real_B1N)
        x = self.second(F.gelu(x) * real_B1N).transpose(1, 2)
        T = -(-N // self.stack)
        x_BTD = F.gelu(x[:, :T]) + self.position[:T]
        mask_BT = torch.arange(T, device=x.device) < token_lengths(frames_B, self.stack)[:, None]
        return self.norm(x_BTD), mask_BT


def token_lengths(frames_B: Tensor, stack: int) -> Tensor:
    """Return the number of tokens of sound with a number of frames: ceil(frames / stack).

    Args:
        frames_B: real frames.
        stack: frames per token.
    """
    return (frames_B + stack - 1) // stack


def patchify(x_BHWC: Tensor, side: int) -> Tensor:
    """Cut images into squares, row by row: (B, H, W, C) -> (B, T, p*p*C).

    Args:
        x_BHWC: images whose sides divide by ``side``.
        side: p, pixels per side of a patch.
    """
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // side, side, W // side, side, C)
    return x.transpose(2, 3).reshape(B, -1, side * side * C)


def cut_tubelets(x_BNHWC: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """Cut videos into tubelets, frame by frame: (B, N, H, W, C) -> (B, T, f*h*w*C).

    Args:
        x_BNHWC: videos whose sizes divide by the tubelet.
        tubelet: (frames, height, width) of one token.
    """
    B, N, H, W, C = x_BNHWC.shape
    f, h, w = tubelet
    x = x_BNHWC.reshape(B, N // f, f, H // h, h, W // w, w, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, f * h * w * C)


def join_tubelets(x_BTP: Tensor, tubelet: tuple[int, int, int], frames: int, size: int) -> Tensor:
    """Invert :func:`cut_tubelets`.

    Args:
        x_BTP: tubelets.
        tubelet: (frames, height, width) of one token.
        frames: frames of the video.
        size: pixels per side of a frame.
    """
    f, h, w = tubelet
    x = x_BTP.reshape(x_BTP.shape[0], frames // f, size // h, size // w, f, h, w, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], frames, size, size, -1)


def stack_frames(x_BNM: Tensor, stack: int) -> Tensor:
    """Join consecutive frames, (B, N, M) -> (B, T, stack*M), with zeros after the last frame.

    Args:
        x_BNM: log-mel frames.
        stack: frames per token.
    """
    B, N, M = x_BNM.shape
    return F.pad(x_BNM, (0, 0, 0, -N % stack)).reshape(B, -1, stack * M)


def unstack_frames(x_BTP: Tensor, stack: int, frames: int) -> Tensor:
    """Invert :func:`stack_frames`.

    Args:
        x_BTP: joined frames.
        stack: frames per token.
        frames: N, frames of the result.
    """
    return x_BTP.reshape(x_BTP.shape[0], x_BTP.shape[1] * stack, -1)[:, :frames]


def values_of_token(config: SkillNetConfig, modality: str) -> int:
    """Return the number of input values of one token of image, video (3 channels) or sound.

    Args:
        config: sizes of the inputs.
        modality: ``image``, ``video`` or ``sound``.
    """
    f, h, w = config.tubelet
    return {
        "image": 3 * config.patch_size**2,
        "video": 3 * f * h * w,
        "sound": config.mel_stack * config.n_mels,
    }[modality]


def masked_outputs(config: SkillNetConfig, modality: str) -> int:
    """Return the outputs of a masked head per token: its input values, or the sound units.

    Args:
        config: sizes of the inputs.
        modality: ``image``, ``video`` or ``sound``.
    """
    if modality == "sound" and config.sound_units:
        return config.sound_units
    return values_of_token(config, modality)


def with_motion(x_BNHWC: Tensor) -> Tensor:
    """Append to each frame its difference to the previous one, (B, N, H, W, C) -> (…, 2 C)."""
    # The first frame has no predecessor, so its difference is zero.
    before = torch.cat([x_BNHWC[:, :1], x_BNHWC[:, :-1]], 1)
    return torch.cat([x_BNHWC, x_BNHWC - before], -1)


def scale_to_signed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert pixels, uint8 or floats in [0, 1], to floats in [-1, 1].

    Args:
        x: pixels of any shape.
        dtype: floating-point type of the result.
    """
    if x.dtype == torch.uint8:
        return x.to(dtype) * (2 / 255) - 1
    return x.to(dtype) * 2 - 1


STEMS: dict[str, type[nn.Module]] = {
    "token": TokenStem,
    "patch": PatchStem,
    "tubelet": TubeletStem,
    "log_mel": LogMelStem,
}

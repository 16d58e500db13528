"""Stems: what turns an input of each modality into tokens of the model's width.

Shapes: B batch, T tokens, D model width, M mel bins, N frames, C channels, p a patch's side,
f frames of a tubelet.

Every stem maps its tower's batch (a dict of tensors) to ``(x_BTD, mask_BT)``; the mask is True
at real tokens, and None where all tokens are real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig

Batch = dict[str, Tensor]
Tokens = tuple[Tensor, Tensor | None]

PAD = 0


def _positions(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, dim) * 0.02)


class TokenStem(nn.Module):
    """Text and code. Batch: ``tokens`` (B, T) int64, 0 is padding.

    Besides its own embedding a token may get that of the pair it forms with the next one, from
    a hashed table (the idea of fastText's n-gram features).
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
        self.modality = nn.ParameterDict(
            {name: torch.zeros(config.dim) for name in ("text", "code")}
        )
        self.norm = nn.LayerNorm(config.dim)

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
            # A multiplicative hash; 1_000_003 is prime, so that pairs spread over the buckets.
            x_BTD = x_BTD + self.bigram((tokens_BT * 1_000_003 + following) % self.buckets)
        x_BTD = x_BTD + self.position[:T] + self.modality[modality]
        return self.norm(x_BTD), mask_BT


class PatchStem(nn.Module):
    """Pictures. Batch: ``pixels`` (B, H, W, 3), uint8 or floats in [0, 1]. T = (H/p)(W/p)."""

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.size, self.patch = config.image_size, config.patch_size
        count = (self.size // self.patch) ** 2
        self.project = nn.Linear(3 * self.patch**2, config.dim)
        self.position = _positions(count, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def patches(self, pixels_BHWC: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, T, p*p*3), values in [-1, 1]."""
        B, H, W, C = pixels_BHWC.shape
        if (H, W, C) != (self.size, self.size, 3):
            raise ValueError(
                f"pictures are {H}x{W}x{C}, the model reads {self.size}x{self.size}x3; "
                "prepare them at model.image_size"
            )
        p = self.patch
        x = _signed(pixels_BHWC, self.position.dtype).view(B, H // p, p, W // p, p, C)
        return x.transpose(2, 3).reshape(B, -1, p * p * C)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.patches(batch["pixels"])) + self.position
        return self.norm(x_BTD), None


class TubeletStem(nn.Module):
    """Clips. Batch: ``frames`` (B, N, H, W, C), C 1 or 3. T = (N/f)(H/h)(W/w).

    With ``video_motion`` each frame carries, as three more channels, its difference to the one
    before (ours), so that a tubelet sees what changed across its own border in time.
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
        self.norm = nn.LayerNorm(config.dim)

    def tubelets(self, frames_BNHWC: Tensor) -> Tensor:
        """(B, N, H, W, C) -> (B, T, f*h*w*3 or 6), values in [-1, 1]; grey becomes 3 channels."""
        B, N, H, W, C = frames_BNHWC.shape
        if (N, H, W) != (self.count, self.size, self.size) or C not in (1, 3):
            raise ValueError(
                f"clips are {N} frames of {H}x{W}x{C}, the model reads {self.count} frames of "
                f"{self.size}x{self.size} with 1 or 3 channels; prepare them at "
                "model.video_frames and model.video_size"
            )
        f, h, w = self.tubelet
        x = _signed(frames_BNHWC, self.position.dtype).expand(B, N, H, W, 3)
        if self.motion:
            before = torch.cat([x[:, :1], x[:, :-1]], 1)
            x = torch.cat([x, x - before], -1)
        channels = x.shape[-1]
        x = x.reshape(B, N // f, f, H // h, h, W // w, w, channels)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, f * h * w * channels)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BTD = self.project(self.tubelets(batch["frames"])) + self.position
        return self.norm(x_BTD), None


class LogMelStem(nn.Module):
    """Sound. Batch: ``log_mel`` (B, N, M), ``frames`` (B,) their real number.

    Two convolutions over time (the form of Whisper's stem), the second of which takes
    ``mel_stack`` frames to one token: T = ceil(N / mel_stack).
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.stack, self.max_frames = config.mel_stack, config.max_frames
        width = self.stack + (self.stack + 1) % 2
        self.first = nn.Conv1d(config.n_mels, config.dim, 3, padding=1)
        self.second = nn.Conv1d(
            config.dim, config.dim, width, stride=self.stack, padding=width // 2
        )
        self.position = _positions(-(-config.max_frames // self.stack), config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BNM, frames_B = batch["log_mel"], batch["frames"]
        N = x_BNM.shape[1]
        if self.max_frames < N:
            raise ValueError(
                f"a recording of {N} frames is longer than model.max_frames {self.max_frames}; "
                "cut it or raise model.max_frames"
            )
        # Padding is zeroed before each convolution: a row's result must not hang on its batch.
        real_B1N = (torch.arange(N, device=x_BNM.device) < frames_B[:, None])[:, None]
        x = self.first(x_BNM.to(self.position.dtype).transpose(1, 2) * real_B1N)
        x = self.second(F.gelu(x) * real_B1N).transpose(1, 2)
        T = -(-N // self.stack)
        x_BTD = F.gelu(x[:, :T]) + self.position[:T]
        mask_BT = torch.arange(T, device=x.device) < token_lengths(frames_B, self.stack)[:, None]
        return self.norm(x_BTD), mask_BT


def token_lengths(frames_B: Tensor, stack: int) -> Tensor:
    """Number of tokens of recordings with that many frames: ceil(frames / stack)."""
    return (frames_B + stack - 1) // stack


def _signed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels, uint8 or floats in [0, 1], as floats in [-1, 1]."""
    if x.dtype == torch.uint8:
        return x.to(dtype) * (2 / 255) - 1
    return x.to(dtype) * 2 - 1


STEMS: dict[str, type[nn.Module]] = {
    "token": TokenStem,
    "patch": PatchStem,
    "tubelet": TubeletStem,
    "log_mel": LogMelStem,
}

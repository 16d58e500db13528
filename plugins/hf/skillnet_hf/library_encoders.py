"""Adapters of transformers and timm encoders: SkillNet's batches in, tokens of its grid out.

Shapes: B batch, T tokens, D model width, W width of the library's model, N frames, M mel bins,
V tokens of the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.encoder import WrappedEncoder
from skillnet.modalities.pixels import scale_to_signed, with_motion
from skillnet.modalities.sound import token_lengths
from skillnet.modalities.tensors import PAD, Batch, Tokens
from skillnet.precision import uses_gpu_kernels

#: Names of the lists of layers in models of transformers and timm.
LAYER_LISTS = frozenset({"layer", "layers", "blocks"})


class EncoderAdapter(WrappedEncoder):
    """Encoder of a library, with a projection if its width differs from the study's.

    Args:
        model: model of the library.
        width: W, width of its tokens.
        dim: D, width that the heads expect.
    """

    def __init__(self, model: Any, width: int, dim: int) -> None:
        super().__init__()
        self.model = model
        self.project = nn.Identity() if width == dim else nn.Linear(width, dim)

    def forward(self, batch: Batch) -> Tokens:
        """Return tokens (B, T, D) and their mask (B, T), None if every token is real."""
        x_BTW, mask_BT = self.encode(batch)
        return self.project(x_BTW), mask_BT

    def encode(self, batch: Batch) -> Tokens:
        """Return the library's tokens (B, T, W) and their mask."""
        raise NotImplementedError

    def token_embedding(self, vocabulary: int) -> Tensor:
        """Return the embedding (V, D) of the first ``vocabulary`` tokens.

        Raises:
            ValueError: the encoder has no token embedding.
        """
        raise ValueError(f"{type(self.model).__name__} embeds no tokens")

    def recompute_layers(self, is_on: bool) -> None:
        """Keep only the inputs of the layers for the backward pass, or all (transformers' models).

        Args:
            is_on: whether layers are computed again.
        """
        if is_on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()

    def list_layers(self) -> list[nn.Module]:
        """Return the layers of the library's model."""
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in LAYER_LISTS:
                return list(module)
        return []

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    def attend_for(self, x: Tensor) -> None:
        """Select the attention implementation of transformers for the device of ``x``."""
        # torch's fused attention has a slow backward pass on CPUs; see skillnet/layers.py.
        self.model.config._attn_implementation = "sdpa" if uses_gpu_kernels(x) else "eager"


class TextTower(EncoderAdapter):
    """``BertModel`` or ``RobertaModel``, no pooler. Batch: ``tokens`` (B, T), 0 is padding."""

    def encode(self, batch: Batch) -> Tokens:
        tokens_BT = batch["tokens"]
        mask_BT = tokens_BT != PAD
        self.attend_for(tokens_BT)
        return self.model(tokens_BT, attention_mask=mask_BT).last_hidden_state, mask_BT

    def token_embedding(self, vocabulary: int) -> Tensor:
        weight_VW = self.model.get_input_embeddings().weight[:vocabulary]
        return weight_VW if isinstance(self.project, nn.Identity) else self.project(weight_VW)


class ImageTower(EncoderAdapter):
    """timm's ``VisionTransformer``. Batch: ``pixels`` (B, H, W, 3)."""

    def __init__(self, model: Any, width: int, dim: int) -> None:
        super().__init__(model, width, dim)
        model.patch_embed.proj = PatchProduct(model.patch_embed.proj)

    def recompute_layers(self, is_on: bool) -> None:
        """Keep only the inputs of the blocks for the backward pass, or all.

        Args:
            is_on: whether blocks are computed again.
        """
        self.model.set_grad_checkpointing(is_on)

    def encode(self, batch: Batch) -> Tokens:
        x_BCHW = scale_to_signed(batch["pixels"], self.dtype).permute(0, 3, 1, 2)
        # timm decides this at construction, when the device is not yet known.
        for block in self.model.blocks:
            block.attn.fused_attn = uses_gpu_kernels(x_BCHW)
        x_BTW = self.model.forward_features(x_BCHW)
        return x_BTW[:, self.model.num_prefix_tokens :], None


class PatchProduct(nn.Module):
    """Convolution whose stride equals its kernel, computed as one matrix product.

    (B, C, …) -> (B, W, …), with the weights of the convolution that it replaces. On CPUs the
    backward pass of the convolution takes several times as long.
    """

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        assert convolution.stride == convolution.kernel_size
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        B, C, *sizes = x.shape
        kernel = self.weight.shape[2:]
        counts = [size // side for size, side in zip(sizes, kernel, strict=True)]
        cut = [n for pair in zip(counts, kernel, strict=True) for n in pair]
        # (B, C, counts and kernel in turn) -> (B, counts, C, kernel)
        n = len(sizes)
        order = [0, *range(2, 2 * n + 2, 2), 1, *range(3, 2 * n + 3, 2)]
        patches = x.reshape(B, C, *cut).permute(order).flatten(n + 1)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


class VideoTower(EncoderAdapter):
    """``VideoMAEModel``. Batch: ``frames`` (B, N, H, W, C), C 1 or 3.

    A model with six channels also gets the difference of each frame to the previous one, as
    SkillNet does with ``model.video_motion``.
    """

    def __init__(self, model: Any, width: int, dim: int) -> None:
        super().__init__(model, width, dim)
        embeddings = model.embeddings
        embeddings.patch_embeddings.projection = PatchProduct(
            embeddings.patch_embeddings.projection
        )
        # transformers keeps its fixed positions in a plain tensor, which stays on the CPU and is
        # copied to the device in each pass.
        positions = embeddings.position_embeddings
        del embeddings.position_embeddings
        embeddings.register_buffer("position_embeddings", positions, persistent=False)

    def encode(self, batch: Batch) -> Tokens:
        x = scale_to_signed(batch["frames"], self.dtype)
        x = x.expand(*x.shape[:-1], 3)
        if self.model.config.num_channels == 6:
            x = with_motion(x)
        self.attend_for(x)
        return self.model(x.permute(0, 1, 4, 2, 3)).last_hidden_state, None


class SoundTower(EncoderAdapter):
    """Encoder of ``Speech2TextModel``. Batch: ``log_mel`` (B, N, M), ``frames`` (B,).

    Each of its convolutions halves the number of frames.
    """

    def encode(self, batch: Batch) -> Tokens:
        x_BNM, real_BN = real_frames(batch, self.dtype)
        N, stack = x_BNM.shape[1], 2**self.model.config.num_conv_layers
        T = -(-N // stack)
        # Convolutions read beyond the end of a row. Silence after every row makes the result
        # independent of the other rows of the batch.
        behind = T * stack - N + self._reach(stack)
        x_BNM, mask_BN = F.pad(x_BNM, (0, 0, 0, behind)), F.pad(real_BN, (0, behind))
        self.attend_for(x_BNM)
        x_BTW = self.model(x_BNM, attention_mask=mask_BN.long()).last_hidden_state
        lengths_B = token_lengths(batch["frames"], stack)
        mask_BT = torch.arange(T, device=x_BNM.device) < lengths_B[:, None]
        return x_BTW[:, :T], mask_BT

    def _reach(self, stack: int) -> int:
        """Return the frames after its last one that a token sees, as a multiple of ``stack``."""
        kernels = self.model.config.conv_kernel_sizes
        seen = sum(kernel // 2 * 2**layer for layer, kernel in enumerate(kernels))
        return -(-seen // stack) * stack


class SpectrogramTower(EncoderAdapter):
    """``ASTModel``: patches of the spectrogram, averaged over frequency to one token per time step.

    Batch: ``log_mel`` (B, N, M), ``frames`` (B,).
    """

    def encode(self, batch: Batch) -> Tokens:
        config = self.model.config
        stack, patch = config.time_stride, config.patch_size
        x_BNM, _ = real_frames(batch, self.dtype)
        B, N, _ = x_BNM.shape
        steps = (config.max_length - patch) // stack + 1
        # The position vectors have one length, so rows are padded with silence up to it. Patches
        # are wider than their stride, so they are centred on their frames.
        before = (patch - stack) // 2
        x_BNM = F.pad(x_BNM, (0, 0, before, config.max_length - N - before))
        lengths_B = token_lengths(batch["frames"], stack)
        real_BT = torch.arange(steps, device=x_BNM.device) < lengths_B[:, None]
        bands = (config.num_mel_bins - patch) // config.frequency_stride + 1
        # The first two tokens are the class and distillation tokens.
        mask = torch.cat([real_BT.new_ones(B, 2), real_BT.repeat(1, bands)], 1)
        self.attend_for(x_BNM)
        x = self.model(x_BNM, attention_mask=mask).last_hidden_state[:, 2:]
        T = -(-N // stack)
        return x.reshape(B, bands, steps, -1).mean(1)[:, :T], real_BT[:, :T]


def real_frames(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return log-mel frames (B, N, M) with zeros at padding, and the mask of real frames (B, N).

    Args:
        batch: ``log_mel`` and ``frames``.
        dtype: type of the frames.
    """
    x_BNM, frames_B = batch["log_mel"].to(dtype), batch["frames"]
    real_BN = torch.arange(x_BNM.shape[1], device=x_BNM.device) < frames_B[:, None]
    # Frames behind the end of a row may hold anything, so they are set to silence.
    return x_BNM * real_BN[..., None], real_BN

"""Transformer encoder: layers whose attention and feed-forward parts may have skills.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from skillnet.config import SkillNetConfig
from skillnet.layer_compiler import LayerCompiler, pad_tokens
from skillnet.layers import (
    LayerWeights,
    PackedRows,
    Padding,
    RaggedRows,
    SkillAttention,
    SkillFeedForward,
    Skills,
    compute_dtype,
    padding_bias,
    takes_lengths,
)
from skillnet.precision import uses_gpu_kernels
from skillnet.skill_weights import share_merges

#: Largest ``model.drop_path`` at which GPUs compute dropped rows too and give them the weight 0: up
#: to here, leaving rows out costs more in copies than it saves (the limit of DINOv2).
MASKED_DROP_PATH = 0.1


#: Largest share of real tokens at which they are packed. Above, the copies cost more than padding.
PACKED_SHARE = 0.93


class StepRows(NamedTuple):
    """Position of a forward pass in its step.

    Args:
        generator: source of random numbers of the step, on the host; each tower draws from it in
            turn.
        total: rows N of all ranks and micro-batches.
        first: position of the first row.
    """

    generator: np.random.Generator
    total: int
    first: int


class KeptRows(NamedTuple):
    """Rows that compute a residual branch, and the factor of their result.

    Args:
        rows: (kept,) row numbers, int64.
        scale: N / kept rows of the step. It is 0 if the step keeps none of these rows; then one of
            them is computed, so that its rank takes part in all collective operations.
    """

    rows: Tensor
    scale: float


#: Draw of one layer: the rows of both branches, or weights (2, B, 1, 1) of all rows.
LayerDraw = tuple[KeptRows, KeptRows] | Tensor

_step_rows: ContextVar[StepRows | None] = ContextVar("step_rows", default=None)


@contextmanager
def place_rows(seed: int, total: int, first: int) -> Iterator[None]:
    """State which rows of a step the forward passes inside the block compute.

    Args:
        seed: start of the random numbers of the step, equal on all ranks.
        total: rows of all ranks and micro-batches.
        first: position of the first row.
    """
    token = _step_rows.set(StepRows(np.random.default_rng(seed), total, first))
    try:
        yield
    finally:
        _step_rows.reset(token)


def draw_kept_rows(
    x_BTD: Tensor, layers: int, drop_path: float, is_masked: bool | None = None
) -> list[LayerDraw] | None:
    """Draw the rows that compute the residual branches of each layer.

    Outside of :func:`place_rows` the rows are a step of their own, drawn by torch's generator.

    Args:
        x_BTD: tokens.
        layers: number of layers.
        drop_path: probability of dropping a branch of a row.
        is_masked: compute dropped rows too, and give them the weight 0; None does so on GPUs up to
            :data:`MASKED_DROP_PATH`.

    Returns:
        None if no row is dropped.
    """
    B = x_BTD.shape[0]
    step = _step_rows.get()
    total, first = (B, 0) if step is None else (step.total, step.first)
    kept = count_kept_rows(total, drop_path)
    if kept == total:
        return None
    # The host draws, so it knows the numbers of rows, and devices agree. The order of random
    # numbers is a random order, so the step keeps exactly `kept` rows.
    generator = np.random.default_rng(_draw_seed()) if step is None else step.generator
    ranks_L2N = generator.random((layers, 2, total), dtype=np.float32).argsort(-1)
    kept_L2B = (ranks_L2N < kept)[..., first : first + B]
    scale = total / kept
    if is_masked is None:
        is_masked = drop_path <= MASKED_DROP_PATH and uses_gpu_kernels(x_BTD)
    if is_masked:
        weights_L2B11 = torch.from_numpy(kept_L2B[..., None, None] * scale)
        return list(_move(weights_L2B11, x_BTD).to(x_BTD.dtype).unbind())
    return [
        (_select(attention_B, scale, x_BTD), _select(feedforward_B, scale, x_BTD))
        for attention_B, feedforward_B in kept_L2B
    ]


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def _select(kept_B: np.ndarray, scale: float, x_BTD: Tensor) -> KeptRows:
    (rows,) = kept_B.nonzero()
    if not len(rows):
        rows, scale = np.zeros(1, dtype=np.int64), 0.0
    return KeptRows(_move(torch.from_numpy(rows), x_BTD), scale)


def _move(values: Tensor, x_BTD: Tensor) -> Tensor:
    """Copy a small tensor of the host to the device of the tokens, without a wait on GPUs."""
    if x_BTD.device.type == "cuda":
        values = values.pin_memory()
    return values.to(x_BTD.device, non_blocking=True)


def count_kept_rows(rows: int, drop_path: float) -> int:
    """Return the number of rows that keep a branch: at least one, so that its weights learn.

    Args:
        rows: number of rows in the step.
        drop_path: probability of dropping a branch of a row.
    """
    return max(round(rows * (1 - drop_path)), 1)


#: Name of the only "skill" of a layer without skill modules. All tasks use its weights.
SHARED: Skills = ("shared",)


#: A layer or a branch of it: tokens, active skills or weights, padding, and for a layer also rows.
LayerCall = Callable[..., Tensor]


class EncoderLayer(nn.Module):
    """Transformer layer that normalizes the input of each branch, or the sum after it.

    Args:
        config: sizes, and the layers and modules that have skills.
        index: position of the layer, from 0. Every ``skill_every``-th layer has skills.
    """

    def __init__(self, config: SkillNetConfig, index: int) -> None:
        super().__init__()
        carries = (index + 1) % config.skill_every == 0
        self.attention_skills = carries and config.skill_modules in ("both", "attention")
        self.feedforward_skills = carries and config.skill_modules in ("both", "feedforward")
        std = config.init_scale * config.dim**-0.5
        # Residual branches start smaller with depth (GPT-2), so the sum keeps its variance.
        out_std = (2 * config.num_layers) ** -0.5
        self.is_post_norm = config.norm_position == "post"
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = SkillAttention(
            config.skills if self.attention_skills else SHARED,
            config.dim,
            config.num_heads,
            std=std,
            out_std=std * out_std,
            has_bias=config.bias,
            forms=config.skill_forms,
        )
        self.feedforward_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.feedforward = SkillFeedForward(
            config.skills if self.feedforward_skills else SHARED,
            config.dim,
            config.ffn_dim,
            std=std,
            out_std=config.init_scale * config.ffn_dim**-0.5 * out_std,
            has_bias=config.bias,
            forms=config.skill_forms,
        )
        #: Wraps a call of the layer, to gather the weights of the given skills around it.
        self.gather_weights: Callable[[LayerCall, Skills], LayerCall] | None = None
        #: Compiles the computation of the layer; None computes operation by operation.
        self.compiler: LayerCompiler | None = None

    def forward(
        self,
        x_BTD: Tensor,
        skills: Skills,
        padding: Padding,
        draw: LayerDraw | None = None,
    ) -> Tensor:
        """Add both residual branches, and normalize each sum in a post-norm layer.

        Args:
            x_BTD: tokens.
            skills: active skills, sorted.
            padding: see :func:`skillnet.layers.multihead_attention`.
            draw: rows that compute the branches, see :func:`draw_kept_rows`; None means all.
        """
        if self.gather_weights is None:
            return self._run(x_BTD, skills, padding, draw)
        # The weights exist only inside the call, so a step cannot share merged ones.
        with share_merges(()):
            call = self.gather_weights(self._run, tuple(dict.fromkeys(chain(*self._own(skills)))))
            return call(x_BTD, skills, padding, draw)

    def _own(self, skills: Skills) -> tuple[Skills, Skills]:
        """Return the keys of the weights that attention and feed-forward network read."""
        attention = skills if self.attention_skills else SHARED
        return attention, skills if self.feedforward_skills else SHARED

    def _run(
        self, x_BTD: Tensor, skills: Skills, padding: Padding, draw: LayerDraw | None
    ) -> Tensor:
        weights = self.merge_weights(x_BTD, skills)
        method, compiled = type(self)._compute, None
        if self.compiler is not None:
            # Of which kind they are may not decide on the graph of an evaluation.
            weights = weights if torch.is_grad_enabled() else weights.detach()
            compiled = self.compiler.find_compiled(self, method, x_BTD, weights, padding, draw)
        return (compiled or method)(self, x_BTD, weights, padding, draw)

    def merge_weights(self, x_BTD: Tensor, skills: Skills) -> LayerWeights:
        """Return what the computation of the layer reads.

        Args:
            x_BTD: tokens.
            skills: active skills, sorted.
        """
        attention, feedforward = self._own(skills)
        merged = self.attention.merge(x_BTD, attention), self.feedforward.merge(x_BTD, feedforward)
        return LayerWeights(*merged, self.list_norms())

    def list_norms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return scale and shift of both norms."""
        attention, feedforward = self.attention_norm, self.feedforward_norm
        return (attention.weight, attention.bias), (feedforward.weight, feedforward.bias)

    def prepare(
        self, x_BTD: Tensor, skills: Skills, padding: Padding, draw: LayerDraw | None
    ) -> bool:
        """Compile the layer for some inputs; no weight is read, so shards stay where they are.

        Args:
            x_BTD: tokens of any value.
            skills: active skills, sorted.
            padding: see :meth:`forward`.
            draw: see :meth:`forward`.

        Returns:
            Whether the output has a gradient.
        """
        kind = compute_dtype(x_BTD), x_BTD.device, self.gather_weights is not None
        branches = self.attention.products, self.feedforward.products
        attention, feedforward = (
            tuple(
                (weight.outline(own, *kind), None if bias is None else bias.outline(own, *kind))
                for weight, bias in products
            )
            for products, own in zip(branches, self._own(skills), strict=True)
        )

        def outline_norm(p: Tensor) -> Tensor:
            values = torch.ones(p.shape, dtype=p.dtype, device=x_BTD.device)
            return nn.Parameter(values, p.requires_grad)

        norms = tuple((outline_norm(p), outline_norm(q)) for p, q in self.list_norms())
        weights = LayerWeights(attention, feedforward, norms)
        weights = weights if torch.is_grad_enabled() else weights.detach()
        assert self.compiler is not None
        self.compiler.find_compiled(self, type(self)._compute, x_BTD, weights, padding, draw)
        return any(each.requires_grad for each in (x_BTD, *weights.list_tensors()))

    def _compute(
        self, x_BTD: Tensor, weights: LayerWeights, padding: Padding, draw: LayerDraw | None
    ) -> Tensor:
        for index, branch in enumerate((self._attend, self._feed)):
            if isinstance(draw, tuple):
                x_BTD = self._add(branch, x_BTD, weights, padding, draw[index])
            else:
                y_BTD = branch(x_BTD, weights, padding)
                if draw is None:
                    x_BTD = x_BTD + y_BTD
                elif torch.compiler.is_compiling():
                    x_BTD = x_BTD + y_BTD * draw[index]
                else:
                    x_BTD = _WeightedSum.apply(x_BTD, y_BTD, draw[index])
            if self.is_post_norm:
                x_BTD = self._normalize(x_BTD, weights.norms[index])
        return x_BTD

    def _normalize(self, x_BTD: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = norm
        return F.layer_norm(x_BTD, x_BTD.shape[-1:], scale, shift, self.attention_norm.eps)

    def normalize_input(self, x_BTD: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        """Return the input of a branch, normalized in a pre-norm layer.

        Args:
            x_BTD: tokens.
            norm: scale and shift of the norm of the branch.
        """
        return x_BTD if self.is_post_norm else self._normalize(x_BTD, norm)

    def _attend(self, x_BTD: Tensor, weights: LayerWeights, padding: Padding) -> Tensor:
        z_BTD = self.normalize_input(x_BTD, weights.norms[0])
        return self.attention(z_BTD, weights.attention, padding)

    def _feed(self, x_BTD: Tensor, weights: LayerWeights, padding: Padding) -> Tensor:
        z_BTD = self.normalize_input(x_BTD, weights.norms[1])
        return self.feedforward(z_BTD, weights.feedforward)

    def _add(
        self,
        branch: LayerCall,
        x_BTD: Tensor,
        weights: LayerWeights,
        padding: Padding,
        kept: KeptRows,
    ) -> Tensor:
        """Add a residual branch to the rows that keep it. The other rows cost nothing."""
        places, count = kept.rows, len(kept.rows)
        if isinstance(padding, PackedRows):
            places, padding = padding.select_rows(kept.rows)
            count = padding.real
        elif isinstance(padding, RaggedRows):
            padding = RaggedRows.find(padding.mask_BT.index_select(0, kept.rows))
        elif padding is not None:
            padding = padding.index_select(0, kept.rows)
        y = branch(x_BTD.index_select(0, places), weights, padding)[:count].to(x_BTD.dtype)
        return x_BTD.index_add(0, places[:count], y, alpha=kept.scale)


class _WeightedSum(torch.autograd.Function):
    """x + weights * y in one operation each way, also if autocast gave y a smaller type."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, y_BTD: Tensor, weights_B11: Tensor) -> Tensor:
        ctx.save_for_backward(weights_B11)
        ctx.dtype = y_BTD.dtype
        # Autocast would convert the branch in an operation of its own.
        with torch.autocast(x_BTD.device.type, enabled=False):
            return torch.addcmul(x_BTD, y_BTD, weights_B11)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (weights_B11,) = ctx.saved_tensors
        of_branch = torch.empty_like(grads[0], dtype=ctx.dtype)
        return grads[0], torch.mul(grads[0], weights_B11, out=of_branch), None


class KeptTokens:
    """Tokens of a forward pass whose tensors stay in memory, shared by its towers.

    A token counts once in each layer. Later layers are kept first: the backward pass frees their
    tensors before it computes earlier ones again (Chen et al. 2016). A tower keeps whole quarters
    of its layers, which leaves more to a shorter one: each layer costs as many launches there.

    Args:
        limit: most tokens, over all layers and towers.
    """

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def take(self, tokens: int, layers: int) -> int:
        """Return how many layers of a tower are kept.

        Args:
            tokens: number of tokens in all rows.
            layers: number of layers of the encoder.
        """
        quarter = max(layers // 4, 1)
        most = min(self.left // tokens, layers) if tokens else layers
        count = most if most == layers else most - most % quarter
        self.left -= count * tokens
        return count


class Encoder(nn.Module):
    """Stack of encoder layers, and after pre-norm layers a final norm. (B, T, D) -> (B, T, D)."""

    #: Whether the computation of a layer is a graph that depends on sizes alone.
    can_compile = True

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, index) for index in range(config.num_layers)
        )
        # The last post-norm layer has normalized its output already.
        is_post_norm = config.norm_position == "post"
        self.norm = nn.Identity() if is_post_norm else nn.LayerNorm(config.dim, config.norm_eps)
        self.drop_path = config.drop_path
        self._head_width = config.dim // config.num_heads
        #: Whether rows whose branch is dropped may be computed.
        self.can_mask_rows = True
        #: Tokens whose tensors stay for the backward pass; None keeps all.
        self.kept_tokens: KeptTokens | None = None
        #: Compiles layers; None computes operation by operation.
        self.compiler: LayerCompiler | None = None

    def compile_layers(self, compiler: LayerCompiler | None) -> None:
        """Compute all layers with a compiler.

        Args:
            compiler: may serve several encoders; None ends compilation.
        """
        self.compiler = compiler
        for layer in self.layers:
            if isinstance(layer, EncoderLayer):
                layer.compiler = compiler

    def prepare(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None) -> None:
        """Compile what a pass over such tokens needs, without a weight.

        Args:
            x_BTD: tokens of any value.
            skills: active skills, sorted.
            mask_BT: see :meth:`forward`.
        """
        x_BTD, mask_BT = pad_tokens(x_BTD, mask_BT)
        padding = None if mask_BT is None else self._find_padding(mask_BT, x_BTD)
        draws = self._draw_rows(x_BTD)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            has_gradient = layer.prepare(x_BTD, skills, padding, draws[index] if draws else None)
            x_BTD = x_BTD.detach().requires_grad_(has_gradient)

    def forward(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None = None) -> Tensor:
        """Encode tokens (B, T, D) with the active skills.

        Args:
            x_BTD: tokens of a stem.
            skills: active skills, sorted.
            mask_BT: True at real tokens; None if all are real.
        """
        first, draws = self._find_first_kept(x_BTD), self._draw_rows(x_BTD)
        if self.compiler is None:
            return self._encode(x_BTD, skills, mask_BT, first, draws)
        padded_BTD, padded_BT = pad_tokens(x_BTD, mask_BT)
        return self._encode(padded_BTD, skills, padded_BT, first, draws)[:, : x_BTD.shape[1]]

    def _find_first_kept(self, x_BTD: Tensor) -> int:
        """Return the first layer whose tensors stay; those before it keep their input only."""
        if self.kept_tokens is None or not torch.is_grad_enabled():
            return 0
        return len(self.layers) - self.kept_tokens.take(x_BTD.shape[:2].numel(), len(self.layers))

    def _draw_rows(self, x_BTD: Tensor) -> list[LayerDraw]:
        """Return the rows that each layer computes; nothing if no row is dropped."""
        if not self.training:
            return []
        # A graph has no numbers of rows that differ between steps.
        is_masked = None if self.compiler is None else True
        is_masked = is_masked if self.can_mask_rows else False
        return draw_kept_rows(x_BTD, len(self.layers), self.drop_path, is_masked) or []

    def _encode(
        self,
        x_BTD: Tensor,
        skills: Skills,
        mask_BT: Tensor | None,
        first: int,
        draws: Sequence[LayerDraw],
    ) -> Tensor:
        # The bias is built once for all layers.
        padding: Padding = None
        if mask_BT is not None:
            padding = self._find_padding(mask_BT, x_BTD)
            if isinstance(padding, PackedRows):
                x_BTD = padding.pack(x_BTD)
        for index, layer in enumerate(self.layers):
            draw = draws[index] if draws else None
            if index < first:
                x_BTD = checkpoint(layer, x_BTD, skills, padding, draw, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, skills, padding, draw)
        x_BTD = self.norm(x_BTD)
        return padding.pad(x_BTD) if isinstance(padding, PackedRows) else x_BTD

    def _find_padding(self, mask_BT: Tensor, x_BTD: Tensor) -> Padding:
        """Return packed rows where computing padding costs more, else lengths or a bias."""
        # Padding may lie between tokens, as that of a text with "[PAD]". Answers must be exact.
        if self.training and takes_lengths(x_BTD, self._head_width):
            return RaggedRows.find(mask_BT)
        dtype = compute_dtype(x_BTD)
        # A GPU would wait for the number of real tokens, and a graph has one shape.
        if uses_gpu_kernels(mask_BT) or self.compiler or torch.compiler.is_compiling():
            return padding_bias(mask_BT, dtype)
        places_N = mask_BT.flatten().nonzero()[:, 0]
        # Such as those of a request alone: a bias of 0 changes no bit.
        if len(places_N) == mask_BT.numel():
            return None
        packed = PackedRows.find(places_N, padding_bias(mask_BT, dtype))
        is_shorter = len(packed.places_P) <= PACKED_SHARE * mask_BT.numel()
        return packed if is_shorter else packed.bias_B11T


class WrappedEncoder(nn.Module):
    """Encoder of another library in a tower of a system, such as a specialist."""

    def list_layers(self) -> list[nn.Module]:
        """Return its layers, whose weights are sharded and gathered one after the other."""
        raise NotImplementedError

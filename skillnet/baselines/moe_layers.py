"""Expert layers: each token is sent to a few experts, and only those are computed.

    router      top-k of a softmax in float32 (Shazeer et al. 2017), renormalized over the chosen
                experts (GShard, Lepikhin et al. 2021; Mixtral, Jiang et al. 2024)
    balance     E sum_e f_e P_e, with the share f_e of assignments and the mean probability P_e
                of an expert (Switch Transformer, Fedus et al. 2022); 1 for an even load
    z           mean of the squared logsumexp of the logits (ST-MoE, Zoph et al. 2022)

Experts have no capacity limit, so no token is dropped (MegaBlocks, Gale et al. 2023). Tokens are
sorted by expert, and each expert runs on its slice. Padding is not routed on CPUs. On GPUs it is
routed, because only the device knows the real tokens; its result is 0, and no figure counts it.

Shapes: B batch, T tokens, N real tokens of the batch, k experts per token, S = N k pairs of token
and expert, R rows that experts compute (S, or a few more), E experts, D model width, F hidden
width of an expert, I and O widths of a product.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skillnet.layers import compute_dtype
from skillnet.precision import uses_gpu_kernels
from skillnet.skipped_init import draw_truncated_normal

#: Rows of an expert are padded to a multiple of this number in bf16 on CPUs.
ROWS = 32


class RoutingResult(NamedTuple):
    """Assignment of the tokens of a batch to experts.

    Attributes:
        logits_NE: scores of the router.
        weights_Nk: weights of the experts of a token; they sum to 1.
        experts_Nk: chosen experts, best first.
        is_real_N: which tokens are real; None if all are.
    """

    logits_NE: Tensor
    weights_Nk: Tensor
    experts_Nk: Tensor
    is_real_N: Tensor | None = None


class TopKRouter(nn.Module):
    """Router of tokens (N, D). It computes in the type of its weights, also under autocast.

    Args:
        dim: width of a token.
        experts: number of experts.
        top_k: experts per token.
        jitter: in training, tokens are multiplied by noise from [1 - jitter, 1 + jitter] before
            they are scored (Switch Transformer).
    """

    def __init__(self, dim: int, experts: int, top_k: int, jitter: float = 0.0) -> None:
        super().__init__()
        self.top_k, self.jitter = top_k, jitter
        # Small initial weights keep the first choices close to even (Switch Transformer).
        self.weight = nn.Parameter(torch.empty(experts, dim))
        draw_truncated_normal(self.weight, 0.02)

    def forward(self, x_ND: Tensor) -> RoutingResult:
        # In bf16, rounding would decide between nearly equal experts.
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.to(self.weight.dtype)
            if self.training and self.jitter:
                x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_NE = F.linear(x_ND, self.weight)
            chosen_Nk, experts_Nk = logits_NE.topk(self.top_k, dim=-1)
            # The softmax over the chosen experts equals the renormalized softmax over all.
            return RoutingResult(logits_NE, chosen_Nk.softmax(-1), experts_Nk)


class ExpertFeedForward(nn.Module):
    """Two-layer feed-forward experts and their router. (B, T, D) -> (B, T, D), 0 at padding.

    Args:
        dim: model width.
        hidden: hidden width of one expert.
        experts: number of experts.
        top_k: experts per token.
        jitter: see :class:`TopKRouter`.
        std, out_std: standard deviations of the initial values of the two layers.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        std: float,
        out_std: float,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = TopKRouter(dim, experts, top_k, jitter)
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        draw_truncated_normal(self.up, std)
        draw_truncated_normal(self.down, out_std)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, RoutingResult]:
        """Route and compute tokens; ``mask_BT`` is True at real tokens, None if all are real.

        Without a mask, ``x_BTD`` may have any leading axes.
        """
        x_ND = x_BTD.flatten(0, -2)
        if mask_BT is None:
            y_ND, routing = self.run(x_ND)
            return y_ND.view(x_BTD.shape), routing
        if uses_gpu_kernels(x_BTD):
            return self.run_with_padding(x_BTD, mask_BT)
        real_N = mask_BT.flatten().nonzero()[:, 0]
        y_ND, routing = self.run(x_ND.index_select(0, real_N))
        padded = y_ND.new_zeros(x_ND.shape).index_copy(0, real_N, y_ND)
        return padded.view(x_BTD.shape), routing

    def run_with_padding(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, RoutingResult]:
        """Route and compute all tokens, and set the result of padding to 0.

        To select the real tokens, the host would have to wait for their number in each layer. The
        other systems compute padding too.
        """
        is_real_N = mask_BT.flatten()
        y_ND, routing = self.run(x_BTD.flatten(0, 1))
        y_ND = y_ND.masked_fill(~is_real_N[:, None], 0)
        return y_ND.view(x_BTD.shape), routing._replace(is_real_N=is_real_N)

    def flops(self, tokens: int, active: int = 1) -> int:
        """Return the operations of a number of real tokens: router and chosen experts."""
        experts, hidden, dim = self.up.shape
        return 2 * tokens * dim * (experts + 2 * hidden * self.router.top_k)

    def run(self, x_ND: Tensor) -> tuple[Tensor, RoutingResult]:
        """Compute real tokens with their experts, (N, D) -> (N, D)."""
        routing = self.router(x_ND)
        dtype, (N, k) = compute_dtype(x_ND), routing.experts_Nk.shape
        counts_E, tokens_R, rows_S = expert_slices(
            routing.experts_Nk, len(self.up), _multiple(x_ND, dtype)
        )
        x_RD = x_ND.to(dtype).index_select(0, tokens_R)
        h_RF = F.gelu(grouped_linear(x_RD, self.up.to(dtype), counts_E))
        y_RD = grouped_linear(h_RF, self.down.to(dtype), counts_E)
        # Restore the order of tokens. A sum over k adds in a fixed order on a GPU too; an in-place
        # scatter-add would not.
        y_NkD = y_RD.index_select(0, rows_S).view(N, k, x_ND.shape[1])
        return (y_NkD * routing.weights_Nk[..., None].to(dtype)).sum(1), routing


def expert_slices(experts_Nk: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens by expert, into contiguous rows per expert.

    Args:
        experts_Nk: chosen experts of each token.
        experts: number of experts E.
        multiple: the rows of each expert are padded to a multiple of this number.

    Returns:
        (E,) rows of each expert; (R,) token of each row; (S,) row of each pair of token and expert.
        Padding rows repeat a token, and their results are not used.
    """
    S, k, device = experts_Nk.numel(), experts_Nk.shape[1], experts_Nk.device
    experts_S, order_S = experts_Nk.flatten().sort(stable=True)
    counts_E = count_experts(experts_S, experts)
    rows_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = (rows_E.cumsum(0) - rows_E) - (counts_E.cumsum(0) - counts_E)
    sorted_S = torch.arange(S, device=device) + shift_E[experts_S]
    total = S if multiple == 1 else int(rows_E.sum())
    tokens_R = torch.zeros(total, dtype=torch.long, device=device)
    tokens_R[sorted_S] = order_S.div(k, rounding_mode="floor")
    rows_S = torch.empty_like(order_S)
    rows_S[order_S] = sorted_S
    return rows_E, tokens_R, rows_S


def count_experts(experts_S: Tensor, experts: int, weights_S: Tensor | None = None) -> Tensor:
    """Return the (E,) number of pairs of each expert.

    Args:
        experts_S: expert of each pair.
        experts: number of experts E.
        weights_S: how often a pair counts, int64; None counts each once.
    """
    # torch.bincount reads the largest number, for which the host waits.
    ones_S = torch.ones_like(experts_S) if weights_S is None else weights_S
    return experts_S.new_zeros(experts).index_add_(0, experts_S, ones_S)


def _multiple(x: Tensor, dtype: torch.dtype) -> int:
    """Return the number whose multiple the rows of an expert are.

    On CPUs, oneDNN compiles one kernel per shape of a bf16 product, which takes several times as
    long as the product. With steps of 32 rows the shapes soon repeat.
    """
    return ROWS if dtype == torch.bfloat16 and not uses_gpu_kernels(x) else 1


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by the matrix of this expert, (R, I) -> (R, O).

    Args:
        x_RI: rows, sorted by expert.
        weight_EOI: one matrix per expert.
        counts_E: rows of each expert.
    """
    if uses_gpu_kernels(x_RI) and x_RI.dtype == torch.bfloat16:
        return one_kernel(x_RI, weight_EOI, counts_E)
    # On a GPU, fp32 makes the host wait for the counts.
    return _GroupedLinear.apply(x_RI, weight_EOI, counts_E.tolist())


def one_kernel(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Compute :func:`grouped_linear` by torch's grouped bf16 product, without host sync.

    Args:
        x_RI: rows, sorted by expert.
        weight_EOI: one matrix per expert.
        counts_E: rows of each expert.
    """
    product = getattr(F, "grouped_mm", torch._grouped_mm)  # public since torch 2.10
    ends_E = counts_E.cumsum(0).to(torch.int32)
    outputs, inputs = weight_EOI.shape[1:]
    # Rows must start at multiples of 16 bytes, so widths are padded with zeros to multiples of 8.
    more_outputs, more_inputs = -outputs % 8, -inputs % 8
    if more_inputs:
        x_RI = F.pad(x_RI, (0, more_inputs))
    if more_inputs or more_outputs:
        weight_EOI = F.pad(weight_EOI, (0, more_inputs, 0, more_outputs))
    y_RO = product(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    return y_RO[:, :outputs] if more_outputs else y_RO


class _GroupedLinear(torch.autograd.Function):
    """Loop over experts that writes into one tensor in both directions, so no slices are joined."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts = counts
        y_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
        parts = zip(x_RI.split(counts), weight_EOI, y_RO.split(counts), strict=True)
        for x, weight, y in parts:
            if len(x):
                torch.mm(x, weight.T, out=y)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight_EOI = ctx.saved_tensors
        # Zeros: an expert without tokens also gets a gradient, so all ranks reduce the same
        # tensors.
        to_x, to_weight = torch.empty_like(x_RI), torch.zeros_like(weight_EOI)
        g_RO = grads[0].contiguous()
        for index, (x, g, out) in enumerate(
            zip(x_RI.split(ctx.counts), g_RO.split(ctx.counts), to_x.split(ctx.counts), strict=True)
        ):
            if len(x):
                torch.mm(g, weight_EOI[index], out=out)
                torch.mm(g.T, x, out=to_weight[index])
        return to_x, to_weight, None


def expert_load(routing: RoutingResult) -> Tensor:
    """Return the share of assignments of each expert, (E,); the shares sum to 1."""
    experts_Nk, is_real_N = routing.experts_Nk, routing.is_real_N
    experts, dtype = routing.logits_NE.shape[1], routing.logits_NE.dtype
    if is_real_N is None:
        counts_E = count_experts(experts_Nk.flatten(), experts)
        return counts_E.to(dtype) / max(experts_Nk.numel(), 1)
    weights_S = is_real_N.long()[:, None].expand_as(experts_Nk).flatten()
    counts_E = count_experts(experts_Nk.flatten(), experts, weights_S)
    return counts_E.to(dtype) / weights_S.sum().clamp(min=1)


def balance_loss(routing: RoutingResult) -> Tensor:
    """Return E sum_e f_e P_e, a scalar: 1 for even loads or probabilities, at most E."""
    experts = routing.logits_NE.shape[1]
    mean_E = _average_tokens(routing, routing.logits_NE.softmax(-1))
    return experts * (expert_load(routing) * mean_E).sum()


def z_loss(routing: RoutingResult) -> Tensor:
    """Return the mean of logsumexp(logits) squared, a scalar."""
    return _average_tokens(routing, routing.logits_NE.logsumexp(-1).square())


def router_entropy(routing: RoutingResult) -> Tensor:
    """Return the mean entropy of the router's probabilities, in nats, at most log E."""
    log_p = routing.logits_NE.log_softmax(-1)
    return -_average_tokens(routing, (log_p.exp() * log_p).sum(-1))


def _average_tokens(routing: RoutingResult, x: Tensor) -> Tensor:
    """Average figures of tokens (N, …) over the real ones; 0 if the batch is all padding."""
    is_real_N = routing.is_real_N
    if is_real_N is None:
        return x.sum(0) / max(len(x), 1)
    weights = is_real_N.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))
    return (x * weights).sum(0) / is_real_N.sum().clamp(min=1)

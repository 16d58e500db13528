"""Our layer of experts against the mixture-of-experts block of transformers, forward and backward.

Its Mixtral block, once with the two-matrix experts of its Nemotron-H, so that both sides compute
the same function at the same sizes (a test holds that), and once with its own gated experts, whose
three matrices have two thirds of the width: as many parameters and operations. Each in both of
transformers' ways to run experts: one after the other, and as a grouped product.

How many tokens an expert gets differs from batch to batch, and with it the shapes of products,
for each of which oneDNN compiles a kernel: so batches that never come again are the measure.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, clock_for, in_turns, ratio
from skillnet.baselines.moe_layers import ExpertFeedForward
from skillnet.precision import native_bf16

#: Passes before the clock starts.
WARMUP = 3

WAYS = {"eager": "one by one", "grouped_mm": "grouped"}


@dataclass(frozen=True)
class Sizes:
    """B rows of T tokens, width D, E experts of hidden width F, top k of them."""

    rows: int = 64
    tokens: int = 48
    dim: int = 256
    hidden: int = 1152
    experts: int = 8
    top_k: int = 2

    def __str__(self) -> str:
        kind = "bf16" if native_bf16(torch.device("cpu")) else "fp32"
        return (
            f"B {self.rows} T {self.tokens} D {self.dim} F {self.hidden} E {self.experts} "
            f"k {self.top_k} {kind}"
        )


def ours(sizes: Sizes) -> ExpertFeedForward:
    """Our layer."""
    torch.manual_seed(0)
    return ExpertFeedForward(
        sizes.dim, sizes.hidden, sizes.experts, sizes.top_k, std=0.06, out_std=0.03
    )


def theirs(sizes: Sizes, way: str = "eager", gated: bool = False) -> nn.Module:
    """The block of transformers; ``way`` is a key of ``WAYS``."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes.dim,
        intermediate_size=2 * sizes.hidden // 3,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        hidden_act="gelu",
    )
    config._experts_implementation = way
    block: Any = MixtralSparseMoeBlock(config)
    if not gated:
        block.experts = _two_matrix_experts(sizes, way)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.03)
    return block


def _two_matrix_experts(sizes: Sizes, way: str) -> nn.Module:
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(
        hidden_size=sizes.dim,
        moe_intermediate_size=sizes.hidden,
        n_routed_experts=sizes.experts,
        mlp_hidden_act="gelu",
    )
    config._experts_implementation = way
    return NemotronHExperts(config)


class Pass:
    """A forward and a backward pass of a layer; calling it does one.

    Args:
        layer: whose gradients are made.
        forward: computation of the layer.
        sizes: rows and lengths of a batch.
        batches: how many different ones to take in turn.
    """

    def __init__(
        self, layer: nn.Module, forward: Callable[[Tensor], Tensor], sizes: Sizes, batches: int
    ) -> None:
        torch.manual_seed(0)
        self.layer, self.forward = layer, forward
        shape = (sizes.rows, sizes.tokens, sizes.dim)
        every = [torch.randn(shape, requires_grad=True) for _ in range(batches)]
        self.batches = itertools.cycle(every)
        self.probe_BTD = torch.randn(shape) / every[0].numel()
        self.bf16 = native_bf16(torch.device("cpu"))

    def __call__(self) -> None:
        x_BTD = next(self.batches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            y_BTD = self.forward(x_BTD)
        (y_BTD * self.probe_BTD).sum().backward()
        x_BTD.grad = None
        self.layer.zero_grad()


def run(rounds: int, threads: int) -> list[Result]:
    """Our time over theirs, with batches that never come again, as in training, and with one."""
    results = []
    for sizes in (Sizes(), Sizes(rows=96, tokens=16)):
        for batches in (rounds + WARMUP, 1):
            results += _compare(sizes, batches, rounds, threads)
    return results


def _compare(sizes: Sizes, batches: int, rounds: int, threads: int) -> list[Result]:
    layer = ours(sizes)
    runs = {"ours": Pass(layer, lambda x: layer(x)[0], sizes, batches)}
    for gated in (False, True):
        for way, words in WAYS.items():
            block = theirs(sizes, way, gated)
            name = f"transformers' Mixtral block, {'gated, ' if gated else ''}{words}"
            runs[name] = Pass(block, block, sizes, batches)
    seconds = in_turns(runs, rounds, clock_for(threads), WARMUP)
    which = "the same batch each time" if batches == 1 else "a new batch each time"
    return [
        Result(
            f"our experts, {which}",
            name,
            "ratio of times",
            *ratio(seconds["ours"], seconds[name]),
            "<= 1",
            rounds,
            str(sizes),
        )
        for name in list(runs)[1:]
    ]

"""A training step of the encoder (forward, backward, clipping, AdamW) against others.

The hidden width of a skill is four times the model's, so that arithmetic alone allows, against
the loop over skills, 24/20 with 2 skills and 36/28 with 3, and 60/20 against all 7 skills.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients
from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.layers import SkillLinear, Skills, compute_dtype, multihead_attention
from skillnet.precision import native_bf16
from skillnet.skills import DEFAULT_SKILLS

SKILLS = DEFAULT_SKILLS


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step: B rows of T tokens, width D, depth L."""

    rows: int = 64
    tokens: int = 48
    dim: int = 256
    depth: int = 4

    def config(self, skills: tuple[str, ...] = SKILLS) -> SkillNetConfig:
        return SkillNetConfig(
            skills=skills,
            dim=self.dim,
            num_layers=self.depth,
            num_heads=4,
            ffn_dim=4 * self.dim,
            drop_path=0.0,
            tasks={},
        )

    def __str__(self) -> str:
        kind = "bf16" if native_bf16(torch.device("cpu")) else "fp32"
        return f"B {self.rows} T {self.tokens} D {self.dim} F {4 * self.dim} L {self.depth} {kind}"


class Step:
    """A training step over the parameters that take part; calling it does one."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        named: Iterable[tuple[str, nn.Parameter]],
        sizes: Sizes,
    ) -> None:
        torch.manual_seed(0)
        self.forward, self.named = forward, list(named)
        self.x_BTD = torch.randn(sizes.rows, sizes.tokens, sizes.dim)
        self.probe_BTD = torch.randn_like(self.x_BTD) / self.x_BTD.numel()
        self.optimizer = build_optimizer(self.named, TrainingConfig(lr=1e-4))
        self.bf16 = native_bf16(torch.device("cpu"))

    def __call__(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            y_BTD = self.forward(self.x_BTD)
        (y_BTD * self.probe_BTD).sum().backward()
        clip_gradients((p for _, p in self.named), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of optimiser state."""
        tensors = [x for state in self.optimizer.state.values() for x in state.values()]
        return sum(x.numel() * x.element_size() for x in tensors)

    def gradient_bytes(self) -> int:
        """Bytes of all gradients that a backward pass leaves."""
        (self.forward(self.x_BTD) * self.probe_BTD).sum().backward()
        total = sum(p.grad.numel() * 4 for _, p in self.named if p.grad is not None)
        for _, parameter in self.named:
            parameter.grad = None
        return total


def skillnet_step(
    sizes: Sizes, active: int, skills: tuple[str, ...] = SKILLS, make: type[Encoder] = Encoder
) -> Step:
    """A step of SkillNet, or of the loop, with the first ``active`` skills."""
    torch.manual_seed(0)
    encoder = make(sizes.config(skills))
    plan = skills[:active]
    named = [
        (name, parameter)
        for name, parameter in encoder.named_parameters()
        if ".weights." not in name or name.rpartition(".")[2] in plan
    ]
    return Step(lambda x: encoder(x, plan), named, sizes)


def dense_step(sizes: Sizes, hidden: int, torch_attention: bool = False) -> Step:
    torch.manual_seed(0)
    encoder = DenseEncoder(sizes.config(), hidden, torch_attention)
    return Step(encoder, encoder.named_parameters(), sizes)


def run(rounds: int, threads: int) -> list[Result]:
    """All comparisons of a training step."""
    return [
        *_against_dense(rounds, threads),
        *_against_the_loop(rounds, threads),
        *_against_all_skills(rounds, threads),
        *_growing(rounds, threads),
    ]


def _compare(
    ours: tuple[str, Step],
    theirs: tuple[str, Step],
    rounds: int,
    threads: int,
    sizes: Sizes,
    target: str = "",
    faster: bool = False,
) -> Result:
    """Our time over theirs; ``faster`` turns it round: how many times as fast we are."""
    seconds = in_turns(dict([ours, theirs]), rounds, clock_for(threads))
    above, below = seconds[ours[0]], seconds[theirs[0]]
    value = ratio(below, above) if faster else ratio(above, below)
    unit = "times as fast" if faster else "ratio of times"
    return Result(ours[0], theirs[0], unit, *value, target, rounds, str(sizes))


def _against_dense(rounds: int, threads: int) -> list[Result]:
    sizes, results = Sizes(), []
    for active in (1, 2, 3):
        ours = (f"SkillNet, {active} active", skillnet_step(sizes, active))
        wide = active * 4 * sizes.dim
        theirs = (f"dense, hidden {wide}", dense_step(sizes, wide))
        results.append(_compare(ours, theirs, rounds, threads, sizes, "<= 1.05"))
        theirs = (f"dense, hidden {wide}, torch's attention", dense_step(sizes, wide, True))
        results.append(_compare(ours, theirs, max(rounds // 3, 3), threads, sizes, "<= 1.05"))
    return results


def _against_the_loop(rounds: int, threads: int) -> list[Result]:
    sizes, results = Sizes(), []
    for active, target in ((2, ">= 1.12"), (3, ">= 1.2")):
        ours = (f"SkillNet, {active} active", skillnet_step(sizes, active))
        theirs = (f"loop over {active} skills", skillnet_step(sizes, active, make=LoopEncoder))
        results.append(_compare(ours, theirs, rounds, threads, sizes, target, faster=True))
    return results


def _against_all_skills(rounds: int, threads: int) -> list[Result]:
    sizes = Sizes()
    ours = ("SkillNet, 2 of 7 active", skillnet_step(sizes, 2))
    theirs = ("dense, all 7 skills' width", dense_step(sizes, 7 * 4 * sizes.dim))
    rounds = max(rounds // 2, 3)
    return [_compare(ours, theirs, rounds, threads, sizes, ">= 2.5", faster=True)]


def _growing(rounds: int, threads: int) -> list[Result]:
    sizes = Sizes()
    few = skillnet_step(sizes, 2)
    many = skillnet_step(sizes, 2, tuple(f"skill_{i}" for i in range(56)))
    result = _compare(
        ("SkillNet, 2 of 56 active", many),
        ("SkillNet, 2 of 7 active", few),
        rounds,
        threads,
        sizes,
        "<= 1.05",
    )
    memory = [
        Result(what, "with 7 skills", "ratio of bytes", *spread([a / b]), "<= 1", 1, str(sizes))
        for what, a, b in (
            ("optimiser state with 56 skills", many.state_bytes(), few.state_bytes()),
            ("gradients with 56 skills", many.gradient_bytes(), few.gradient_bytes()),
        )
    ]
    return [result, *memory]


# -- encoders with the same norms, activation and depth --------------------------------------
# B batch, T tokens, D model width, F hidden width of a skill, K active skills.


class DenseEncoder(nn.Module):
    """A Transformer without skills, of torch.nn.functional's kernels; ``hidden`` in all.

    ``torch_attention`` takes torch's scaled_dot_product_attention. Without it attention is
    SkillNet's own, so that what is compared is skills and nothing else.
    """

    def __init__(self, config: SkillNetConfig, hidden: int, torch_attention: bool = False) -> None:
        super().__init__()
        D, self.heads, self.torch_attention = config.dim, config.num_heads, torch_attention
        shapes = {"qkv": (3 * D, D), "out": (D, D), "up": (hidden, D), "down": (D, hidden)}
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            weights = {k: nn.Parameter(torch.randn(s) * s[1] ** -0.5) for k, s in shapes.items()}
            norms = {
                f"{k}_{i}": nn.Parameter(torch.full((D,), float(k == "scale")))
                for k in ("scale", "shift")
                for i in (1, 2)
            }
            self.layers.append(nn.ParameterDict(weights | norms))
        self.norm = nn.LayerNorm(D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        for layer in self.layers:
            p: Any = layer  # a ParameterDict, which nn.ModuleList does not tell
            qkv = F.linear(F.layer_norm(x_BTD, (D,), p["scale_1"], p["shift_1"]), p["qkv"])
            if self.torch_attention:
                q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
            else:
                y = multihead_attention(qkv, self.heads)
            x_BTD = x_BTD + F.linear(y, p["out"])
            h = F.linear(F.layer_norm(x_BTD, (D,), p["scale_2"], p["shift_2"]), p["up"])
            x_BTD = x_BTD + F.linear(F.gelu(h), p["down"])
        return self.norm(x_BTD)


class LoopEncoder(Encoder):
    """SkillNet's weights, one skill after the other: K products where the fused layers do one."""

    def forward(self, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None = None) -> Tensor:
        dtype = compute_dtype(x_BTD)
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            attention, forward = layer.attention, layer.feedforward
            qkv = _each(attention.qkv, layer.attention_norm(x_BTD).to(dtype), skills)
            x_BTD = x_BTD + _each(attention.out, multihead_attention(qkv, attention.heads), skills)
            z = layer.feedforward_norm(x_BTD).to(dtype)
            outputs = [
                F.linear(F.gelu(F.linear(z, forward.up.weights[s])), forward.down.weights[s])
                for s in skills
            ]
            x_BTD = x_BTD + _mean(outputs)
        return self.norm(x_BTD)


def _each(layer: SkillLinear, x: Tensor, skills: Skills) -> Tensor:
    return _mean([F.linear(x, layer.weight.weights[s]) for s in skills])


def _mean(outputs: list[Tensor]) -> Tensor:
    total = outputs[0]
    for output in outputs[1:]:
        total = total + output
    return total / len(outputs) if len(outputs) > 1 else total

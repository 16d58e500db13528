"""Share of the machine's matrix product rate that a training step reaches, and torch.compile.

The rate is that of a product of two square matrices in the step's own type, measured in turns
with the step. The step's operations are those that torch's counter finds in it, forward and
backward; the optimiser, norms and activations count as time but not as operations.
"""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from benchmarks.training_step import Sizes, Step, skillnet_step

SIDE = 1024


def run(rounds: int, threads: int) -> list[Result]:
    """Shares at some sizes, then what torch.compile changes at the first."""
    results = []
    for sizes, active in (
        (Sizes(), 2),
        (Sizes(), 3),
        (Sizes(rows=96, tokens=16), 3),
        (Sizes(rows=96, dim=192), 2),
    ):
        step = skillnet_step(sizes, active)
        results.append(
            _share(
                f"SkillNet, {active} active, {sizes.rows}x{sizes.tokens}x{sizes.dim}",
                step,
                sizes,
                rounds,
                threads,
            )
        )
    return [*results, *_compiled(rounds, threads)]


def _share(name: str, step: Step, sizes: Sizes, rounds: int, threads: int) -> Result:
    dtype = torch.bfloat16 if step.bf16 else torch.float32
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    repeats = 10

    def product() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = in_turns({"step": step, "product": product}, rounds, clock_for(threads))
    by_product = [2 * SIDE**3 * repeats / s for s in seconds["product"]]
    by_step = [counter.get_total_flops() / s for s in seconds["step"]]
    shares = ratio(by_step, by_product)
    rate = spread(by_product).median / 1e9
    note = f"product {rate:.0f} GFLOP/s, step {spread(by_step).median / 1e9:.0f}"
    where = f"square product of {SIDE}"
    return Result(name, where, "share", *shares, ">= 0.5", rounds, str(sizes), note)


def _compiled(rounds: int, threads: int) -> list[Result]:
    sizes = Sizes()
    plain, compiled = skillnet_step(sizes, 2), skillnet_step(sizes, 2)
    compiled.forward = torch.compile(compiled.forward)
    begin = time.perf_counter()
    try:
        compiled()
    except Exception as error:  # no compiler on this machine, or torch cannot
        print(f"torch.compile does not work here: {type(error).__name__}")
        return []
    start = time.perf_counter() - begin
    seconds = in_turns({"plain": plain, "compiled": compiled}, rounds, clock_for(threads))
    value = ratio(seconds["compiled"], seconds["plain"])
    note = f"the first step took {start:.0f} s of wall time"
    return [
        Result(
            "SkillNet compiled, 2 active",
            "SkillNet, 2 active",
            "ratio of times",
            *value,
            "",
            rounds,
            str(sizes),
            note,
        )
    ]

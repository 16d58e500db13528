"""An optimizer without the import of torch's compiler."""

import subprocess
import sys

import torch
from torch import nn

from pipelines.training.loop.optimizer import EagerAdamW

STEP = """
import sys
import torch
from pipelines.training.loop.optimizer import EagerAdamW
weight = torch.nn.Parameter(torch.ones(3))
optimizer = EagerAdamW([weight], fused=True)
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_step_does_not_import_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP], env={"PYTHONPATH": ":".join(sys.path)}, check=False
    )
    assert done.returncode == 0


def test_its_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    ours, theirs = EagerAdamW([weights[0]], fused=True), torch.optim.AdamW([weights[1]], fused=True)
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
    assert torch.equal(*weights)
    assert weights[0].grad is not None
    assert weights[0].requires_grad

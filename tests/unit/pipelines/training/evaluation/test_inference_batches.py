"""Batches of inference: larger on a GPU, and copied while the host and the GPU work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.training.evaluation import inference
from pipelines.training.evaluation.inference import BATCH_LIMITS, InferenceInputs, InferenceRunner


class OneWeight(nn.Module):
    """A model that only states its device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def test_a_batch_is_sent_from_pinned_memory_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def record(call: Any, x: Tensor) -> Tensor:
        calls.append(call)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", lambda x: record("pin", x))
    monkeypatch.setattr(Tensor, "to", lambda x, device, **more: record((device.type, more), x))
    inference.send_batch({"tokens": torch.zeros(2)}, torch.device("cuda"))
    assert calls == ["pin", ("cuda", {"non_blocking": True})]


def test_a_result_is_awaited_after_the_next_batch_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def send(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        done.append(f"send {int(batch['tokens'][0])}")
        return batch

    def fetch(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        return results, lambda: done.append(f"wait {int(results[0][0])}")

    monkeypatch.setattr(inference, "send_batch", send)
    monkeypatch.setattr(inference, "fetch_results", fetch)
    runner = InferenceRunner(OneWeight(), "fp32", 1)  # type: ignore[arg-type]
    inputs = InferenceInputs(np.ones(3), lambda rows: {"tokens": torch.from_numpy(rows)})
    found = [int(rows[0]) for rows, _ in runner._infer(inputs, lambda x: (x["tokens"],))]
    assert found == [0, 1, 2]
    assert done == ["send 0", "send 1", "wait 0", "send 2", "wait 1", "wait 2"]


def test_the_limit_of_a_batch_follows_the_device() -> None:
    runner = InferenceRunner(OneWeight(), "fp32")  # type: ignore[arg-type]
    assert (runner.max_batch_tokens, runner.max_batch_rows) == BATCH_LIMITS["cpu"]
    assert all(
        gpu > cpu for gpu, cpu in zip(BATCH_LIMITS["cuda"], BATCH_LIMITS["cpu"], strict=True)
    )

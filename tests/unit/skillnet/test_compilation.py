"""Compiled layers: one graph for as many skills, equal results, and layers without a compiler."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skillnet import skill_weights
from skillnet.layer_compiler import LayerCompiler
from skillnet.model import SkillNet
from skillnet.precision import assume_gpu
from skillnet.skill_weights import share_merges
from skillnet.skills import masked_tasks
from tests.helpers.small_models import small_config, towers_of

#: The masked task has the plan of the text task; the other one has two plans of as many skills.
TASKS = ("text_classification", "text_to_image", "masked_text")


def build_model() -> SkillNet:
    torch.manual_seed(0)
    tasks = {**small_config().tasks, **masked_tasks()}
    config = small_config(num_layers=2, tasks={name: tasks[name] for name in TASKS})
    return SkillNet(config).double()


def make_towers(model: SkillNet, task: str, rows: int, tokens: int) -> dict[str, Any]:
    towers = towers_of("text_classification" if task == "masked_text" else task, model.config, rows)
    for batch in towers.values():
        if "tokens" in batch:
            batch["tokens"] = torch.randint(
                4, 40, (rows, tokens), generator=torch.Generator().manual_seed(tokens)
            )
            batch["tokens"][0, tokens // 2 :] = 0  # padding
    if task == "masked_text":
        towers["input"]["places"] = torch.arange(0, rows * tokens, 3)
    return towers


def run_step(model: SkillNet, task: str, rows: int, tokens: int) -> dict[str, Tensor]:
    outputs = model(task, make_towers(model, task, rows, tokens))
    loss = sum(x.square().sum() for x in outputs.values() if x.requires_grad)
    model.zero_grad()
    loss.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{key: x.detach() for key, x in outputs.items()}, **gradients}


def test_plans_with_as_many_skills_are_one_graph_for_all_batches() -> None:
    # The processes of other tests start seconds earlier without the compiler.
    from torch._dynamo.utils import counters

    model = build_model().train()
    sizes = ((6, 7), (8, 12))
    expected = {(task, *size): run_step(model, task, *size) for task in TASKS for size in sizes}
    torch._dynamo.reset()
    counters.clear()
    problems: list[str] = []
    compiler = LayerCompiler(problems.append, "eager")
    model.encoder.compile_layers(compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in TASKS:
            for size in sizes:
                found = run_step(model, task, *size)
                torch.testing.assert_close(
                    found, expected[task, *size], rtol=1e-9, atol=1e-9, msg=lambda m, t=task: t + m
                )
    # Two and three skills with padding (texts), and three without (images).
    assert counters["stats"]["unique_graphs"] == 3
    model.eval()
    with torch.no_grad():
        for rows, tokens in sizes:
            towers = make_towers(model, "text_classification", rows, tokens)
            model.encoder.compile_layers(compiler)
            found = model("text_classification", towers)["logits"]
            model.encoder.compile_layers(None)
            torch.testing.assert_close(found, model("text_classification", towers)["logits"])
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    assert problems == []


def test_a_step_merges_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging is no part of a graph, so the towers and parts of a step share what it made."""
    model = build_model().float().train()
    model.encoder.compile_layers(LayerCompiler(print, "eager"))
    merged: list[int] = []
    merge = skill_weights.merge_rounded
    monkeypatch.setattr(
        skill_weights,
        "merge_rounded",
        lambda parts, plans, *rest: merged.append(len(plans)) or merge(parts, plans, *rest),
    )
    task = "text_to_image"
    plans = [plan.skills for plan in model.config.tasks[task].towers.values()]
    with assume_gpu(), torch.autocast("cpu", dtype=torch.bfloat16), share_merges(plans):
        for _ in range(2):
            run_step(model, task, 6, 7)
    # Four matrices in each of two layers, for the plans of both towers.
    assert merged == [2] * 8


def test_layers_that_cannot_be_compiled_are_reported_once() -> None:
    model = build_model().train()
    expected = run_step(model, "text_classification", 4, 6)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler for this processor\nand a second line")

    torch._dynamo.reset()
    problems: list[str] = []
    model.encoder.compile_layers(LayerCompiler(problems.append, fail))
    for _ in range(2):
        found = run_step(model, "text_classification", 4, 6)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model.eval()
    with torch.no_grad():
        model("text_classification", make_towers(model, "text_classification", 4, 6))
    assert problems == ["RuntimeError: no compiler for this processor"]


def test_lack_of_memory_is_no_failure_of_the_compiler() -> None:
    model = build_model().train()

    def fill_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    torch._dynamo.reset()
    problems: list[str] = []
    model.encoder.compile_layers(LayerCompiler(problems.append, fill_memory))
    with pytest.raises(Exception, match="out of memory"):
        run_step(model, "text_classification", 4, 6)
    assert problems == []

"""Compiled plans: one graph each, equal results, and a plan that cannot be compiled."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.training.loop.setup import compile_plans
from skillnet.baselines.moe import MoE, MoEOptions
from skillnet.encoder import PlanCompiler
from skillnet.model import SkillNet
from skillnet.skills import masked_tasks
from tests.helpers.small_models import small_config, towers_of

#: The masked task has the plan of the text task; the other one has two plans.
TASKS = ("text_classification", "text_to_image", "masked_text")


def build_model() -> SkillNet:
    torch.manual_seed(0)
    tasks = {**small_config().tasks, **masked_tasks()}
    config = small_config(num_layers=1, tasks={name: tasks[name] for name in TASKS})
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


def test_each_plan_is_one_graph_for_all_batches() -> None:
    # The processes of other tests start seconds earlier without the compiler.
    from torch._dynamo.utils import counters

    model = build_model().train()
    sizes = ((6, 7), (8, 12))
    expected = {(task, *size): run_step(model, task, *size) for task in TASKS for size in sizes}
    torch._dynamo.reset()
    counters.clear()
    problems: list[str] = []
    model.enable_compilation(problems.append, "eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in TASKS:
            for size in sizes:
                found = run_step(model, task, *size)
                torch.testing.assert_close(
                    found, expected[task, *size], rtol=1e-9, atol=1e-9, msg=lambda m, t=task: t + m
                )
    # Plans: text, text with alignment, image with alignment.
    assert counters["stats"]["unique_graphs"] == 3
    model.eval()
    with torch.no_grad():
        for rows, tokens in sizes:
            towers = make_towers(model, "text_classification", rows, tokens)
            found = model("text_classification", towers)["logits"]
            compiler, model.encoder.compiler = model.encoder.compiler, None
            torch.testing.assert_close(found, model("text_classification", towers)["logits"])
            model.encoder.compiler = compiler
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    assert problems == []


def test_a_plan_that_cannot_be_compiled_is_reported_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build_model().train()
    expected = run_step(model, "text_classification", 4, 6)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler for this processor\nand a second line")

    torch._dynamo.reset()
    compile_plans(model)
    compiler = model.encoder.compiler
    assert compiler is not None
    compiler._backend = fail
    for _ in range(2):
        found = run_step(model, "text_classification", 4, 6)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model.eval()
    with torch.no_grad():
        model("text_classification", make_towers(model, "text_classification", 4, 6))
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert "training.compile: text_classification, masked_text: the plan general+text" in lines[0]
    assert "no compiler for this processor" in lines[0]


def test_experts_run_without_compilation(capsys: pytest.CaptureFixture[str]) -> None:
    """Shards are two models, of training and of evaluation, and give one line."""
    models = [MoE(small_config(num_layers=1), MoEOptions(experts=3)) for _ in range(2)]
    compile_plans(*models)
    assert all(model.encoder.compiler is None for model in models)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "training.compile: the system moe runs without compilation" in line


def test_lack_of_memory_is_no_failure_of_the_compiler() -> None:
    model = build_model().train()

    def fill_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    torch._dynamo.reset()
    problems: list[Any] = []
    model.encoder.compiler = PlanCompiler(lambda *words: problems.append(words), fill_memory)
    with pytest.raises(Exception, match="out of memory"):
        run_step(model, "text_classification", 4, 6)
    assert problems == []

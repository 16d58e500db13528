"""A task as a dense model or a graph has the outputs of its source."""

import pytest
import torch

from skillnet.skill_proofs import make_example_batch
from skillnet.skills import default_tasks
from skillnet_serving.model_export import TowerGraph, export_tower, merge_task_skills
from tests.helpers.small_models import small_model, towers_of


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skill_every": 2},
        {"skill_modules": "attention"},
        {"skill_rank": 2},
        {"bias": True, "norm_position": "post"},
    ],
)
def test_merged_skills_have_the_outputs_of_the_source(changes: dict) -> None:
    model = small_model(torch.float32, **changes).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for task in default_tasks():
        dense = merge_task_skills(model, task)
        assert set(dense.config.skills) <= set(dense.config.tasks[task].towers)
        batches = towers_of(task, model.config)
        with torch.no_grad():
            wanted, found = model(task, batches), dense(task, batches)
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'text_to_code'"):
        merge_task_skills(small_model(), "text_to_cod")


def test_graphs_take_any_number_of_rows_and_shorter_texts() -> None:
    task = "text_classification"
    dense = merge_task_skills(small_model(torch.float32).eval(), task)
    for tower, plan in dense.config.tasks[task].towers.items():
        graph = TowerGraph(dense, task, tower).eval()
        program = export_tower(graph, make_example_batch(plan, dense.config)).module()
        for rows in (1, 5):
            batch = make_example_batch(plan, dense.config, rows, seed=rows)
            if plan.stem == "token":
                batch["tokens"] = batch["tokens"][:, :4]
            tensors = [batch[name] for name in graph.input_names]
            with torch.no_grad():
                for wanted, found in zip(graph(*tensors), program(*tensors), strict=True):
                    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

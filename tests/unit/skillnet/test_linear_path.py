"""The linear path of retrieval tasks: similarity before training, cost, files and limits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from skillnet.accounting import account_task
from skillnet.baselines.alone import SeparateSkillNets
from skillnet.baselines.dense import DenseModel
from skillnet.baselines.moe import MoE
from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import PAD
from skillnet.model import SkillNet
from skillnet.objectives.retrieval import find_grid_side
from skillnet.skill_proofs import make_example_batch
from skillnet.skills import SkillPlan, Task
from skillnet_hf.specialist import SpecialistModel
from skillnet_serving.model_export import TowerGraph, export_tower
from tests.helpers.small_models import loss_of, small_config, small_model, towers_of

TASKS = ("text_to_image", "text_to_code")


def linear_config(**changes) -> SkillNetConfig:
    config = small_config(**changes)
    paths = {name: replace(config.tasks[name], linear_path=True) for name in TASKS}
    config.tasks = config.tasks | paths
    return config


def linear_model(dtype: torch.dtype = torch.float32) -> SkillNet:
    torch.manual_seed(0)
    return SkillNet(linear_config()).to(dtype).eval()


def test_a_new_model_finds_functions_with_the_words_of_a_text() -> None:
    sizes = {"dim": 64, "embedding_dim": 64, "vocab_size": 500, "bigram_buckets": 0}
    torch.manual_seed(0)
    code = torch.randint(4, 500, (40, 12))
    # Half of the words of each text are words of its function.
    text = torch.cat([code[:, :6], torch.randint(4, 500, (40, 6))], 1)
    found = {}
    for is_linear in (False, True):
        torch.manual_seed(1)
        model = SkillNet(linear_config(**sizes) if is_linear else small_config(**sizes)).eval()
        with torch.no_grad():
            query = model.embed("text_to_code", "query", {"tokens": text})
            candidate = model.embed("text_to_code", "candidate", {"tokens": code})
        best = (query @ candidate.T).argmax(1)
        found[is_linear] = int((best == torch.arange(40)).sum())
    assert found[True] >= 20
    assert found[False] <= 5


def test_padding_and_neighbours_change_no_vector() -> None:
    model = linear_model()
    tokens = towers_of("text_to_code", model.config)["query"]["tokens"]
    vectors = model.embed("text_to_code", "query", {"tokens": tokens})
    longer = F.pad(tokens, (0, 2), value=PAD)[1:]
    torch.testing.assert_close(
        model.embed("text_to_code", "query", {"tokens": longer}), vectors[1:]
    )


def test_brightness_of_an_image_does_not_matter_and_its_shapes_do() -> None:
    path = linear_model().heads["text_to_image"].linear_path
    pixels = torch.rand(2, 8, 8, 3) * 0.5
    one, brighter, other = (
        path({"pixels": p}, lambda: None)[0] for p in (pixels, pixels + 0.3, pixels.flip(2))
    )
    torch.testing.assert_close(brighter, one, rtol=0, atol=1e-5)
    assert F.cosine_similarity(one, other, 0) < 0.9


def test_bytes_and_fractions_of_an_image_have_one_vector() -> None:
    model = linear_model()
    pixels = towers_of("text_to_image", model.config)["candidate"]["pixels"]
    one = model.embed("text_to_image", "candidate", {"pixels": pixels})
    other = model.embed("text_to_image", "candidate", {"pixels": pixels / 255})
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("task", TASKS)
def test_vectors_have_unit_length_and_all_weights_learn(task: str) -> None:
    model = linear_model(torch.float64)
    outputs = model(task, towers_of(task, model.config))
    torch.testing.assert_close(outputs["query"].norm(dim=1), torch.ones(3, dtype=torch.float64))
    loss_of(model, task).backward()
    for name, parameter in model.heads[task].named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("task", TASKS)
def test_operations_equal_torchs_count(task: str) -> None:
    model = linear_model()
    towers = towers_of(task, model.config, rows=1)
    lengths = {tower: b["tokens"].shape[1] for tower, b in towers.items() if "tokens" in b}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(task, towers)
    assert account_task(model, task, lengths).flops_per_example == counter.get_total_flops()


@pytest.mark.parametrize("system", [SkillNet, SeparateSkillNets, DenseModel, MoE, SpecialistModel])
@pytest.mark.parametrize("task", TASKS)
def test_every_system_has_the_path(system: type, task: str) -> None:
    config = linear_config(dim=32, ffn_dim=48, num_heads=4, embedding_dim=32, mel_stack=4)
    model = system(config).eval()
    towers = towers_of(task, config)
    outputs = model(task, towers)
    for tower in ("query", "candidate"):
        again = model.embed(task, tower, towers[tower])
        torch.testing.assert_close(again, outputs[tower])
    model.heads[task].linear_path.log_gain.data.fill_(5.0)
    assert not torch.allclose(model.embed(task, "query", towers["query"]), outputs["query"])


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_task_has_its_path(task: str, tmp_path: Path) -> None:
    model = small_model(torch.float32, tasks=linear_config().tasks).eval()
    model.save_pretrained(tmp_path / "model")
    for known in (None, task):
        again = SkillNet.from_pretrained(tmp_path / "model", known)
        for tower, batch in towers_of(task, model.config).items():
            assert torch.equal(again.embed(task, tower, batch), model.embed(task, tower, batch))


@pytest.mark.parametrize("task", TASKS)
def test_a_graph_has_the_path(task: str) -> None:
    model = linear_model()
    for tower, plan in model.config.tasks[task].towers.items():
        graph = TowerGraph(model, task, tower).eval()
        program = export_tower(graph, make_example_batch(plan, model.config)).module()
        batch = make_example_batch(plan, model.config, rows=5, seed=1)
        tensors = [batch[name] for name in graph.input_names]
        with torch.no_grad():
            torch.testing.assert_close(program(*tensors)[0], graph(*tensors)[0])


def test_cells_divide_the_image() -> None:
    assert [find_grid_side(size) for size in (48, 224, 72, 7, 13)] == [12, 8, 12, 7, 1]


@pytest.mark.parametrize(
    ("objective", "towers", "message"),
    [
        ("classification", {"input": "text"}, "linear_path is for retrieval"),
        ("retrieval", {"query": "text", "candidate": "video"}, "tower candidate reads video"),
        ("retrieval", {"query": "sound", "candidate": "text"}, "tower query reads sound"),
        ("retrieval", {"query": "text", "candidate": "code"}, "is true or false, not 'yes'"),
    ],
)
def test_a_path_that_does_not_fit_is_refused(
    objective: str, towers: dict[str, str], message: str
) -> None:
    plans = {name: SkillPlan(("general",), modality) for name, modality in towers.items()}
    given: Any = "yes" if "yes" in message else True
    with pytest.raises(ValueError, match=message):
        Task(objective, plans, outputs=3, linear_path=given)

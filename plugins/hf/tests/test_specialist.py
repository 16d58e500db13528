"""Specialists: one encoder per tower, no shared parameter, training as if alone."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.config.run import PretrainConfig, TaskTraining
from pipelines.training.loop.loop import seed_dropout, train_model
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients, set_learning_rate
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.step import step_loss
from skillnet.accounting import account_task
from skillnet.baselines import size_matching
from skillnet.model_merging import remove_task
from skillnet.precision import choose_precision
from skillnet.skills import SkillPlan, Task, masked_tasks, pretraining_tasks
from skillnet.systems import build_system, load_model
from skillnet_hf.specialist import SPECIALIST, SpecialistModel, SpecialistOptions, is_layer_weight
from tests.helpers.small_corpora import small_config as small_run
from tests.helpers.small_corpora import write_corpora
from tests.helpers.small_models import loss_of, small_config, towers_of


def specialist(options: dict[str, Any] | None = None, **changes: Any) -> SpecialistModel:
    torch.manual_seed(0)
    config = small_config(**({"mel_stack": 4, "n_mels": 8} | changes))
    model = build_system("specialist", config, {"ffn_dim": 10} | (options or {}))
    assert isinstance(model, SpecialistModel)
    return model.double()


@pytest.mark.parametrize("task", small_config().tasks)
def test_a_task_touches_its_own_encoders_and_head_and_all_of_them(task: str) -> None:
    model = specialist()
    loss_of(model, task).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in model.active_parameters(task)}
    towers = {f"specialist-{task}-{tower}" for tower in model.config.tasks[task].towers}
    assert {model.file_of(name) for name in touched} == towers | {f"head-{task}"}
    assert sum(p.numel() for p in model.parameters()) == sum(
        model.activated_parameters(other) for other in model.config.tasks
    )


def test_layers_are_as_large_as_what_skillnet_activates() -> None:
    config = small_config(dim=32, ffn_dim=48, num_heads=4, embedding_dim=32, mel_stack=4)
    own = SPECIALIST.configure(config, SpecialistOptions())
    model = SpecialistModel(own)
    sizes = [
        sum(
            p.numel()
            for name, p in model.active_parameters(task)
            if any(f".{part}." in name for part in ("encoder", "blocks", "layers"))
        )
        for task in config.tasks
    ]
    assert sum(sizes) / len(sizes) == pytest.approx(
        size_matching.mean_activated_params(config), rel=0.01
    )
    pretrained = SPECIALIST.configure(
        dataclasses.replace(config, tasks=masked_tasks(), reference_tasks=config.tasks),
        SpecialistOptions(),
    )
    assert pretrained.ffn_dim == own.ffn_dim


def test_costs_are_counted() -> None:
    model = specialist()
    for task in model.config.tasks:
        cost = account_task(model, task)
        assert cost.flops_per_example > 0
        assert cost.activated == model.activated_parameters(task) < cost.total
    short, long = (account_task(model, "text_classification", {"input": n}) for n in (4, 8))
    assert (short.tokens, long.tokens) == (4, 8)
    assert long.flops_per_example > 1.9 * short.flops_per_example
    assert account_task(model, "speech_recognition").tokens == 5
    pretrained = specialist(tasks=masked_tasks())
    for task in pretrained.config.tasks:
        assert account_task(pretrained, task).flops_per_example > 0


def test_a_round_trip_and_one_task_of_it(tmp_path: Path) -> None:
    model = specialist({"text": "roberta", "sound": "ast"}).eval()
    model.save_pretrained(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert "specialist-text_to_image-candidate.safetensors" in files
    for kept in (*(tmp_path / "model").glob("*text_to_code*"),):
        kept.unlink()  # not read for another task
    for task in ("text_classification", "speech_recognition", "text_to_video"):
        one = load_model(tmp_path / "model", task)
        batch = towers_of(task, model.config)
        expected, found = model(task, batch), one(task, batch)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_trained_model_is_read_without_the_checkpoint_it_started_from(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    shape = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
    bert = BertModel(BertConfig(vocab_size=50, num_hidden_layers=1, **shape))
    bert.save_pretrained(folder)
    model = specialist({"checkpoints": {"text": str(folder)}}).eval()
    for task, tower in (("text_classification", "input"), ("text_to_code", "query")):
        weight = model.token_embedding(task, tower)
        taken: Any = model.tower(task, tower).model
        assert weight.shape == (40, 8)
        expected = bert.embeddings.word_embeddings.weight.double()
        assert torch.equal(taken.embeddings.word_embeddings.weight, expected)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "model")
    batch = towers_of("text_to_code", model.config)
    expected, found = model("text_to_code", batch), again("text_to_code", batch)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="neither a folder nor in the cache"):
        specialist({"checkpoints": {"text": str(folder)}})


def test_towers_start_from_the_encoder_pretrained_on_their_modality() -> None:
    pretrained = specialist(tasks=masked_tasks())
    model = specialist()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fresh = model.load_partial(dict(pretrained.named_parameters()))
    assert {name.partition(".")[0] for name in fresh} == {"heads"}
    source = dict(pretrained.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("towers.text_to_image.query."):
            assert torch.equal(
                parameter, source[name.replace("towers.text_to_image.query", "pretrained.text")]
            )
        if name.startswith("towers.text_to_code.candidate."):
            assert torch.equal(
                parameter, source[name.replace("towers.text_to_code.candidate", "pretrained.code")]
            )
        if name in fresh:
            assert torch.equal(parameter, before[name])
    other = specialist(tasks=masked_tasks(), options={"ffn_dim": 12})
    with pytest.raises(ValueError, match="give both the same model section"):
        model.load_partial(dict(other.named_parameters()))


def test_self_supervised_tasks_of_a_modality_train_one_encoder() -> None:
    plan = SkillPlan(("general", "image", "alignment"), "image")
    views = Task("retrieval", {"query": plan, "candidate": plan})
    model = specialist(tasks=masked_tasks() | {"views_image": views})
    files = {task: set(model.files_of(task)) for task in model.config.tasks}
    assert files["views_image"] == {"pretrained-image", "head-views_image"}
    assert files["masked_image"] == {"pretrained-image", "head-masked_image"}
    assert model.tower("views_image", "query") is model.tower("masked_image", "input")
    remove_task(model, "views_image")
    assert "pretrained-image" in model.files_of()
    remove_task(model, "masked_image")
    assert "pretrained-image" not in model.files_of()


def test_pairs_of_text_and_code_train_the_encoders_of_both() -> None:
    tasks = masked_tasks() | {"pairs_code": pretraining_tasks()["pairs_code"]}
    model = specialist(tasks=tasks)
    for tower, modality in (("query", "text"), ("candidate", "code")):
        assert model.tower("pairs_code", tower) is model.tower(f"masked_{modality}", "input")
    loss_of(model, "pairs_code").backward()
    touched = {model.file_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {"pretrained-text", "pretrained-code", "head-pairs_code"}
    assert touched == set(model.files_of("pairs_code"))
    remove_task(model, "masked_text")
    assert "pretrained-text" in model.files_of()
    # Sizes of a baseline follow the tasks that fine-tuning trains, which pairs are not.
    config = PretrainConfig(system="specialist", tasks={"pairs_code": TaskTraining("functions")})
    assert "pairs_code" not in config.joint().model.reference_tasks


@pytest.mark.parametrize("modality", ["text", "code", "image", "sound", "video"])
def test_masked_tasks_run(modality: str) -> None:
    task = f"masked_{modality}"
    model = specialist(tasks=masked_tasks())
    batch = towers_of(task, model.config)
    x, _ = model.tower_tokens(task, "input", batch["input"])
    first_B = torch.arange(len(x)) * x.shape[1]
    predicted = model(task, {"input": batch["input"] | {"places": first_B}})["predicted"]
    assert predicted.shape[0] == len(x)
    predicted.square().sum().backward()
    assert all(p.grad is not None for _, p in model.active_parameters(task))


def test_a_task_can_be_taken_off() -> None:
    model = specialist()
    kept = {n for n, _ in model.named_parameters() if ".text_to_code." not in n}
    remove_task(model, "text_to_code")
    assert {n for n, _ in model.named_parameters()} == kept
    model("text_to_image", towers_of("text_to_image", model.config))


def test_mistakes_are_named() -> None:
    for options, words in (
        ({"text": "brt"}, "did you mean 'bert'"),
        ({"sound": "vit"}, "options.sound: no architecture 'vit'; Known: speech2text, ast"),
        ({"checkpoints": {"txt": "x"}}, "options.checkpoints: unknown modality 'txt'"),
        ({"ffn_dim": 0}, "options.ffn_dim must be from 1 to"),
    ):
        with pytest.raises(ValueError, match=words):
            SpecialistOptions(**options)


def test_training_side_by_side_is_training_alone(tmp_path: Path) -> None:
    """To the bit, with dropout on: the claim that specialists are trained as if alone."""
    config = small_run(write_corpora(tmp_path / "data"), steps=15, max_grad_norm=0.5)
    config.system, config.options = "specialist", {"ffn_dim": 8}
    config.model.drop_path = 0.2
    config.training.lr = 1e-3
    # A task with a rate of its own is trained as in a run with this rate.
    for factor, settings in enumerate(list(config.tasks.values())[1:], 2):
        settings.lr = factor * 1e-3
    together = dict(train_model(ResolvedRun(config)).model.named_parameters())

    start = dict(build_model(config).named_parameters())
    stream = ResolvedRun(config).dataloader
    device = torch.device("cpu")
    for task in config.tasks:
        steps = [step for step in range(15) if stream.batch_spec(step).task == task]
        assert steps
        alone_config = dataclasses.replace(config.model, tasks={task: config.model.tasks[task]})
        alone = build_system("specialist", alone_config, config.options).double().train()
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(start[name])
        training = dataclasses.replace(config.training, lr=config.tasks[task].lr or 1e-3)
        optimizer = build_optimizer(alone.named_parameters(), training)
        active = list(alone.named_parameters())
        for step in steps:
            batch = stream.batch(step).to(device, torch.float64)
            seed_dropout(config.seed, step, 0)
            loss = step_loss(
                alone, config.model.tasks[task], batch, choose_precision("fp64", device), config
            )
            loss.backward()
            clip_gradients((p for _, p in active), config.training.max_grad_norm)
            # The rate follows the steps of all tasks.
            set_learning_rate(optimizer, training, step)
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in active:
            assert torch.equal(parameter, together[name]), name
            assert name.endswith("key.bias") or not torch.equal(parameter, start[name].double())


@pytest.mark.parametrize("system", ["skillnet", "alone", "dense", "moe", "specialist"])
def test_the_scale_of_initial_weights_is_a_setting_of_every_system(system: str) -> None:
    models = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        config = small_config(mel_stack=4, n_mels=8, init_scale=scale)
        models.append(dict(build_system(system, config).named_parameters()))
    ratios = {
        name: float(weight.detach().norm() / plain.detach().norm())
        for (name, plain), weight in zip(models[0].items(), models[1].values(), strict=True)
        if is_layer_weight(name) and plain.ndim >= 2 and "router" not in name
    }
    assert ratios
    assert ratios == {name: pytest.approx(0.25) for name in ratios}
    others = [name for name in models[0] if not is_layer_weight(name)]
    assert others
    assert all(torch.equal(models[0][name], models[1][name]) for name in others)

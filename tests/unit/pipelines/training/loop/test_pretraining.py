"""Masked tasks: their targets, the weights that change, and the splits that are never read."""

from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.data import AUGMENTATIONS
from pipelines.training.config.run import FinetuneConfig, PretrainConfig, TaskTraining
from pipelines.training.loading.pixel_changes import apply_changes
from pipelines.training.loading.task_columns import resolve_splits
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import (
    ResolvedRun,
    build_joint_run,
    check_pretraining_splits,
)
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.step import task_loss
from pipelines.training.runs.identity import open_corpora
from skillnet.keyed_random import BatchRandom
from skillnet.skills import masked_tasks
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_pretraining, write_corpora
from tests.helpers.small_models import small_model, towers_of

TASKS = tuple(masked_tasks())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


@pytest.fixture
def config(data: Path) -> FinetuneConfig:
    return build_joint_run(small_pretraining(data))


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_only_the_named_tokens_are_predicted_in_row_major_order(task: str) -> None:
    model = small_model(tasks=masked_tasks()).eval()
    towers = towers_of(task, model.config)
    x_BTD, real_BT = model.tower_tokens(task, "input", towers["input"])
    everything = model(task, towers)["predicted"]
    real_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
    assert len(everything) == int(real_BT.sum())
    chosen_BT = real_BT & (torch.rand(real_BT.shape) < 0.5)
    chosen_BT[0, 0] = True
    towers["input"]["places"] = chosen_BT.flatten().nonzero()[:, 0]
    some = model(task, towers)["predicted"]
    torch.testing.assert_close(some, everything[chosen_BT[real_BT]])


def test_tokens_are_predicted_by_their_own_embedding() -> None:
    model = small_model(tasks=masked_tasks()).eval()
    towers = towers_of("masked_text", model.config)
    before = model("masked_text", towers)["predicted"]
    with torch.no_grad():
        # No row reads token 1, so only what it is predicted by changes.
        assert not (towers["input"]["tokens"] == 1).any()
        model.stems["token"].embedding.weight[1] += 1
    after = model("masked_text", towers)["predicted"]
    changed = (before != after).any(0)
    assert changed.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("task", TASKS)
def test_every_activated_weight_gets_a_gradient_and_no_other(config, task):
    model, stream = build_model(config).double(), ResolvedRun(config).dataloader
    step = next(step for step in range(60) if stream.batch_spec(step).task == task)
    batch = stream.batch(step).to(torch.device("cpu"), torch.float64)
    task_loss(config.model.tasks[task], model(task, batch.towers), batch).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in model.active_parameters(task)}
    skills = {name.rsplit(".", 1)[1] for name in touched if ".weights." in name}
    assert skills == {"general", task.removeprefix("masked_")}


def test_inactive_skills_are_bitwise_unchanged(config: FinetuneConfig) -> None:
    del config.tasks["masked_video"], config.tasks["masked_sound"]
    before = {name: p.clone() for name, p in build_model(config).double().named_parameters()}
    after = dict(train_model(ResolvedRun(config)).model.named_parameters())
    still = {name for name, p in after.items() if torch.equal(p, before[name])}
    expected = {
        name
        for name in after
        if name.endswith((".video", ".sound", ".alignment"))
        or ".tubelet." in name
        or ".log_mel." in name
        or "masked_video" in name
        or "masked_sound" in name
    }
    assert expected
    assert still == expected


def test_losses_fall_on_learnable_rows(data: Path, tmp_path: Path) -> None:
    config = build_joint_run(
        small_pretraining(data, steps=150, lr=3e-3, precision="fp32", log_every=25)
    )
    first = train_model(ResolvedRun(config, tmp_path), stop_at=25).losses
    last = train_model(ResolvedRun(config, tmp_path)).losses
    assert last.keys() == set(TASKS)
    for task in TASKS:
        assert last[task] < first[task], task


# -- what is read ---------------------------------------------------------------------------------


def test_pretraining_reads_what_the_manifest_allows_and_each_row_once(config, data):
    stream, corpora = ResolvedRun(config).dataloader, open_corpora(config)
    for name, settings in config.tasks.items():
        splits = resolve_splits(corpora[settings.corpus], "pretraining")
        assert splits == (("train",) if name == "masked_sound" else ("pretrain", "train"))
        rows = stream.datasets[name]
        assert rows.num_rows == 45 + (20 if len(splits) == 2 else 0)
        keys = rows.shard_table.table().column("key").to_pylist()
        assert {key.split("/")[0] for key in keys} == set(splits)
        assert len(set(keys)) == rows.num_rows


def test_rows_of_several_splits_equal_those_of_each(data: Path, config: FinetuneConfig) -> None:
    rows = ResolvedRun(config).dataloader.datasets["masked_video"]
    splits = open_corpus(data / "strokes").splits
    for place, (split, row) in {3: ("pretrain", 3), 20: ("train", 0), 64: ("train", 44)}.items():
        stored = splits[split].column("frames")[row].as_py()
        found = rows.load_inputs(np.array([place]))["frames"]
        assert found.flatten().tolist() == stored


def test_no_built_in_corpus_allows_pretraining_on_evaluation_splits() -> None:
    found = {entry.name: entry.load() for entry in entry_points(group="skillnet.corpora")}
    assert len(found) >= 5
    for name, corpus in found.items():
        assert set(corpus.pretraining) <= {"pretrain", "train"}, name


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluation_split_is_rejected(data: Path, split: str) -> None:
    config = small_pretraining(data)
    config.tasks["masked_image"].split = split
    with pytest.raises(UserError, match=rf"drawings allows pretrain, train for .*not {split}"):
        build_joint_run(config)


def test_pairs_are_read_by_the_task_that_names_their_split(data: Path) -> None:
    joint = small_pretraining(data).joint()
    joint.tasks["pairs_code"] = TaskTraining("functions", split="pretrain_pairs", auxiliary=True)
    corpora = dict(open_corpora(small_pretraining(data).joint()))
    functions = corpora["functions"]
    splits = functions.splits | {"pretrain_pairs": functions.splits["train"]}
    corpora["functions"] = replace(functions, splits=splits)
    check_pretraining_splits(joint, corpora)
    # Masked tasks would read the same code twice.
    assert resolve_splits(corpora["functions"], "pretraining") == ("pretrain", "train")


def test_corpus_without_pretraining_splits_is_rejected(data: Path) -> None:
    corpus = open_corpus(data / "drawings")
    corpus.manifest["pretraining"] = []
    with pytest.raises(UserError, match="names no split for pretraining"):
        resolve_splits(corpus, "pretraining")


def test_task_with_labels_is_rejected(data: Path) -> None:
    config = small_pretraining(data)
    config.tasks["text_classification"] = TaskTraining("headings")
    with pytest.raises(UserError, match=r"text_classification learns from labels"):
        build_joint_run(config)


def test_contrastive_adds_pairs_of_training_rows(data: Path) -> None:
    config = small_pretraining(data)
    config.contrastive = True
    joint = build_joint_run(config)
    pairs = {"text_to_image", "text_to_video", "text_to_code", "text_to_definition"}
    assert set(joint.tasks) == set(TASKS) | pairs == set(joint.model.tasks)
    stream = ResolvedRun(joint).dataloader
    for name in pairs:
        keys = stream.datasets[name].shard_table.table().column("key").to_pylist()
        assert {key.split("/")[0] for key in keys} == {
            "pretrain" if name == "text_to_definition" else "train"
        }
    without = build_joint_run(small_pretraining(data))
    assert set(without.model.tasks) == set(TASKS)


def test_views_are_two_changes_of_the_same_rows(data: Path) -> None:
    config = small_pretraining(data)
    config.views = True
    joint = build_joint_run(config)
    names = {"views_image", "views_video", "views_code"}
    assert set(joint.tasks) == set(TASKS) | names
    assert names.isdisjoint(joint.measured)
    stream = ResolvedRun(joint).dataloader
    for name in names:
        rows = stream.datasets[name]
        assert rows.location.endswith("pretrain+train")
        picked, draws = np.arange(6), BatchRandom((0, "rows", 3), 6, slice(None))
        towers, targets = apply_changes(
            *rows.load(picked, draws, AUGMENTATIONS[joint.training.augment])
        )
        (key,) = towers["query"]
        query, candidate = towers["query"][key], towers["candidate"][key]
        assert query.shape == candidate.shape
        assert (query.flatten(1) != candidate.flatten(1)).any(1).all()
        # What a corpus calls alike is a label: a row is the pair of itself alone.
        assert len(set(targets["groups"].tolist())) == 6
        draws = BatchRandom((0, "rows", 3), 6, slice(2, 4))
        again, _ = apply_changes(
            *rows.load(picked[2:4], draws, AUGMENTATIONS[joint.training.augment])
        )
        width = again["query"][key].shape[1]  # sequences are padded to the longest of their batch
        assert torch.equal(again["query"][key], query[2:4, :width])


def test_views_of_captions_are_rejected(data: Path) -> None:
    config = small_pretraining(data)
    config.tasks["text_to_image"] = TaskTraining("drawings", views=True)
    with pytest.raises(UserError, match=r"tasks\.text_to_image\.views .* both read image"):
        _ = ResolvedRun(build_joint_run(config)).dataloader


def test_configuration_survives_yaml() -> None:
    from skillnet_platform import config as configuration

    before = PretrainConfig(contrastive=True)
    again = configuration.build_config(PretrainConfig, configuration.to_dict(before))
    assert configuration.digest_config(again) == configuration.digest_config(before)
    joint = configuration.build_config(FinetuneConfig, configuration.to_dict(before.joint()))
    assert configuration.digest_config(joint) == configuration.digest_config(before.joint())

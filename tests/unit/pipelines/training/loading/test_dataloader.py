"""Batches are a pure function of (seed, step), for any number of workers."""

import multiprocessing
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.config.folds import FoldConfig
from pipelines.training.config.data import AUGMENTATIONS, AugmentConfig
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import (
    Batch,
    MultiTaskDataLoader,
    prefetch_batches,
    rank_slice,
)
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, write_corpora, write_scaled_sound


@pytest.fixture
def stream(data: Path) -> MultiTaskDataLoader:
    return ResolvedRun(small_config(data)).dataloader


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {f"{t}/{k}": x for t, inputs in batch.towers.items() for k, x in inputs.items()}
    return found | batch.targets


def rows_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """Rows padded with zeros to ``width`` along the second axis, if they are sequences."""
    if x.ndim < 2 or x.ndim > 3:
        return x
    out = x.new_zeros(x.shape[0], width, *x.shape[2:])
    out[:, : x.shape[1]] = x
    return out


@pytest.mark.parametrize("world", [2, 3, 4])
def test_slices_of_ranks_join_to_the_global_batch(stream: MultiTaskDataLoader, world: int) -> None:
    tasks = set()
    for step in range(20):
        whole = stream.batch(step)
        tasks.add(whole.task)
        parts = [stream.batch(step, rank, world) for rank in range(world)]
        real = [part for part in parts if not part.is_padding]
        assert np.array_equal(np.concatenate([part.rows for part in real]), whole.rows)
        assert {part.global_rows for part in parts} == {len(whole.rows)}
        for name, expected in tensors(whole).items():
            width = expected.shape[1] if expected.ndim > 1 else 0
            found = torch.cat([rows_of(tensors(part)[name], width) for part in real])
            assert torch.equal(found, rows_of(expected, width)), (whole.task, name)
    assert len(tasks) == 5


def test_equal_step_gives_an_equal_batch(data: Path) -> None:
    first, second = (ResolvedRun(small_config(data)).dataloader for _ in range(2))
    for step in (7, 3, 7):
        one, other = tensors(first.batch(step)), tensors(second.batch(step))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_rows_and_another_order(data: Path) -> None:
    config = small_config(data)
    first = ResolvedRun(config).dataloader
    config.seed = 1
    second = ResolvedRun(config).dataloader
    plans = [(first.batch_spec(step), second.batch_spec(step)) for step in range(20)]
    assert [one.task for one, _ in plans] != [other.task for _, other in plans]
    assert any(set(one.rows) != set(other.rows) for one, other in plans)


def test_rows_change_from_epoch_to_epoch(stream: MultiTaskDataLoader) -> None:
    """Augmentation depends on the step: a repeated image is augmented differently."""
    steps = [step for step in range(200) if stream.batch_spec(step).task == "text_to_image"]
    seen: dict[int, torch.Tensor] = {}
    for step in steps:
        batch = stream.batch(step)
        for place, row in enumerate(batch.rows.tolist()):
            pixels = batch.towers["candidate"]["pixels"][place]
            assert row not in seen or not torch.equal(pixels, seen[row])
            seen[row] = pixels


def test_sequences_of_a_batch_have_similar_lengths(data: Path) -> None:
    stream = ResolvedRun(small_config(data)).dataloader
    rows = stream.datasets["text_classification"]
    lengths = rows.row_lengths(np.arange(rows.num_rows))
    steps = [s for s in range(400) if stream.batch_spec(s).task == "text_classification"]
    spread = np.mean([np.ptp(lengths[stream.batch_spec(step).rows]) for step in steps])
    random = np.random.default_rng(0)
    at_random = np.mean([np.ptp(random.choice(lengths, 7, replace=False)) for _ in range(200)])
    assert spread < 0.6 * at_random


def test_captions_of_a_row_are_all_used(stream: MultiTaskDataLoader) -> None:
    stream.datasets["text_to_image"]._first_caption_prob = 0.0
    table = stream.datasets["text_to_image"].shard_table.table()
    captions = table.column("caption_tokens").to_pylist()
    row = next(index for index, found in enumerate(captions) if len(found) == 3)
    config = stream._augmentation
    assert config is not None
    stream._augmentation = replace(config, token_dropout=0.0)
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(400):
        plan = stream.batch_spec(step)
        if plan.task == "text_to_image" and row in plan.rows:
            place = plan.rows.tolist().index(row)
            tokens = stream.batch(step).towers["query"]["tokens"][place]
            seen[tuple(tokens[tokens > 0].tolist())] += 1
    assert set(seen) == {tuple(tokens) for tokens in captions[row]}


def test_noise_level_does_not_depend_on_the_deviation_of_the_corpus(data, tmp_path, monkeypatch):
    """Log power is stored divided by a deviation; noise adds to the power itself."""
    config = small_config(data)
    config.tasks = {"speech_recognition": config.tasks["speech_recognition"]}
    noisy = AugmentConfig(sound_noise=0.5, sound_gain=0.0)
    monkeypatch.setitem(AUGMENTATIONS, config.training.augment, noisy)
    plain = ResolvedRun(config).dataloader
    config.data = str(tmp_path)
    write_scaled_sound(data / "syllables", tmp_path / "syllables", 3.2)
    scaled = ResolvedRun(config).dataloader
    for step in range(4):
        one, other = (x.batch(step).towers["input"]["log_mel"] for x in (plain, scaled))
        torch.testing.assert_close(other * 3.2, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"image_size": 96},
            "drawings/train: the rows .* size 48.* Set model.image_size 48, or .*",
        ),
        (
            {"video_frames": 4, "video_size": 64},
            "strokes/train: the rows were prepared with frames 8, video_size 32, which the model "
            "does not read. Set model.video_frames 8, model.video_size 32, or prepare the corpus "
            "with --options.strokes.frames 4 --options.strokes.video_size 64",
        ),
    ],
)
def test_sizes_that_the_model_does_not_read_are_named(data, sizes, message):
    config = small_config(data)
    config.model = replace(config.model, **sizes)
    with pytest.raises(UserError, match=message):
        _ = ResolvedRun(config).dataloader


def test_prefetcher_raises_the_error_of_its_thread(stream: MultiTaskDataLoader) -> None:
    stream.datasets["text_to_video"].limit = None
    stream.datasets["text_to_video"].shard_table._columns["frames"] = object()
    with prefetch_batches(stream, 0, 20) as ahead, pytest.raises(UserError, match="frames"):
        list(ahead)


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_loaded_ahead_in_order(data: Path, processes: int) -> None:
    stream = ResolvedRun(small_config(data)).dataloader
    before = set(multiprocessing.active_children())
    with prefetch_batches(stream, 5, 25, rank=1, world=2, processes=processes) as ahead:
        batches = list(ahead)
    assert len(batches) == 20
    for step, batch in zip(range(5, 25), batches, strict=True):
        whole = stream.batch(step, 1, 2)
        assert (batch.task, batch.rows.tolist()) == (whole.task, whole.rows.tolist())
        expected = tensors(whole)
        assert all(torch.equal(x, expected[name]) for name, x in tensors(batch).items())
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("rows", ["whole", "windows", "groups", "fold", "fraction"])
def test_what_a_loading_process_is_sent_does_not_grow(tmp_path: Path, rows: str) -> None:
    """Neither with rows nor with shards, also after rows were read; and batches are equal."""
    name, sent = "text_classification", []
    for number, shards in enumerate((5, 60)):
        data = write_corpora(tmp_path / str(number), rows=8 * shards, shards=shards)
        config = small_config(data, shuffle_gb=1e-5 if rows in ("windows", "groups") else 4)
        config.training.shard_groups = 2 if rows == "groups" else None
        fraction = 0.5 if rows == "fraction" else 1
        config.tasks = {name: replace(config.tasks[name], batch_size=4, label_fraction=fraction)}
        if rows == "fold":
            config.fold = FoldConfig(3, 1, 0.3)
        stream = ResolvedRun(config).dataloader
        read = [stream.batch(step) for step in range(3)]
        for split in stream.datasets[name].shard_table._splits:
            split.table()
        content = pickle.dumps(stream)
        sent.append(len(content))
        copy: MultiTaskDataLoader = pickle.loads(content)  # noqa: S301
        for step, batch in enumerate(read):
            expected, found = tensors(batch), tensors(copy.batch(step))
            assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert sent[1] - sent[0] < 100


def test_processes_raise_the_error_of_a_batch_unchanged(data: Path) -> None:
    stream = ResolvedRun(small_config(data)).dataloader
    for dataset in stream.datasets.values():
        dataset.modality = None
    with pytest.raises(AttributeError, match="NoneType") as alone:
        stream.batch(0)
    with (
        prefetch_batches(stream, 0, 20, processes=1) as ahead,
        pytest.raises(AttributeError, match="NoneType") as raised,
    ):
        list(ahead)
    assert str(raised.value) == str(alone.value)


def test_rank_slice_equals_array_split() -> None:
    for count in range(12):
        for world in range(1, 6):
            expected = [part.tolist() for part in np.array_split(np.arange(count), world)]
            rows = [list(range(count))[rank_slice(count, rank, world)] for rank in range(world)]
            assert rows == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tasks": {"text_to_image": {"corpus": "strokes"}}},
            r"text_to_image reads image, but corpus strokes holds video",
        ),
        (
            {"tasks": {"text_to_image": {"split": "training"}}},
            r"drawings has no split 'training'; it has train, ",
        ),
        ({"model": {"vocab_size": 50}}, "vocab_size is 50; set it to 64"),
        (
            {"model": {"tasks": {"text_classification": {"outputs": 3}}}},
            r"text_classification\.outputs is 3",
        ),
    ],
)
def test_a_corpus_that_does_not_fit_is_rejected(data, change, message):
    tree = configuration.merge_trees(configuration.to_dict(small_config(data)), change)
    config = configuration.build_config(FinetuneConfig, tree)
    with pytest.raises(UserError, match=message):
        _ = ResolvedRun(config).dataloader

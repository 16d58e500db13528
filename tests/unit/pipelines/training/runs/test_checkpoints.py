"""Checkpoints are complete or rejected."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pipelines.training.loop import checkpointing
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.optimizer import WeightAverage, build_optimizer
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.runs import checkpoints, model_source
from pipelines.training.runs.checkpoints import list_checkpoint_folders
from pipelines.training.runs.mirror import RunMirror
from skillnet import SkillNet, systems
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from tests.helpers.small_corpora import small_config


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    train_model(
        ResolvedRun(
            small_config(data, steps=8, checkpoint_every=2, keep_checkpoints=3, ema=0.9), run
        )
    )
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_newest_checkpoints_are_kept(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


def test_loaded_checkpoint_equals_the_written_one(data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=5, ema=0.9)
    done = train_model(ResolvedRun(config, tmp_path))
    found = checkpoints.find_newest(tmp_path / "checkpoints")
    assert (found.step, found.path) == (5, done.checkpoint)
    model, average = build_model(config).double(), WeightAverage(0.9)
    optimizer = build_optimizer(model.named_parameters(), config.training)
    checkpointing.load_checkpoint(found, model, optimizer, average)
    tensors = checkpointing.CheckpointTensors(model, optimizer, average)
    again = checkpointing.write_checkpoint(
        tmp_path / "again", 5, tensors, dict(found.state), keep=1
    )
    for path in sorted(found.path.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    # A state tensor for each parameter that some step touched, in its owner's file.
    updated = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert updated == average.values.keys()
    average.swap(model)
    for (name, one), (_, other) in zip(
        model.named_parameters(), done.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_checkpoint_loads_as_a_saved_model(run: Path) -> None:
    model = SkillNet.from_pretrained(run / "checkpoints" / "step-00000008", task="text_to_image")
    assert set(model.config.tasks) == {"text_to_image"}


def _inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("is_beside", [False, True], ids=["in the loop", "beside the loop"])
def test_a_checkpoint_writes_what_changed_and_links_the_rest(
    data: Path, tmp_path: Path, is_beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "writes_beside_training", lambda device: is_beside)
    config = small_config(data, steps=6, checkpoint_every=2, keep_checkpoints=3, precision="fp32")
    source = tmp_path / "base"
    build_model(config).save_pretrained(source)
    config.init_from = str(source)
    config.training.trainable = ["skill-general"]
    run = ResolvedRun(config, tmp_path)
    train_model(run, stop_at=4)
    train_model(ResolvedRun(config, tmp_path))  # resumed
    folders = list_checkpoint_folders(tmp_path / "checkpoints")
    changed = {"skill-general.safetensors", "optimizer-skill-general.safetensors"}
    expected = {"manifest.json", "state.json", "config.json", *changed}
    kept = [_inodes(folder) for folder in folders]
    assert len(kept) == 3
    for newer, older in pairwise(kept):
        assert {name for name, inode in newer.items() if inode != older[name]} == expected
    initial = _inodes(source)
    weights = {name for name in kept[0] if name.endswith(".safetensors")} - changed
    assert weights, "files that stayed"
    assert all(kept[0][name] == initial[name] for name in weights)
    for folder in folders:
        checkpoints.verify_checkpoint(folder)


@pytest.mark.parametrize("sharding", ["none", "host"])
def test_checkpoints_beside_the_loop_have_the_same_bytes(
    data: Path, tmp_path: Path, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint_every": 2, "keep_checkpoints": 9, "ema": 0.9, "sharding": sharding}
    config = small_config(data, steps=7, **options)
    for name, is_beside in (("plain", False), ("beside", True)):
        monkeypatch.setattr(checkpointing, "writes_beside_training", lambda device, b=is_beside: b)
        train_model(ResolvedRun(config, tmp_path / name), stop_at=3)
        done = train_model(ResolvedRun(config, tmp_path / name))
        assert done.resumed == 3
        assert done.checkpoint == tmp_path / name / "checkpoints" / "step-00000007"
    expected = sorted((tmp_path / "plain").rglob("step-*/*"))
    assert len(expected) > 20
    for path in expected:
        other = tmp_path / "beside" / path.relative_to(tmp_path / "plain")
        assert path.read_bytes() == other.read_bytes(), path.name


class BackgroundWriter:
    """A writer of the checkpoints of a model, whose thread waits for :meth:`release`."""

    def __init__(self, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = small_config(data)
        self.model, self.steps = build_model(config), list[int]()
        self._go = threading.Event()
        optimizer = build_optimizer(self.model.named_parameters(), config.training)
        self.writer = checkpointing.BackgroundCheckpoints(
            folder,
            checkpointing.CheckpointTensors(self.model, optimizer, None),
            9,
            checkpointing.UnchangedFiles(),
            lambda path, step: self.steps.append(step),
        )
        save = checkpointing._save_copies

        def wait(tensors: dict[str, torch.Tensor], path: Path) -> None:
            assert self._go.wait(60)
            save(tensors, path)

        monkeypatch.setattr(checkpointing, "_save_copies", wait)

    def release(self) -> None:
        self._go.set()


def test_later_steps_do_not_change_a_checkpoint_in_progress(data, tmp_path, monkeypatch):
    background = BackgroundWriter(data, tmp_path, monkeypatch)
    weights = dict(background.model.named_parameters())
    before = {name: x.detach().clone() for name, x in weights.items()}
    background.writer.start(1, {})
    with torch.no_grad():
        for x in weights.values():
            x += 1
    assert background.steps == []
    background.release()
    path = background.writer.finish()
    assert (path, background.steps) == (tmp_path / "step-00000001", [1])
    checkpoints.verify_checkpoint(path)
    loaded = dict(SkillNet.from_pretrained(path).named_parameters())
    assert all(torch.equal(loaded[name], x) for name, x in before.items())
    # The next checkpoint has the later values, although the copies keep their memory.
    background.writer.start(2, {})
    loaded = dict(SkillNet.from_pretrained(background.writer.close()).named_parameters())
    assert all(torch.equal(loaded[name], x.detach()) for name, x in weights.items())


def test_a_full_disk_is_reported_by_the_next_checkpoint(data, tmp_path, monkeypatch):
    background = BackgroundWriter(data, tmp_path, monkeypatch)
    background.release()
    background.writer.start(1, {})
    assert background.writer.finish() is not None

    def fail(*given: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "complete_checkpoint", fail)
        background.writer.start(2, {})
        with pytest.raises(UserError, match="disk is full"):
            background.writer.start(3, {})
    assert [path.name for path in list_checkpoint_folders(tmp_path)] == ["step-00000001"]
    assert background.steps == [1]


@pytest.mark.parametrize("change", ["in place", "another tensor", "no links", "file cut short"])
def test_a_changed_tensor_or_file_is_written_again(data, tmp_path, change, monkeypatch):
    config = small_config(data)
    model = build_model(config)
    optimizer = build_optimizer(model.named_parameters(), config.training)
    unchanged = checkpointing.UnchangedFiles()

    def write(step: int) -> Path:
        tensors = checkpointing.CheckpointTensors(model, optimizer, None)
        return checkpointing.write_checkpoint(tmp_path, step, tensors, {}, 9, unchanged)

    first, second = write(1), write(2)
    name = "skill-text.safetensors"
    assert _inodes(first)[name] == _inodes(second)[name]
    weight = next(p for n, p in model.named_parameters() if model.file_of(n) == "skill-text")
    if change == "in place":
        with torch.no_grad():
            weight += 1
    elif change == "another tensor":
        weight.data = weight.data + 1
    elif change == "no links":

        def refuse(self: Path, source: Path) -> None:
            raise OSError(1, "no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    else:
        (second / name).write_bytes(b"short")
    third = write(3)
    assert _inodes(third)[name] != _inodes(second)[name]
    checkpoints.verify_checkpoint(third)
    saved = systems.load_model(third).get_parameter(
        next(n for n, p in model.named_parameters() if p is weight)
    )
    assert torch.equal(saved, weight)


@pytest.mark.parametrize("fault", ["", "replaced", "removed", "damaged manifest", "no copies"])
def test_a_store_gets_the_files_that_changed_since_its_last_checkpoint(
    run, object_store, fault, monkeypatch
):
    mirror, name = RunMirror(f"{object_store.uri}/run", run), "skill-text.safetensors"
    older, newer = (run / "checkpoints" / f"step-0000000{step}" for step in (6, 8))
    # As if the later steps had not changed this skill.
    (newer / name).unlink()
    (newer / name).hardlink_to(older / name)
    before, after = (json.loads((x / "manifest.json").read_text()) for x in (older, newer))
    after["files"][name] = before["files"][name]
    (newer / "manifest.json").write_text(json.dumps(after))
    same = {n for n, entry in after["files"].items() if before["files"][n] == entry}
    assert {name, "config.json"} <= same < after["files"].keys()
    sent: list[str] = []
    put = directories.put_file

    def send(path: Path, uri: str) -> None:
        sent.append(Path(path).name)
        put(path, uri)

    monkeypatch.setattr(directories, "put_file", send)
    mirror.upload_checkpoint(older, keep=2)
    there = mirror.uri_of("checkpoints", older.name)
    if fault == "replaced":
        size = (older / name).stat().st_size
        directories.write_bytes(directories.join_uri(there, name), bytes(size))
    elif fault == "removed":
        directories.remove_file(directories.join_uri(there, name))
    elif fault == "damaged manifest":
        directories.write_bytes(directories.join_uri(there, "manifest.json"), b"{}")
    elif fault == "no copies":

        def refuse(source: str, target: str) -> None:
            raise UserError("not allowed")

        monkeypatch.setattr(directories, "copy_file", refuse)
    sent.clear()
    mirror.upload_checkpoint(newer, keep=2)
    changed = after["files"].keys() - same
    again = {"": set[str](), "replaced": {name}, "removed": {name}}.get(fault, same)
    assert set(sent) - {"run.json", "progress.jsonl"} == changed | again
    shutil.rmtree(run / "checkpoints")
    found = mirror.download_newest()
    assert found.step == 8


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, "remove", f"checkpoint .*step-00000008 cannot be used: .*{name}")
          for name in ("manifest.json", "state.json", "skill-general.safetensors", "config.json")),
        *((name, "alter", f"{name} was altered")
          for name in ("optimizer-shared.safetensors", "state.json")),
        ("manifest.json", "truncate", "manifest.json is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_rejected_by_name(run, name, damage, message):
    path = run / "checkpoints" / "step-00000008" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "remove":
        content[len(content) // 2] ^= damage == "alter"
        path.write_bytes(content[: -20 if damage == "truncate" else None])
    with pytest.raises(UserError, match=message):
        checkpoints.verify_checkpoint(path.parent)


def test_newest_valid_checkpoint_is_used_and_invalid_ones_are_named(run, capsys):
    (run / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "step-00000006").mkdir()
    (run / "checkpoints" / ".step-00000010.123.tmp").mkdir()
    found = checkpoints.find_newest(run / "checkpoints")
    assert found.step == 4
    said = capsys.readouterr().err
    assert "step-00000008" in said
    assert "step-00000006" in said


def test_saved_model_is_not_a_checkpoint(data: Path, tmp_path: Path) -> None:
    build_model(small_config(data)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is a saved model, not a checkpoint"):
        checkpoints.verify_checkpoint(tmp_path / "model")


def test_weights_of_another_shape_are_rejected(data: Path, run: Path) -> None:
    config = small_config(data)
    config.model.ffn_dim = 32
    with pytest.raises(UserError, match="this model has"):
        checkpoints.load_weights(run / "checkpoints" / "step-00000008", build_model(config))


def test_start_from_a_checkpoint(data: Path, run: Path) -> None:
    config = small_config(data)
    config.init_from = str(run / "checkpoints" / "step-00000008")
    start = dict(build_model(config).named_parameters())
    saved = SkillNet.from_pretrained(config.init_from).named_parameters()
    average = model_source.load_source_model(
        model_source.resolve_model(config.init_from)
    ).named_parameters()
    moved = 0
    for (name, last), (_, mean) in zip(saved, average, strict=True):
        assert torch.equal(start[name], mean.to(start[name].dtype)), name
        moved += not torch.equal(last, mean)
    assert moved > 20


SCRIPT = """
import sys
from itertools import pairwise
from pathlib import Path
from pipelines.training.runs import checkpoints
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config
config = small_config(Path(sys.argv[1]), steps=6, checkpoint_every=2, keep_checkpoints=9)
try:
    train_model(ResolvedRun(config, Path(sys.argv[2])))
except UserError as problem:
    found = checkpoints.find_newest(Path(sys.argv[2]) / "checkpoints")
    left = sorted(path.name for path in (Path(sys.argv[2]) / "checkpoints").iterdir())
    print(found.step, left, problem, sep="|")
"""


def test_full_disk_keeps_the_previous_checkpoint(data: Path, tmp_path: Path) -> None:
    """On a file system with room for one checkpoint, in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} - {data} {disk}"
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("needs user namespaces")
    done = subprocess.run(
        [*namespace, "sh", "-c", command],
        input=SCRIPT,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[5],
        env={"PYTHONPATH": ".:platform", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
    )
    assert done.stdout, done.stderr
    step, left, message = done.stdout.strip().split("|")
    assert (step, left) == ("2", "['step-00000002']"), done.stderr
    assert "the disk is full" in message
    assert "step-00000004" in message
    assert "it takes" in message


def test_manifest_is_json_with_every_file(run: Path) -> None:
    path = run / "checkpoints" / "step-00000008"
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"manifest.json"}

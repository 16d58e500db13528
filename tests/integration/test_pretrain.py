"""``skillnet pretrain`` from the command line to a fine-tuning that starts from it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.finetune import finetune
from pipelines.pretrain import main, pretrain
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.init_from import resolve_init_weights
from pipelines.training.loop.resolved_run import build_joint_run
from pipelines.training.loop.setup import build_model
from pipelines.training.runs import model_source
from pipelines.training.runs.identity import compute_identity
from skillnet import SkillNet
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from tests.helpers.readable_corpora import config as readable_config
from tests.helpers.registered_model import Place, registered
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from registered(tmp_path_factory)


def saved(path: str | Path) -> dict[str, torch.Tensor]:
    return dict(SkillNet.from_pretrained(path).named_parameters())


# -- the command ----------------------------------------------------------------------------------


def test_command_line(
    data: Path, run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    config = small_pretraining(data, steps=6, evaluate_every=3, log_every=3)
    config.evaluate, config.tracking.register = True, False
    config.model.sound_units = 4
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    assert main(["--config", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 6
    assert {(row["task"], row["split"]) for row in result["evaluation"]} == {
        (task, "validation") for task in config.tasks
    }
    heads = {file.name for file in Path(result["model"]).glob("head-*")}
    assert heads == {f"head-{task}.safetensors" for task in config.tasks}
    recorded = backend.create_client(backend.resolve_uri()).get_run(result["run_id"])
    assert recorded.data.tags["stage"] == "pretrain"
    assert {f"{task}/validation_masked_loss" for task in config.tasks} <= set(recorded.data.metrics)
    # Text, code and sound are predicted as classes, so an accuracy is reported.
    reported = {row["task"] for row in result["evaluation"] if row["metric"] == "masked_accuracy"}
    assert reported == {"masked_text", "masked_code", "masked_sound"}
    assert result["registered"] is None

    assert main(["--config", str(path), "--tasks.masked_text.split", "test", "--name", "x"]) == 2
    assert "allows pretrain, train for pretraining, not test" in capsys.readouterr().err
    assert not (run_root / "x").exists()


# -- fine-tuning from it --------------------------------------------------------------------------


def tuning(data: Path, start: str | None, name: str = "tuned") -> FinetuneConfig:
    config = replace(small_config(data, steps=3), name=name, init_from=start)
    config.tracking.register = False
    return config


def test_from_a_run_a_folder_and_a_checkpoint(data: Path, run_root: Path) -> None:
    made = pretrain(small_pretraining(data, steps=5))
    start = saved(made["model"])
    for given in ("pretraining", made["run"], made["model"], made["checkpoint"]):
        here = replace(tuning(data, given), run_dir=str(run_root))
        here.init_from = resolve_init_weights(given, None, str(run_root))
        model = dict(build_model(here).named_parameters())
        same = {name for name in model if name in start}
        assert all(torch.equal(model[name], start[name].float()) for name in same)
        # No masked task activates the skill alignment, so the pretrained model does not have it.
        fresh = {name for name in model.keys() - same if not name.endswith("weights.alignment")}
        assert {name.split(".")[0] for name in fresh} == {"heads"}

    result = finetune(tuning(data, "pretraining"))
    reported = result["init_from"]
    assert reported["digest"] == model_source.resolve_model(made["run"]).digest
    heads = {f"head-{task}" for task in small_config(data).tasks}
    assert heads | {"skill-alignment"} == set(reported["fresh"])
    assert {"shared", "skill-general", "skill-sound", "stem-token"} <= set(reported["taken"])
    # The same weights from another place are the same run; other weights are not.
    shutil.copytree(made["model"], run_root / "copy")
    again = finetune(tuning(data, str(run_root / "copy")))
    assert again["run_id"] == result["run_id"]
    with pytest.raises(UserError, match="the run tuned has init_from"):
        finetune(tuning(data, None))


def test_from_a_registered_version(place: Place, tmp_path: Path) -> None:
    folder = resolve_init_weights("models:/skillnet@champion", None, str(tmp_path))
    assert Path(folder).is_relative_to(tmp_path)
    assert resolve_init_weights("models:/skillnet/1", None, str(tmp_path)) == folder
    config = FinetuneConfig(data=str(place.data), model=readable_config(), init_from=folder)
    model, expected = build_model(config), saved(place.saved)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert (
        compute_identity(config)["init_from"] == model_source.resolve_model(str(place.saved)).digest
    )


def refusal(config: FinetuneConfig) -> str:
    with pytest.raises(UserError) as caught:
        build_model(config)
    return str(caught.value)


def test_what_does_not_fit_is_named(data: Path, tmp_path: Path) -> None:
    joint = build_joint_run(small_pretraining(data))
    build_model(joint).save_pretrained(tmp_path / "model")
    start = str(tmp_path / "model")
    config = tuning(data, start)
    config.model.patch_size = 8
    message = refusal(config)
    assert "stems.patch.project.weight" in message or "stems.patch.position" in message
    assert "model.patch_size 16 there and 8 here" in message
    config = tuning(data, start)
    config.model.vocab_size = 80
    assert "model.vocab_size 64, this run 80" in refusal(config)
    config = tuning(data, start)
    config.model.num_layers = 3
    assert "model.num_layers 2, this run 3" in refusal(config)
    about = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(about | {"system": "moe"}), "utf-8")
    with pytest.raises(ValueError, match="altered"):
        build_model(tuning(data, start))


def test_a_model_of_another_system_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SkillNet, "system", "moe")
    build_model(build_joint_run(small_pretraining(data))).save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert "system 'moe', this run trains 'skillnet'" in refusal(
        tuning(data, str(tmp_path / "model"))
    )


def test_a_start_without_stems_of_a_task_leaves_them_fresh(data: Path, tmp_path: Path) -> None:
    config = small_pretraining(data)
    config.tasks = {"masked_sound": config.tasks["masked_sound"]}
    build_model(build_joint_run(config)).save_pretrained(tmp_path / "model")
    from pipelines.training.loop.setup import dry_run_init

    start = dry_run_init(tuning(data, str(tmp_path / "model")))
    assert start is not None
    assert "stem-log_mel" in start.taken
    assert "skill-sound" in start.taken
    assert "stem-patch" in start.fresh
    assert "random: " in start.describe()[0]

"""Presets of ``--config``: each names its commands, and other commands name the right preset."""

import re
from pathlib import Path

import pytest

from skillnet_platform import cli
from skillnet_platform.config import presets

PRESETS = sorted(presets.list_presets())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_the_commands_that_take_it(name: str) -> None:
    commands = presets.read_preset_commands(name)
    assert commands
    assert set(commands) <= set(cli.SUMMARIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "pretrain --config tiny",
            "error: --config tiny: this is a preset of skillnet finetune; presets of skillnet "
            "pretrain: pretrain, pretrain/base, pretrain/code-pairs",
        ),
        (
            "compare --config tiny",
            "error: --config tiny: this is a preset of skillnet finetune; did you mean "
            "'studies/tiny'?",
        ),
        (
            "finetune --config studies/tiny",
            "error: --config studies/tiny: this is a preset of skillnet compare; did you mean "
            "'tiny'?",
        ),
        (
            "predict --config tiny",
            "error: --config tiny: this is a preset of skillnet finetune",
        ),
        ("compare --config pilot", "error: --config pilot: neither a file nor a preset; did you "
         "mean 'studies/pilot'?"),
    ],
)  # fmt: skip
def test_a_preset_of_another_command_is_named(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    assert capsys.readouterr().err.strip() == message


def test_a_name_means_the_preset_of_the_command() -> None:
    assert presets.choose_preset("base", "skillnet pretrain") == "pretrain/base"
    assert presets.choose_preset("base", "skillnet finetune") == "base"
    assert presets.choose_preset("./base.yaml", "skillnet pretrain") == "./base.yaml"
    loaded = cli.find_commands()["pretrain"].load()
    assert isinstance(loaded, cli.CliCommand)
    config = loaded.parse_arguments(["--config", "base", "--training.workers", "4"])
    # The model of `finetune --config base`, which starts from it.
    assert (config.model.dim, config.training.use_gpu) == (768, True)
    assert "text_classification" not in config.tasks
    assert {"masked_sound", "views_image", "text_to_image"} <= set(config.tasks)


def test_an_error_of_a_fitting_preset_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", "--config", "tiny", "--training.stepz", "3"]) == 2
    assert "did you mean 'training.steps'" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {dim: wide}\n", encoding="utf-8")
    assert cli.main(["finetune", "--config", "mine.yaml"]) == 2
    assert re.search(r"mine.yaml.*model\.dim", capsys.readouterr().err)


@pytest.mark.parametrize(("word", "meant"), [("train", "finetune"), ("tune", "sweep")])
def test_usual_names_of_commands_lead_to_ours(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"error: unknown command {word!r}; did you mean {meant!r}?\n"

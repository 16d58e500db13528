"""`finetune` takes a preset and overrides from Python as from the command line."""

from typing import Any

import pytest

from pipelines import finetune as command
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.errors import UserError


def test_preset_and_overrides_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(command, "run_end_to_end", lambda config, stage: calls.append(config) or {})
    changes = {
        "name": "first",
        "training.steps": 7,
        "evaluate": False,
        "model.tubelet": [4, 16, 16],
    }
    command.finetune("tiny", changes)
    words = (
        "--config tiny --name first --training.steps 7 --evaluate false --model.tubelet [4,16,16]"
    )
    assert calls == [command.main.parse_arguments(words.split())]
    with pytest.raises(UserError, match=r"training\.steps"):
        command.finetune("tiny", {"training.steps": "many"})
    with pytest.raises(UserError, match="overrides"):
        command.finetune(FinetuneConfig(), {"name": "first"})

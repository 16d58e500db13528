"""A registered model, its corpora and its run root: made once for all tests that read it."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from pipelines.serving import registration
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from tests.helpers.readable_corpora import config, write_corpora


class Place:
    """A run root with prepared corpora, a saved model, and that model registered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = write_corpora(root / "corpora")
        torch.manual_seed(0)
        self.saved = root / "saved"
        SkillNet(config()).save_pretrained(self.saved)
        self.made = registration.register_model(
            model_source.resolve_model(str(self.saved)),
            self.data,
            bootstrap_samples=50,
            description="A first try.",
        )


@lru_cache(maxsize=1)
def _made(root: Path) -> Place:
    return Place(root)


def registered(factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The place, with the environment pointing at it; for a module's fixture."""
    root = factory.getbasetemp() / "registered"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        yield _made(root)

"""``skillnet register``: put a trained model into the registry, behind the gate."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from skillnet_platform.tracking.registry import Registered
from pipelines.serving.registration import register_model


@dataclass
class RegisterConfig:
    """Register a trained model as a new version.

    Args:
        source: a run's name, id or folder, a checkpoint, or a saved model.
        name: of the registered model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        samples: resamplings of the intervals that the gate compares.
        force: make it champion whatever the gate says.
        description: added to the page of the version.
        corpora: task -> corpus, where it is not the one of the training run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    source: str = positional()
    name: str = "skillnet"
    data: str | None = None
    samples: int = 1000
    force: bool = False
    description: str = ""
    corpora: dict[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None


def show_registration(made: "Registered") -> None:
    """Print what was registered, under which alias, and why."""
    console.note(f"{made.uri} is now @{made.alias}")
    rows = [reason.partition(": ")[::2] for reason in made.verdict.reasons]
    console.table("the gate", ["task", "verdict"], rows)
    console.note(f"try: skillnet predict --model models:/{made.name}@{made.alias} --text …")


@command(
    RegisterConfig,
    description="Log a trained model with its tokenizer and names, make it a version of the "
    "registry, and let the gate decide whether it becomes the champion: at least as good on "
    "all tasks and better on one, by confidence interval.",
    example="skillnet register my-run",
    show=show_registration,
    resources=lambda config: request_model(config.source, config.data),
)
def main(config: RegisterConfig) -> "Registered":
    """Run ``skillnet register``."""
    from dataclasses import replace

    from pipelines.runs import model_source

    if config.samples < 1:
        raise UserError("the gate compares intervals: samples must be at least 1")
    source = model_source.resolve_model(config.source, config.tracking_uri)
    if config.corpora:
        tasks = source.settings.get("tasks", {})
        named = {
            task: {**tasks.get(task, {}), "corpus": name} for task, name in config.corpora.items()
        }
        source = replace(source, settings={**source.settings, "tasks": {**tasks, **named}})
    return register_model(
        source,
        place(config.data, data_root()),
        name=config.name,
        uri=config.tracking_uri,
        samples=config.samples,
        force=config.force,
        description=config.description,
    )


if __name__ == "__main__":
    raise SystemExit(main())

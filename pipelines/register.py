"""``skillnet register``: add a trained model to the registry and decide about its promotion."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import ResampleCount

if TYPE_CHECKING:
    from skillnet_platform.tracking.registry import RegisteredVersion


@dataclass
class RegisterConfig:
    """Register a trained model as a new version.

    Args:
        source: name, id or folder of a run, checkpoint, or saved model.
        name: name of the registered model; by default that of the training run, such as skillnet or
            skillnet-dense.
        data: directory or URI of prepared corpora; by default those of the model's run, else
            corpora below the run root.
        bootstrap_samples: resamples of the intervals of macro-F1 and median rank.
        force: make it champion without the comparison.
        description: added to the page of the version.
        allow_weak_test: register it although test rows were in its training. Its page states this.
        corpora: task -> corpus, if it differs from the training run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    source: str = positional_field()
    name: str | None = None
    data: str | None = None
    bootstrap_samples: ResampleCount = 1000
    force: bool = False
    description: str = ""
    allow_weak_test: bool = False
    corpora: dict[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None


def show_registration(registered: "RegisteredVersion") -> None:
    """Print the registered version, its alias, and the reasons for the alias.

    Args:
        registered: the new version.
    """
    console.print_note(f"{registered.uri} is now @{registered.alias}")
    rows = [reason.partition(": ")[::2] for reason in registered.verdict.reasons]
    console.print_table("promotion", ["task", "reason"], rows)
    console.print_note(
        f"try: skillnet predict --model models:/{registered.name}@{registered.alias} --text …"
    )


@command(
    RegisterConfig,
    description="Register a trained model with its tokenizer and output names as a new version. "
    "It becomes the champion if it is not worse on any task and better on at least one, by "
    "confidence interval. Models of different systems are never compared.",
    example="skillnet register my-run",
    show=show_registration,
    resources=lambda config: request_model(config.source, config.data),
)
def main(config: RegisterConfig) -> "RegisteredVersion":
    """Run ``skillnet register``."""
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(config.source, config.tracking_uri)
    # The source has the corpora of its training run; the option overrides them.
    source = source.with_corpora(config.corpora)
    # torch and MLflow load here: --help and wrong names do not need them.
    from pipelines.serving.registration import register_model

    return register_model(
        source,
        source.find_corpora(config.data),
        name=config.name,
        uri=config.tracking_uri,
        bootstrap_samples=config.bootstrap_samples,
        force=config.force,
        description=config.description,
        allow_weak_test=config.allow_weak_test,
    )


if __name__ == "__main__":
    raise SystemExit(main())

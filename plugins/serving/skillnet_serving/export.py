"""``skillnet export``: write a trained model for the Hub, as a dense model, or as a graph."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from skillnet_serving.model_export import ExportReport

DEFAULT_MODEL = "models:/skillnet@champion"


@dataclass
class ExportConfig:
    """Export a trained model, or one task of it.

    Args:
        task: task to export; by default all, which only hf can.
        to: hf writes a folder for the Hugging Face Hub, dense merges the skills of the task into
            one set of weights, pt2 and onnx write a graph of it. onnx-int8 has weights of 8 bits,
            and says what that changes. sentence-transformers writes a folder that this library
            and mteb load.
        output: folder to create; by default named after the task and the format.
        model: a registered model, a run, a checkpoint, or a folder.
        data: directory or URI of prepared corpora, for a model that is not registered; by default
            those of its run, else corpora below the run root.
        corpora: task -> corpus, for a model without a training run, or with other corpora.
        push: owner/name of a repository of the Hub that gets the folder; only with --to hf.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    task: str | None = positional_field(default=None)
    to: Literal["hf", "dense", "pt2", "onnx", "onnx-int8", "sentence-transformers"] = "hf"
    output: str | None = None
    model: str = DEFAULT_MODEL
    data: str | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    push: str | None = None
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        if self.push is not None and self.to != "hf":
            raise UserError(f"push: --to {self.to} writes no folder for the Hub. Use --to hf")


def show_export(report: "ExportReport") -> None:
    """Print what was written.

    Args:
        report: collected findings of the export.
    """
    console.print_note(
        f"{report.parameters / 1e6:.2f} M parameters, {', '.join(report.tasks)}; largest "
        f"difference to the source: {report.difference:.2g}"
    )
    console.print_note(f"{report.folder} holds the export ({report.format})")


@command(
    ExportConfig,
    description="Write a trained model in another form: a folder that SkillNet.from_pretrained and "
    "the Hugging Face Hub read, or one task as a dense model, a torch.export program or ONNX. The "
    "outputs are compared with those of the source.",
    example="skillnet export --to hf --output my-model\n"
    "skillnet export text_to_image --to onnx --output text-to-image",
    show=show_export,
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: ExportConfig) -> "ExportReport":
    """Run ``skillnet export``."""
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.serving.bundle import find_bundle
    from skillnet_serving.exported_folder import push_folder
    from skillnet_serving.model_export import export_bundle

    source = source.with_corpora(config.corpora)
    bundle, manifest = find_bundle(source, source.find_corpora(config.data))
    target = Path(config.output or f"{config.task or 'skillnet'}-{config.to}")
    report = export_bundle(bundle, manifest, target, config.to, config.task)
    if config.push is not None:
        console.print_note(f"pushed: {push_folder(target, config.push)}")
    return report


if __name__ == "__main__":
    raise SystemExit(main())

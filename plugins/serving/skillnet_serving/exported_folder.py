"""The folder of an exported model: weights, files of predictions, a card; its way to the Hub.

``skillnet export --to hf`` writes it, and ``model.save_pretrained`` and ``model.push_to_hub`` by
the entry points of ``skillnet.exporters``.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelHubMixin

from pipelines.serving.bundle import list_reading_files
from pipelines.training.evaluation.tables import result_cells, sort_rows
from pipelines.training.runs.bundle_manifest import (
    MANIFEST,
    add_bundle_manifest,
    is_bundle,
    read_bundle_manifest,
)
from pipelines.training.runs.model_source import ModelSource
from skillnet.multitask_model import TaskModel
from skillnet.serialization import write_model
from skillnet_evidence.cells import markdown_table
from skillnet_platform.errors import UserError, list_hub_errors
from skillnet_platform.storage import staging_directory

CARD_FILE = "README.md"
#: Settings of the training that an export repeats. The others name folders and servers.
PUBLIC_SETTINGS = frozenset(
    ("seed", "system", "options", "model", "tasks", "corpora", "fold", "training")
)


def write_exported_folder(
    bundle: Path, manifest: Mapping[str, Any], model: TaskModel, folder: Path, title: str
) -> None:
    """Write a model, a card, and the files of predictions of the bundle that it comes from.

    Args:
        bundle: folder of the source.
        manifest: entry ``serving`` of its manifest.
        model: its tasks are those of the source or some of them.
        folder: existing directory.
        title: heading of the card.
    """
    write_model(model, folder)
    tasks = {task: manifest["tasks"][task] for task in model.config.tasks}
    files = sorted(list_reading_files(tasks) & manifest["files"].keys())
    for name in files:
        shutil.copyfile(bundle / name, folder / name)
    settings = {k: v for k, v in manifest["settings"].items() if k in PUBLIC_SETTINGS}
    content = {key: value for key, value in manifest.items() if key not in ("digest", "files")} | {
        "settings": shorten_paths(settings),
        "tasks": {
            task: entry | {"preprocessing": shorten_paths(entry["preprocessing"])}
            for task, entry in tasks.items()
        },
        "weights_digest": ModelSource(str(folder), folder).digest,
        "evaluation": [row for row in manifest["evaluation"] if row["task"] in tasks],
    }
    add_bundle_manifest(folder, content, files)
    # Not listed in the manifest: people edit the card.
    (folder / CARD_FILE).write_text(render_card(content, model, title), encoding="utf-8")


def shorten_paths(value: Any) -> Any:
    """Return a tree of plain values with the names of files and folders instead of their paths."""
    if isinstance(value, Mapping):
        return {key: shorten_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shorten_paths(each) for each in value]
    # A user's folder may also be written with a tilde, or as an address.
    if isinstance(value, str) and value.startswith(("/", "~", "file:")):
        return Path(value).name
    return value


def save_described_model(model: TaskModel, target: Path) -> None:
    """Write a model in memory with the files of predictions of its origin, atomically.

    ``model.save_pretrained`` calls it by the entry point ``folder`` of ``skillnet.exporters``.

    Args:
        model: read from the folder of a bundle; its weights may have changed.
        target: directory to write; an older model there is replaced.

    Raises:
        UserError: the target exists and is no saved model.
    """
    assert model.origin is not None
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{target}: exists and is not a saved model; choose another folder")
    manifest = read_bundle_manifest(model.origin)
    with staging_directory(target) as folder:
        write_exported_folder(model.origin, manifest, model, folder, target.name)


def render_card(manifest: Mapping[str, Any], model: TaskModel, name: str) -> str:
    """Return the card as Markdown with a YAML header, as the Hugging Face Hub reads it.

    Args:
        manifest: entry ``serving`` of the model's manifest.
        model: network whose weights are read.
        name: title of the card.
    """
    tasks = {task: manifest["tasks"][task] for task in sort_rows(model.config.tasks)}
    header = {
        "library_name": "skillnet-platform",
        "tags": ["skillnet", *sorted({spec.objective for spec in model.config.tasks.values()})],
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_one_line(name)}",
        f"A model of the system {model.system} with {total / 1e6:.1f} M parameters and the tasks "
        f"{', '.join(tasks)}.",
        "```python\nfrom skillnet import SkillNet\n\n"
        'model = SkillNet.from_pretrained("PATH or owner/name")\n```',
        "## Data",
        markdown_table(
            ["task", "corpus", "digest of the corpus", "licences of its sources"],
            [
                [
                    task,
                    _one_line(entry["corpus"]),
                    f"`{_one_line(entry['corpus_digest'])[:16]}`",
                    _one_line("; ".join(entry["licences"])) or "not recorded",
                ]
                for task, entry in tasks.items()
            ],
        ),
        "## Figures",
    ]
    rows = [row for row in manifest["evaluation"] if row["task"] in tasks]
    rows = [row for row in rows if row["value"] is not None]
    parts.append(markdown_table(*result_cells(rows)) if rows else "This model was not evaluated.")
    if rows:
        parts.append("Intervals of 95 % over held-out units of the test.")
    parts += ["## Cost", markdown_table(*_cost_cells(model, list(tasks), total))]
    steps = "an unknown number of" if manifest["steps"] is None else f"{manifest['steps']}"
    parts += [
        "## Training",
        f"Trained for {steps} steps. Written by skillnet-platform "
        f"{_one_line(manifest['package'])}; `manifest.json` has all settings and hashes.",
    ]
    return "\n\n".join(parts) + "\n"


def _cost_cells(
    model: TaskModel, tasks: list[str], total: int
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of what one example of a task reads and computes."""
    cells = []
    for task in tasks:
        active = model.activated_parameters(task)
        flops, tokens = model.flops(task)
        share = f"{active / 1e6:.1f} M ({100 * active / total:.0f} %)"
        cells.append([task, share, f"{flops / 1e9:.3g}", str(tokens)])
    return ["task", "activated parameters", "GFLOPs of the longest example", "tokens"], cells


def _one_line(text: str) -> str:
    # A name with a line break or markup could write other parts of the card.
    return " ".join(text.replace("<", "‹").replace("`", "'").split())


class ExportedFolder(ModelHubMixin):
    """Folder of ``skillnet export --to hf`` with the Hub's methods for models."""

    #: Folder of the export; not an argument, because the mixin would save it as configuration.
    folder: Path

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def push_folder(folder: Path, repository: str, **options: Any) -> str:
    """Upload an exported model; create the repository if it does not exist.

    Args:
        folder: directory of the export.
        repository: ``owner/name``.
        **options: further arguments of ``ModelHubMixin.push_to_hub``, such as ``private`` and
            ``token``.

    Returns:
        URL of the commit.

    Raises:
        UserError: the folder is no export, or the Hub refuses it.
    """
    if not is_bundle(folder):
        raise UserError(f"{folder}: no exported model. Write one: skillnet export --to hf")
    exported = ExportedFolder()
    exported.folder = folder
    try:
        return str(exported.push_to_hub(repository, **options))
    # The text of an HTTP error may hold the request's URL only.
    except list_hub_errors() as error:
        raise UserError(
            f"{repository}: the Hub refuses the upload ({type(error).__name__}). Check the name, "
            "the connection and HF_TOKEN"
        ) from None


def push_model(model: TaskModel, repository: str, **options: Any) -> str:
    """Upload a model in memory with the files of predictions of the folder that it was read from.

    ``model.push_to_hub`` calls it by the entry point ``hub`` of ``skillnet.exporters``.

    Args:
        model: read from the folder of a bundle; its weights may have changed.
        repository: ``owner/name``.
        **options: see :func:`push_folder`.

    Returns:
        URL of the commit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repository.rpartition("/")[2]
        save_described_model(model, folder)
        return push_folder(folder, repository, **options)

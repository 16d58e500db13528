"""Export of a trained model: folders for the Hub, a dense model, torch.export and ONNX.

    hf      weights per skill, tokenizer, manifest and model card; all tasks or one
    dense   the same of one task, with the skills of each tower merged into one set of weights
    pt2     a torch.export program per tower of one task, of the merged weights
    onnx    the same as ONNX

:func:`export_bundle` is the entry point of ``skillnet export``. Every export is compared with the
outputs of its source.
"""

import contextlib
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelHubMixin
from torch import Tensor

from pipelines.training.evaluation.tables import result_cells, sort_rows
from pipelines.training.runs.bundle_manifest import (
    TOKENIZER_FILE,
    add_bundle_manifest,
    is_bundle,
    read_bundle_manifest,
)
from pipelines.training.runs.model_source import ModelSource
from skillnet import systems
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.router import name_counts
from skillnet.serialization import write_model
from skillnet.skill_proofs import make_example_batch
from skillnet.skills import find_task
from skillnet_evidence.cells import markdown_table
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import describe_missing_extra
from skillnet_platform.storage import staging_directory
from skillnet_serving.dense_export import TowerGraph, export_tower, merge_task_skills

FORMATS = ("hf", "dense", "pt2", "onnx")
#: Largest difference of an output in float32, relative to the largest output or 1.
TOLERANCE = 1e-5
#: Version of the ONNX operators: attention and normalization exist since 18.
OPSET = 18
GRAPH_MANIFEST, CARD_FILE = "graph.json", "README.md"
#: Settings of the training that an export repeats. The others name folders and servers.
PUBLIC_SETTINGS = frozenset(
    ("seed", "system", "options", "model", "tasks", "corpora", "fold", "training")
)

Towers = Callable[[str, str, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Args:
        folder: that was written.
        format: one of ``FORMATS``.
        tasks: names of the exported model's tasks.
        parameters: number of its weights.
        difference: largest difference of its outputs to those of the source.
    """

    folder: str
    format: str
    tasks: list[str]
    parameters: int
    difference: float


def export_bundle(
    bundle: Path, manifest: Mapping[str, Any], target: Path, to: str, task: str | None = None
) -> ExportReport:
    """Write a model in another form, atomically, and compare its outputs with those of the source.

    Args:
        bundle: checked bundle of the model.
        manifest: entry ``serving`` of its manifest.
        target: directory to create.
        to: one of ``FORMATS``.
        task: to export; None exports all tasks, which only ``hf`` can.

    Raises:
        UserError: the target exists, a task is missing or unknown, or a package is not installed.
        ValueError: the outputs differ.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists. Give --output another folder")
    tasks = list(manifest["tasks"])
    if task is None and to != "hf":
        raise UserError(f"--to {to} exports one task. Give one of {', '.join(tasks)}")
    if task is not None:
        find_task(task, dict.fromkeys(tasks))  # type: ignore[arg-type]
    if to == "onnx":
        _require_onnx()
    source = systems.load_model(bundle, task)
    # A tower of several skills becomes one of a single skill, so a graph has no averages.
    exported = source
    if to != "hf":
        if not isinstance(source, SkillNet):
            raise UserError(f"--to {to}: the system {source.system} has no skills to merge")
        exported = merge_task_skills(source, str(task))
    with staging_directory(target) as folder:
        if to in ("hf", "dense"):
            write_exported_folder(bundle, manifest, exported, folder, target.name)
            difference = _compare(source, manifest, _run_model(systems.load_model(folder)))
        else:
            run = _write_graphs(bundle, manifest, exported, str(task), folder, to)
            difference = _compare(source, manifest, run)
        # Before the folder gets its name, so that a wrong export never exists.
        if not difference <= TOLERANCE:
            raise ValueError(f"{target}: outputs differ from the source by {difference:.2g}")
    parameters = sum(parameter.numel() for parameter in exported.parameters())
    return ExportReport(str(target), to, list(exported.config.tasks), parameters, difference)


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
    banks = [f"captions-{task}.{kind}" for task in tasks for kind in ("json", "safetensors")]
    possible = (TOKENIZER_FILE, *banks, *map(name_counts, tasks))
    files = [name for name in possible if name in manifest["files"]]
    for name in files:
        shutil.copyfile(bundle / name, folder / name)
    settings = {k: v for k, v in manifest["settings"].items() if k in PUBLIC_SETTINGS}
    content = {key: value for key, value in manifest.items() if key not in ("digest", "files")} | {
        "settings": _shorten_paths(settings),
        "tasks": {
            task: entry | {"preprocessing": _shorten_paths(entry["preprocessing"])}
            for task, entry in tasks.items()
        },
        "weights_digest": ModelSource(str(folder), folder).digest,
        "evaluation": [row for row in manifest["evaluation"] if row["task"] in tasks],
    }
    add_bundle_manifest(folder, content, files)
    # Not listed in the manifest: people edit the card.
    (folder / CARD_FILE).write_text(render_card(content, model, title), encoding="utf-8")


def _shorten_paths(value: Any) -> Any:
    """Return a tree of plain values with the names of files and folders instead of their paths."""
    if isinstance(value, Mapping):
        return {key: _shorten_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten_paths(each) for each in value]
    # A user's folder may also be written with a tilde, or as an address.
    if isinstance(value, str) and value.startswith(("/", "~", "file:")):
        return Path(value).name
    return value


def _write_graphs(
    bundle: Path, manifest: Mapping[str, Any], model: TaskModel, task: str, folder: Path, to: str
) -> Towers:
    """Write a graph per tower, and return a function that runs them."""
    towers: dict[str, Any] = {}
    runs: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
    for tower, plan in model.config.tasks[task].towers.items():
        graph = TowerGraph(model, task, tower).eval()
        settings = manifest["tasks"][task]["preprocessing"]
        batch = make_example_batch(plan, model.config, settings=settings)
        program = export_tower(graph, batch)
        path = folder / f"{tower}.{to}"
        if to == "pt2":
            torch.export.save(program, path)
            runs[tower] = program.module()
        else:
            _write_onnx(program, graph, path)
            runs[tower] = _run_onnx(path, graph)
        towers[tower] = {
            "file": path.name,
            "inputs": {
                name: {
                    # Rows, and tokens of a text, are free.
                    "shape": [None, *([None] if name == "tokens" else batch[name].shape[1:])],
                    "dtype": str(batch[name].dtype).removeprefix("torch."),
                }
                for name in graph.input_names
            },
            "outputs": list(graph.output_names),
        }
    shutil.copyfile(bundle / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    entry = manifest["tasks"][task]
    about = {key: entry[key] for key in ("names", "limit")}
    about["preprocessing"] = _shorten_paths(entry["preprocessing"])
    about = {"task": task, "package": manifest["package"], "towers": towers} | about
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / GRAPH_MANIFEST).write_text(text + "\n", encoding="utf-8")
    return lambda _, tower, tensors: runs[tower](*tensors)


def _require_onnx() -> None:
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--to onnx: {describe_missing_extra(error) or error}") from None


def _write_onnx(program: torch.export.ExportedProgram, graph: TowerGraph, path: Path) -> None:
    # The exporter reports its steps on standard output, where --json has one document.
    with contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(
            program,
            f=path,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )


def _run_onnx(path: Path, graph: TowerGraph) -> Callable[..., tuple[Tensor, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for name, x in zip(graph.input_names, tensors, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(None, feed))

    return run


def _run_model(model: TaskModel) -> Towers:
    return lambda task, tower, tensors: TowerGraph(model, task, tower).eval()(*tensors)


@torch.no_grad()
def _compare(source: TaskModel, manifest: Mapping[str, Any], run: Towers) -> float:
    """Return the largest difference of the outputs of all towers, for one row and for several."""
    largest = 0.0
    expected = _run_model(source)
    for task, spec in source.config.tasks.items():
        settings = manifest["tasks"][task]["preprocessing"]
        for tower, plan in spec.towers.items():
            for rows in (1, 4):
                batch = make_example_batch(plan, source.config, rows, rows, settings)
                tensors = tuple(batch[name] for name in TowerGraph(source, task, tower).input_names)
                pairs = zip(expected(task, tower, tensors), run(task, tower, tensors), strict=True)
                for wanted, found in pairs:
                    scale = max(float(wanted.abs().max()), 1.0)
                    largest = max(largest, float((wanted - found).abs().max()) / scale)
    return largest


# -- card and upload ----------------------------------------------------------------------------


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not is_bundle(folder):
        raise UserError(f"{folder}: no exported model. Write one: skillnet export --to hf")
    exported = ExportedFolder()
    exported.folder = folder
    try:
        return str(exported.push_to_hub(repository, **options))
    # Connection errors are OSErrors. The text of an HTTP error may hold the request's URL only.
    except (HFValidationError, HfHubHTTPError, OSError) as error:
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
    assert model.origin is not None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        manifest = read_bundle_manifest(model.origin)
        title = repository.rpartition("/")[2]
        write_exported_folder(model.origin, manifest, model, folder, title)
        return push_folder(folder, repository, **options)

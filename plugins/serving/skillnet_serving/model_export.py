"""Export of a trained model: folders for the Hub, a dense model, torch.export and ONNX.

    hf      weights per skill, tokenizer, manifest and model card; all tasks or one
    dense   the same of one task, with the skills of each tower merged into one set of weights
    pt2     a torch.export program per tower of one task, of the merged weights
    onnx    the same as ONNX

:func:`export_bundle` is the entry point of ``skillnet export``. Every export is compared with the
outputs of its source.

A task has a fixed plan, so its inactive skills are not needed and its active ones are always
averaged. :func:`merge_task_skills` computes the merged weights once. The result is a SkillNet with
one skill per plan; its outputs are those of the source.
"""

import contextlib
import dataclasses
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipelines.serving.bundle import list_reading_files
from pipelines.training.evaluation.tables import result_cells, sort_rows
from pipelines.training.runs.bundle_manifest import (
    MANIFEST,
    TOKENIZER_FILE,
    add_bundle_manifest,
    is_bundle,
    read_bundle_manifest,
)
from pipelines.training.runs.model_source import ModelSource
from skillnet import systems
from skillnet.encoder import SHARED
from skillnet.layers import SkillWeights
from skillnet.modality import find_modality
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective
from skillnet.serialization import write_model
from skillnet.skill_proofs import make_example_batch
from skillnet.skills import SkillPlan, find_task
from skillnet.skipped_init import SkippedInit
from skillnet_evidence.cells import markdown_table
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import describe_missing_extra
from skillnet_platform.storage import staging_directory

FORMATS = ("hf", "dense", "pt2", "onnx")
#: Largest difference of an output in float32, relative to the largest output or 1.
TOLERANCE = 1e-5
#: Version of the ONNX operators: attention and normalization exist since 18.
OPSET = 18
#: Shortest text of a graph. Tensors of length 1 broadcast, so torch would trace another graph.
MIN_TOKENS = 3
GRAPH_MANIFEST, CARD_FILE = "graph.json", "README.md"
#: Settings of the training that an export repeats. The others name folders and servers.
PUBLIC_SETTINGS = frozenset(
    ("seed", "system", "options", "model", "tasks", "corpora", "fold", "training")
)

Towers = Callable[[str, str, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
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
    files = sorted(list_reading_files(tasks) & manifest["files"].keys())
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


# -- one task as a dense model, and its graphs -------------------------------------------------


@torch.no_grad()
def merge_task_skills(model: SkillNet, task: str) -> SkillNet:
    """Return a model of one task, in evaluation mode, with one skill per plan of the task.

    The skill is named after the first tower with its plan. The feed-forward layers of the result
    are as wide as those of all active skills together.

    Args:
        model: trained model; it is not changed.
        task: name of the task.

    Raises:
        ValueError: the model has no such task.
    """
    spec = find_task(task, model.config.tasks)
    merged: dict[tuple[str, ...], str] = {}
    for tower in sorted(spec.towers):
        merged.setdefault(spec.towers[tower].skills, tower)
    towers = {
        tower: SkillPlan((merged[plan.skills],), plan.modality)
        for tower, plan in spec.towers.items()
    }
    # Layers whose feed-forward part has no skills keep their width, and are padded with zeros.
    has_wide = any(layer.feedforward_skills for layer in model.encoder.layers)
    width = model.config.ffn_dim * (max(map(len, merged)) if has_wide else 1)
    config = dataclasses.replace(
        model.config,
        skills=tuple(merged.values()),
        skill_rank=0,
        low_rank_skills={},
        ffn_dim=width,
        tasks={task: dataclasses.replace(spec, towers=towers)},
    )
    some = next(model.parameters())
    with SkippedInit(), some.device:
        dense = SkillNet(config).to(some.dtype)
    known = model.state_dict()
    # Every weight without skills has the same name and shape in both models.
    dense.load_state_dict(
        {name: known[name] for name in dense.state_dict() if ".weights." not in name}, strict=False
    )
    for name, module in model.named_modules():
        if isinstance(module, SkillWeights):
            target = dense.get_submodule(name)
            assert isinstance(target, SkillWeights)
            for skills, merged_name in merged.items():
                is_shared = SHARED[0] in module.weights
                weight = module.merged(SHARED if is_shared else skills, some.dtype)
                wanted = target.weights[SHARED[0] if is_shared else merged_name]
                wanted.copy_(_pad(weight, wanted.shape))
    dense.vocabulary = model.vocabulary.restrict_to(config.tasks)
    return dense.eval()


def _pad(weight: Tensor, shape: torch.Size) -> Tensor:
    """Append zeros: gelu(0) is 0, so a hidden unit without weights changes no output."""
    missing = [wanted - found for found, wanted in zip(weight.shape, shape, strict=True)]
    return F.pad(weight, [n for each in reversed(missing) for n in (0, each)])


class TowerGraph(nn.Module):
    """One tower of a task with tensors as inputs and outputs.

    Args:
        model: with the task.
        task: name of the task.
        tower: tower of the task, such as ``query``.
    """

    def __init__(self, model: TaskModel, task: str, tower: str) -> None:
        super().__init__()
        self.model, self.task, self.tower = model, task, tower
        self.spec = find_task(task, model.config.tasks)
        self.input_names = find_modality(self.spec.towers[tower].modality).batch
        self.output_names: tuple[str, ...] = ()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the unit vectors of a retrieval tower, or the outputs of the head."""
        batch = dict(zip(self.input_names, tensors, strict=True))
        if find_objective(self.spec.objective).pairs_towers:
            outputs = {"vectors": self.model.embed(self.task, self.tower, batch)}
        else:
            outputs = self.model(self.task, {self.tower: batch})
        self.output_names = tuple(outputs)
        return tuple(outputs.values())


def export_tower(graph: TowerGraph, batch: Batch) -> ExportedProgram:
    """Trace a tower for any number of rows, and texts of any length up to that of the batch.

    Args:
        graph: traceable module of the tower, its model in evaluation mode.
        batch: inputs of the longest length, at least two rows.
    """
    shapes: list[dict[int, Any]] = []
    for name in graph.input_names:
        axes: dict[int, Any] = {0: Dim.DYNAMIC}
        longest = batch[name].shape[1] if name == "tokens" else 0
        # torch cannot prove that the convolutions of sound give as many tokens as their mask has.
        if longest > MIN_TOKENS:
            axes[1] = Dim("tokens_length", min=MIN_TOKENS, max=longest)
        shapes.append(axes)
    tensors = tuple(batch[name] for name in graph.input_names)
    with torch.no_grad():
        graph(*tensors)  # sets the names of the outputs
        program = torch.export.export(graph, tensors, dynamic_shapes=(tuple(shapes),))
    for node in program.graph.nodes:
        # It names files of this machine, and would be a part of the export.
        node.meta.pop("stack_trace", None)
    return program


# -- files ---------------------------------------------------------------------------------------


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


def _write_onnx(program: ExportedProgram, graph: TowerGraph, path: Path) -> None:
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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repository.rpartition("/")[2]
        save_described_model(model, folder)
        return push_folder(folder, repository, **options)


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

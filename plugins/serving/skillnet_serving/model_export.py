"""Export of a trained model: folders for the Hub, a dense model, torch.export and ONNX.

    hf      weights per skill, tokenizer, manifest and model card; all tasks or one
    dense   the same of one task, with the skills of each tower merged into one set of weights
    pt2     a torch.export program per tower of one task, of the merged weights
    onnx    the same as ONNX
    onnx-int8              the same with weights of 8 bits
    sentence-transformers  hf of one task, with the list of modules of this library

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
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipelines.training.runs.bundle_manifest import (
    TOKENIZER_FILE,
)
from skillnet import systems
from skillnet.encoder import SHARED
from skillnet.layers import SkillWeights
from skillnet.modality import find_modality
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skill_proofs import make_example_batch
from skillnet.skills import SkillPlan, find_task
from skillnet.skipped_init import SkippedInit
from skillnet_platform.errors import UserError
from skillnet_platform.package_version import describe_missing_extra
from skillnet_platform.storage import staging_directory
from skillnet_serving.exported_folder import shorten_paths, write_exported_folder

FORMATS = ("hf", "dense", "pt2", "onnx", "onnx-int8", "sentence-transformers")
#: Formats that keep the skills of the model.
SPARSE_FORMATS = ("hf", "sentence-transformers")
#: Format -> packages that it needs.
NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "sentence-transformers": ("sentence_transformers",),
}
#: Largest difference of an output in float32, relative to the largest output or 1.
TOLERANCE = 1e-5
#: The same for weights of 8 bits, whose difference is reported: a larger one is a wrong graph.
INT8_TOLERANCE = 1.0
#: Version of the ONNX operators: attention and normalization exist since 18.
OPSET = 18
#: Shortest text of a graph. Tensors of length 1 broadcast, so torch would trace another graph.
MIN_TOKENS = 3
GRAPH_MANIFEST = "graph.json"
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
    _require_packages(to)
    source = systems.load_model(bundle, task)
    # A tower of several skills becomes one of a single skill, so a graph has no averages.
    exported = source
    if to not in SPARSE_FORMATS:
        if not isinstance(source, SkillNet):
            raise UserError(f"--to {to}: the system {source.system} has no skills to merge")
        exported = merge_task_skills(source, str(task))
    with staging_directory(target) as folder:
        if to in ("hf", "dense"):
            write_exported_folder(bundle, manifest, exported, folder, target.name)
            difference = _compare(source, manifest, _run_model(systems.load_model(folder)))
        elif to == "sentence-transformers":
            read = _write_sentence_model(source, str(task), folder / target.name)
            difference = _compare(source, manifest, _run_model(read))
        else:
            run = _write_graphs(bundle, manifest, exported, str(task), folder, to)
            difference = _compare(source, manifest, run)
        # Before the folder gets its name, so that a wrong export never exists.
        if not difference <= (INT8_TOLERANCE if to == "onnx-int8" else TOLERANCE):
            raise ValueError(f"{target}: outputs differ from the source by {difference:.2g}")
    parameters = sum(parameter.numel() for parameter in exported.parameters())
    return ExportReport(str(target), to, list(exported.config.tasks), parameters, difference)


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
        path = folder / f"{tower}.{to.removesuffix('-int8')}"
        if to == "pt2":
            torch.export.save(program, path)
            runs[tower] = program.module()
        else:
            _write_onnx(program, graph, path)
            if to == "onnx-int8":
                _quantize_onnx(path)
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
    about["preprocessing"] = shorten_paths(entry["preprocessing"])
    about = {"task": task, "package": manifest["package"], "towers": towers} | about
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / GRAPH_MANIFEST).write_text(text + "\n", encoding="utf-8")
    return lambda _, tower, tensors: runs[tower](*tensors)


def _require_packages(to: str) -> None:
    try:
        for name in NEEDED.get(to, ()):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--to {to}: {describe_missing_extra(error) or error}") from None


def _write_sentence_model(model: TaskModel, task: str, folder: Path) -> TaskModel:
    """Write a folder of Sentence Transformers in place of its parent; return the model as read."""
    from sentence_transformers import SentenceTransformer

    from skillnet_serving.sentence_module import SkillNetModule

    written = SentenceTransformer(modules=[SkillNetModule(model, task)], device="cpu")
    written.save(str(folder), create_model_card=False)
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmdir()
    read = SentenceTransformer(str(folder.parent), device="cpu", trust_remote_code=True)
    module = read[0]
    assert isinstance(module, SkillNetModule)
    return module.model


def _quantize_onnx(path: Path) -> None:
    """Replace the matrices of a graph by 8-bit ones; products stay in float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_suffix(".int8")
    root = logging.getLogger()
    level = root.level
    # A warning asks for another preprocessing, which changes nothing here.
    root.setLevel(logging.ERROR)
    try:
        # Products of 7 and 8 bits do not overflow on processors without VNNI.
        quantize_dynamic(
            path, small, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )
    finally:
        root.setLevel(level)
    small.replace(path)


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

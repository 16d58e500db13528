"""The face that every compared system has: tasks in, outputs out, and who owns which weight.

SkillNet, the dense and mixture-of-experts baselines and the specialists are each one module of
this kind, so that they share the stream, the training loop, checkpoints and evaluation.

Shapes: B batch, T tokens, D model width, C classes, S symbols, E width of the retrieval space,
M masked tokens of all rows, P values of a token, V tokens of the vocabulary.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.heads import HEADS, MaskedHead, RetrievalHead
from skillnet.serialization import (
    _said,
    check_file,
    load_tensors,
    read_config,
    read_manifest,
    shapes,
    write_manifest,
    write_parts,
)
from skillnet.skills import find_task

if TYPE_CHECKING:
    from skillnet.systems import System


Batch = dict[str, Tensor]
Tokens = tuple[Tensor, Tensor | None]
Outputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a system that has none."""


class TaskModel(nn.Module):
    """A model of several tasks, each with a head of its own.

    A subclass says how a tower's input becomes tokens (:meth:`tower_tokens`) and which
    parameters a task touches (:meth:`file_of`, :meth:`touches`).

    Args:
        config: sizes of inputs and widths, and the tasks.
        options: what else shapes the model, as the system's dataclass; written beside the
            weights.
    """

    #: Name of the system in ``skillnet.systems``.
    system: ClassVar[str]

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__()
        self.config = config
        self.options: dict[str, Any] = dataclasses.asdict(options or NoOptions())
        self.heads = nn.ModuleDict()

    def add_heads(self) -> None:
        """Build the heads of all tasks; a subclass calls it last in its constructor."""
        from skillnet.layers import check_free

        for name, task in self.config.tasks.items():
            check_free(self.heads, name, "task")
            self.heads[name] = HEADS[task.objective](self.config, task)

    # -- running ---------------------------------------------------------------------------

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encoded tokens (B, T, D) of a task's tower, and their mask (B, T) or none."""
        raise NotImplementedError

    def forward(self, task: str, towers: dict[str, Batch]) -> Outputs:
        """Run a task on the batches of its towers.

        Returns:
            classification: ``logits`` (B, C). ctc: ``log_probs`` (B, T, S + 1) and ``lengths``
            (B,). retrieval: ``query`` and ``candidate`` (B, E), unit length, and ``scale`` ().
            masked: ``predicted`` (M, V) for text and code, else (M, P), at the tokens that the
            batch's ``masked`` (B, T) names, row by row; without it, at every real token.
        """
        spec = find_task(task, self.config.tasks)
        head = self.heads[task]
        if isinstance(head, RetrievalHead):
            return {
                "query": self.embed(task, "query", towers["query"]),
                "candidate": self.embed(task, "candidate", towers["candidate"]),
                "scale": head.scale,
            }
        x_BTD, mask_BT = self.tower_tokens(task, "input", towers["input"])
        if spec.objective == "classification":
            return {"logits": head(mean(x_BTD, mask_BT))}
        if isinstance(head, MaskedHead):
            masked_BT = towers["input"].get("masked", mask_BT)
            x_MD = x_BTD.flatten(0, 1) if masked_BT is None else x_BTD[masked_BT]
            tied = self.token_embedding(task, "input") if head.tied else None
            return {"predicted": head(x_MD, tied)}
        if mask_BT is not None:
            lengths_B = mask_BT.sum(1)
        else:
            lengths_B = torch.full((x_BTD.shape[0],), x_BTD.shape[1], device=x_BTD.device)
        return {"log_probs": head(x_BTD), "lengths": lengths_B}

    def embed(self, task: str, tower: str, batch: Batch) -> Tensor:
        """Unit vectors (B, E) of one tower of a retrieval task."""
        spec = find_task(task, self.config.tasks)
        if spec.objective != "retrieval":
            raise ValueError(f"{task} is a {spec.objective} task: it has no retrieval space")
        if tower not in spec.towers:
            raise ValueError(f"{task} has the towers query and candidate, not {tower!r}")
        return self.heads[task](mean(*self.tower_tokens(task, tower, batch)), tower)

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Embedding (V, D) of the tokens that a tower reads; masked tokens are predicted by it.

        Raises:
            ValueError: this system has none that it can give.
        """
        raise ValueError(f"the system {self.system!r} cannot predict masked tokens ({task})")

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Losses, besides the task's, of the last forward pass; added to it in training."""
        return {}

    def statistics(self) -> dict[str, float]:
        """Numbers about the last forward pass for the record, such as the load of experts."""
        return {}

    # -- ownership -------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """File of a parameter, such as ``head-TASK``, without its ending."""
        raise NotImplementedError

    def touches(self, name: str, task: str) -> bool:
        """Whether a task reads (and its training may change) a parameter."""
        raise NotImplementedError

    def needs(self, task: str) -> set[str]:
        """Files that hold what a task touches."""
        return {self.owner(n) for n, _ in self.named_parameters() if self.touches(n, task)}

    def files_of(self, task: str | None = None) -> dict[str, list[str]]:
        """File -> names of its parameters; only what one task touches, if it is given."""
        wanted = None if task is None else self.needs(task)
        files: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            file = self.owner(name)
            if wanted is None or file in wanted:
                files.setdefault(file, []).append(name)
        return files

    def active_parameters(self, task: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and tensor of every parameter that the task touches, in forward order."""
        find_task(task, self.config.tasks)
        for name, parameter in self.named_parameters():
            if self.touches(name, task):
                yield name, parameter

    def activated_parameters(self, task: str) -> int:
        """Number of parameters that one example of a task reads."""
        return sum(p.numel() for _, p in self.active_parameters(task))

    def flops(self, task: str, lengths: Mapping[str, int] | None = None) -> tuple[int, int]:
        """(floating-point operations, tokens) of one example of a task, forward."""
        from skillnet.flops import count_flops

        return count_flops(self, task, lengths)

    def forget(self, task: str) -> None:
        """Drop what only this task, which was removed from the configuration, needs."""
        del self.heads[task]

    # -- files -----------------------------------------------------------------------------

    @classmethod
    def config_for(cls, config: SkillNetConfig, task: str) -> SkillNetConfig:
        """The configuration of a model that can do one task and holds nothing else."""
        return dataclasses.replace(config, tasks={task: find_task(task, config.tasks)})

    @torch.no_grad()
    def adopt(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Start from the weights of a pretrained model of the same system.

        Args:
            tensors: parameter name -> weights.

        Returns:
            Names of the parameters that keep their fresh values.

        Raises:
            ValueError: a tensor of another shape; names it.
        """
        fresh = []
        for name, parameter in self.named_parameters():
            source = tensors.get(self.counterpart(name, tensors))
            if source is None:
                fresh.append(name)
            elif source.shape != parameter.shape:
                raise ValueError(
                    f"{name} is {tuple(source.shape)} in the pretrained model and "
                    f"{tuple(parameter.shape)} here; give both the same model section"
                )
            else:
                parameter.copy_(source)
        return fresh

    def counterpart(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Name, in a pretrained model, of what a parameter starts from."""
        return name

    def save_pretrained(self, path: str | Path) -> None:
        """Write one safetensors file per owner, a configuration and hashes."""

        save(self, Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path, task: str | None = None) -> Self:
        """Read a saved model; with ``task`` only the files of what that task touches.

        Raises:
            ValueError: files that are missing, altered or do not fit; an unknown task; a model
                of another system.
        """

        model = load(Path(path), task)
        if not isinstance(model, cls):
            raise ValueError(
                f"{path} holds a model of the system {model.system!r}, not {cls.system!r}; "
                "skillnet.systems.load reads any"
            )
        return model


def mean(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean over real tokens, (B, D). A row without a real token gives zeros."""
    if mask_BT is None:
        return x_BTD.mean(1)
    weights_BT1 = mask_BT[..., None].to(x_BTD.dtype)
    # No matrix product: autocast would round what is pooled to bf16.
    return (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def save(model: "TaskModel", path: Path) -> None:
    """Write a model whole or not at all; an older model at the same path is replaced."""
    foreign = path.is_dir() and not (path / "manifest.json").is_file() and any(path.iterdir())
    if foreign or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is not a saved model; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        write_manifest(aside, write_parts(model, aside))
        if path.exists():
            old = path.with_name(f"{path.name}.old-{os.getpid()}")
            path.rename(old)
            try:
                aside.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load(path: Path, task: str | None = None) -> "TaskModel":
    """Read a saved model of any system, or only what one task of it touches.

    Raises:
        ValueError: files that are missing, altered, or are not what their names say; weights
            that do not fit the configuration, before memory for it is taken.
    """
    from skillnet.systems import find_system

    manifest = read_manifest(path)
    config, name, options = read_config(path, manifest)
    system = find_system(name)
    if isinstance(options, dict) and options.get("download"):
        options = options | {"download": False}  # reading a model fetches nothing
    if task is not None:
        config = system.model.config_for(config, task)
    # A few bytes of configuration can ask for any amount of memory; the weights come with a file.
    with torch.device("meta"):
        _check_shapes(path, _made(path, system, config, options), manifest)
    model = _made(path, system, config, options)
    dtype = None
    for file in model.files_of():
        tensors = load_tensors(path / f"{file}.safetensors")
        kinds = {tensor.dtype for tensor in tensors.values()} | ({dtype} if dtype else set())
        if len(kinds) > 1:
            raise ValueError(f"{path / file}.safetensors: weights of several types: {kinds}")
        (dtype,) = kinds
        model.to(dtype).load_state_dict(tensors, strict=False)
    return model.eval()


def _made(path: Path, system: "System", config: SkillNetConfig, options: Any) -> "TaskModel":
    try:
        return system.model(config, system.read_options(options))
    except Exception as problem:  # of whichever library the system builds with
        raise ValueError(
            f"{path / 'config.json'}: no {system.name} model can be made of it: {_said(problem)}"
        ) from problem


def _check_shapes(path: Path, model: "TaskModel", manifest: dict[str, Any]) -> None:
    """ValueError unless the files of a model hold its weights, by their headers."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for file, names in model.files_of().items():
        place = check_file(path, f"{file}.safetensors", manifest)
        found = shapes(place)
        if found.keys() != set(names):
            raise ValueError(f"{place} holds other weights than its config says")
        for name, shape in found.items():
            if shape != wanted[name]:
                raise ValueError(
                    f"{place} does not fit its config: {name} is {shape}, expected {wanted[name]}"
                )

"""Base class of all compared systems: multi-task forward pass and parameter-to-file mapping.

SkillNet, the dense and mixture-of-experts baselines and the specialists subclass
:class:`TaskModel`. They therefore share the data loader, the training loop, checkpoints and
evaluation. :func:`skillnet.systems.load_model` reads a saved model of any system.

Shapes: B batch, T tokens, D model width, C classes, S symbols, E width of the retrieval space,
M masked tokens of all rows, P values of a token, V tokens of the vocabulary.
"""

import contextlib
import dataclasses
import pkgutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from skillnet.bounds import require_fields
from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, KeptTokens
from skillnet.flops import count_flops
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import TaskHead, build_head
from skillnet.raw_inputs import SAVER, RawInputModel, find_model_folder
from skillnet.serialization import (
    PACKAGES,
    SavedFile,
    describe_error,
    find_file,
    load_tensors,
    map_tensors,
    mark_tensors,
    read_config,
    read_manifest,
    read_tensor_shapes,
    read_vocabulary,
    require_output_names,
    require_saved_shapes,
    save_model,
)
from skillnet.skill_weights import require_unused_name
from skillnet.skills import find_task, require_outputs
from skillnet.skipped_init import SkippedInit, leave_out, placed_weights
from skillnet.vocabulary import ModelVocabulary, find_order

#: Registrations per weight: a module that replaces another one registers the same weights again.
REGISTRATIONS_PER_WEIGHT = 4
#: Modules per weight. Those without weights, such as activations, are fewer than the others.
MODULES_PER_WEIGHT = 8
#: Registrations that every model may have.
FREE_REGISTRATIONS = 1000


def count_saved_weights(files: Iterable[Path]) -> int:
    """Return the number of weights with data in safetensors files.

    Args:
        files: paths. A file that is missing or damaged counts as empty: who needs it reports it.
    """
    total = 0
    for file in files:
        if file.is_file():
            with contextlib.suppress(ValueError):
                total += sum(0 not in shape for shape in read_tensor_shapes(file).values())
    return total


@contextlib.contextmanager
def limit_weights(weights: int) -> Iterator[None]:
    """Stop building modules inside the block when they have more weights than a saved model.

    Args:
        weights: number of elements of the saved model; see :func:`count_saved_weights`.

    Raises:
        ValueError: more weights, or an excessive number of modules without weights.
    """
    owner = threading.get_ident()
    built = {"weights": 0, "modules": 0}
    most = {
        "weights": FREE_REGISTRATIONS + REGISTRATIONS_PER_WEIGHT * weights,
        "modules": FREE_REGISTRATIONS + MODULES_PER_WEIGHT * weights,
    }

    def count(kind: str) -> None:
        # The hooks are global: other threads may build models of their own.
        if threading.get_ident() != owner:
            return
        built[kind] += 1
        if built[kind] > most[kind]:
            raise ValueError(f"it describes more than the {weights} weights of its files")

    def on_weight(module: nn.Module, name: str, weight: Any) -> None:
        if weight is not None:
            count("weights")

    def on_module(module: nn.Module, name: str, child: Any) -> None:
        count("modules")

    hooks = [
        register_module_parameter_registration_hook(on_weight),
        register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Batch = dict[str, Tensor]
Tokens = tuple[Tensor, Tensor | None]
Outputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a system that has none."""


class TaskModel(RawInputModel, nn.Module):
    """Model of several tasks with one head per task.

    A subclass defines how the input of a tower becomes tokens (:meth:`tower_tokens`), which file
    stores a parameter (:meth:`file_of`) and which tasks use it (:meth:`uses_parameter`).

    Args:
        config: sizes of inputs and layers, and the tasks.
        options: further options of the system, an instance of :attr:`options_class`. They are
            saved with the weights.
    """

    #: Name of the system in ``skillnet.systems``.
    system: ClassVar[str]

    #: Dataclass of the options; its ``__post_init__`` validates them.
    options_class: ClassVar[type] = NoOptions

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__()
        self.config = config
        self.options: dict[str, Any] = dataclasses.asdict(options or NoOptions())
        self.heads = nn.ModuleDict()
        #: Meaning of token ids and outputs; training takes it from the corpora.
        self.vocabulary = ModelVocabulary()
        #: Name -> entry of the packages of skills that were added, see ``skillnet.package_joins``.
        self.packages: dict[str, Any] = {}
        #: Folder that the model was read from, for messages; None for a new model.
        self.origin: Path | None = None
        #: File, without suffix -> the saved file that its weights are mapped from.
        self.unread: dict[str, SavedFile] = {}
        #: Gives the model the weights of a task, if it does not hold all, as in sharded training.
        self.weight_loader: Callable[[str], None] | None = None
        #: See :meth:`limit_kept_tokens`.
        self.kept_tokens: KeptTokens | None = None

    @classmethod
    def parse_options(cls, given: Mapping[str, Any] | None) -> Any:
        """Build the options of the system from plain values.

        Args:
            given: option name -> value; None means all defaults.

        Returns:
            An instance of :attr:`options_class`.

        Raises:
            ValueError: an unknown option, with the nearest valid name, or an invalid value.
        """
        require_fields(given or {}, cls.options_class, f"system {cls.system}")
        return cls.options_class(**(given or {}))

    @classmethod
    def parse_saved_options(cls, given: Mapping[str, Any] | None) -> Any:
        """Build the options of a saved model, whose weights come from its own files only.

        Args:
            given: as in :meth:`parse_options`.
        """
        return cls.parse_options(given)

    def add_heads(self) -> None:
        """Build the heads of all tasks. Subclasses call this last in their constructor."""
        for name, task in self.config.tasks.items():
            require_unused_name(self.heads, name, "task")
            require_outputs(name, task)
            self.heads[name] = build_head(self.config, task)

    # -- forward pass ----------------------------------------------------------------------

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encode the input of one tower.

        Args:
            task: name of the task.
            tower: ``input``, ``query`` or ``candidate``.
            batch: input tensors of the tower.

        Returns:
            Tokens (B, T, D), and their mask (B, T), or None if every token is real.
        """
        raise NotImplementedError

    def forward(self, task: str, towers: dict[str, Batch]) -> Outputs:
        """Run a task on one batch per tower.

        Args:
            task: name of the task.
            towers: tower name -> input tensors.

        Returns:
            Tensors by name, as the head of the objective defines them.
            classification: ``logits`` (B, C). ctc: ``log_probs`` (B, T, S + 1) and ``lengths``
            (B,). retrieval: ``query`` and ``candidate`` (B, E), unit length, and ``scale`` ().
            masked: ``predicted`` (M, V) for text and code, otherwise (M, P), in the order of the
            batch's ``places`` (M,), numbers among its B T tokens, or of all real tokens without it.
        """
        find_task(task, self.config.tasks)
        if self.kept_tokens is not None:
            self.kept_tokens.left = self.kept_tokens.limit
        return self._head(task).run(
            towers,
            lambda tower: self.tower_tokens(task, tower, towers[tower]),
            lambda tower: self.token_embedding(task, tower),
        )

    def embed(self, task: str, tower: str, batch: Batch) -> Tensor:
        """Return the unit vectors (B, E) of one tower of a retrieval task.

        Args:
            task: name of a retrieval task.
            tower: ``query`` or ``candidate``.
            batch: input tensors of the tower.

        Raises:
            ValueError: an unknown task or tower, or a task of another objective.
        """
        spec = find_task(task, self.config.tasks)
        if not find_objective(spec.objective).pairs_towers:
            raise ValueError(f"{task} is a {spec.objective} task: it has no retrieval space")
        if tower not in spec.towers:
            raise ValueError(f"{task} has the towers query and candidate, not {tower!r}")
        return self._head(task).embed(
            tower,
            batch,
            lambda name: self.tower_tokens(task, name, batch),
            lambda name: self.token_embedding(task, name),
        )

    def _head(self, task: str) -> TaskHead:
        head = self.heads[task]
        assert isinstance(head, TaskHead)
        return head

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Return the token embedding (V, D) of a tower; it also predicts masked tokens.

        Args:
            task: name of the task.
            tower: name of the tower.

        Raises:
            ValueError: the system has no token embedding to share.
        """
        raise ValueError(f"the system {self.system!r} cannot predict masked tokens ({task})")

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return further losses of the last forward pass, added to the task's loss in training."""
        return {}

    def statistics(self) -> dict[str, float]:
        """Return metrics of the last forward pass for logging, such as the load of experts."""
        return {}

    # -- parameters and files --------------------------------------------------------------

    def file_of(self, name: str) -> str:
        """Return the file of a parameter, such as ``head-TASK``, without its suffix."""
        raise NotImplementedError

    @classmethod
    def possible_files(cls, config: SkillNetConfig) -> set[str] | None:
        """Return the files that a model can have, without suffix; None if the system cannot say.

        The weights of other files in its folder do not raise the limit of its size.

        Args:
            config: shape of the model.
        """
        return None

    @classmethod
    def needed_files(cls, config: SkillNetConfig, tasks: Iterable[str]) -> set[str] | None:
        """Return the files that some tasks use, without suffix; None if the system cannot say.

        Args:
            config: shape of the model.
            tasks: names of tasks of the configuration.
        """
        return None

    def uses_parameter(self, name: str, task: str) -> bool:
        """Return whether a task reads a parameter. Only then can training it change the value."""
        raise NotImplementedError

    def required_files(self, task: str) -> set[str]:
        """Return the files of all parameters that a task uses."""
        return {
            self.file_of(name)
            for name, _ in self.named_parameters()
            if self.uses_parameter(name, task)
        }

    def files_of(self, task: str | None = None) -> dict[str, list[str]]:
        """Return file -> names of its parameters, restricted to the files of a task if given."""
        wanted = None if task is None else self.required_files(task)
        files: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            file = self.file_of(name)
            if wanted is None or file in wanted:
                files.setdefault(file, []).append(name)
        return files

    def active_parameters(self, task: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and tensor of every parameter that a task uses, in forward order."""
        find_task(task, self.config.tasks)
        # Most files of a model of many skills belong to other tasks.
        required = self.required_files(task)
        for name, parameter in self.named_parameters():
            if self.file_of(name) in required and self.uses_parameter(name, task):
                yield name, parameter

    def activated_parameters(self, task: str) -> int:
        """Return the number of parameters that one example of a task reads."""
        return sum(p.numel() for _, p in self.active_parameters(task))

    def flops(self, task: str, lengths: Mapping[str, int] | None = None) -> tuple[int, int]:
        """Return the forward cost of one example: (floating-point operations, tokens).

        Args:
            task: name of the task.
            lengths: tower -> length of its input; the longest supported input by default.
        """
        return count_flops(self, task, lengths)

    def require_weights(self, task: str) -> None:
        """Load the weights of a task, if the model does not hold all; see :attr:`weight_loader`.

        Args:
            task: that is evaluated next.
        """
        if self.weight_loader is not None:
            self.weight_loader(task)

    def drop_task(self, task: str) -> None:
        """Delete the parameters that only this task uses, after it left the configuration."""
        del self.heads[task]

    def limit_kept_tokens(self, limit: int | None) -> None:
        """Let the backward pass compute layers again beyond a number of tokens.

        Args:
            limit: see :class:`skillnet.encoder.KeptTokens`; None keeps all.

        Raises:
            ValueError: the system does not support it.
        """
        # A model of a thousand skills has many modules to look through.
        if limit is None and self.kept_tokens is None:
            return
        encoders = [module for module in self.modules() if isinstance(module, Encoder)]
        if not encoders:
            raise ValueError(
                f"the system {self.system} cannot compute layers again; set "
                "training.kept_tokens to null"
            )
        self.kept_tokens = None if limit is None else KeptTokens(limit)
        for encoder in encoders:
            encoder.kept_tokens = self.kept_tokens

    @torch.no_grad()
    def reorder_outputs(self, task: str, names: Sequence[str]) -> None:
        """Move the outputs of a head, with their weights, to another order of the same names.

        Args:
            task: a task with names in :attr:`vocabulary`.
            names: identifiers of its outputs, in the new order.

        Raises:
            ValueError: these are not the names of the task's outputs.
        """
        order = find_order(names, self.vocabulary.outputs[task])
        if order is None:
            raise ValueError(f"{task}: the outputs have other names than {', '.join(names)}")
        # The outputs without a name, such as the blank of CTC, stay at the start.
        first = find_objective(self.config.tasks[task].objective).unnamed_outputs
        order = [*range(first), *(first + position for position in order)]
        for parameter in self.heads[task].parameters():
            parameter.copy_(parameter[order])
        outputs = {**self.vocabulary.outputs, task: tuple(names)}
        self.vocabulary = dataclasses.replace(self.vocabulary, outputs=outputs)

    # -- saving and loading ----------------------------------------------------------------

    @classmethod
    def config_for(cls, config: SkillNetConfig, task: str) -> SkillNetConfig:
        """Return the configuration of a model that supports only one task."""
        return dataclasses.replace(config, tasks={task: find_task(task, config.tasks)})

    @torch.no_grad()
    def load_partial(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Initialize parameters from a pretrained model of the same system.

        Args:
            tensors: parameter name of the pretrained model -> weights.

        Returns:
            Names of the parameters without a counterpart; they keep their values.

        Raises:
            ValueError: a tensor has another shape.
        """
        fresh = []
        for name, parameter in self.named_parameters():
            source = tensors.get(self.source_name(name, tensors))
            if source is None:
                fresh.append(name)
            elif source.data_ptr() == parameter.data_ptr():
                continue  # the model maps the same file
            elif source.shape != parameter.shape:
                raise ValueError(
                    f"{name} is {tuple(source.shape)} in the pretrained model and "
                    f"{tuple(parameter.shape)} here; give both the same model section"
                )
            else:
                parameter.copy_(source)
        return fresh

    def source_name(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Return the name, in a pretrained model, of the parameter that initializes ``name``."""
        return name

    def save_pretrained(self, path: str | Path) -> None:
        """Write the configuration, one safetensors file per group of weights, and a manifest.

        A model that was trained by :meth:`fit`, or read with the names of its outputs, is written
        with them, its tokenizer and a card.

        Args:
            path: directory to write.

        Raises:
            ValueError: the path exists and is not a saved model.
        """
        if self.origin is None or not pkgutil.resolve_name(SAVER)(self, Path(path)):
            save_model(self, Path(path))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, task: str | None = None, revision: str | None = None
    ) -> Self:
        """Read a saved model of this system, in evaluation mode.

        Args:
            path: directory of the saved model, or ``owner/name`` of a repository of the Hugging
                Face Hub.
            task: read, and download, only the files that this task uses.
            revision: branch, tag or commit of the repository; None takes the newest commit.

        Raises:
            ValueError: missing, altered or invalid files; an unknown task; a model of another
                system; weights that do not fit the configuration. The shapes are compared
                before memory for the weights is allocated.
        """
        return cls.from_folder(find_model_folder(path, task, revision), task)

    @classmethod
    def from_folder(
        cls, folder: Path, task: str | None = None, unread: Collection[str] = ()
    ) -> Self:
        """Read a saved model of this system; see :meth:`from_pretrained`.

        Args:
            folder: directory of the saved model.
            task: read only the files that this task uses.
            unread: files, without suffix, that are mapped: neither hashed nor read.

        Raises:
            ValueError: see :meth:`from_pretrained`.
        """
        manifest = read_manifest(folder)
        config, system, options = read_config(folder, manifest)
        vocabulary = read_vocabulary(folder, manifest)
        if system != cls.system:
            raise ValueError(
                f"{folder} holds a model of the system {system!r}, not {cls.system!r}; "
                "skillnet.systems.load_model reads any"
            )
        if task is not None:
            config = cls.config_for(config, task)
        # A few bytes of configuration can request any amount of memory. The files cannot.
        files = {name for name in manifest["files"] if name.endswith(".safetensors")}
        possible = cls.possible_files(config)
        if possible is not None:
            files &= {f"{name}.safetensors" for name in possible}
        budget = limit_weights(count_saved_weights(folder / name for name in files))
        with torch.device("meta"), SkippedInit(), budget:
            require_saved_shapes(folder, cls._build(folder, config, options), manifest, unread)
        require_output_names(folder, config, vocabulary)
        skills = {file.removeprefix("skill-") for file in unread}
        # Every weight is read or mapped from the files below.
        with SkippedInit(), placed_weights(skills, leave_out):
            model = cls._build(folder, config, options)
        model.vocabulary, model.origin = vocabulary.restrict_to(config.tasks), folder
        # A model of one task has no whole package to remove.
        model.packages = manifest.get(PACKAGES, {}) if task is None else {}
        parameters, dtype = dict(model.named_parameters()), None
        for file, names in model.files_of().items():
            path = folder / f"{file}.safetensors"
            if file in unread:
                weights = {name: parameters[name] for name in names}
                tensors = model.map_file(file, weights, path, manifest)
            else:
                tensors = load_tensors(path)
            kinds = {tensor.dtype for tensor in tensors.values()} | ({dtype} if dtype else set())
            if len(kinds) > 1:
                raise ValueError(f"{path}: weights of several types: {kinds}")
            if dtype is None:
                (dtype,) = kinds
                model.to(dtype)
            if file not in unread:
                with torch.no_grad():
                    for name, value in tensors.items():
                        parameters[name].copy_(value)
        return model.eval()

    def map_file(
        self,
        file: str,
        weights: Mapping[str, nn.Parameter],
        path: Path,
        manifest: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Map the weights of a file of a saved model into this model, without reading them.

        Args:
            file: name without suffix.
            weights: name -> weight of this model, of all weights of the file.
            path: the saved file.
            manifest: parsed ``manifest.json`` of its folder.

        Returns:
            Name -> mapped tensor.

        Raises:
            ValueError: the file is missing, of another size, or does not have these weights.
        """
        found = find_file(path.parent, path.name, dict(manifest))
        tensors = map_tensors(found)
        self._take_map(file, weights, tensors, path, manifest["files"][path.name])
        return tensors

    def share_files(self, other: "TaskModel") -> None:
        """Take the maps of files that another model has, of files that this model has too.

        Args:
            other: a model that has mapped files.

        Raises:
            ValueError: a file has other weights than this model.
        """
        files = self.files_of() if other.unread else {}
        mine, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        for file in other.unread.keys() & files.keys():
            tensors = {name: theirs[name].data for name in files[file] if name in theirs}
            weights = {name: mine[name] for name in files[file]}
            path, entry, _ = other.unread[file]
            self._take_map(file, weights, tensors, path, entry)

    def _take_map(
        self,
        file: str,
        weights: Mapping[str, nn.Parameter],
        tensors: Mapping[str, Tensor],
        path: Path,
        entry: Mapping[str, Any],
    ) -> None:
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
        if found != wanted:
            name = next(n for n in sorted(found | wanted) if found.get(n) != wanted.get(n))
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'missing')}, this model has "
                f"{wanted.get(name, 'no such weight')}; use the model section of that run"
            )
        for name, weight in weights.items():
            weight.data = tensors[name]
        self.unread[file] = SavedFile(path, entry, mark_tensors(weights))

    def place_weights(
        self, device: torch.device, dtype: torch.dtype | None, resting: Collection[str]
    ) -> None:
        """Move the model to a device and a number type; weights that no task needs stay.

        Args:
            device: place of the forward pass, such as ``cuda:0``.
            dtype: type of the weights; None keeps it.
            resting: files, without suffix, that stay in the host's memory.
        """
        files = self.files_of() if resting else {}
        weights = dict(self.named_parameters())
        stay = {id(weights[name]) for file in resting for name in files.get(file, ())}

        def place(x: Tensor) -> Tensor:
            there = x.device if id(x) in stay else device
            return x.to(there, dtype if dtype and x.is_floating_point() else x.dtype)

        self._apply(place)

    @classmethod
    def _build(cls, folder: Path, config: SkillNetConfig, options: Any) -> Self:
        try:
            return cls(config, cls.parse_saved_options(options))
        except Exception as error:  # any library that a system builds its encoders with
            raise ValueError(
                f"{folder / 'config.json'}: cannot build a {cls.system} model from it: "
                f"{describe_error(error)}"
            ) from error

"""Sharded training: each rank keeps a part of every weight, its gradient and its optimizer state.

The parts are those of PyTorch FSDP2 (``fully_shard``; Zhao et al. 2023). A group of weights is
gathered as a whole before it is used, and freed after the backward pass of the step. The weights
that a skill has in one layer form one group, and so does each stem and each head::

                      general        text           image
    layer 0           1 group        1 group        1 group       attention and feed-forward
    layer 1           1 group        1 group        1 group
    stem-token, stem-patch, …, head-TASK, …         1 group each
    norms                                           1 group

A step therefore gathers only the skills, stems and heads that its task activates.
:mod:`pipelines.training.loop.sharding` has the groups of other layers. The weights of a file
that are in no layer are one more group.
:func:`shard_model` is called by the training loop.
"""

import contextlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pipelines.training.loop.gradient_sync import FlagReader
from skillnet.baselines.moe_layers import ExpertFeedForward
from skillnet.encoder import EncoderLayer, LayerCall, WrappedEncoder
from skillnet.layers import Skills, SkillWeights
from skillnet.multitask_model import Batch, Outputs, TaskModel
from skillnet_platform.errors import UserError

#: Name of the group of a layer that each of its calls uses: that of its experts, or all weights of
#: a library's layer. No skill has this name.
ALWAYS = ""


def require_sharding(model: TaskModel) -> None:
    """Raise UserError unless the weights of a model can be gathered in groups."""
    if any(isinstance(part, SkillWeights) and part.is_low_rank for part in model.modules()):
        raise UserError(
            "training.sharding: low-rank skills read the weights of general as well, so a skill is "
            "no group of its own; set sharding to none, or model.skill_rank to 0"
        )
    if any(getattr(part, "layerdrop", 0) for part in model.modules()):
        raise UserError(
            "training.sharding: the library's encoder leaves out layers at random (layerdrop), on "
            "each worker others; set sharding to none, or layerdrop of the checkpoint to 0"
        )


def find_layers(model: TaskModel) -> list[nn.Module]:
    """Return the layers of all encoders, those of SkillNet and of libraries.

    Args:
        model: module of any system.
    """
    layers: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, EncoderLayer):
            layers.append(module)
        elif isinstance(module, WrappedEncoder):
            layers += module.list_layers()
    return layers


def list_groups(layer: nn.Module, prefix: str) -> dict[str, tuple[list[nn.Module], list[str]]]:
    """Return the groups of a layer: modules that hold the weights, and names of the weights.

    Args:
        layer: module of any system. The norms of an encoder layer are in no group of it.
        prefix: name of the layer in the model.

    Returns:
        Skill -> its group; and that of :data:`ALWAYS`.
    """
    groups: dict[str, tuple[list[nn.Module], list[str]]] = {}
    is_library = not isinstance(layer, EncoderLayer)
    for path, module in layer.named_modules(prefix=prefix):
        if isinstance(module, SkillWeights):
            for name in module.weights:
                owners, names = groups.setdefault(name, ([], []))
                owners.append(module.weights)
                names.append(f"{path}.weights.{name}")
        elif isinstance(module, ExpertFeedForward) or (is_library and module is layer):
            groups[ALWAYS] = [module], [f"{path}.{name}" for name, _ in module.named_parameters()]
    return groups


def find_rounded_weights(model: TaskModel) -> set[str]:
    """Return the weights that products round anyway, so that they are gathered in their type.

    Args:
        model: module of any system.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    groups = [list_groups(layer, prefixes[layer]).items() for layer in find_layers(model)]
    return {name for each in groups for key, (_, names) in each if key != ALWAYS for name in names}


#: Names of the two dimensions of a mesh: replicas, and the ranks that share one replica.
REPLICATE, SHARD = "replicate", "shard"


class WeightGroup(nn.Module):
    """Weights that are gathered together, around the call of a function that reads them.

    Args:
        owners: modules that hold the weights. They may hold weights of other groups too.
    """

    def __init__(self, owners: list[nn.Module]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)
        #: Whether a call of this step has passed its tensors through the hooks of FSDP.
        self.is_entered = False

    def forward(self, call: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        return call(*inputs, **options)


class ShardedModel(nn.Module):
    """Model whose weights are gathered group by group, as a task needs them.

    Args:
        model: all its groups are sharded.
        of_file: file of the model -> the group of its weights outside layers.
        of_layers: groups of the layers.
    """

    def __init__(
        self,
        model: TaskModel,
        of_file: Mapping[str, WeightGroup],
        of_layers: list[WeightGroup],
    ) -> None:
        super().__init__()
        self.model = model
        self.groups = nn.ModuleList([*of_layers, *of_file.values()])
        self._of_layers = of_layers
        # Task -> the groups around its forward pass.
        self._of_task = {
            task: [of_file[file] for file in sorted(model.required_files(task) & of_file.keys())]
            for task in model.config.tasks
        }

    def forward(self, task: str, towers: dict[str, Batch]) -> Outputs:
        """Run a task on one batch per tower; see :meth:`TaskModel.forward`."""
        for group in self._of_layers:
            group.is_entered = False
        call: Callable[..., Outputs] = self.model
        for group in self._of_task[task]:
            call = partial(group, call)
        return call(task, towers)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the further losses of the model; see :meth:`TaskModel.auxiliary_losses`."""
        return self.model.auxiliary_losses()

    def statistics(self) -> dict[str, float]:
        """Return metrics of the last forward pass; see :meth:`TaskModel.statistics`."""
        return self.model.statistics()


class ModelShards:
    """This rank's part of a model's weights.

    Optimizer, clipping and average work on :attr:`parameters`: plain tensors that share the memory
    of this rank's parts.

    Args:
        runner: computes steps.
        whole: the model without values; evaluation gives it those of one task at a time.
        mesh: ranks of all ranks; its last dimension shares one replica.
    """

    def __init__(self, runner: ShardedModel, whole: TaskModel, mesh: DeviceMesh) -> None:
        self.runner, self.whole = runner, whole
        self.group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
        self.device = torch.device(mesh.device_type)
        self._distributed: dict[str, DTensor] = {}
        #: Name -> this rank's rows of the weight.
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in runner.model.named_parameters():
            assert isinstance(parameter, DTensor), name
            self._distributed[name] = parameter
            local = nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
            self.parameters[name] = local

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return name and part of each weight, in the order of the model."""
        return list(self.parameters.items())

    @torch.no_grad()
    def gather(self, name: str, part: Tensor) -> Tensor:
        """Return the whole of a tensor of which each rank has a part; all ranks call this.

        Args:
            name: identifier of a weight. The tensor has its shape: the weight, or an average of
                AdamW.
            part: this rank's rows.
        """
        return self.share(name, part).full_tensor()

    def share(self, name: str, part: Tensor) -> DTensor:
        """Return a tensor of which each rank has a part.

        Args:
            name: see :meth:`gather`.
            part: this rank's rows.
        """
        weight = self._distributed[name]
        return DTensor.from_local(
            part.detach(),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )

    def gather_weight(self, name: str) -> Tensor:
        """Return a whole weight; all ranks call this."""
        return self.gather(name, self.parameters[name])

    def gather_files(self, model: TaskModel) -> None:
        """Take part in gathering all weights of a model, on a rank that does not write them."""
        for names in model.files_of().values():
            for name in names:
                self.gather_weight(name)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that has the shape of a weight.

        Args:
            name: dotted path of the weight in the module.
            whole: the tensor.
        """
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        parts = whole.chunk(ranks)
        return parts[rank] if rank < len(parts) else whole[:0]

    @torch.no_grad()
    def store(self, name: str, whole: Tensor) -> None:
        """Copy this rank's rows of a weight from the whole weight.

        Args:
            name: dotted path of the weight in the module.
            whole: its value.
        """
        self.parameters[name].copy_(self.cut(name, whole))

    def take_gradient(self, name: str) -> Tensor | None:
        """Return this rank's part of a gradient, and forget it.

        Args:
            name: dotted path of the weight in the module.
        """
        weight = self._distributed[name]
        gradient, weight.grad = weight.grad, None
        return gradient.to_local() if isinstance(gradient, DTensor) else None

    def count_bytes(self, name: str) -> int:
        """Return the bytes of a gradient that this rank sends."""
        return self._distributed[name].nbytes

    @torch.no_grad()
    def load_task(self, task: str) -> None:
        """Give the whole model the weights of one task, and only these; all ranks call this.

        Args:
            task: name of a task of the model.
        """
        files = self.whole.required_files(task)
        for name, parameter in list(self.whole.named_parameters()):
            needed = self.whole.file_of(name) in files
            # A weight of other tasks is one number, seen in its shape.
            empty = parameter.new_zeros((), device=self.device).expand(parameter.shape)
            value = self.gather_weight(name) if needed else empty
            _replace_parameter(self.whole, name, value)
        # The training mode drops merged weights of earlier values.
        self.whole.train().eval()


def shard_model(
    structure: TaskModel,
    whole: TaskModel,
    source: TaskModel | None,
    mesh: DeviceMesh,
    *,
    products: torch.dtype | None = None,
    frees_early: bool = False,
) -> ModelShards:
    """Divide the weights of a model among the ranks.

    A rank holds one whole group at a time: the first rank sends it, and each keeps its part.

    Args:
        structure: the model without values, on the meta device. It becomes the sharded model.
        whole: another one; see :class:`ModelShards`.
        source: the model with its values on the first rank; None on the others.
        mesh: see :func:`build_mesh`.
        products: type of matrix products, in which the weights of skills are gathered; None is that
            of the weights. Gradients are summed in the type of the weights.
        frees_early: free the weights of a layer after its forward pass, and gather them once more
            for its backward pass.

    Raises:
        UserError: the system has weights that cannot be grouped.
    """
    require_sharding(structure)
    device = torch.device(mesh.device_type)
    _receive_buffers((structure, whole), source, device)
    values = dict(source.named_parameters()) if source is not None else {}
    done: set[nn.Parameter] = set()

    def shard(
        module: nn.Module, names: list[str], frees: bool, dtype: torch.dtype | None = None
    ) -> None:
        for name in names:
            _receive_weight(structure, name, values.pop(name, None), device)
        own = {structure.get_parameter(name) for name in names}
        others = {p for p in module.parameters() if p not in own}
        summed = None if dtype is None else structure.get_parameter(names[0]).dtype
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=frees,
            mp_policy=MixedPrecisionPolicy(dtype, summed, cast_forward_inputs=False),
            ignored_params=others,
        )
        done.update(structure.get_parameter(name) for name in names)

    of_layers: list[WeightGroup] = []
    prefixes = {module: name for name, module in structure.named_modules()}
    for layer in find_layers(structure):
        groups = {}
        for group, (owners, names) in list_groups(layer, prefixes[layer]).items():
            groups[group] = WeightGroup(owners)
            # The merge would round them. Norms, routers and embeddings keep their digits.
            shard(groups[group], names, frees_early, None if group == ALWAYS else products)
        of_layers += groups.values()
        if isinstance(layer, EncoderLayer):
            layer.gather_weights = partial(_gather_around, groups)
        else:
            layer.forward = _gather_around(groups, layer.forward, ())  # type: ignore[method-assign]
    files: dict[str, list[str]] = {}
    for name, parameter in structure.named_parameters():
        if parameter not in done:
            files.setdefault(structure.file_of(name), []).append(name)
    of_file = {}
    for file in sorted(files.keys() - {"shared"}):
        of_file[file] = WeightGroup([structure])
        shard(of_file[file], files[file], False)
    runner = ShardedModel(structure, of_file, of_layers)
    shard(runner, files.get("shared", []), False)
    for group in (runner, *runner.groups):
        assert isinstance(group, FSDPModule)
        # Losses are sums over rows, so gradients are summed, not averaged.
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    return ModelShards(runner, whole, mesh)


def build_mesh(device: torch.device, world: int, is_hybrid: bool) -> DeviceMesh:
    """Build the mesh of all ranks; all ranks call this.

    Args:
        device: device of the weights, such as ``cuda:0``.
        world: number of ranks.
        is_hybrid: divide the weights among the ranks of a node, and replicate them over nodes.

    Raises:
        UserError: the nodes have different numbers of ranks.
    """
    if not is_hybrid:
        return init_device_mesh(device.type, (world,), mesh_dim_names=(SHARD,))
    nodes: list[str] = [""] * world
    dist.all_gather_object(nodes, platform.node())
    size = count_ranks_per_node(nodes)
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=(REPLICATE, SHARD))


def count_ranks_per_node(nodes: Sequence[str]) -> int:
    """Return the number of ranks on each node.

    Args:
        nodes: name of the node of each rank.

    Raises:
        UserError: the nodes have different numbers of ranks, or their ranks are mixed.
    """
    size = nodes.count(nodes[0])
    blocks = [set(nodes[start : start + size]) for start in range(0, len(nodes), size)]
    is_even = len(nodes) % size == 0 and len(set(nodes)) == len(blocks)
    if not is_even or any(len(block) > 1 for block in blocks):
        counts = ", ".join(f"{name} {nodes.count(name)}" for name in sorted(set(nodes)))
        raise UserError(
            f"training.sharding: hybrid needs equally many workers on each node, and they are "
            f"{counts}. Use full, or a number of workers that fills the nodes"
        )
    return size


def _gather_around(groups: Mapping[str, WeightGroup], call: LayerCall, skills: Skills) -> LayerCall:
    """Return a call of a layer around which the weights that it uses are gathered."""
    for name in (*skills, ALWAYS):
        if name in groups:
            call = _around_group(groups[name], call)
    return call


def _around_group(group: WeightGroup, call: LayerCall) -> LayerCall:
    def run(x_BTD: Tensor, *rest: Any, **options: Any) -> Any:
        # FSDP reduces the gradients of a group when that of its input is ready. A second tower
        # that reads the group comes first in the backward pass, so only the first tower's input
        # may trigger the reduction: once a step, when the gradients are complete.
        if group.is_entered:
            return group(partial(call, x_BTD, *rest, **options))
        group.is_entered = torch.is_grad_enabled()
        return group(call, x_BTD, *rest, **options)

    return run


def _receive_weight(
    model: TaskModel, name: str, value: Tensor | None, device: torch.device
) -> None:
    """Give a weight the value that the first rank has."""
    meta = model.get_parameter(name)
    _replace_parameter(model, name, _receive_tensor(meta, value, device), meta.requires_grad)


def _receive_buffers(
    models: Sequence[TaskModel], source: TaskModel | None, device: torch.device
) -> None:
    """Give the buffers of equal models the values that the first rank has. None is divided."""
    values = dict(source.named_buffers()) if source is not None else {}
    for name, meta in list(models[0].named_buffers()):
        value = _receive_tensor(meta, values.get(name), device)
        path, _, attribute = name.rpartition(".")
        for model in models:
            setattr(model.get_submodule(path), attribute, value)


def _receive_tensor(meta: Tensor, value: Tensor | None, device: torch.device) -> Tensor:
    """Return the value that the first rank has, in the shape and type of a tensor."""
    if value is None:
        whole = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    else:
        whole = value.detach().to(device, meta.dtype, copy=True)
    dist.broadcast(whole, src=0)
    return whole


def _replace_parameter(
    model: TaskModel, name: str, value: Tensor, requires_grad: bool = False
) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(value, requires_grad))


class ShardedSync:
    """Sum of the active weights' gradients over all ranks; each rank keeps its part.

    Call ``begin(task)`` before the backward pass and ``finish()`` after it. A flag of each rank is
    summed beside the step, so all ranks know after it whether one of them requested a stop; on
    GPUs one step later, so that no step waits.

    Args:
        shards: divided weights of the model.
        active: task -> names and parts of the weights that its steps change.
    """

    def __init__(
        self, shards: ModelShards, active: Mapping[str, Sequence[tuple[str, nn.Parameter]]]
    ) -> None:
        self._shards, self._active = shards, active
        self.norm: Tensor | None = None
        self.bytes_reduced = 0
        self._task = ""
        self._flag = torch.zeros(1, device=shards.device)
        self._handle: Any = None
        self._flag_reader = FlagReader()

    def begin(self, task: str, flag: bool = False, others: Iterable[str] = ()) -> None:
        """Prepare for a backward pass of a task, with this rank's flag; it is the only one."""
        self._task = task
        self._flag.fill_(float(flag))
        self._handle = dist.all_reduce(self._flag, async_op=True)

    @contextlib.contextmanager
    def paused(self, is_paused: bool = True) -> Iterator[None]:
        """Let backward passes inside the block add to the gradients without starting a reduction.

        The gathered weights stay for the next pass.

        Args:
            is_paused: False changes nothing.
        """
        runner = self._shards.runner
        assert isinstance(runner, FSDPModule)
        if not is_paused:
            yield
            return
        runner.set_requires_gradient_sync(False)
        runner.set_reshard_after_backward(False)
        try:
            yield
        finally:
            runner.set_requires_gradient_sync(True)
            runner.set_reshard_after_backward(True)

    def finish(self) -> bool:
        """Give the parts of the active weights their gradients, which are sums.

        Returns:
            Whether the flag of any rank was set; see :meth:`GradientSync.finish`.
        """
        for name, part in self._active[self._task]:
            gradient = self._shards.take_gradient(name)
            # Weights without a gradient in this step have that of zero, as without shards.
            part.grad = torch.zeros_like(part) if gradient is None else gradient
            self.bytes_reduced += self._shards.count_bytes(name)
        self._handle.wait()
        return self._flag_reader.read(self._flag)

"""Groups of weights that sharded training gathers around the call of a layer.

The weights of a skill in a layer are a group. The experts of a layer with their router are one,
because a step uses all of them. So is a layer of a library's encoder.
:func:`pipelines.training.loop.sharding.shard_model` divides the groups.
"""

from torch import nn

from skillnet.baselines.moe_layers import ExpertFeedForward
from skillnet.encoder import EncoderLayer, WrappedEncoder
from skillnet.layers import SkillWeights
from skillnet.multitask_model import TaskModel
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

"""Systems that a study compares, by name. Each builds a :class:`TaskModel` from the same sizes.

Built-in systems are ``skillnet`` and the baselines of :mod:`skillnet.baselines`. A third party
adds one through the entry point group ``skillnet.systems``, whose entries name a :class:`System`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_config, read_manifest
from skillnet.skills import nearest_hint
from skillnet_files.entry_points import find_entries, load_named

GROUP = "skillnet.systems"


def _keep_config(config: SkillNetConfig, options: Any) -> SkillNetConfig:
    return config


#: Largest relative difference to the aimed size that is not reported.
MAX_SIZE_DEVIATION = 0.05


@dataclass(frozen=True)
class SizeMatch:
    """Size of a baseline's layers beside the size that it aims at, on average over tasks.

    Args:
        quantity: that is matched, in words.
        aimed: size of the layers of the study's SkillNet.
        reached: size of the layers of the baseline.
    """

    quantity: str
    aimed: float
    reached: float

    @property
    def deviation(self) -> float:
        """Relative difference to the aimed size; negative for a smaller baseline."""
        return self.reached / self.aimed - 1

    @property
    def is_mismatch(self) -> bool:
        """Whether the difference is above 5 % and has to be reported."""
        return abs(self.deviation) > MAX_SIZE_DEVIATION

    def describe(self) -> str:
        """Return ``+12.0 % activated parameters (1,234 for 1,102)``."""
        return (
            f"{100 * self.deviation:+.1f} % {self.quantity} "
            f"({self.reached:,.0f} for {self.aimed:,.0f})"
        )


@dataclass(frozen=True)
class System:
    """Recipe for one system.

    Args:
        name: as in configurations and reports.
        model: class of the model; its ``options_class`` defines the options.
        configure: maps (configuration of the study, options) to the configuration of the system,
            for example with other widths. The saved model stores the latter.
        measure: maps the same to the size that the system aims at and its own; None for a system
            that is not matched with SkillNet.
        shares_weights: whether tasks share weights. Otherwise each is trained as if it were alone.
        summary: one line for reports.
    """

    name: str
    model: type[TaskModel]
    configure: Callable[[SkillNetConfig, Any], SkillNetConfig] = _keep_config
    measure: Callable[[SkillNetConfig, Any], SizeMatch] | None = None
    shares_weights: bool = True
    summary: str = ""

    def build(self, config: SkillNetConfig, given: Mapping[str, Any] | None = None) -> TaskModel:
        """Build a randomly initialized model.

        Args:
            config: configuration of the study.
            given: option name -> value.

        Raises:
            ValueError: an unknown option or an invalid value.
        """
        options = self.model.parse_options(given)
        return self.model(self.configure(config, options), options)

    def find_shape(
        self, config: SkillNetConfig, given: Mapping[str, Any] | None = None
    ) -> SkillNetConfig:
        """Return the configuration of the model that :meth:`build` makes, without its weights.

        Args:
            config: configuration of the study.
            given: option name -> value.

        Raises:
            ValueError: an unknown option or an invalid value.
        """
        return self.configure(config, self.model.parse_options(given))

    def measure_size(
        self, config: SkillNetConfig, given: Mapping[str, Any] | None = None
    ) -> SizeMatch | None:
        """Return the aimed size and the size of the system; None if it is not matched.

        Args:
            config: configuration of the study, with its reference tasks.
            given: option name -> value.

        Raises:
            ValueError: an unknown option, an invalid value, or a size that cannot be reached.
        """
        if self.measure is None:
            return None
        return self.measure(config, self.model.parse_options(given))


SKILLNET = System("skillnet", SkillNet, summary="one encoder, its skills activated per task")


def system_names() -> list[str]:
    """Return the names of all installed systems."""
    return sorted({SKILLNET.name, *find_entries(GROUP)})


def find_system(name: str) -> System:
    """Return the system of a name.

    Raises:
        ValueError: no system has this name (with the nearest valid one), or its entry point does
            not name a :class:`System` of the same name.
    """
    if name == SKILLNET.name:
        return SKILLNET
    found = load_named(GROUP, name, System)
    if found is None:
        raise ValueError(f"unknown system {name!r}{nearest_hint(name, system_names())}")
    return found


def build_system(
    name: str, config: SkillNetConfig, options: Mapping[str, Any] | None = None
) -> TaskModel:
    """Build a randomly initialized model of a system.

    Args:
        name: system, such as ``dense``.
        config: configuration of the study.
        options: option name -> value.

    Raises:
        ValueError: an unknown system or option, or an invalid value.
    """
    return find_system(name).build(config, options)


def load_model(
    path: str | Path, task: str | None = None, unread: Collection[str] = ()
) -> TaskModel:
    """Read a saved model of any system, in evaluation mode.

    Args:
        path: directory of the saved model.
        task: read only the files that this task uses.
        unread: files, without suffix, that are mapped: neither hashed nor read.

    Raises:
        ValueError: missing, altered or invalid files; an unknown task or system.
    """
    folder = Path(path)
    _, system, _ = read_config(folder, read_manifest(folder))
    return find_system(system).model.from_folder(folder, task, unread)

"""Size of a run's baseline beside the size that it aims at; docs/baselines.md has the rules.

Commands warn of a mismatch, plans and evaluation rows contain it.
"""

from typing import TYPE_CHECKING

from pipelines.training.config.run import FinetuneConfig

if TYPE_CHECKING:
    from skillnet.systems import SizeMatch


#: Sizes of this process' runs: models are built for them, which can take seconds. Checks, plans,
#: each evaluation and reports ask for the same one.
_measured: "dict[str, SizeMatch | None]" = {}


def measure_baseline_size(config: FinetuneConfig) -> "SizeMatch | None":
    """Return the aimed size and the size of the run's system; None if it is not matched.

    Args:
        config: settings of a run, with its reference tasks.

    Raises:
        ValueError: no model has the requested size.
    """
    from skillnet.systems import find_system

    key = repr((config.system, config.model, config.options))
    if key not in _measured:
        system = find_system(config.system)
        _measured[key] = system.measure_size(config.model, config.options)
    return _measured[key]


def find_size_mismatch(config: FinetuneConfig) -> str | None:
    """Return in a sentence how a baseline misses the size that it aims at; None within 5 %.

    Args:
        config: settings of a run, with its reference tasks.

    Raises:
        ValueError: no model has the requested size.
    """
    from skillnet.baselines.size_matching import reference_tasks

    size = measure_baseline_size(config)
    if size is None or not size.is_mismatch:
        return None
    tasks = ", ".join(reference_tasks(config.model))
    return (
        f"the layers of {config.system} miss SkillNet's size by {size.describe()}, on average over "
        f"{tasks}"
    )

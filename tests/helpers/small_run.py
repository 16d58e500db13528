"""Sizes and options that make a run of a command small, for tests from start to end."""

from typing import Any

from skillnet.skills import default_tasks

#: Of a model with a few thousand parameters.
SIZES: dict[str, Any] = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
SIZES |= {"embedding_dim": 8, "patch_size": 16, "tubelet": (4, 16, 16), "vocab_size": 1200}
SMALL_RUN: dict[str, object] = {
    "training.threads_per_worker": 1,
    **{f"model.{name}": list(x) if name == "tubelet" else x for name, x in SIZES.items()},
    **{f"tasks.{task}.batch_size": 8 for task in default_tasks()},
}


def option_arguments(options: dict[str, object]) -> list[str]:
    """Return options as the arguments of a command."""
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]

"""Options that make a run of a command small, for tests of commands from start to end."""

from skillnet.skills import default_tasks

#: Of a model with a few thousand parameters, trained in this process.
SMALL_RUN = {
    "training.workers": 0,
    "training.threads_per_worker": 1,
    "model.dim": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.ffn_dim": 16,
    "model.embedding_dim": 8,
    "model.patch_size": 16,
    "model.tubelet": "[4,16,16]",
    "model.vocab_size": 1200,
    **{f"tasks.{task}.batch_size": 8 for task in default_tasks()},
}


def option_arguments(options: dict[str, object]) -> list[str]:
    """Return options as the arguments of a command."""
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]

"""Identity of a run: the part of its configuration that determines the weights.

The digests of the corpora are a part of it, because equal names do not mean equal rows.
:func:`open_corpora` opens them with their digests checked.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.folds import open_fold
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.model_source import ModelSource
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_platform.storage.location import join_location, parse_location

#: Keys of ``training`` that change where, how fast and how often. They change the result at most
#: as another number of workers does, by rounding.
NON_IDENTITY_KEYS = (
    "workers",
    "min_workers",
    "resize_interval_s",
    "threads_per_worker",
    "dataloader_num_workers",
    "use_gpu",
    "placement_strategy",
    "precision",
    "micro_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "log_every",
    "kept_tokens",
    "compile",
    "profile_start",
    "sharding",
    "max_failures",
    "collective_timeout_s",
    "callbacks",
)


def compute_identity(config: FinetuneConfig) -> dict[str, Any]:
    """Return the configuration without names, locations and intervals.

    A run resumes only with an equal identity.

    Args:
        config: settings of the run, with ``init_from`` as a folder of weights.
    """
    training = {k: v for k, v in asdict(config.training).items() if k not in NON_IDENTITY_KEYS}
    tasks = configuration.to_dict(config.tasks)
    if config.training.patience is not None:
        # The validations decide which weights are final.
        training["evaluate_every"] = config.training.evaluate_every
    else:
        for task in tasks.values():
            del task["metric"]
    return {
        "seed": config.seed,
        "init_from": digest_weights(config.init_from),
        "system": config.system,
        "options": config.options,
        "model": configuration.to_dict(config.model),
        "tasks": tasks,
        "corpora": {
            name: config.corpora[name] for name in corpora_of(config) if config.corpora.get(name)
        },
        "fold": configuration.to_dict(config.fold),
        "training": training,
    }


def corpora_of(config: FinetuneConfig) -> list[str]:
    """Return the names of the corpora of all tasks, sorted."""
    return sorted({task.corpus for task in config.tasks.values()})


def find_identity_differences(
    before: FinetuneConfig, now: FinetuneConfig
) -> dict[str, tuple[Any, Any]]:
    """Return key -> (value before, value now) of all differences; those of corpora come last.

    A corpus without a digest on one side is no difference: it is missing, and a finished run needs
    none, or the configuration was not resolved yet.

    Args:
        before: configuration of an existing run.
        now: configuration of this call.
    """
    old = configuration.flatten_tree(compute_identity(before))
    new = configuration.flatten_tree(compute_identity(now))
    keys = sorted(old.keys() | new.keys(), key=lambda key: (is_corpus_key(key), key))
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key)
        and not (is_corpus_key(key) and None in (old.get(key), new.get(key)))
    }


def is_corpus_key(key: str) -> bool:
    """Return whether a key of a flat identity holds the digest of a corpus, or says it has none."""
    # A mapping without entries stays a value in a flat tree: its key has no name of a corpus.
    return key.partition(".")[0] == "corpora"


def check_trained_corpora(config: FinetuneConfig, before: FinetuneConfig, stored: Path) -> None:
    """Raise UserError if a run was trained on other corpora than a configuration names.

    Args:
        config: configuration of this call.
        before: configuration of the existing run.
        stored: its file, for the message.
    """
    # A corpus without a digest is missing, and a finished run needs none.
    pairs = {name: (before.corpora.get(name), config.corpora.get(name)) for name in before.corpora}
    differing = [name for name, (old, new) in pairs.items() if old and new and old != new]
    if differing:
        old, new = pairs[differing[0]]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"the run {before.name} was trained on another corpus: corpora.{differing[0]} is {old} "
            f"in {stored}, and {new} below {config.data}{more}. Restore that corpus to resume the "
            "run, or give another --name"
        )


def digest_weights(weights: str | None) -> str | None:
    """Return the digest of a folder of weights: a run depends on them, not on their location."""
    if not weights:
        return None
    return ModelSource(weights, Path(weights)).digest


def open_corpora(
    config: FinetuneConfig, opened: Mapping[str, PreparedCorpus] | None = None
) -> dict[str, PreparedCorpus]:
    """Open the corpora of all tasks with the splits of the run's fold; return name -> corpus.

    Args:
        config: settings of the run.
        opened: corpora that are open already.

    Raises:
        UserError: a corpus is missing, was exchanged, or has a larger vocabulary than the model.
    """
    data = parse_location(config.data, data_root())
    known = opened or {}
    corpora = {
        name: known[name] if name in known else open_corpus(join_location(data, name))
        for name in corpora_of(config)
    }
    for name, corpus in corpora.items():
        expected = config.corpora.get(name)
        if expected is not None and expected != corpus.digest:
            raise UserError(
                f"{corpus.path}: the corpus was exchanged: its digest is {corpus.digest}, and "
                f"corpora.{name} is {expected}. Restore that corpus, or train another run: give "
                f"another --name and --corpora.{name} null"
            )
        size = (corpus.manifest.get("tokenizer") or {}).get("vocab_size", 0)
        if size > config.model.vocab_size:
            raise UserError(
                f"corpus {name} was prepared with a vocabulary of {size} tokens, "
                f"model.vocab_size is {config.model.vocab_size}; set it to {size} or more"
            )
    return {name: open_fold(corpus, config.fold) for name, corpus in corpora.items()}

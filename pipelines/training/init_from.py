"""Initial weights of a run: random ones, those of a trained model, or copies of a dense encoder.

A trained model of the same system provides the weights that both models have by name: stems,
shared weights, skills and heads of tasks that both know. The rest stays random and is reported. A
head whose classes or symbols are not those of the corpus starts from random weights. From a dense
model, or a checkpoint of a library, every skill of a SkillNet gets a copy
(:mod:`pipelines.training.upcycling`).
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.head_sizes import outputs_key
from pipelines.runs.layout import SETTINGS, TRAINED
from pipelines.runs.model_source import (
    ModelSource,
    load_source_model,
    read_training_settings,
    resolve_model,
)
from pipelines.runs.vocabulary_match import (
    align_outputs,
    check_corpus_tokenizer,
    list_names,
    read_corpus_names,
    reads_tokens,
)
from pipelines.shards.dataset import PreparedCorpus
from pipelines.shards.value_scale import read_value_scale
from pipelines.training.upcycling import (
    add_noise,
    check_dense_source,
    find_library_checkpoint,
    import_checkpoint,
    starts_skills,
)
from skillnet.config import INITIAL_SETTINGS, SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.positions import resize_positions
from skillnet.serialization import read_about, read_config, read_manifest, read_vocabulary
from skillnet.skills import Task, find_task
from skillnet.upcycling.library_checkpoint import is_unset_weight
from skillnet.upcycling.skill_copies import copy_to_skills, is_difference
from skillnet.vocabulary import ModelVocabulary, find_order
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.objects import is_uri

#: Beside a copy of initial weights: the address that it was made from.
ORIGIN = "origin.json"
#: Keys that change the model's computation although all tensors may fit.
_MUST_EQUAL = (
    "num_layers",
    "num_heads",
    "skill_modules",
    "skill_every",
    "skill_rank",
    "bias",
    "skill_norms",
    "norm_position",
    "norm_eps",
    "stem_norm",
    "class_token",
)
_NOT_SHAPE = ("tasks", "reference_tasks", "skills", "drop_path", "dropout", *INITIAL_SETTINGS)


@dataclass(frozen=True)
class InitReport:
    """Origin of a run's initial weights.

    Args:
        source: folder of the weights.
        digest: of the weights.
        taken: files all of whose weights came from the source.
        fresh: files that a task activates with a weight that stayed random.
        corpora: corpus -> digest of the corpora that the source was trained on, as far as known.
        new_heads: task -> why its head starts from random weights although the source has one.
        trained_tasks: tasks all of whose weights came from a source that is trained for them.
        resized: position weight -> change of its grid, for inputs of another size.
        noise: a line for each skill that was copied with noise.
    """

    source: str
    digest: str
    taken: list[str]
    fresh: list[str]
    corpora: dict[str, str | None]
    new_heads: dict[str, str] = field(default_factory=dict)
    trained_tasks: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    noise: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return lines for the console: the origin, new heads, and positions of other sizes."""
        fresh = f"; random: {', '.join(self.fresh)}" if self.fresh else ""
        origin = f"started from {find_origin(self.source)} with {', '.join(self.taken)}{fresh}"
        return [
            origin,
            *(f"{task}: {reason}" for task, reason in self.new_heads.items()),
            *(f"{name}: interpolated from {change}" for name, change in self.resized.items()),
            *self.noise,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for the run's result."""
        return dataclasses.asdict(self)


def resolve_init_weights(address: str, uri: str | None, run_dir: str) -> str:
    """Return the folder of the weights that ``--from`` names.

    A registered version and a model in an object store are copied below ``run_dir``: a download
    may be gone when the run resumes. A checkpoint of a library is converted to a model there.

    Args:
        address: a path, a run, a registered version, or a checkpoint of transformers or timm.
        uri: of the tracking server.
        run_dir: directory of runs.

    Raises:
        UserError: there is no such model.
    """
    # This is the only place that contacts the registry, a store or the hub for initial weights.
    checkpoint = find_library_checkpoint(address)
    if checkpoint is not None:
        return record_origin(import_checkpoint(checkpoint, run_dir), address)
    source = resolve_model(address, uri)
    is_registered = source.version is not None or address.startswith(("models:/", "runs:/"))
    if not is_registered and not is_uri(address):
        return str(source.weights.absolute())
    copy = Path(run_dir) / ".starts" / source.digest[:16]
    if not (copy / "manifest.json").is_file():
        with storage.staging_directory(copy) as staging:
            shutil.copytree(source.weights, staging, dirs_exist_ok=True)
            # A comparison of runs reports the cost of training these weights.
            if source.run is not None and (source.run / TRAINED).is_file():
                shutil.copy(source.run / TRAINED, staging / TRAINED)
            if source.settings:
                storage.write_json(staging / SETTINGS, source.settings)
    return record_origin(copy, address)


def record_origin(copy: Path, address: str) -> str:
    """Write what a copy of initial weights was made from beside it; return the copy's folder.

    Args:
        copy: folder of the weights, whose name means nothing to the user.
        address: as the user gave it.
    """
    storage.write_json(copy / ORIGIN, {"address": str(SecretUri(address))})
    return str(copy)


def find_origin(weights: str) -> str:
    """Return the address that a copy of initial weights was made from; other folders unchanged.

    Args:
        weights: folder of the weights.
    """
    # A damaged record must not hide the message that names the weights.
    with contextlib.suppress(ValueError, OSError):
        found = storage.read_json(Path(weights) / ORIGIN)
        if isinstance(found, dict) and isinstance(found.get("address"), str):
            return str(found["address"])
    return weights


def inherit_reference_tasks(config: FinetuneConfig, weights: str) -> FinetuneConfig:
    """Return the run with the reference tasks of the model that it starts from.

    A baseline that trains fewer tasks than its pretraining was made for keeps the size of the
    weights. Tasks that the configuration gives stay.

    Args:
        config: of the run.
        weights: folder of the initial weights.
    """
    if config.system == "skillnet" or config.model.reference_tasks:
        return config
    # A damaged folder is reported when its weights are read.
    with contextlib.suppress(ValueError, OSError):
        start, _, _ = read_config(Path(weights), read_manifest(Path(weights)))
        model = dataclasses.replace(config.model, reference_tasks=start.reference_tasks)
        return dataclasses.replace(config, model=model)
    return config


def load_init_weights(
    config: FinetuneConfig, model: TaskModel, corpora: Mapping[str, PreparedCorpus]
) -> InitReport | None:
    """Load the weights of ``init_from`` into a fresh model; averaged ones if its run kept them.

    Args:
        config: of the run.
        model: with random weights, and the vocabulary of its corpora; it inherits the vocabulary
            of weights that the corpora do not concern.
        corpora: task -> its corpus.

    Returns:
        A report, or None without ``init_from``.

    Raises:
        UserError: a model of another system or tokenizer, or weights that do not fit; names the
            tensor and the keys of the configuration that differ.
    """
    if not config.init_from:
        return None
    source, origin = resolve_model(config.init_from), find_origin(config.init_from)
    location = f"--from {origin}"
    vocabulary = read_vocabulary(source.weights, read_manifest(source.weights))
    # Before the sizes: another tokenizer explains another number of tokens.
    for task, corpus in corpora.items():
        if reads_tokens(find_task(task, config.model.tasks)):
            check_corpus_tokenizer(vocabulary, corpus, source.weights, origin)
    # Differences are collected first, to explain a tensor that does not fit.
    differing, is_dense = _find_differences(config, source.weights, location)
    start = load_source_model(source)
    new_heads = _match_heads(config, start, corpora)
    try:
        found = {
            name: parameter
            for name, parameter in start.named_parameters()
            if not any(name.startswith(f"heads.{task}.") for task in new_heads)
            and not is_unset_weight(name, start.config)
        }
        weights, resized = resize_positions(found, start.config, model.config)
        if is_dense:
            weights = copy_to_skills(weights, model)
        # Names of parameters that the source does not provide.
        fresh = set(model.load_partial(weights))
        if is_dense:  # a difference of zero is a copy too
            fresh = {name for name in fresh if not is_difference(name)}
    except ValueError as error:
        keys = ", ".join(
            f"model.{key} {theirs} there and {ours} here" for key, theirs, ours in differing
        )
        raise UserError(f"{location}: {error}" + (f" ({keys})" if keys else "")) from None
    noise = add_noise(config, model) if is_dense else []
    files = model.files_of()
    partial = sorted(file for file, names in files.items() if fresh & set(names))
    taken = sorted(set(files) - set(partial))
    if not taken:
        raise UserError(
            f"{location} has no weight that this model could start from; it holds "
            f"{', '.join(sorted(weights)[:3])}, …"
        )
    inherited = start.vocabulary.restrict_to(model.config.tasks)
    model.vocabulary = ModelVocabulary(
        model.vocabulary.tokenizer or inherited.tokenizer,
        {**inherited.outputs, **model.vocabulary.outputs},
        {**inherited.scales, **model.vocabulary.scales},
    )
    active = {
        task: {name for name, _ in model.active_parameters(task)} for task in model.config.tasks
    }
    trained_tasks = [
        task
        for task, names in active.items()
        if task not in source.untrained and fresh.isdisjoint(names)
    ]
    # Skills and stems that no task activates are left out of the final model.
    used = set[str]().union(*active.values())
    return InitReport(
        source=str(source.weights),
        digest=source.digest,
        taken=taken,
        fresh=[file for file in partial if not used.isdisjoint(files[file])],
        corpora=read_training_corpora(source),
        new_heads=new_heads,
        trained_tasks=trained_tasks,
        resized=resized,
        noise=noise,
    )


def _match_heads(
    config: FinetuneConfig, start: TaskModel, corpora: Mapping[str, PreparedCorpus]
) -> dict[str, str]:
    """Give the heads of a trained model the order of the corpora; find those that do not fit.

    Returns:
        Task -> why the head of the trained model does not fit the corpus.

    Raises:
        UserError: the head of such a task is not trained, or a frozen head would be reordered.
    """
    new_heads = {}
    trainable = config.training.trainable
    for task, corpus in corpora.items():
        if task not in start.config.tasks:
            continue
        reason = _describe_other_outputs(start, task, config.model.tasks[task], corpus)
        is_frozen = bool(trainable) and f"head-{task}" not in trainable
        if reason is None:
            known = start.vocabulary.outputs.get(task)
            align_outputs(start, task, corpus)
            # A frozen file keeps its bytes, which growth proves after the training.
            if is_frozen and known != start.vocabulary.outputs.get(task):
                raise UserError(
                    f"tasks.{task}: the corpus {corpus.name} lists the names of "
                    f"the trained model in another order, and head-{task} is frozen. Give the task "
                    f"a corpus that lists them as {list_names(known or ())}"
                )
        elif is_frozen or config.tasks[task].eval_only:
            state = "its head is frozen" if is_frozen else "the task is only evaluated"
            raise UserError(
                f"tasks.{task}: {reason}, and {state}. Give it a corpus with the names of the "
                "trained model, or train it"
            )
        else:
            new_heads[task] = f"{reason}; its head starts from random weights"
    return new_heads


def _describe_other_outputs(
    start: TaskModel, task: str, spec: Task, corpus: PreparedCorpus
) -> str | None:
    """Return how the outputs of a trained head differ from those of a corpus; None if they fit."""
    old, listed = start.config.tasks[task], outputs_key(spec)
    if old.objective != spec.objective:
        return f"the model was trained for {old.objective}, this run trains {spec.objective}"
    scale, known_scale = read_value_scale(corpus.manifest, spec), start.vocabulary.scales.get(task)
    if scale != known_scale:
        return f"the model was trained for values of another scale than those of {corpus.name}"
    if listed is None:
        return None
    known, names = start.vocabulary.outputs.get(task), read_corpus_names(corpus, spec)
    if known and names:
        if find_order(names, known) is not None:
            return None
        return (
            f"the model was trained for the {listed} {list_names(known)}; the corpus "
            f"{corpus.name} has {list_names(names)}"
        )
    if old.outputs != spec.outputs:
        return f"the model was trained for {old.outputs} {listed}, this run has {spec.outputs}"
    return None


def read_training_corpora(source: ModelSource) -> dict[str, str | None]:
    """Return corpus -> digest of the corpora that a model was trained on; {} if unknown.

    Args:
        source: a run, a bundle, or a copy of weights with the settings of their training.
    """
    corpora = read_training_settings(source).get("corpora")
    return dict(corpora) if isinstance(corpora, dict) else {}


def _find_differences(
    config: FinetuneConfig, weights: Path, location: str
) -> tuple[list[tuple[str, Any, Any]], bool]:
    """Return differences that may not fit, and whether skills become copies of a dense model.

    A difference is (key of the model section, value there, value here).

    Raises:
        UserError: another system, or a difference after which weights fit but mean another thing.
    """
    about = read_about(weights, read_manifest(weights))
    system = about.get("system", "skillnet")
    is_dense = starts_skills(system, config)
    source, _, _ = read_config(weights, read_manifest(weights))
    if is_dense:
        check_dense_source(config, source, location)
    elif system != config.system:
        raise UserError(
            f"{location} holds a model of the system {system!r}, this run trains "
            f"{config.system!r}; give --system {system}, or start from a model of the same system"
        )
    here = configuration.to_dict(config.model)
    differing = [
        (f.name, about[f.name], here[f.name])
        for f in dataclasses.fields(SkillNetConfig)
        if f.name in about and f.name not in _NOT_SHAPE and about[f.name] != here[f.name]
    ]
    for key, theirs, ours in differing:
        if key in _MUST_EQUAL and not is_dense:
            raise UserError(
                f"{location} has model.{key} {theirs}, this run {ours}; give both the same"
            )
        if key == "vocab_size" and any("token" in task.stems for task in source.tasks.values()):
            raise UserError(
                f"{location} has model.vocab_size {theirs}, this run {ours}, so token ids would "
                "not mean the same; prepare all corpora with one tokenizer and give both its size"
            )
    return differing, is_dense

"""Comparison of a model's vocabulary with that of a corpus.

An id of another tokenizer, or of other classes, is a valid number: without a comparison it is read
as another token or class. :func:`check_corpus_vocabulary` compares, and :func:`align_outputs` also
maps the same class names in another order. Training, evaluation, interpretation, growth, search
and bundles call one of them.
"""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.runs.bundle_manifest import TOKENIZER_FILE
from pipelines.training.runs.model_source import read_training_settings, resolve_model
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skills import Task, find_task
from skillnet.vocabulary import ModelVocabulary, find_order
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file

#: Longest printed list of names, in characters.
MAX_LISTED = 200
#: Printed hexadecimal digits of a digest.
DIGITS = 16


def read_corpora_vocabulary(
    tasks: Mapping[str, Task], corpora: Mapping[str, PreparedCorpus]
) -> ModelVocabulary:
    """Return the vocabulary of a model that is trained on some corpora.

    Args:
        tasks: name -> task of the model.
        corpora: task -> its corpus.

    Raises:
        UserError: the corpora were prepared with different tokenizers.
    """
    specs = {task: find_task(task, tasks) for task in corpora}
    readers = [corpus for task, corpus in corpora.items() if reads_tokens(specs[task])]
    outputs = {task: read_corpus_names(corpus, specs[task]) for task, corpus in corpora.items()}
    scales = {
        task: find_objective(specs[task].objective).read_scale(corpus.manifest)
        for task, corpus in corpora.items()
    }
    return ModelVocabulary(
        find_common_tokenizer({corpus.name: corpus.manifest for corpus in readers}),
        {task: names for task, names in outputs.items() if names},
        {task: scale for task, scale in scales.items() if scale is not None},
    )


def find_common_tokenizer(manifests: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the SHA-256 of the tokenizer of some corpora; None if none of them has one.

    Args:
        manifests: corpus name -> manifest.

    Raises:
        UserError: the corpora were prepared with different tokenizers.
    """
    tokenizers = {
        name: digest
        for name, manifest in manifests.items()
        if (digest := _tokenizer_digest(manifest)) is not None
    }
    if len(set(tokenizers.values())) > 1:
        raise UserError(
            f"the corpora {', '.join(tokenizers)} were prepared with different tokenizers; "
            "prepare them together: skillnet prepare"
        )
    return next(iter(tokenizers.values()), None)


def read_corpus_names(corpus: PreparedCorpus, spec: Task) -> tuple[str, ...]:
    """Return the names of the classes or CTC symbols of a corpus; () if it lists none.

    Args:
        corpus: shards of the task.
        spec: the task.
    """
    return tuple(corpus.manifest.get(find_objective(spec.objective).listed or "") or ())


def reads_tokens(spec: Task) -> bool:
    """Return whether a task reads token ids: of texts, code or captions."""
    return any(plan.stem == "token" for plan in spec.towers.values())


def check_corpus_vocabulary(model: TaskModel, task: str, corpus: PreparedCorpus) -> None:
    """Check that the ids of a corpus mean the same as those of a model.

    Args:
        model: its vocabulary is compared as far as it is known.
        task: name of a task of the model.
        corpus: shards of the task.

    Raises:
        UserError: another tokenizer, other classes or symbols, or another number of them.
    """
    spec = find_task(task, model.config.tasks)
    if reads_tokens(spec):
        check_corpus_tokenizer(model.vocabulary, corpus, model.origin)
    names, known = read_corpus_names(corpus, spec), model.vocabulary.outputs.get(task)
    if known and names and find_order(names, known) is None:
        raise UserError(
            f"{corpus.path}: its {find_objective(spec.objective).listed} are {list_names(names)}; "
            f"the task {task} of the model was trained for {list_names(known)}. Give a corpus with "
            f"the same names, or train the model on this one: skillnet finetune --from MODEL "
            f"--tasks.{task}.corpus {corpus.name}"
        )
    check_outputs(corpus, task, spec)


def align_outputs(model: TaskModel, task: str, corpus: PreparedCorpus) -> None:
    """Check a corpus' vocabulary, and give the model's outputs the order of its names.

    The weights of an output move with its name, so predictions stay the same by name.

    Args:
        model: changed in place if the corpus lists the same names in another order.
        task: name of a task of the model.
        corpus: shards of the task.

    Raises:
        UserError: as for :func:`check_corpus_vocabulary`.
    """
    check_corpus_vocabulary(model, task, corpus)
    names = read_corpus_names(corpus, find_task(task, model.config.tasks))
    known = model.vocabulary.outputs.get(task)
    if known and names and names != known:
        model.reorder_outputs(task, names)


def check_outputs(corpus: PreparedCorpus, task: str, spec: Task) -> None:
    """Check that a corpus has as many classes or symbols as the model has outputs.

    Args:
        corpus: shards of the task.
        task: name of the task.
        spec: the task, with its number of outputs.

    Raises:
        UserError: the numbers differ.
    """
    objective = find_objective(spec.objective)
    num_outputs = objective.count_names(corpus.manifest)
    # Without this check, outputs would get the names of other classes, without any error.
    if num_outputs is not None and num_outputs != spec.outputs:
        raise UserError(
            f"{task}: the corpus {corpus.name} has {num_outputs} {objective.listed}, the "
            f"model was built for {spec.outputs}; set model.tasks.{task}.outputs to {num_outputs} "
            "and train again"
        )


def check_corpus_tokenizer(
    vocabulary: ModelVocabulary, corpus: PreparedCorpus, origin: Path | None
) -> None:
    """Check that a corpus was prepared with the tokenizer of a model.

    Args:
        vocabulary: tokenizer digest and output names of the model; without a tokenizer nothing is
            compared.
        corpus: whose tokens the model reads.
        origin: folder of the model, to find its tokenizer for the message.

    Raises:
        UserError: it has another tokenizer; names both, and the command that prepares the corpus.
    """
    found = describe_other_tokenizer(vocabulary, [corpus], origin)
    if found:
        raise UserError(found)


def describe_other_tokenizer(
    vocabulary: ModelVocabulary,
    corpora: Sequence[PreparedCorpus],
    origin: Path | None,
    name: str = "",
    others: Sequence[PreparedCorpus] = (),
    tokenizer: str | None = None,
) -> str:
    """Return which corpora have another tokenizer than a model, and the remedy; "" if none has.

    Args:
        vocabulary: tokenizer digest and output names of the model; without a tokenizer nothing is
            compared.
        corpora: whose tokens the model reads.
        origin: folder of the model, to find its tokenizer.
        name: identifier of the model in the message, by default the folder.
        others: further corpora that are read from the same directory.
        tokenizer: file or folder of the model's tokenizer, if it is known.
    """
    expected = vocabulary.tokenizer
    digests = {each.name: _tokenizer_digest(each.manifest) for each in corpora}
    other = [each for each in corpora if digests[each.name] not in (None, expected)]
    if expected is None or not other:
        return ""
    model = "the model" if origin is None else f"the model {name or origin}"
    is_one = len(other) == 1
    paths, found = ", ".join(str(each.path) for each in other), str(digests[other[0].name])
    again = {each.name: each for each in (*other, *corpora, *others)}.values()
    return (
        f"{paths}: {'it was' if is_one else 'they were'} prepared with the tokenizer "
        f"{found[:DIGITS]}, {model} was trained with {expected[:DIGITS]}, so "
        f"{'its' if is_one else 'their'} token ids mean other tokens. Prepare the "
        f"{'corpus' if len(again) == 1 else 'corpora'} with the model's tokenizer, and give its "
        f"--data to this command too: {suggest_prepare(list(again), expected, origin, tokenizer)}"
    )


def suggest_prepare(
    corpora: Sequence[PreparedCorpus],
    tokenizer: str,
    origin: Path | None,
    file: str | None = None,
) -> str:
    """Return the command that prepares corpora with the tokenizer of a model.

    Args:
        corpora: to prepare again, at least one.
        tokenizer: SHA-256 of the model's tokenizer.
        origin: folder of the model.
        file: the tokenizer's file or folder, if it is known.
    """
    readers = {each.name: each.manifest.get("preprocessing", {}).get("reader") for each in corpora}
    words = [name for name, reader in readers.items() if not reader]
    # Manifests of own corpora name their reader, but not the place of their files.
    words += [f"--corpus {name}={reader}:PATH" for name, reader in readers.items() if reader]
    known = file or find_tokenizer_file(tokenizer, origin)
    given = shlex.quote(str(known)) if known else f"FILE (the {TOKENIZER_FILE} of its training)"
    # A directory of corpora has one tokenizer, and others there may use the present one.
    data = f"{str(corpora[0].path).rstrip('/').rpartition('/')[0]}-{tokenizer[:8]}"
    words += ["--tokenizer", given, "--data", shlex.quote(data)]
    return f"skillnet prepare {' '.join(words)}"


def find_tokenizer_file(tokenizer: str, origin: Path | None) -> Path | None:
    """Return a tokenizer file with a digest: of the model's bundle, or beside its corpora.

    Args:
        tokenizer: SHA-256 of the file.
        origin: folder of the model.
    """
    if origin is None:
        return None
    candidates = [origin / TOKENIZER_FILE]
    # The model is loaded already; only its settings may be missing or damaged.
    with contextlib.suppress(ValueError, OSError):
        data = read_training_settings(resolve_model(str(origin))).get("data")
        candidates += [Path(str(data)) / TOKENIZER_FILE] if data else []
    return next((p for p in candidates if p.is_file() and sha256_file(p) == tokenizer), None)


def list_names(names: Sequence[str]) -> str:
    """Return names as a list for a message, cut at :data:`MAX_LISTED` characters."""
    text = ", ".join(names)
    if len(text) <= MAX_LISTED:
        return text
    return f"{text[:MAX_LISTED].rpartition(', ')[0]}, … ({len(names)} in total)"


def _tokenizer_digest(manifest: Mapping[str, Any]) -> str | None:
    return (manifest.get("tokenizer") or {}).get("sha256")

"""Typed settings of a training run: what `configs/*.yaml` and the command line fill in."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from pipelines.config.data import AugmentConfig, MaskConfig
from skillnet.config import SkillNetConfig
from skillnet.skills import MODALITIES, Modality, SkillPlan, Task, default_tasks, masked_tasks
from skillnet_platform.config import aliased
from skillnet_platform.storage.objects import is_uri
from skillnet_platform.tracking import TrackingConfig


@dataclass
class TaskTraining:
    """How one task takes part in the mixture.

    Args:
        corpus: name of the corpus, a directory below ``data``.
        weight: share of the steps relative to the other tasks; none leaves it to
            ``training.temperature`` over the tasks' numbers of rows.
        batch: rows of one global batch, over all workers.
        split: the split it trains on; ``pretraining`` stands for all splits that the corpus'
            manifest allows for pretraining.
        max_length: longest sequence of the corpus' own modality, in tokens or frames; longer
            rows are cropped at random. None: as long as the model allows.
        smoothing: label smoothing, classification only.
        first_caption: share of the draws that take a row's first caption, the one it is
            evaluated with; the others take any of its captions. Retrieval only.
        auxiliary: it only helps the others to learn: it is not evaluated, and the final model
            does without its head.
        views: the query is no caption but the row itself, as is the candidate; each is changed
            and hidden in part anew (SimCLR, Chen et al. 2020). Retrieval only, towers of the
            corpus' modality.
        measured_only: it takes no steps and is evaluated beside the others, as are the tasks
            that a model had before it was grown.
    """

    corpus: str
    weight: float | None = None
    batch: int = 64
    split: str = "train"
    max_length: int | None = None
    smoothing: float = 0.0
    first_caption: float = 0.0
    auxiliary: bool = False
    views: bool = False
    measured_only: bool = False

    def __post_init__(self) -> None:
        if self.auxiliary and self.measured_only:
            raise ValueError("a task is auxiliary or measured_only, not both: it would do nothing")
        if self.batch < 1:
            raise ValueError(f"a task's batch must be at least 1, got {self.batch}")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(
                f"a task's weight must be above 0, got {self.weight}; leave the task out instead"
            )


@dataclass
class TrainingConfig:
    """Optimisation, parallelism and the run's rhythm.

    Args:
        steps: global steps; one task each.
        minutes: stop early after so long, with a checkpoint and a note in the record. The
            learning rate follows steps, so a run cut short has not decayed.
        lr: peak learning rate of AdamW (Loshchilov & Hutter 2019).
        warmup: steps of linear rise; below 1 it is a share of ``steps``.
        schedule: decay after the rise: ``cosine`` or ``linear`` to ``final_lr`` at the last
            step; ``wsd`` holds the peak and falls linearly over the last ``decay`` share;
            ``constant``.
        final_lr: learning rate at the end, as a share of ``lr``.
        decay: share of the steps in which ``wsd`` falls.
        weight_decay: AdamW's, on weight matrices of active skills; none on biases, norms and
            embeddings.
        beta1: AdamW's.
        beta2: AdamW's.
        clip: largest global norm of the active gradients; 0 does not clip.
        temperature: tasks without a weight get rows ** (1 / temperature).
        ema: decay per step of an average of the weights kept beside them and used for
            evaluation and the final model; 0 keeps none.
        workers: Ray workers; 0 trains in this process without Ray.
        min_workers: go on with as few workers when hosts of a cluster leave, and with up to
            ``workers`` when they are back: an elastic run. None starts again with all of
            ``workers``, and waits for their places.
        regrow_seconds: seconds from the start of the workers, and from one look to the next, until
            an elastic run with too few looks whether more would find a place.
        threads_per_worker: compute threads of a worker, and as many (up to eight) that make its
            batches; 0 shares the machine's cores out.
        use_gpu: give each worker a GPU.
        placement: where workers start on a cluster: ``pack`` together if they fit, ``spread``
            over hosts if there are enough, ``strict_spread`` each on a host of its own.
        precision: ``auto`` is bf16 autocast where the device multiplies bf16 natively and
            fp32 elsewhere; fp64 is for tests.
        checkpoint_every: steps between checkpoints; 0 only at the end.
        keep: newest checkpoints that stay on disk.
        evaluate_every: steps between evaluations on the validation split; 0 none.
        log_every: steps between logged metrics.
        bucket_mb: size of a gradient bucket on the wire, in MiB.
        max_failures: restarts after a worker dies.
        only: files of the model that train (skill-NAME, head-TASK, stem-NAME, shared); all
            others are read and stay as they are to the bit. Empty trains all that a task activates.
        augment: random changes of training rows.
        masking: what masked tasks hide.
        shuffle_gb: a task's rows are shuffled whole up to so many 10^9 bytes of shards; beyond,
            in windows of so many bytes of shards, drawn anew each epoch. It decides the order.
    """

    steps: int = 2000
    minutes: float | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    final_lr: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    temperature: float = 2.0
    ema: float = 0.0
    workers: int = 1
    min_workers: int | None = None
    regrow_seconds: float = 60.0
    threads_per_worker: int = 0
    use_gpu: bool = False
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    checkpoint_every: int = 500
    keep: int = 2
    evaluate_every: int = 0
    log_every: int = 20
    bucket_mb: float = 8.0
    max_failures: int = 1
    only: list[str] = field(default_factory=list)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    masking: MaskConfig = field(default_factory=MaskConfig)
    shuffle_gb: float = 4.0

    def __post_init__(self) -> None:
        for key in ("steps", "keep", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"training.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("workers", "threads_per_worker", "checkpoint_every", "evaluate_every", "clip"):
            if getattr(self, key) < 0:
                raise ValueError(f"training.{key} must not be negative, got {getattr(self, key)}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"training.min_workers must be between 1 and training.workers ({self.workers}), "
                f"got {self.min_workers}; leave it out to train with all workers or none"
            )
        if self.regrow_seconds <= 0:
            raise ValueError(f"training.regrow_seconds must be above 0, got {self.regrow_seconds}")
        if self.lr <= 0:
            raise ValueError(f"training.lr must be above 0, got {self.lr}")
        if self.shuffle_gb <= 0:
            raise ValueError(f"training.shuffle_gb must be above 0, got {self.shuffle_gb}")
        if self.temperature <= 0:
            raise ValueError(f"training.temperature must be above 0, got {self.temperature}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"training.ema must be in [0, 1), got {self.ema}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"training.minutes must be above 0, got {self.minutes}")


def default_tasks_training() -> dict[str, TaskTraining]:
    """The five built-in corpora with shares that a short run on two cores was tuned to."""
    return {
        "text_classification": TaskTraining("headings", weight=0.15, batch=128),
        "speech_recognition": TaskTraining("syllables", weight=0.2, batch=48),
        "text_to_image": TaskTraining("drawings", weight=0.25, batch=96),
        "text_to_video": TaskTraining("strokes", weight=0.25, batch=96),
        "text_to_code": TaskTraining("functions", weight=0.15, batch=96, max_length=128),
    }


@dataclass
class StorageConfig:
    """Where a run is kept besides its folder on this machine, and how corpora in a store are read.

    Args:
        mirror: URI that the run's folder is copied to, and taken from where it is missing; none
            keeps it on this machine. ``--run_dir s3://bucket/runs`` sets it.
        patience: seconds that a run waits at its end for a store that does not answer, before it
            says what is not yet there and exits with 1.
        cache_gb: 10^9 bytes on this machine for shards of corpora in a store; none takes
            ``$SKILLNET_CACHE_GB``, else 20.
    """

    mirror: str | None = None
    patience: float = 600.0
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        if self.mirror is not None and not is_uri(self.mirror):
            raise ValueError(
                f"storage.mirror must be a URI such as s3://bucket/runs, got {self.mirror!r}"
            )
        if self.patience < 0:
            raise ValueError(f"storage.patience must not be negative, got {self.patience}")
        if self.cache_gb is not None and self.cache_gb <= 0:
            raise ValueError(f"storage.cache_gb must be above 0, got {self.cache_gb}")


@dataclass
class FinetuneConfig:
    """A joint training run.

    Args:
        name: name of the run and of its directory. The name of an unfinished run goes on from
            its newest whole checkpoint; none makes a fresh name.
        run_dir: directory of runs, or a URI that they are mirrored to; none takes the run root.
        seed: of weights, order, augmentation and dropout.
        data: directory or URI of prepared corpora; none takes ``corpora`` below the run root.
        init_from: trained model of the same system to start from: the name or folder of a run,
            a checkpoint, a saved model or a registered version; none starts at random.
        system: what to train: ``skillnet``, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model.
        tasks: task name -> how it takes part.
        training: optimisation, parallelism, rhythm.
        tracking: where it is recorded.
        storage: where it is kept, and how corpora in a store are read.
        evaluate: evaluate the final model on the test splits.
    """

    name: str | None = None
    run_dir: str | None = None
    seed: int = 0
    data: str | None = None
    init_from: str | None = aliased(None, "from")
    system: str = "skillnet"
    options: dict[str, Any] = field(default_factory=dict)
    model: SkillNetConfig = field(default_factory=SkillNetConfig)
    tasks: dict[str, TaskTraining] = field(default_factory=default_tasks_training)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    evaluate: bool = True

    @property
    def trained(self) -> dict[str, TaskTraining]:
        """The tasks that take steps: all but those that are only measured."""
        return {name: task for name, task in self.tasks.items() if not task.measured_only}

    @property
    def measured(self) -> dict[str, TaskTraining]:
        """The tasks that are evaluated: all but the auxiliary ones."""
        return {name: task for name, task in self.tasks.items() if not task.auxiliary}


def default_masked_training() -> dict[str, TaskTraining]:
    """The masked tasks on the pretraining part of the built-in corpora."""
    return {
        "masked_text": TaskTraining("headings", 0.3, 128, "pretraining", max_length=32),
        "masked_sound": TaskTraining("syllables", 0.15, 48, "pretraining"),
        "masked_image": TaskTraining("drawings", 0.2, 96, "pretraining"),
        "masked_video": TaskTraining("strokes", 0.2, 64, "pretraining"),
        "masked_code": TaskTraining("functions", 0.15, 64, "pretraining", max_length=96),
    }


def contrastive_training() -> dict[str, TaskTraining]:
    """Pairs that the corpora hold: captions with what they name, words with their definitions."""
    return {
        "text_to_definition": TaskTraining(
            "headings", 0.3, 128, "pretrain", max_length=24, auxiliary=True
        ),
        "text_to_image": TaskTraining("drawings", 0.2, 96, first_caption=0.5),
        "text_to_video": TaskTraining("strokes", 0.2, 64),
        "text_to_code": TaskTraining("functions", 0.15, 64, max_length=96),
    }


def views_training() -> dict[str, TaskTraining]:
    """Two views of a row as a pair, on the pretraining part of the built-in corpora."""
    more: dict[str, Any] = {"split": "pretraining", "auxiliary": True, "views": True}
    return {
        "views_image": TaskTraining("drawings", 0.2, 96, **more),
        "views_video": TaskTraining("strokes", 0.2, 64, **more),
        "views_code": TaskTraining("functions", 0.15, 64, max_length=96, **more),
    }


def _pretraining_model() -> SkillNetConfig:
    def alike(modality: Modality) -> Task:
        plan = SkillPlan(("general", modality, "alignment"), modality)
        return Task("retrieval", {"query": plan, "candidate": plan})

    pairs = {f"views_{modality}": alike(modality) for modality in MODALITIES}
    pairs["text_to_definition"] = alike("text")
    return SkillNetConfig(tasks=masked_tasks() | default_tasks() | pairs)


@dataclass
class PretrainConfig(FinetuneConfig):
    """Self-supervised pretraining of the skills on unlabelled rows.

    Args:
        name: name of the run and of its directory. The name of an unfinished run goes on from
            its newest whole checkpoint; none makes a fresh name.
        run_dir: directory of runs, or a URI that they are mirrored to; none takes the run root.
        seed: of weights, order, augmentation, masks and dropout.
        data: directory or URI of prepared corpora; none takes ``corpora`` below the run root.
        init_from: trained model of the same system to start from: the name or folder of a run,
            a checkpoint, a saved model or a registered version; none starts at random.
        system: what to train: ``skillnet``, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model. Of its tasks those count that ``tasks`` names.
        tasks: task name -> how it takes part.
        training: optimisation, parallelism, rhythm, and what is masked.
        tracking: where it is recorded; the model is registered only if asked.
        storage: where it is kept, and how corpora in a store are read.
        evaluate: measure the final model on the validation splits.
        contrastive: train on the pairs that corpora hold as well: captions with drawings, clips
            and functions of the training splits, words with their definitions.
        views: tell rows of drawings, clips and functions from one another by two changed views of
            each, with the plans of the retrieval tasks.
    """

    model: SkillNetConfig = field(default_factory=_pretraining_model)
    tasks: dict[str, TaskTraining] = field(default_factory=default_masked_training)
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(register=False))
    contrastive: bool = False
    views: bool = False

    def joint(self) -> FinetuneConfig:
        """The joint training run that this is: its tasks, and a model of only these."""
        more = (contrastive_training() if self.contrastive else {}) | (
            views_training() if self.views else {}
        )
        tasks = more | self.tasks
        known = {name: task for name, task in self.model.tasks.items() if name in tasks}
        model = replace(self.model, tasks=known)
        kept = {f.name: getattr(self, f.name) for f in fields(FinetuneConfig)}
        return FinetuneConfig(**(kept | {"model": model, "tasks": tasks}))

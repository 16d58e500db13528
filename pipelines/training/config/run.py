"""Configuration of a training run, filled by `configs/*.yaml` and the command line."""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from annotated_types import Interval

from pipelines.data.config.folds import FoldConfig
from pipelines.training.config.data import AugmentationName, MaskingName
from skillnet.config import SkillNetConfig
from skillnet.skills import known_tasks, pretrained_modalities, pretraining_tasks
from skillnet_platform.config import aliased_field, choices_field, fixed_field
from skillnet_platform.config.bounds import (
    NonNegativeAmount,
    NonNegativeCount,
    PartialFraction,
    PositiveAmount,
    PositiveCount,
    RandomSeed,
    UnitFraction,
    require_bounds,
)
from skillnet_platform.storage.directories import is_uri, require_no_secret
from skillnet_platform.tracking import TrackingConfig
from skillnet_platform.tracking.backend import PRETRAINING_EXPERIMENT


@dataclass
class StorageConfig:
    """Settings of object stores: the mirror of a run.

    Args:
        mirror: URI to which the run's folder is copied, and from which it is restored; null keeps
            it on this machine. A ``run_dir`` that is a URI sets it.
    """

    mirror: str | None = fixed_field(None)

    def __post_init__(self) -> None:
        if self.mirror is not None and not is_uri(self.mirror):
            raise ValueError(
                f"storage.mirror must be a URI such as s3://bucket/runs, got {self.mirror!r}"
            )
        if self.mirror is not None:
            require_no_secret(self.mirror)


#: Options of every training command that ``--help`` shows; ``--help all`` shows the others.
ESSENTIAL_TRAINING_OPTIONS = (
    "training.steps",
    "training.lr",
    "training.use_gpu",
    "training.workers",
    "training.min_workers",
    "training.precision",
    "training.checkpoint_every",
    "training.evaluate_every",
    "tracking.uri",
)


LearningRate = Annotated[float, Interval(gt=0, le=10)]
#: Processes or threads of a worker.
ProcessCount = Annotated[int, Interval(ge=0, le=10_000)]
WorkerCount = Annotated[int, Interval(ge=1, le=10_000)]


@dataclass
class TaskTraining:
    """Settings of one task of a training run.

    Args:
        corpus: corpus in ``data``, given for each task to train. Without any, the default tasks
            are trained on the built-in corpora.
        weight: share of the steps relative to the other tasks; null derives it from the numbers
            of rows, see ``training.temperature``.
        batch_size: rows of one global batch, over all workers.
        split: the split to train on; ``pretraining`` stands for all splits that the manifest of
            the corpus allows for pretraining.
        lr: peak learning rate of the task's steps; null takes ``training.lr``.
        max_length: longest sequence of the corpus' own modality, in tokens or frames; longer
            rows are cropped at a random position. Null takes the limit of the model.
        label_smoothing: label smoothing, for classification.
        class_weights: factor of the loss of a row, by its label, for classification. ``balanced``
            is the number of rows / (number of labels × rows of the label); a mapping gives the
            factor of each label, and 1 to labels that it leaves out.
        metric: metric of the validation whose score ranks runs and trials, and stops a run by
            ``training.patience``; one of the objective or of ``skillnet.metrics``. Null takes the
            first of the objective.
        label_fraction: fraction of the rows that the task trains on, by held-out units. A smaller
            fraction is a part of a larger one. Validation and test rows stay.
        first_caption_prob: probability of a row's first caption, which evaluation uses; else any
            of its captions is drawn. For retrieval.
        auxiliary: the task only supports the others: it is not evaluated, and the final model has
            no head for it.
        views: the query is the row itself, as is the candidate; each is augmented and masked
            independently (SimCLR, Chen et al. 2020). For retrieval with towers of one modality.
        eval_only: the task takes no steps and is evaluated with the others, as are the tasks of a
            model before it was grown.
    """

    corpus: str
    weight: PositiveAmount | None = None
    batch_size: Annotated[int, Interval(ge=1, le=2**20)] = 64
    split: str = "train"
    lr: LearningRate | None = None
    max_length: PositiveCount | None = None
    label_smoothing: PartialFraction = 0.0
    class_weights: Literal["balanced"] | dict[str, PositiveAmount] | None = None
    metric: str | None = None
    label_fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    first_caption_prob: UnitFraction = 0.0
    auxiliary: bool = fixed_field(False)
    views: bool = False
    eval_only: bool = fixed_field(False)

    def __post_init__(self) -> None:
        if self.auxiliary and self.eval_only:
            raise ValueError("a task is auxiliary and eval_only, so it has no effect; set only one")
        require_bounds(self, "a task's ")


@dataclass
class TrainingConfig:
    """Settings of the optimizer, the workers and the intervals of a run.

    Args:
        steps: global steps; each has ``tasks_per_step`` batches of one task each.
        tasks_per_step: batches of a step, whose gradients are summed. Workers divide into groups,
            of which each computes its tasks beside the others and keeps their state alone, if both
            numbers have a common divisor. ``max_grad_norm`` limits the mean of the gradients.
        lr: peak learning rate of AdamW (Loshchilov & Hutter 2019).
        warmup_fraction: fraction of ``steps`` used for linear warmup.
        schedule: decay after the warmup: ``cosine`` or ``linear`` to 2 % of ``lr`` at the last
            step; ``wsd`` keeps the peak and decays linearly in the last 30 % of the steps;
            ``constant``.
        weight_decay: strength of the decay of AdamW, for weight matrices of active skills; none for
            biases, norms and embeddings.
        max_grad_norm: largest global norm of the active gradients; 0 does not clip.
        temperature: a task without a weight gets rows ** (1 / temperature).
        ema: decay per step of an average of the weights, used for evaluation and the final model;
            0 keeps no average.
        workers: processes that train. One without a GPU, a cluster and ``min_workers`` is the
            process of the command; all others are workers of Ray.
        min_workers: elastic training: continue with at least this number of workers when nodes
            leave, and with up to ``workers`` when they return. Null restarts with all
            ``workers`` and waits for their nodes.
        resize_interval_s: seconds between two checks of an elastic run for room for more workers.
        threads_per_worker: compute threads of a worker, and threads (up to eight) that build its
            batches; 0 takes the reserved CPUs if they are more than one, else the worker's share
            of the cores of its node. In the command's process 0 takes torch's number.
        dataloader_num_workers: processes of a worker that load batches; 0 loads them in a thread.
        use_gpu: give each worker a GPU, and reserve its share of the node's CPUs, at most 8.
        placement_strategy: ``pack`` places workers on one node if they fit, ``spread`` on
            different nodes if possible, ``strict_spread`` always on different nodes.
        precision: ``auto`` is bf16 autocast if the device multiplies bf16 natively, else fp32;
            fp64 is for tests.
        micro_batch_size: rows that a worker computes at a time. A larger batch passes in parts,
            whose gradients add up; a contrastive loss still compares all rows. Balancing losses of
            experts are those of the parts. Null computes all rows at once.
        kept_tokens: tokens, counted in each encoder layer, whose tensors a worker keeps for the
            backward pass. Beyond them a layer keeps its input only and is computed again: with 0 a
            third more operations, and far less memory. Null keeps all.
        compile: compile layers with ``torch.compile`` before the first step; for GPUs. Where that
            fails, the run says why and continues without.
            Results differ in rounding.
        profile_start: first of five steps that ``torch.profiler`` records; its traces are in
            ``profiles`` of the run's folder. Null records none.
        sharding: place of the weights, with their optimizer state and average. ``none`` keeps all
            on each worker. ``host`` keeps those in the host's memory that neither the current nor
            the next step uses. ``full`` divides weights, state and gradients among all workers
            (FSDP), ``hybrid`` among the workers of a node, with a replica on each node (HSDP); a
            step then gathers only the weights that its task uses.
        checkpoint_every: steps between checkpoints; 0 writes one only at the end.
        keep_checkpoints: newest checkpoints that stay on disk.
        evaluate_every: steps between validations, the last step included; 0 for none.
        patience: validations without a better score after which training ends; the final model
            then has the weights of the best one, also if training reaches the last step. Null
            trains all steps, and takes the last weights.
        log_every: steps between logged metrics.
        max_failures: restarts after a worker of Ray dies. A command that trains in its own process
            is run again instead.
        collective_timeout_s: seconds that a worker waits for the others in a collective operation.
            Then it counts as dead, as do all workers, and they restart. It must be longer than
            anything that only one worker does, such as an upload or the intervals of an evaluation.
        trainable: files of the model to train (skill-NAME, head-TASK, stem-NAME, shared); all
            others stay bitwise unchanged. Empty trains all that a task activates.
        augment: random changes of training rows: ``none``, ``light`` for small images and few
            tokens, ``default``, or ``strong``, which hides every fifth token of a text.
        masking: masks of masked tasks: ``default``, ``short_sound`` for recordings of half a
            second, or ``small``, also for videos of few positions per frame.
        shuffle_gb: largest size of a task's shards, in GB, that are shuffled as a unit; a larger
            task is shuffled in windows of this size, drawn again each epoch. It determines the
            order of rows.
        shard_groups: groups of shards from which each batch takes equal parts; a rank then reads
            the shards of its groups only. Choose a multiple of the largest number of workers; it
            determines the order of rows. Null lets each rank read all shards.
        callbacks: names of entry points ``skillnet.callbacks`` that the training loop calls.
    """

    steps: PositiveCount = 2000
    tasks_per_step: Annotated[int, Interval(ge=1, le=10_000)] = fixed_field(1)
    lr: LearningRate = 1e-3
    warmup_fraction: UnitFraction = 0.05
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    weight_decay: Annotated[float, Interval(ge=0, le=10)] = 0.05
    max_grad_norm: NonNegativeAmount = 1.0
    temperature: PositiveAmount = 2.0
    ema: PartialFraction = 0.0
    workers: WorkerCount = 1
    min_workers: WorkerCount | None = None
    resize_interval_s: PositiveAmount = fixed_field(60.0)
    threads_per_worker: ProcessCount = 0
    dataloader_num_workers: ProcessCount = 0
    use_gpu: bool = False
    placement_strategy: Literal["pack", "spread", "strict_spread"] = "pack"
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    micro_batch_size: PositiveCount | None = None
    kept_tokens: Annotated[int, Interval(ge=0, le=10**12)] | None = None
    compile: bool = False
    profile_start: NonNegativeCount | None = None
    sharding: Literal["none", "host", "full", "hybrid"] = "none"
    checkpoint_every: NonNegativeCount = 500
    keep_checkpoints: PositiveCount = 2
    evaluate_every: NonNegativeCount = 0
    patience: PositiveCount | None = None
    log_every: PositiveCount = 20
    max_failures: NonNegativeCount = 1
    collective_timeout_s: PositiveAmount = fixed_field(1800.0)
    trainable: list[str] = field(default_factory=list)
    augment: AugmentationName = "default"
    masking: MaskingName = "default"
    shuffle_gb: PositiveAmount = fixed_field(4.0)
    shard_groups: Annotated[int, Interval(ge=1, le=100_000)] | None = fixed_field(None)
    callbacks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_bounds(self, "training.")
        if self.patience is not None and not self.evaluate_every:
            raise ValueError(
                "training.patience counts validations, and training.evaluate_every is 0; set the "
                "steps between two validations"
            )
        if self.patience is not None and self.sharding in ("full", "hybrid"):
            raise ValueError(
                f"training.patience keeps whole weights, and training.sharding {self.sharding} "
                "divides them; remove one of them"
            )
        if self.tasks_per_step > 1 and self.sharding != "none":
            raise ValueError(
                f"training.tasks_per_step {self.tasks_per_step} places weights by task, and "
                f"training.sharding {self.sharding} places them too; remove one of them"
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"training.min_workers must be between 1 and training.workers ({self.workers}), "
                f"got {self.min_workers}; remove it to train with all workers or none"
            )


def default_tasks_training() -> dict[str, TaskTraining]:
    """Return the tasks of the five built-in corpora, with weights tuned for a short CPU run."""
    return {
        "text_classification": TaskTraining("headings", weight=0.15, batch_size=128),
        "speech_recognition": TaskTraining("syllables", weight=0.2, batch_size=48),
        "text_to_image": TaskTraining("drawings", weight=0.25, batch_size=96),
        "text_to_video": TaskTraining("strokes", weight=0.25, batch_size=96),
        "text_to_code": TaskTraining("functions", weight=0.15, batch_size=96, max_length=128),
    }


@dataclass
class FinetuneConfig:
    """Configuration of a joint training run.

    Args:
        name: name of the run and of its directory. The name of an unfinished run resumes it from
            the newest valid checkpoint; null generates a name.
        run_dir: directory of runs, or a URI to which they are mirrored; null takes the run root.
        seed: seed of weights, order, augmentation and dropout.
        data: directory or URI of prepared corpora; null takes ``corpora`` in the run root.
        init_from: trained model to start from: the name or folder of a run, a checkpoint, a saved
            model or a registered version of the same system, or of the dense one, or a checkpoint
            of transformers or timm (a folder, or ``owner/name`` of the Hugging Face hub). From the
            last two, every skill is a copy. Null starts from random weights.
        system: system to train: ``skillnet``, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model.
        tasks: task name -> its corpus, weight and batch size. If the configuration gives a task a
            corpus, only tasks with a given corpus are trained; otherwise all default tasks are.
        corpora: corpus -> digest that its manifest must have; null or a missing corpus takes the
            digest of the corpus that is found. A run resumes only on equal corpora.
        training: optimizer, workers and intervals.
        tracking: MLflow server, experiment and registration.
        storage: mirror of the run in an object store.
        fold: fold of the corpora by held-out units, in place of their own splits.
        evaluate: evaluate the final model on the test splits.
    """

    name: str | None = None
    run_dir: str | None = None
    seed: RandomSeed = 0
    data: str | None = None
    init_from: str | None = aliased_field(None, "from")
    system: str = "skillnet"
    options: dict[str, Any] = field(default_factory=dict)
    model: SkillNetConfig = field(default_factory=SkillNetConfig)
    tasks: dict[str, TaskTraining] = choices_field(default_tasks_training, "corpus")
    corpora: dict[str, str | None] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    fold: FoldConfig = field(default_factory=FoldConfig)
    evaluate: bool = True

    def joint(self) -> "FinetuneConfig":
        """Return the joint training run with the reference tasks of a baseline.

        The run trains all of its tasks jointly. A pretraining returns its run.
        """
        # SkillNet is the reference of the others, so it has none.
        if self.system == "skillnet" or self.model.reference_tasks:
            return self
        plans = known_tasks() | self.model.tasks
        compared = self.trained.keys() & self.measured.keys() or self.trained.keys()
        found = {name: plans[name] for name in self.tasks if name in compared and name in plans}
        return replace(self, model=replace(self.model, reference_tasks=found))

    @property
    def trained(self) -> dict[str, TaskTraining]:
        """The tasks that take steps: all but the eval_only ones."""
        return {name: task for name, task in self.tasks.items() if not task.eval_only}

    @property
    def measured(self) -> dict[str, TaskTraining]:
        """The tasks that are evaluated: all but the auxiliary ones."""
        return {name: task for name, task in self.tasks.items() if not task.auxiliary}


def default_masked_training() -> dict[str, TaskTraining]:
    """Return the masked tasks on the pretraining splits of the built-in corpora."""
    return {
        "masked_text": TaskTraining("headings", 0.3, 128, "pretraining", max_length=32),
        "masked_sound": TaskTraining("syllables", 0.15, 48, "pretraining"),
        "masked_image": TaskTraining("drawings", 0.2, 96, "pretraining"),
        "masked_video": TaskTraining("strokes", 0.2, 64, "pretraining"),
        "masked_code": TaskTraining("functions", 0.15, 64, "pretraining", max_length=96),
    }


def default_contrastive_training() -> dict[str, TaskTraining]:
    """Return tasks on pairs of the corpora: captions with objects, words with definitions."""
    return {
        "text_to_definition": TaskTraining(
            "headings", 0.3, 128, "pretrain", max_length=24, auxiliary=True
        ),
        "text_to_image": TaskTraining("drawings", 0.2, 96, first_caption_prob=0.5),
        "text_to_video": TaskTraining("strokes", 0.2, 64),
        "text_to_code": TaskTraining("functions", 0.15, 64, max_length=96),
    }


def default_views_training() -> dict[str, TaskTraining]:
    """Return tasks on two views of a row, on the pretraining splits of the built-in corpora."""
    more: dict[str, Any] = {"split": "pretraining", "auxiliary": True, "views": True}
    return {
        "views_image": TaskTraining("drawings", 0.2, 96, **more),
        "views_video": TaskTraining("strokes", 0.2, 64, **more),
        "views_code": TaskTraining("functions", 0.15, 64, max_length=96, **more),
    }


@dataclass
class PretrainConfig(FinetuneConfig):
    """Configuration of a self-supervised pretraining on unlabelled rows.

    Args:
        name: name of the run and of its directory. The name of an unfinished run resumes it from
            the newest valid checkpoint; null generates a name.
        run_dir: directory of runs, or a URI to which they are mirrored; null takes the run root.
        seed: seed of weights, order, augmentation, masks and dropout.
        data: directory or URI of prepared corpora; null takes ``corpora`` in the run root.
        init_from: trained model to start from: the name or folder of a run, a checkpoint, a saved
            model or a registered version of the same system, or of the dense one, or a checkpoint
            of transformers or timm (a folder, or ``owner/name`` of the Hugging Face hub). From the
            last two, every skill is a copy. Null starts from random weights.
        system: system to train: ``skillnet``, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model; of its tasks, only those in ``tasks`` are used.
        tasks: task name -> its corpus, weight and batch size. If the configuration gives a task a
            corpus, only tasks with a given corpus are trained; otherwise all default tasks are.
        corpora: corpus -> digest that its manifest must have; null or a missing corpus takes the
            digest of the corpus that is found. A run resumes only on equal corpora.
        training: optimizer, workers, intervals and masks.
        tracking: MLflow server and experiment; the model is not registered by default.
        storage: mirror of the run in an object store.
        fold: fold of the corpora by held-out units, in place of their own splits.
        evaluate: evaluate the final model on the validation splits.
        contrastive: also train on pairs: captions with images, videos and functions of the
            training splits, and words with their definitions.
        views: also train on two augmented views of each image, video and function, with the plans
            of the retrieval tasks.
    """

    model: SkillNetConfig = field(default_factory=lambda: SkillNetConfig(tasks=pretraining_tasks()))
    tasks: dict[str, TaskTraining] = choices_field(default_masked_training, "corpus")
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment=PRETRAINING_EXPERIMENT, register=False)
    )
    contrastive: bool = False
    views: bool = False

    def joint(self) -> FinetuneConfig:
        """Return the joint training run: its tasks, and a model of only these."""
        more = (default_contrastive_training() if self.contrastive else {}) | (
            default_views_training() if self.views else {}
        )
        tasks = more | self.tasks
        # A model with heads of all known tasks would have parameters that no step trains.
        known = {name: task for name, task in self.model.tasks.items() if name in tasks}
        reference = self.model.reference_tasks
        if self.system != "skillnet" and not reference:
            # Fine-tuning builds the same size, although it trains other tasks.
            plans = self.model.tasks
            reference = {n: plans[n] for n in plans if not pretrained_modalities(n, plans[n])}
        model = replace(self.model, tasks=known, reference_tasks=reference)
        values = {f.name: getattr(self, f.name) for f in fields(FinetuneConfig)}
        return FinetuneConfig(**(values | {"model": model, "tasks": tasks}))

"""Skills, plans and tasks: each tower of each task activates a set of skills.

This module is pure Python without torch. docs/skills.md gives the source of each default.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from skillnet.bounds import OptionalSize, check_bounds, nearest_hint
from skillnet.modality import CAPTION_MODALITY, find_modality, modality_names
from skillnet.objectives.base import BUILT_IN_OBJECTIVES, PAIR, find_objective, objective_names

DEFAULT_SKILLS: tuple[str, ...] = (
    "general",
    "text",
    "image",
    "sound",
    "video",
    "code",
    "alignment",
)


@dataclass(frozen=True)
class SkillPlan:
    """Set of skills that one tower activates, and the modality that it reads.

    Args:
        skills: names of the active skills. They are kept sorted, so that equal sets are equal plans
            and merged weights are cached once per set.
        modality: input of the tower; it selects the stem.

    Raises:
        ValueError: no skill, a repeated skill, or an unknown modality.
    """

    skills: tuple[str, ...]
    modality: str = CAPTION_MODALITY

    def __post_init__(self) -> None:
        if isinstance(self.skills, str):
            raise ValueError(f"skills is a list of names, not the single name {self.skills!r}")
        # Sorted once here: the order of the sum, and so its rounding, is the same everywhere.
        names = tuple(sorted(set(self.skills)))
        if not names:
            raise ValueError("a plan activates at least one skill; add 'general'")
        if len(names) != len(tuple(self.skills)):
            raise ValueError(f"a skill is named twice in {list(self.skills)}")
        if self.modality not in modality_names():
            find_modality(self.modality)  # raises the error; others load with their first use
        # The dataclass is frozen because plans are keys of the cache of merged weights.
        object.__setattr__(self, "skills", names)

    @property
    def stem(self) -> str:
        """Name of the stem that turns the input of this tower into tokens."""
        return find_modality(self.modality).stem


@dataclass(frozen=True)
class Task:
    """Objective and towers of a task.

    Classification, CTC and masked modelling have one tower, ``input``. Retrieval has two,
    ``query`` and ``candidate``, each with its own plan.

    Args:
        objective: determines the head and the loss.
        towers: tower name -> plan.
        outputs: number of classes (classification) or of symbols without the blank (CTC); 0 takes
            the number in the manifest of the task's corpus. Retrieval and masked modelling ignore
            it.
        linear_path: add a linear map from the input of each tower to the retrieval space
            (:mod:`skillnet.objectives.retrieval`); for retrieval between text, code and images.

    Raises:
        ValueError: an unknown objective, or towers or a linear path that do not fit it.
    """

    objective: str
    towers: dict[str, SkillPlan] = field(default_factory=dict)
    outputs: OptionalSize = 0
    linear_path: bool = False

    def __post_init__(self) -> None:
        if self.objective not in BUILT_IN_OBJECTIVES:
            known = objective_names()
            if self.objective not in known:
                hint = nearest_hint(self.objective, known)
                raise ValueError(f"unknown objective {self.objective!r}{hint}")
        expected = set(find_objective(self.objective).towers)
        if set(self.towers) != expected:
            raise ValueError(
                f"a {self.objective} task has the towers {sorted(expected)}, "
                f"not {sorted(self.towers)}"
            )
        if not isinstance(self.linear_path, bool):
            raise ValueError(f"linear_path is true or false, not {self.linear_path!r}")
        if self.linear_path:
            self._check_linear_path()
        check_bounds(self, "")

    def _check_linear_path(self) -> None:
        if not find_objective(self.objective).pairs_towers:
            raise ValueError(
                f"linear_path is for retrieval; set it to false for a {self.objective} task"
            )
        for name, plan in self.towers.items():
            if not find_modality(plan.modality).has_linear_path:
                raise ValueError(
                    f"linear_path reads text, code and images, and the tower {name} reads "
                    f"{plan.modality}; set linear_path to false"
                )

    @property
    def skills(self) -> tuple[str, ...]:
        """All skills that at least one tower activates, sorted."""
        return tuple(sorted({name for plan in self.towers.values() for name in plan.skills}))

    @property
    def caption_tower(self) -> str | None:
        """Tower of a retrieval task that reads the captions of rows; None if none reads text.

        The other tower reads the rows themselves. If both read text, the query reads captions.
        """
        towers = PAIR if find_objective(self.objective).pairs_towers else ()
        return next(
            (each for each in towers if self.towers[each].modality == CAPTION_MODALITY), None
        )

    @property
    def paired_tower(self) -> str | None:
        """Tower that reads the second medium of rows in two media; None for other tasks."""
        media = {plan.modality for plan in self.towers.values()}
        is_pair = find_objective(self.objective).pairs_towers
        is_paired = is_pair and len(media) == 2 and CAPTION_MODALITY not in media
        return "query" if is_paired else None

    @property
    def has_row_pairs(self) -> bool:
        """Whether both towers read the rows of a corpus, so that rows of one group are pairs."""
        is_pair = find_objective(self.objective).pairs_towers
        return is_pair and self.caption_tower is None and self.paired_tower is None

    @property
    def row_tower(self) -> str:
        """Tower that reads the rows of the corpus, in their own modality."""
        if not find_objective(self.objective).pairs_towers:
            return next(iter(self.towers))
        return "query" if self.caption_tower == "candidate" else "candidate"

    @property
    def stems(self) -> tuple[str, ...]:
        """All stems that at least one tower reads, sorted."""
        return tuple(sorted({plan.stem for plan in self.towers.values()}))


def _retrieval(modality: str) -> Task:
    return Task(
        "retrieval",
        {
            # The query tower is the same for all modalities, so one text skill serves all of them.
            "query": SkillPlan(("general", "text", "alignment"), "text"),
            "candidate": SkillPlan(("general", modality, "alignment"), modality),
        },
    )


def default_tasks() -> dict[str, Task]:
    """Return the paper's five tasks with the default plans (docs/skills.md names each source)."""
    return {
        "text_classification": Task(
            "classification", {"input": SkillPlan(("general", "text"), "text")}, outputs=15
        ),
        "speech_recognition": Task(
            "ctc", {"input": SkillPlan(("general", "sound"), "sound")}, outputs=61
        ),
        "text_to_image": _retrieval("image"),
        "text_to_video": _retrieval("video"),
        "text_to_code": _retrieval("code"),
    }


def masked_tasks() -> dict[str, Task]:
    """Return the self-supervised tasks ``masked_<modality>``.

    Each activates ``general`` and the skill of its modality.
    """
    return {
        f"masked_{name}": Task("masked", {"input": SkillPlan(("general", name), name)})
        for name in modality_names()
    }


def name_task(modality: str, annotations: Collection[str]) -> str:
    """Return the name of the task that rows of a corpus are made for: a key of ``known_tasks``.

    Args:
        modality: medium of the rows.
        annotations: targets of the rows, from "labels", "label_sets", "values", "pairs",
            "captions", "transcripts". Transcripts and captions take precedence over the others.
    """
    if "transcripts" in annotations and (named := find_modality(modality).transcript_task):
        return named
    if modality != CAPTION_MODALITY and "captions" in annotations:
        return f"text_to_{modality}"
    if "pairs" in annotations:
        return f"{modality}_to_{modality}"
    if "values" in annotations:
        return f"{modality}_regression"
    if "label_sets" in annotations:
        return f"{modality}_multi_label"
    return f"{modality}_classification" if "labels" in annotations else f"masked_{modality}"


def known_tasks() -> dict[str, Task]:
    """Return all tasks with a name of their own, and their default plans.

    Manifests, ``skillnet inspect`` and configurations use these names. Only the paper's five tasks
    have numbers of outputs: a run takes them from its corpus.
    """
    labelled = {
        f"{name}_{objective}": Task(objective, {"input": SkillPlan(("general", name), name)})
        for objective in ("classification", "multi_label", "regression")
        for name in modality_names()
    }
    pairs = {
        f"text_to_{name}": _retrieval(name) for name in modality_names() if name != CAPTION_MODALITY
    }
    plans = {
        name: SkillPlan(("general", name, "alignment"), name)
        for name in modality_names()
        if name != CAPTION_MODALITY
    }
    media = {
        f"{query}_to_{candidate}": Task(
            "retrieval", {"query": plans[query], "candidate": plans[candidate]}
        )
        for query in plans
        for candidate in plans
    }
    return labelled | pairs | media | masked_tasks() | default_tasks()


def check_names(names: Sequence[str], where: str) -> None:
    """Check that names can be parts of file names and of attributes, and differ.

    Valid names have letters, digits and underscores, no digit first, at most 64 characters, and
    differ also where a file system ignores case.

    Args:
        names: names of skills or tasks.
        where: configuration key for the message.

    Raises:
        ValueError: an invalid or repeated name.
    """
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name[0] == "_" or len(name) > 64:
            raise ValueError(
                f"{where}: {name!r} is not a name; use letters, digits and underscores, a "
                "letter first, at most 64"
            )
        if name == "shared":
            raise ValueError(f"{where}: 'shared' means the weights of all tasks; choose another")
    # Skills become file names, and some file systems ignore case.
    counts = Counter(name.casefold() for name in names)
    for name in names:
        if counts[name.casefold()] > 1:
            raise ValueError(f"{where}: {name!r} occurs twice (upper and lower case are the same)")


def check_plan(plan: SkillPlan, skills: Sequence[str], where: str = "plan") -> None:
    """Check that a plan names only existing skills.

    Args:
        plan: skills that are active, and the modality.
        skills: names of all skills of the model.
        where: configuration key for the message.

    Raises:
        ValueError: an unknown skill, with the nearest valid name.
    """
    known = set(skills)
    for name in plan.skills:
        if name not in known:
            raise ValueError(f"{where}: unknown skill {name!r}{nearest_hint(name, skills)}")


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """Return the task of a name.

    Args:
        name: key of the task in ``model.tasks``.
        tasks: name -> task.

    Raises:
        ValueError: an unknown task, with the nearest valid name.
    """
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}{nearest_hint(name, list(tasks))}")
    return tasks[name]


def require_outputs(name: str, task: Task) -> None:
    """Check that a task whose outputs have names knows their number.

    Args:
        name: key of the task in ``model.tasks``.
        task: its objective and outputs.

    Raises:
        ValueError: the number is 0.
    """
    listed = find_objective(task.objective).listed
    if listed and not task.outputs:
        raise ValueError(
            f"model.tasks.{name}.outputs is 0: a {task.objective} task needs the number of its "
            f"{listed}. The manifest of its corpus provides it, if the corpus has {listed}; "
            "otherwise set it"
        )


#: Pairs of a text and code that need no label, as a comment and the lines below it.
CODE_PAIRS = "pairs_code"


def pretraining_tasks() -> dict[str, Task]:
    """Return masked tasks, the paper's five, pairs within a modality, and pairs of text and code.

    Pairs within a modality are two views of an image, a video or a function, or a word and its
    definition.
    """
    pairs = {f"views_{modality}": _pair_within(modality) for modality in modality_names()}
    pairs["text_to_definition"] = _pair_within("text")
    pairs[CODE_PAIRS] = default_tasks()["text_to_code"]
    return masked_tasks() | default_tasks() | pairs


def _pair_within(modality: str) -> Task:
    plan = SkillPlan(("general", modality, "alignment"), modality)
    return Task("retrieval", {"query": plan, "candidate": plan})


def pretrained_modalities(name: str, task: Task) -> frozenset[str]:
    """Return the modalities that a self-supervised task trains; none for other tasks.

    Masked modelling, pairs within one modality and ``pairs_code`` are self-supervised.

    Args:
        name: key of the task in ``model.tasks``.
        task: its objective and towers.
    """
    modalities = frozenset(plan.modality for plan in task.towers.values())
    can_pretrain = find_objective(task.objective).can_pretrain
    if name == CODE_PAIRS or (can_pretrain and len(modalities) == 1):
        return modalities
    return frozenset()

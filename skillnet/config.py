"""Model configuration: sizes of the layers and inputs, skills and tasks."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from annotated_types import Interval

from skillnet.bounds import (
    MAX_LAYERS,
    DropProbability,
    LayerSize,
    OptionalSize,
    check_bounds,
    nearest_hint,
)
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.skills import DEFAULT_SKILLS, Task, check_names, check_plan, default_tasks

#: Skill to which low-rank skills are differences.
BASE_SKILL = "general"

#: Most sources of a low-rank skill, each a difference to the next one.
MAX_SOURCES = 16

#: Names that a model has, which models of equal shape may differ in.
NAME_SETTINGS = ("skills", "low_rank_skills", "tasks", "reference_tasks")

#: Settings of the initial weights alone. Models that differ in them have equal shapes.
INITIAL_SETTINGS = ("init_scale",)

#: Mark of a field that is stored with a model and is no option of a command.
_NO_OPTION = {"skillnet_fixed": True}


@dataclass(frozen=True)
class LowRankSkill:
    """Form of a skill whose matrices are W = W_source + A B.

    Args:
        source: skill that it is a difference to.
        rank: columns of A.
    """

    source: str
    rank: LayerSize

    def __post_init__(self) -> None:
        check_bounds(self, "")


@dataclass
class SkillNetConfig:
    """Sizes of a SkillNet, its skills and its tasks. Units are tokens, pixels or frames.

    Args:
        skills: names of all skills; each has its own weights in every skill module.
        dim: model width D.
        num_layers: number of encoder layers.
        num_heads: attention heads; must divide ``dim``.
        ffn_dim: feed-forward width F of one skill.
        skill_modules: modules with skills: attention projections (source: SkillNet-X), the
            feed-forward layer (source: the SkillNet-NLG code), or both.
        skill_every: every n-th layer has skill modules; the other layers are shared.
        skill_rank: rank of the difference of a skill to the skill ``general``, for all skills but
            ``general`` (source: LoRA); 0 gives each skill whole matrices.
        low_rank_skills: skill -> the form that it has in place of that of ``skill_rank``; a growth
            fills it in.
        bias: add a bias to every projection of the layers; per skill, like its weight.
        norm_position: ``pre`` normalizes the input of each branch of a layer, and the output of the
            encoder; ``post`` normalizes the sum after each branch (BERT).
        norm_eps: added to the variance by all norms.
        stem_norm: normalize the tokens of a stem.
        class_token: put a learned token before the patches of an image (ViT).
        drop_path: probability of dropping a residual branch of a row (stochastic depth).
        init_scale: factor of the standard deviation of the initial matrices of the layers; those of
            a library's specialist too.
        vocab_size: tokens of the vocabulary of text and code, including padding (id 0).
        max_tokens: longest sequence of text or code.
        bigram_buckets: rows of the hashed table of token bigrams in the token stem (the idea of
            fastText's n-gram features); 0 disables it.
        n_mels: log-mel bins per frame.
        mel_stack: consecutive frames per token of sound.
        max_frames: longest sound, in frames before stacking.
        sound_units: number of frame clusters that masked sound predicts (HuBERT, Hsu et al.
            2021); 0 regresses the frames.
        image_size: pixels per side of an image.
        patch_size: pixels per side of a patch.
        video_frames: frames of a video.
        video_size: pixels per side of a frame.
        tubelet: (frames, height, width) of one video token.
        video_motion: add the difference to the previous frame as further channels.
        inputs: modality of another package -> its sizes.
        embedding_dim: width of the retrieval space.
        tasks: name -> task (objective, plans of its towers, outputs).
        reference_tasks: tasks over whose mean the sizes of a baseline are matched, with the skills
            of the study's SkillNet. A run fills them in with the tasks that it trains and
            evaluates, a pretraining with those that fine-tuning can train. A model with one task
            of a joint run thereby keeps the size of the joint run.

    Raises:
        ValueError: a value outside its range, sizes that do not divide, or an unknown skill.
    """

    skills: tuple[str, ...] = DEFAULT_SKILLS
    dim: LayerSize = 192
    num_layers: Annotated[int, Interval(ge=1, le=MAX_LAYERS)] = 4
    num_heads: LayerSize = 4
    ffn_dim: LayerSize = 384
    skill_modules: Literal["both", "attention", "feedforward"] = "both"
    skill_every: LayerSize = 1
    skill_rank: OptionalSize = 0
    low_rank_skills: dict[str, LowRankSkill] = field(default_factory=dict, metadata=_NO_OPTION)
    bias: bool = False
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: Annotated[float, Interval(gt=0, le=0.1)] = 1e-5
    stem_norm: bool = True
    class_token: bool = False
    drop_path: DropProbability = 0.1
    init_scale: Annotated[float, Interval(gt=0, le=100)] = 1.0
    vocab_size: LayerSize = 12000
    max_tokens: LayerSize = 192
    bigram_buckets: OptionalSize = 0
    n_mels: LayerSize = field(default=80, metadata=_NO_OPTION)
    mel_stack: LayerSize = 4
    max_frames: LayerSize = 192
    sound_units: OptionalSize = 0
    image_size: LayerSize = 48
    patch_size: LayerSize = 8
    video_frames: LayerSize = 8
    video_size: LayerSize = 32
    tubelet: tuple[LayerSize, LayerSize, LayerSize] = (2, 8, 8)
    video_motion: bool = field(default=True, metadata=_NO_OPTION)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=_NO_OPTION)
    embedding_dim: LayerSize = 192
    tasks: dict[str, Task] = field(default_factory=default_tasks)
    reference_tasks: dict[str, Task] = field(default_factory=dict, metadata=_NO_OPTION)

    def __post_init__(self) -> None:
        self.skills = tuple(self.skills)
        if len(self.tubelet) != 3 or min(self.tubelet) < 1:
            raise ValueError(
                f"model.tubelet is (frames, height, width), each at least 1, got {self.tubelet}"
            )
        self.tubelet = (self.tubelet[0], self.tubelet[1], self.tubelet[2])
        if not self.skills:
            raise ValueError("model.skills is empty; a model needs at least one skill")
        check_names(self.skills, "model.skills")
        check_names(tuple(self.tasks), "model.tasks")
        # Their skills are not checked: a baseline has other skills than the SkillNet it is matched
        # with, and keeps the reference tasks of that SkillNet.
        check_names(tuple(self.reference_tasks), "model.reference_tasks")
        check_bounds(self, "model.")
        if self.skill_rank and BASE_SKILL not in self.skills:
            raise ValueError(
                "model.skill_rank: skills are differences to the skill general, and model.skills "
                "has none; add it, or set skill_rank to 0"
            )
        self._check_rank("model.skill_rank", self.skill_rank)
        for name, form in self.low_rank_skills.items():
            key = f"model.low_rank_skills.{name}"
            for skill in (name, form.source):
                if skill not in self.skills:
                    raise ValueError(f"{key}: unknown skill {skill!r}; add it to model.skills")
            self._check_rank(f"{key}.rank", form.rank)
            self.find_sources([name])
        if self.dim % self.num_heads:
            raise ValueError(
                f"model.dim {self.dim} must divide by model.num_heads {self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} must divide by model.patch_size "
                f"{self.patch_size}"
            )
        frames, height, width = self.tubelet
        if self.video_frames % frames or self.video_size % height or self.video_size % width:
            raise ValueError(
                f"model.tubelet {self.tubelet} must divide model.video_frames "
                f"{self.video_frames} and model.video_size {self.video_size}"
            )
        for name, given in self.inputs.items():
            find_modality(name).build_options(given)
        for name, task in self.tasks.items():
            for tower, plan in task.towers.items():
                check_plan(plan, self.skills, f"model.tasks.{name}.towers.{tower}")
                if not self.class_token or not find_objective(task.objective).hides_inputs:
                    continue
                if find_modality(plan.modality).has_class_token:
                    raise ValueError(
                        f"model.class_token: {name} predicts the patches of an image, and the "
                        "class token is none; set it to false"
                    )

    def _check_rank(self, key: str, rank: int) -> None:
        if rank and rank >= min(self.dim, self.ffn_dim):
            raise ValueError(
                f"{key} {rank} is no low rank; it is less than model.dim {self.dim} and "
                f"model.ffn_dim {self.ffn_dim}"
            )

    def find_form(self, skill: str) -> LowRankSkill | None:
        """Return the form of a low-rank skill; None for one with whole matrices.

        Args:
            skill: name of the skill.
        """
        if skill in self.low_rank_skills:
            return self.low_rank_skills[skill]
        if not self.skill_rank or skill == BASE_SKILL:
            return None
        return LowRankSkill(BASE_SKILL, self.skill_rank)

    @property
    def skill_forms(self) -> dict[str, LowRankSkill]:
        """Low-rank skill -> its form."""
        found = {name: self.find_form(name) for name in self.skills}
        return {name: form for name, form in found.items() if form is not None}

    def find_sources(self, skills: Iterable[str]) -> tuple[str, ...]:
        """Return skills and those whose weights they read: the sources of low-rank skills.

        Args:
            skills: names of skills.

        Raises:
            ValueError: a skill is a difference to itself, or to too many others.
        """
        found: dict[str, None] = {}
        for skill in skills:
            chain = [skill]
            while (form := self.find_form(chain[-1])) is not None:
                if form.source in chain or len(chain) > MAX_SOURCES:
                    raise ValueError(
                        f"model.low_rank_skills: {skill} is a difference to itself, or to more "
                        f"than {MAX_SOURCES} skills; name a source that has whole matrices"
                    )
                chain.append(form.source)
            found |= dict.fromkeys(chain)
        return tuple(found)

    def with_skill(self, name: str, init_from: str | None = None, rank: int = 0) -> Self:
        """Return the configuration with one more skill.

        Args:
            name: key of the new skill.
            init_from: skill that it starts from.
            rank: columns of A in a difference to ``init_from``; 0 gives it the form of the others.

        Raises:
            ValueError: the name or the rank is invalid, or there is no skill to start from.
        """
        if init_from is not None and init_from not in self.skills:
            hint = nearest_hint(init_from, self.skills)
            raise ValueError(f"init_from: unknown skill {init_from!r}{hint}")
        forms = dict(self.low_rank_skills)
        if rank:
            if init_from is None:
                raise ValueError(
                    f"skill.rank: {name} is a difference to another skill; name it: skill.init_from"
                )
            forms[name] = LowRankSkill(init_from, rank)
        return replace(self, skills=(*self.skills, name), low_rank_skills=forms)

    def without(self, skills: Collection[str], tasks: Collection[str] = ()) -> Self:
        """Return the configuration without some skills and tasks.

        Args:
            skills: names of skills.
            tasks: names of tasks.

        Raises:
            ValueError: a task or a skill that stays needs one of the skills.
        """
        specs = {name: task for name, task in self.tasks.items() if name not in tasks}
        forms = {name: form for name, form in self.low_rank_skills.items() if name not in skills}
        for skill in skills:
            users = [name for name, task in specs.items() if skill in task.skills]
            users += [name for name, form in forms.items() if form.source == skill]
            if users:
                raise ValueError(
                    f"the skill {skill} is needed by {', '.join(users)}; remove that first"
                )
        kept = tuple(name for name in self.skills if name not in skills)
        return replace(self, skills=kept, low_rank_skills=forms, tasks=specs)

    def restrict_to(self, skills: Collection[str], tasks: dict[str, Task]) -> Self:
        """Return the configuration with some skills, their sources, and other tasks.

        Args:
            skills: names of skills.
            tasks: name -> task.
        """
        wanted = self.find_sources(skills)
        # The order of the configuration decides the order of initialization.
        kept = tuple(name for name in self.skills if name in wanted)
        forms = {name: form for name, form in self.low_rank_skills.items() if name in wanted}
        return replace(self, skills=kept, low_rank_skills=forms, tasks=tasks)

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

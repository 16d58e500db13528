"""Model configuration: sizes of the layers and inputs, skills and tasks."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from skillnet.bounds import MAX_LAYERS, DropProbability, LayerSize, OptionalSize, check_bounds
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.skills import DEFAULT_SKILLS, Task, check_names, check_plan, default_tasks

#: Skill to which low-rank skills are differences.
BASE_SKILL = "general"

#: Settings of the initial weights alone. Models that differ in them have equal shapes.
INITIAL_SETTINGS = ("init_scale",)

#: Mark of a field that is stored with a model and is no option of a command.
_NO_OPTION = {"skillnet_fixed": True}


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
        if self.skill_modules not in ("both", "attention", "feedforward"):
            raise ValueError(
                f"model.skill_modules is both, attention or feedforward, not {self.skill_modules!r}"
            )
        if self.skill_rank and BASE_SKILL not in self.skills:
            raise ValueError(
                "model.skill_rank: skills are differences to the skill general, and model.skills "
                "has none; add it, or set skill_rank to 0"
            )
        if self.skill_rank >= min(self.dim, self.ffn_dim) and self.skill_rank:
            raise ValueError(
                f"model.skill_rank {self.skill_rank} is no low rank; it is less than model.dim "
                f"{self.dim} and model.ffn_dim {self.ffn_dim}"
            )
        if self.norm_position not in ("pre", "post"):
            raise ValueError(f"model.norm_position is pre or post, not {self.norm_position!r}")
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

    @property
    def base_skills(self) -> tuple[str, ...]:
        """Skills whose weights every task reads, also one that does not activate them."""
        return (BASE_SKILL,) if self.skill_rank else ()

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

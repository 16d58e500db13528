"""SkillNet: stems, encoder and heads, and which file each of its parameters belongs to.

Shapes: B batch, T tokens, D model width, E width of the retrieval space.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder
from skillnet.heads import HEADS, RetrievalHead
from skillnet.layers import check_free
from skillnet.skills import SkillPlan, find_task
from skillnet.stems import STEMS, Batch, LogMelStem, token_lengths

Outputs = dict[str, Tensor]


class SkillNet(nn.Module):
    """One sparsely activated encoder for all tasks of its configuration.

    Only the stems that some task reads through are built, so a model of one task is as small
    as what that task activates.
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.config = config
        needed = {plan.stem for task in config.tasks.values() for plan in task.towers.values()}
        self.stems = nn.ModuleDict({n: make(config) for n, make in STEMS.items() if n in needed})
        self.encoder = Encoder(config)
        self.heads = nn.ModuleDict()
        for name, task in config.tasks.items():
            check_free(self.heads, name, "task")
            self.heads[name] = HEADS[task.objective](config, task)

    # -- running ---------------------------------------------------------------------------

    def tokens(self, batch: Batch, plan: SkillPlan) -> tuple[Tensor, Tensor | None]:
        """Encoded tokens (B, T, D) and their mask (B, T), None where every token is real."""
        if plan.stem not in self.stems:
            raise ValueError(
                f"this model has no {plan.stem!r} stem for {plan.modality}; it was built or "
                f"loaded for the tasks {', '.join(self.config.tasks)}"
            )
        x_BTD, mask_BT = self.stems[plan.stem](batch, plan.modality)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        return self.encoder(x_BTD, plan.skills, mask_BT), mask_BT

    def encode(self, batch: Batch, plan: SkillPlan) -> Tensor:
        """Mean of the encoded real tokens, (B, D).

        Args:
            batch: ``tokens`` (B, T) for text and code; ``log_mel`` (B, N, M) and ``frames``
                (B,) for sound; ``pixels`` (B, H, W, 3) for pictures; ``frames``
                (B, N, H, W, C) for clips.
            plan: the skills to activate and the modality to read.

        Raises:
            ValueError: a skill or a stem that this model lacks, or inputs of the wrong size.
        """
        return _mean(*self.tokens(batch, plan))

    def forward(self, task: str, towers: dict[str, Batch]) -> Outputs:
        """Run a task on the batches of its towers.

        Returns:
            classification: ``logits`` (B, C). ctc: ``log_probs`` (B, T, S + 1) and ``lengths``
            (B,). retrieval: ``query`` and ``candidate`` (B, E), unit length, and ``scale`` ().
        """
        spec = find_task(task, self.config.tasks)
        head = self.heads[task]
        if isinstance(head, RetrievalHead):
            return {
                "query": self.embed(task, "query", towers["query"]),
                "candidate": self.embed(task, "candidate", towers["candidate"]),
                "scale": head.scale,
            }
        plan, batch = spec.towers["input"], towers["input"]
        x_BTD, mask_BT = self.tokens(batch, plan)
        if spec.objective == "classification":
            return {"logits": head(_mean(x_BTD, mask_BT))}
        stem = self.stems[plan.stem]
        if isinstance(stem, LogMelStem):
            lengths_B = token_lengths(batch["frames"], stem.stack)
        elif mask_BT is not None:
            lengths_B = mask_BT.sum(1)
        else:
            lengths_B = torch.full((x_BTD.shape[0],), x_BTD.shape[1], device=x_BTD.device)
        return {"log_probs": head(x_BTD), "lengths": lengths_B}

    def embed(self, task: str, tower: str, batch: Batch) -> Tensor:
        """Unit vectors (B, E) of one tower of a retrieval task."""
        spec = find_task(task, self.config.tasks)
        if spec.objective != "retrieval":
            raise ValueError(f"{task} is a {spec.objective} task: it has no retrieval space")
        if tower not in spec.towers:
            raise ValueError(f"{task} has the towers query and candidate, not {tower!r}")
        return self.heads[task](self.encode(batch, spec.towers[tower]), tower)

    # -- ownership -------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """File of a parameter: ``shared``, ``skill-NAME``, ``stem-NAME`` or ``head-TASK``."""
        parts = name.split(".")
        if parts[0] == "stems":
            return f"stem-{parts[1]}"
        if parts[0] == "heads":
            return f"head-{parts[1]}"
        if parts[-2] == "weights" and parts[-1] in self.config.skills:
            return f"skill-{parts[-1]}"
        return "shared"

    def files_of(self, task: str | None = None) -> dict[str, list[str]]:
        """File -> names of its parameters; only what one task touches, if it is given."""
        wanted = None if task is None else _files_of_task(self.config, task)
        files: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            file = self.owner(name)
            if wanted is None or file in wanted:
                files.setdefault(file, []).append(name)
        return files

    def active_parameters(self, task: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and tensor of every parameter that the task touches, in forward order."""
        wanted = _files_of_task(self.config, task)
        for name, parameter in self.named_parameters():
            if self.owner(name) in wanted and not self._other_modality(name, task):
                yield name, parameter

    def _other_modality(self, name: str, task: str) -> bool:
        """True for the modality vectors of the token stem that the task does not read."""
        parts = name.split(".")
        towers = self.config.tasks[task].towers.values()
        return (
            parts[:1] == ["stems"]
            and parts[2] == "modality"
            and parts[3] not in {plan.modality for plan in towers}
        )

    # -- files -----------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write one safetensors file per skill, stem and head, a configuration and hashes."""
        from skillnet.files import save

        save(self, Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path, task: str | None = None) -> "SkillNet":
        """Read a saved model; with ``task`` only the files of what that task activates.

        Raises:
            ValueError: files that are missing, altered or do not fit; an unknown task.
        """
        from skillnet.files import load

        return load(Path(path), task)


def _files_of_task(config: SkillNetConfig, task: str) -> set[str]:
    spec = find_task(task, config.tasks)
    return {
        "shared",
        f"head-{task}",
        *(f"skill-{name}" for name in spec.skills),
        *(f"stem-{name}" for name in spec.stems),
    }


def _mean(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean over real tokens, (B, D). A row without a real token gives zeros."""
    if mask_BT is None:
        return x_BTD.mean(1)
    weights_BT1 = mask_BT[..., None].to(x_BTD.dtype)
    # No matrix product: autocast would round what is pooled to bf16.
    return (x_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)

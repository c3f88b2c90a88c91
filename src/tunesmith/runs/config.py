"""What decides a run: its settings, which of them must fit together, and warnings on poor ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from tunesmith.adapters.specs import DoRA, Full, LoRA, QALoRA
from tunesmith.auditing import AuditSpec
from tunesmith.data.formats import DataSpec
from tunesmith.engine.requests import MOST_ANSWER_TOKENS
from tunesmith.learning.objective import Objective
from tunesmith.learning.objectives.sft import SFT
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.model.loading import ModelSpec
from tunesmith.settings.config import Sensible, Spec, Texts, load
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import TemplateSpec

SKIPS_BEFORE_STOP = 3
"""Training stops after so many updates in a row whose loss or gradient is not finite."""
MOST_STEPS = 1_000_000
"""Updates of a run. At ten a second they take more than a day; more is a slip of the finger."""
ADHERENCE_PROMPTS = 16
"""Held-out prompts by which adherence is scored if no number is given."""
LOWER = frozenset(
    {"loss", "perplexity", "kl", "kl_error"}
    | {f"{prefix}_{side}" for prefix in ("reward", "logp") for side in ("undesirable", "rejected")}
)
"""Values of `LoopSpec.best` that are better the lower they are."""


class LoopSpec(Spec):
    """How long to train, and when to validate, save and sample."""

    epochs: Annotated[float, Field(gt=0), Sensible(le=MOST_STEPS)] = Field(
        default=1.0,
        description="passes over the training rows",
        json_schema_extra={
            "when": "more if the validation loss still falls at the end, fewer if it rises before"
        },
    )
    steps: Annotated[int | None, Field(ge=1), Sensible(le=MOST_STEPS)] = Field(
        default=None,
        description="optimizer updates; if given, epochs is ignored",
        json_schema_extra={"when": "for a short trial, or to compare runs of equal length"},
    )
    validate_every: int = Field(
        default=50,
        ge=0,
        description="updates between validations; 0: first and last only",
        json_schema_extra={
            "when": "more if validation takes long; fewer on few rows, to find the best checkpoint"
        },
    )
    save_every: int = Field(
        default=100,
        ge=0,
        description="updates between checkpoints; 0: the last only",
        json_schema_extra={"when": "more often if an interruption would cost much"},
    )
    keep_last: int = Field(
        default=3,
        ge=1,
        description="checkpoints kept beside the best",
        json_schema_extra={"when": "more to evaluate several checkpoints, fewer to save disk space"},
    )
    keep_best: bool | None = Field(
        default=None,
        description="save and keep the best checkpoint by validation; null: if rows are held out",
        json_schema_extra={"when": "false if the last checkpoint is what you want"},
    )
    best: str = Field(
        default="loss",
        description="what decides the best: loss, perplexity, adherence, or a metric of the objective "
        "(margin, …)",
        json_schema_extra={
            "when": "adherence or a metric of the objective if a lower loss does not give better answers"
        },
    )
    adherence_prompts: int | None = Field(
        default=None,
        ge=0,
        description=f"held-out prompts answered at each validation to score adherence to their references; "
        f"null: {ADHERENCE_PROMPTS} if best is adherence, else none",
        json_schema_extra={
            "when": "more for a steadier score; each costs one generated answer at every validation"
        },
    )
    early_stop: int | None = Field(
        default=None,
        ge=1,
        description="stop after so many validations without a new best",
        json_schema_extra={"when": "for long runs that may overfit"},
    )
    sample_every: int = Field(
        default=0,
        ge=0,
        description="updates between sample answers; 0: first and last only",
        json_schema_extra={"when": "to watch how answers change while it trains"},
    )
    samples: int = Field(
        default=3,
        ge=0,
        description="validation prompts answered as samples",
        json_schema_extra={"when": "more to see more answers; each takes time to generate"},
    )
    prompts: Texts = Field(
        default=(),
        description="prompts of your own, answered when samples are and at each checkpoint: texts, files "
        "(.txt: one a line; .jsonl: {prompt: …}), or assistant, five that ship with the package",
        json_schema_extra={
            "when": "to see at each checkpoint what the model says to prompts that are not in the data"
        },
    )
    sample_tokens: Annotated[int, Field(ge=1), Sensible(le=MOST_ANSWER_TOKENS)] = Field(
        default=128,
        description="longest sample answer, in tokens",
        json_schema_extra={"when": "to the length of your answers"},
    )
    instrument_every: int = Field(
        default=10,
        ge=0,
        description="updates between measurements of each weight's gradient and change; 0: never",
        json_schema_extra={"when": "1 for a close look at few updates, 0 if it costs too much time"},
    )
    activations: bool = Field(
        default=False,
        description="at validations, also measure the output of each layer",
        json_schema_extra={"when": "if you suspect that values overflow or layers die"},
    )
    checkpoint_gradients: bool = Field(
        default=False,
        description="recompute each layer in the backward pass: about half of the memory beside the weights, "
        "1.2 to 1.5 the time",
        json_schema_extra={"when": "first of all if memory runs out"},
    )
    cache_frozen: bool = Field(
        default=False,
        description="cache the frozen layers' hidden states on disk while training",
        json_schema_extra={"when": "with adapter.layers and several epochs, if the disk has room"},
    )
    compile: bool | None = Field(
        default=None,
        description="compile the step for the most frequent shapes; null: on a GPU, if rows are not packed",
        json_schema_extra={"when": "false to find an error; true to try it on a CPU"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="decides the split, the order of rows, the adapter and its dropout",
        json_schema_extra={"when": "to see how much of a result is chance"},
    )
    tensorboard: bool = Field(
        default=False,
        description="also write TensorBoard files (needs the tensorboard extra)",
        json_schema_extra={"when": "if you watch your runs there"},
    )

    @property
    def scored_prompts(self) -> int:
        """How many held-out prompts are answered at each validation."""
        if self.adherence_prompts is not None:
            return self.adherence_prompts
        return ADHERENCE_PROMPTS if self.best == "adherence" else 0


class RunConfig(Spec):
    """Everything that decides a run."""

    model: ModelSpec
    data: DataSpec
    audit: AuditSpec = Field(default_factory=lambda: AuditSpec.model_validate({}))
    template: TemplateSpec = Field(default_factory=lambda: TemplateSpec.model_validate({}))
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(Objective.member)] = Field(
        default_factory=SFT,
        description="what is minimised; each kind has settings of its own",
        json_schema_extra={"when": "kto if rows are labelled good and bad, dpo or orpo if they are pairs"},
    )
    adapter: LoRA | DoRA | QALoRA | Full = Field(
        default_factory=lambda: LoRA.model_validate({}),
        description="what is trained: matrices beside the weights, or the weights; each kind has settings",
        json_schema_extra={
            "when": "qalora for a base that stays in 4 bits, also after export; full if memory allows"
        },
    )
    batch: BatchSpec = Field(default_factory=BatchSpec)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    loop: LoopSpec = Field(default_factory=LoopSpec)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.data.valid in (0, ()):
            if self.loop.early_stop is not None:
                raise ValueError("loop.early_stop needs validation rows, and data.valid is 0")
            if self.loop.keep_best:
                raise ValueError("loop.keep_best needs validation rows, and data.valid is 0")
            if self.loop.best != "loss":
                raise ValueError("loop.best needs validation rows, and data.valid is 0")
        if self.loop.early_stop is not None and self.loop.validate_every == 0:
            raise ValueError("loop.early_stop needs loop.validate_every above 0")
        if self.loop.best not in (names := ("loss", "perplexity", "adherence", *self.objective.watched)):
            raise ValueError(f"loop.best is {self.loop.best}; {self.objective.kind} has {', '.join(names)}")
        if self.loop.best == "adherence" and self.loop.adherence_prompts == 0:
            raise ValueError("loop.best is adherence, and loop.adherence_prompts is 0")
        if self.loop.adherence_prompts and self.data.valid in (0, ()):
            raise ValueError("loop.adherence_prompts needs validation rows, and data.valid is 0")
        if self.template.prompt_weight and not self.objective.learns_prompts:
            raise ValueError(
                f"template.prompt_weight is for sft: {self.objective.kind} compares answers, not prompts"
            )
        self._require_what_mixing_needs()
        if self.loop.compile and self.batch.pack:
            raise ValueError(
                "loop.compile and batch.pack exclude each other: nearly every packed row would be a new shape"
            )
        return self

    def _require_what_mixing_needs(self) -> None:
        """Raises ValueError for weights and distillation that objective or adapter do not allow: the base
        must be there beside what is trained."""
        for entry in self.data.mix:
            used = "distill" if entry.distill else "weight" if entry.weight != 1 else None
            if used and not self.objective.sums_tokens:
                raise ValueError(f"data.mix: {used} is for sft: {self.objective.kind} compares answers")
            if entry.distill and (changing := self._changes_the_base()):
                text = "data.mix: distill needs the base as it was"
                raise ValueError(f"{text}, and {changing}: its weights change")

    def _changes_the_base(self) -> str | None:
        """The setting by which weights of the base itself are trained."""
        if isinstance(self.adapter, Full):
            return "adapter.kind is full"
        if self.adapter.full_modules:
            return "adapter.full_modules is set"
        return "model.resize_embeddings is true" if self.model.resize_embeddings else None

    def warnings(self) -> list[str]:
        """Settings that are allowed but poor, each with its reason."""
        texts = self._for_the_objective() + self._for_the_adapter()
        if self.data.valid in (0, ()):
            texts.append(
                "data.valid is 0: nothing is held out, so there is no validation, no sample and no evaluation"
            )
        if self.optimizer.max_norm is None:
            texts.append("optimizer.max_norm is null: one bad row can throw the adapter far off")
        if self.adapter.kind == "full" and self.model.quantize is not None:
            texts.append(
                "model.quantize with full weights: the quantised layers stay frozen, only the rest is trained"
            )
        return texts

    def _usual(self, key: str) -> float | None:
        """The value that the objective suggests for ``key`` beside this adapter, or None if it suggests
        none."""
        suits = self.objective.suits
        return suits.get(self.adapter.kind, {}).get(key, suits.get(key))

    def _for_the_objective(self) -> list[str]:
        """Warnings on settings for which the objective suggests a value."""
        texts: list[str] = []
        kind, rate, rows = self.objective.kind, self.optimizer.learning_rate, self.batch.sequences
        usual_rate, usual_rows = self._usual("optimizer.learning_rate"), self._usual("batch.sequences")
        if usual_rate is not None and rate >= 2 * usual_rate:
            texts.append(
                f"optimizer.learning_rate {rate:g} is high for {kind}: {usual_rate:g} is usual; "
                "SFT's is too much for it"
            )
        if self.objective.needs_reference and not isinstance(self.adapter, Full) and self.adapter.dropout > 0:
            texts.append(
                "adapter.dropout is SFT's: it makes the log-ratios to the reference noisy; 0 is usual here"
            )
        if usual_rows is not None and rows < usual_rows:
            texts.append(f"batch.sequences {rows} is few for {kind}: {usual_rows} is usual")
        return texts

    def _for_the_adapter(self) -> list[str]:
        """Warnings on the learning rate, if the objective suggests none, and on large batches for LoRA."""
        rate, full = self.optimizer.learning_rate, self.adapter.kind == "full"
        stated = self._usual("optimizer.learning_rate") is not None
        texts: list[str] = []
        if full and not stated and rate > 5e-5:
            texts.append(
                f"optimizer.learning_rate {rate:g} is high for full weights: 1e-5 is usual, "
                "LoRA's is ten times it"
            )
        if not full and not stated and self.optimizer.kind.startswith("adam") and rate > 1e-3:
            texts.append(f"optimizer.learning_rate {rate:g} is high for LoRA: 1e-4 to 2e-4 is usual")
        if not full and not stated and rate < 1e-5:
            texts.append(
                f"optimizer.learning_rate {rate:g} is low for LoRA: "
                "about ten times the rate of full weights is usual"
            )
        if not full and self.batch.sequences > 32:
            texts.append(
                f"batch.sequences {self.batch.sequences} is large: LoRA learns better from batches under 32"
            )
        return texts


def of_run(file: Path, sets: Sequence[str] = ()) -> RunConfig:
    """The settings that a run wrote to ``file``, with ``sets`` over them. A run that does not name them is
    older than the settings of plain text, and keeps its rules: it ends as a chat's turn does, and control
    tokens in it are letters."""
    resolved = load(RunConfig, files=[file], sets=sets, recorded=[file])
    template, data = resolved.spec.template, resolved.spec.data
    if resolved.origins["template.text_end"] == "default":
        template = template.model_copy(update={"text_end": "turn"})
    if resolved.origins["data.text_control"] == "default":
        data = data.model_copy(update={"text_control": "letters"})
    return resolved.spec.model_copy(update={"template": template, "data": data})

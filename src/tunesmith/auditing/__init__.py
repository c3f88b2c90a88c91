"""What is wrong with a data set, found before hours are spent on training: what an expert would find in an
afternoon of reading.

`survey.audit` reads the rows once, in one process per core, and shows each row to every rule of `rules` (one
file a rule). `findings` holds the result, `page` and `screen` show it, `fix` repairs what can be repaired.
This file holds the settings alone, so that a run's configuration loads none of the rest."""

from __future__ import annotations

from pydantic import Field

from tunesmith.settings.config import Spec, Texts


class AuditSpec(Spec):
    """What the audit asks of the data, before training and on its own."""

    before_training: bool = Field(
        True, description="audit the rows before training; errors stop it, warnings go into the report"
    )
    accept: Texts = Field((), description="rules or dimensions whose findings are accepted as they are")
    against: Texts = Field(
        (),
        description="evaluation sets and fixed prompts that no training row may repeat: JSONL, JSON, CSV, or "
        "text by lines",
    )
    sample: int = Field(
        20_000,
        ge=100,
        description="rows that the costly rules look at: tokens, clusters, languages, the model of labels",
    )
    min_valid: float = Field(0.95, ge=0, le=1, description="least share of rows that are sound")
    min_trigrams: float = Field(
        0.7, ge=0, le=1, description="least share of distinct word trigrams in the answers"
    )
    min_entropy: float = Field(2.5, ge=0, description="least entropy of the instruction types, in bits")
    similarity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="least share of equal letters (1 − edit distance) at which rows are near duplicates",
    )
    mean_answer: tuple[int, ...] = Field(
        (50, 200), min_length=2, max_length=2, description="range of the mean answer, in tokens"
    )
    tail: int = Field(1024, ge=1, description="tokens under which 99 of 100 rows should stay")

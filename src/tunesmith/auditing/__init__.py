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
        True,
        description="audit the rows before training; errors stop it, warnings go into the report",
        json_schema_extra={"when": "false if the same files were audited a moment ago and take long"},
    )
    accept: Texts = Field(
        (),
        description="rules or dimensions whose findings are accepted as they are",
        json_schema_extra={
            "when": "after you have read a finding and want to train on the rows all the same"
        },
    )
    against: Texts = Field(
        (),
        description="evaluation sets and fixed prompts that no training row may repeat: JSONL, JSON, CSV, or "
        "text by lines",
        json_schema_extra={"when": "whenever you will judge the model by a public or private test set"},
    )
    sample: int = Field(
        20_000,
        ge=100,
        description="rows that the costly rules look at: tokens, clusters, languages, the model of labels",
        json_schema_extra={"when": "more for a closer look at large files; less if the audit takes too long"},
    )
    min_valid: float = Field(
        0.95,
        ge=0,
        le=1,
        description="least share of rows that are sound",
        json_schema_extra={"when": "lower if the rest of the rows is known to be unusable"},
    )
    min_trigrams: float = Field(
        0.7,
        ge=0,
        le=1,
        description="least share of distinct word trigrams in the answers",
        json_schema_extra={"when": "lower for answers of a fixed form, such as calls"},
    )
    min_entropy: float = Field(
        2.5,
        ge=0,
        description="least entropy of the instruction types, in bits",
        json_schema_extra={"when": "lower for data of one task"},
    )
    similarity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="least share of equal letters (1 − edit distance) at which rows are near duplicates",
        json_schema_extra={
            "when": "higher if rows that differ in a name or a number are called near duplicates"
        },
    )
    mean_answer: tuple[int, ...] = Field(
        (50, 200),
        min_length=2,
        max_length=2,
        description="range of the mean answer, in tokens",
        json_schema_extra={"when": "to the lengths that your task asks for"},
    )
    tail: int = Field(
        1024,
        ge=1,
        description="tokens under which 99 of 100 rows should stay",
        json_schema_extra={"when": "to the context that you train and serve with"},
    )

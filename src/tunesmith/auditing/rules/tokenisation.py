"""What the tokenizer and the template make of the rows: unknown letters, misplaced control tokens, nothing to
learn.

The renderer itself refuses a row whose learned tokens do not decode to the assistant's words; those rows are
counted here by the code of the refusal. The checks on sequences use the ids alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data.examples import Completion, Document
from tunesmith.errors import TemplateError
from tunesmith.tokens.template import Refused

BARS = {
    "unknown": (
        "holding letters that the tokenizer does not know",
        "they are learned as the unknown token: replace them",
    ),
    "bos": (
        "lacking a BOS token at the start, or with a second one",
        "template and tokenizer both write it: take one out",
    ),
    "embedding": (
        "with ids outside of the model's embedding",
        "name the tokenizer of the model, or set model.resize_embeddings: true",
    ),
    "no_target": ("with nothing to learn", "template.learn says which answers are learned"),
    "control": (
        "with a control token inside an answer",
        "take it out of the text, or the model learns to break off there",
    ),
    "words": (
        "whose learned tokens do not read as the assistant's words",
        "the template or the tokenizer changes the answer",
    ),
}
REFUSED = {
    "text_control": (
        "with control tokens written in plain text",
        "write the rows as messages; or data.text_control=read takes them as the tokens",
    ),
    "words_beside_calls": (
        "with words and calls in one turn, which this format does not have",
        "template.words_beside_calls: drop_words or split",
    ),
}
"""What is wrong with rows that the renderer refuses for a reason that a setting lifts."""
OTHER = "not rendered by this template", "change the rows, or take a model whose template can express them"


class RowTokens(NamedTuple):
    problems: tuple[str, ...]  # keys of `BARS`, or the code of a refusal
    note: str
    unknown: int
    tokens: int
    refused: bool  # training leaves the row out, counted


@register
class Tokenisation(Rule):
    name = "tokenisation"
    order = 90
    looks_at = "what the tokenizer and the chat template make of the rows"
    findings: ClassVar = {
        "unknown": "letters that the tokenizer does not know",
        "bos": "no BOS token at the start, or a second one",
        "embedding": "ids outside of the model's embedding, if a model is named",
        "no_target": "nothing to learn",
        "control": "a control token inside an answer",
        "words": "learned tokens that do not read as the assistant's words",
    }
    otherwise = "rows that the template cannot render, named by the reason"
    gravest: ClassVar = {
        name: "error" for name in ("unknown", "bos", "embedding", "no_target", "control", "words", "")
    }
    bar = "0"
    drawn = True

    def look(self, view: View, context: Context) -> RowTokens | None:
        renderer = context.renderer
        if renderer is None or view.example is None:
            return None
        rows = context.rows(view)
        if isinstance(rows, TemplateError):
            code = rows.code if isinstance(rows, Refused) else "template"
            return RowTokens((code,), rows.what, 0, 0, refused=True)
        whole = isinstance(view.example, Document | Completion)
        bos = renderer.bos_id if whole else renderer.chat_bos_id
        problems: dict[str, str] = {}
        unknown = tokens = 0
        for row in rows:
            ids, targets = row.tokens
            tokens += len(ids)
            if renderer.unknown_id not in (None, bos, *renderer.eos_ids) and (
                many := int((ids == renderer.unknown_id).sum())
            ):
                unknown += many
                problems["unknown"] = f"{many} of {len(ids)} tokens"
            if bos is not None and (ids[0] != bos or (ids == bos).sum() > 1):
                problems["bos"] = (
                    f"{int((ids == bos).sum())} BOS tokens, {'' if ids[0] == bos else 'not '}at the start"
                )
            if context.known is not None and (outside := np.unique(ids[ids >= context.known]).tolist()):
                named = ", ".join(f"{token} ({renderer.decode([token])!r})" for token in outside[:5])
                more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
                problems["embedding"] = f"ids {named}{more}; the embedding has {context.known:,} rows"
            learned = targets >= 1
            if not learned.any():
                problems["no_target"] = "no learned token"
            # An answer ends in a control token, and may begin with one that opens its calls.
            inner = learned & np.r_[False, learned[:-1]] & np.r_[learned[1:], False]
            inside = {
                renderer.decode([token]).strip()
                for token in ids[inner].tolist()
                if token in renderer.control_ids
            }
            if written := [token for token in inside if token in view.said]:  # others are the template's own
                problems["control"] = f"{' '.join(sorted(written))} inside an answer"
        return RowTokens(tuple(problems), "; ".join(problems.values()), unknown, tokens, refused=False)

    def judge(self, facts: list[RowTokens | None], survey: Survey) -> Iterator[Finding]:
        rows = [(row, tokens_of) for row in survey.training if (tokens_of := facts[row]) is not None]
        if not rows:
            return
        concerned: dict[str, list[tuple[RowTokens, FindingRow]]] = defaultdict(list)
        for row, tokens_of in rows:
            for problem in tokens_of.problems:
                concerned[problem].append((tokens_of, FindingRow(survey.sources[row], tokens_of.note)))
        tokens, unknown = (
            sum(tokens_of.tokens for _, tokens_of in rows),
            sum(tokens_of.unknown for _, tokens_of in rows),
        )
        assert survey.context is not None
        most = (1 - survey.spec.min_valid) * len(rows)
        many = survey.context.refusals and sum(tokens_of.refused for _, tokens_of in rows) > most
        for name in (*BARS, *sorted(concerned.keys() - BARS.keys())):
            if name == "embedding" and survey.context.known is None:
                continue
            bad = concerned[name]
            thing, hint = BARS.get(name) or REFUSED.get(name, OTHER)
            sentence = f"{counted(len(bad))} {thing}" if bad else f"no rows {thing}"
            sentence += f"; {unknown:,} of {tokens:,} tokens" if name == "unknown" and bad else ""
            sentence += f" ({name})" if name not in BARS else ""
            mild = (all(tokens_of.refused for tokens_of, _ in bad) and not many) or (
                name == "unknown" and len(bad) <= most
            )
            severity = "good" if not bad else "warning" if mild else "error"
            evidence = tuple(evidence for _, evidence in bad)
            hint = hint if bad else ""
            yield Finding(
                f"tokenisation.{name}",
                severity,
                sentence,
                len(bad),
                len(rows),
                threshold="0",
                rows=evidence,
                hint=hint,
            )

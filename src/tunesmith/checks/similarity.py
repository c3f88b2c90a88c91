"""How near an answer comes to its reference, in words and in meaning.

``rouge_l``: F-measure of the longest common subsequence of words (Lin 2004), words as rouge-score has them,
but of any script. ``bleu``: sacreBLEU's sentence BLEU (Papineni et al. 2002; exponential smoothing, effective
order), by its tokenizer 13a, or by characters where the reference is mostly in a script without spaces.
``similarity``: cosine of two texts by smooth inverse frequency (Arora et al. 2017): the mean of the model's
input embeddings, each weighted by a / (a + p), p the token's share in all references, without the direction
that the references have in common. Whether an answer is true is not checked."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

SMOOTHING = 1e-3  # a
COMMON_FROM = 10
"""With fewer references no common direction is removed."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_LETTER = re.compile(f"[{_UNSPACED}]")

Embedding = nn.Embedding | nn.QuantizedEmbedding


def words(text: str) -> list[str]:
    """In lower case; underscores part them, and in scripts without spaces each letter is one."""
    return _WORD.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """From 0 to 1; if the reference has no words, like a smiley, 1 if the answer is the same."""
    from rapidfuzz.distance import LCSseq

    said, wanted = words(answer), words(reference)
    if not wanted:
        return float(answer.split() == reference.split())
    return 2 * LCSseq.similarity(said, wanted) / (len(said) + len(wanted))


def bleu(answer: str, reference: str) -> float:
    """From 0 to 1."""
    letters = sum(map(str.isalpha, reference))
    unspaced = len(_LETTER.findall(reference)) > letters / 2
    return max(
        0.0, min(1.0, _bleu("char" if unspaced else "13a").sentence_score(answer, [reference]).score / 100)
    )


@lru_cache(maxsize=2)
def _bleu(tokenize: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize, effective_order=True)


def embedding(net: nn.Module) -> Embedding | None:
    """The model's input embeddings (the table with the most rows), or None. A copy that shares the arrays, so
    that later changes of the model do not change it."""
    tables = [module for module in net.modules() if isinstance(module, Embedding)]
    return copy.copy(max(tables, key=lambda table: table.weight.shape[0])) if tables else None


class Encoder:
    """Texts as vectors by ``table``. ``references``: the tokens of each; token frequencies and the common
    direction come from them."""

    def __init__(self, table: Embedding, references: Iterable[Sequence[int]]) -> None:
        self._table = table
        rows = [row for row in references if row]
        self._counts = Counter(token for row in rows for token in row)
        self._total = max(1, self._counts.total())
        points = np.array([self._mean(row) for row in rows])
        # (D,): the first right singular vector. Its sign does not matter.
        self._common = np.linalg.svd(points, full_matrices=False)[2][0] if len(rows) >= COMMON_FROM else None

    def _mean(self, ids: Sequence[int]) -> np.ndarray:
        """(D,) float64"""
        vectors = np.array(self._table(mx.array(list(ids))).astype(mx.float32), np.float64)
        weights = np.array([SMOOTHING / (SMOOTHING + self._counts[token] / self._total) for token in ids])
        return weights @ vectors / len(ids)

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """(D,) float64 of one text with at least one token."""
        point = self._mean(ids)
        return point if self._common is None else point - self._common * (point @ self._common)

    def similarity(self, answer: Sequence[int], reference: Sequence[int]) -> float:
        """Cosine, from 0 to 1: negative values are 0, and so is the similarity of a text without tokens or
        with a zero vector."""
        if not answer or not reference:
            return 0.0
        if list(answer) == list(reference):
            return 1.0
        first, second = self(answer), self(reference)
        size = float(np.linalg.norm(first) * np.linalg.norm(second))
        return max(0.0, min(1.0, float(first @ second) / size)) if size > 0 else 0.0

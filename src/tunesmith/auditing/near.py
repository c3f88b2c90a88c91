"""Texts that nearly repeat each other: candidates by MinHash, each verified by edit distance.

MinHash (Broder, 1997) over pairs of neighbouring words, cut into bands (Leskovec et al., Mining of Massive
Datasets, chapter 3): 32 bands of 4 make texts with a third of their word pairs in common candidates in a
third of the cases and those with two thirds in all but 1 of 1,000. The edit similarity is reported, never the
estimate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

PERMUTATIONS, BAND = 128, 4
COMPARED = 20_000
"""Letters of a text that are compared, from its beginning: edit distance takes quadratic time."""
LIKELY = 0.35
"""Candidates with a smaller share of equal minima (the estimate of the share of common word pairs) are not
compared: texts that share nine letters of ten have about two thirds of their word pairs in common."""
PART = 1 << 16  # candidates at once
HEAD, SHARED = 20, 0.2
"""Words of a beginning, and the share of texts above which a beginning counts as common."""
BUCKET = 40
"""In a larger bucket each text is compared with the first and the one before it, not with all."""


def signature(normal: str) -> bytes:
    """128 minima, uint32 little-endian, of a text in its normal form (`views.normal`)."""
    from rensa import RMinHash  # type: ignore[attr-defined]  # a compiled module without stubs

    words = normal.split(" ")
    pairs = [f"{word} {following}" for word, following in pairwise(words)] or words
    hashed = RMinHash(num_perm=PERMUTATIONS, seed=1)
    hashed.update(pairs)
    return np.array(hashed.digest(), dtype="<u4").tobytes()


def bands(signatures: Sequence[bytes]) -> np.ndarray:
    """(n, 32) uint64 keys: two texts are candidates if they share a key in one column."""
    table = np.frombuffer(b"".join(signatures), dtype="<u4").reshape(len(signatures), -1, BAND)
    keys = np.zeros(table.shape[:2], dtype=np.uint64)
    for column in range(BAND):
        keys = (keys ^ table[..., column]) * np.uint64(0x9E3779B97F4A7C15)
    return keys


def candidates(signatures: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of places, each once, the smaller first."""
    if len(signatures) < 2:
        return []
    pairs: set[tuple[int, int]] = set()
    for column in bands(signatures).T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        for start, end in zip(starts, np.r_[starts[1:], len(order)], strict=True):
            if end - start > 1:
                pairs.update(_pairs(order[start:end].tolist()))
    chosen = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    table = np.frombuffer(b"".join(signatures), dtype="<u4").reshape(len(signatures), -1)
    parts = (chosen[start_of_part : start_of_part + PART] for start_of_part in range(0, len(chosen), PART))
    alike = [(table[part[:, 0]] == table[part[:, 1]]).mean(axis=1) >= LIKELY for part in parts]
    return [
        (first, second) for first, second in chosen[np.concatenate(alike) if alike else slice(0)].tolist()
    ]


def _pairs(places: list[int]) -> Iterator[tuple[int, int]]:
    """``places`` in ascending order, as `candidates` pairs them."""
    if len(places) <= BUCKET:
        yield from ((first, second) for nth, first in enumerate(places) for second in places[nth + 1 :])
        return
    for before, place in pairwise(places):
        yield places[0], place
        if before != places[0]:
            yield before, place


def similarity(first: str, second: str, least: float) -> float:
    """1 − edit distance / length of the longer, of two normal forms; 0 if it is below ``least``."""
    from rapidfuzz.distance import Levenshtein

    longer = max(len(first), len(second))
    if min(len(first), len(second)) < least * longer:
        return 0.0
    return Levenshtein.normalized_similarity(first[:COMPARED], second[:COMPARED], score_cutoff=least)


class Heads:
    """Beginnings that many texts share: an instruction that stands before every text says nothing about
    whether two are near."""

    def __init__(self, texts: Iterable[str]) -> None:
        by_head: dict[str, list[str]] = defaultdict(list)
        many = 0
        for text in texts:
            many += 1
            if len(words := text.split(" ", HEAD)) > HEAD:
                by_head[" ".join(words[:HEAD])].append(text)
        self._common = {
            key: _beginning(texts_alike)
            for key, texts_alike in by_head.items()
            if len(texts_alike) > max(SHARED * many, 4)
        }

    def without(self, text: str) -> str:
        """``text`` without a beginning that many texts share; all of it if nothing would be left."""
        common = self._common.get(" ".join(text.split(" ", HEAD)[:HEAD]), "")
        return text[len(common) :] or text if text.startswith(common) else text


def _beginning(texts: Sequence[str]) -> str:
    """What all of them begin with: what the first and the last in sorted order have in common."""
    low, high = min(texts), max(texts)
    return low[
        : next(
            (place for place, (left, right) in enumerate(zip(low, high, strict=False)) if left != right),
            len(low),
        )
    ]


def pairs(
    signatures: Sequence[bytes], texts: Callable[[Sequence[int]], dict[int, str]], least: float
) -> list[tuple[int, int, float]]:
    """(place, later place, similarity) of all candidates at least so similar. texts: the normal forms of
    places."""
    chosen = candidates(signatures)
    known = texts(sorted({place for pair in chosen for place in pair}))
    heads = Heads(known.values())
    known = {place: heads.without(text) for place, text in known.items()}
    scored = ((first, second, similarity(known[first], known[second], least)) for first, second in chosen)
    return [(first, second, alike) for first, second, alike in scored if alike >= least]


def groups(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Places that are connected by pairs, each group in ascending order, by its first."""
    parent: dict[int, int] = {}

    def root(place: int) -> int:
        while parent.setdefault(place, place) != place:
            parent[place] = place = parent[parent[place]]
        return place

    for left, right in pairs:
        first, second = sorted((root(left), root(right)))
        parent[second] = first
    members: dict[int, list[int]] = defaultdict(list)
    for place in sorted(parent):
        members[root(place)].append(place)
    return [members[first] for first in sorted(members)]

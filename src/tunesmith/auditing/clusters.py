"""Clusters of prompts that are about the same, named after their words, and their places on a map.

Features are TF-IDF of words, or hidden states of the user's model, in 50 dimensions; k-means makes many small
clusters, and those whose rows are alike are merged. Whether a cluster is too large is for `diversity`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np

from tunesmith.auditing import features
from tunesmith.auditing.views import Survey, View
from tunesmith.checks.content import masked
from tunesmith.machine import imports

LETTERS = 2_000
"""Of a prompt that are looked at, from its beginning."""
MAPPED = 2_000
"""Points of the map: t-SNE takes 2 ms for each."""
DIMENSIONS, CLUSTERS = 50, 40
FEW = 30  # different points, below which t-SNE has nothing to arrange
LONGEST = 30  # letters of a word in a name
ALIKE_WORDS, ALIKE_STATES = 0.1, 0.2
"""Least mean cosine (of TF-IDF, of standardised hidden states) at which two clusters are merged, and at which
the rows of one cluster count as about the same. In real sets rows of different clusters stay below; rows of
one template that k-means cut apart are far above."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = (
    "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0971-\u09e5\u09f0-\u0d65\u0d70-\u0dff\u0f00-\u0fff"
)
_WORD = re.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}])[^\W\d_]|[{_MARKS}])+")  # \w has no vowel signs
UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")


class PromptCluster(NamedTuple):
    """One cluster. ``tight``: its rows are about the same; otherwise it holds rows that fit no other
    cluster."""

    name: str
    tight: bool


class Clustering(NamedTuple):
    """``labels``: (n,) places in ``groups``, of which the largest is first. ``points``: (m, 2), of the rows
    ``shown``."""

    labels: np.ndarray
    groups: list[PromptCluster]
    shown: np.ndarray
    points: np.ndarray
    method: str


def subject(view: View) -> str | None:
    """What a row is about: its prompt, of plain text its beginning, or None."""
    return (view.asked or view.said)[:LETTERS].strip() or None


def of(survey: Survey) -> list[PromptCluster | None]:
    """The cluster of each row, None if `Diversity` kept no prompt. Computed once per survey; fills
    ``charts["map"]`` if charts are wanted."""
    if "clusters" not in survey.kept:
        trigrams = survey.kept["diversity"]
        rows = [row for row in survey.training if trigrams[row] is not None and trigrams[row].subject]
        groups: list[PromptCluster | None] = [None] * len(survey)
        if rows:
            context = survey.context
            mapped = context is None or context.charts
            prompts = [trigrams[row].subject for row in rows]
            if context is not None and context.clusters is not None:
                clustering: Clustering = context.clusters(prompts)
            else:
                clustering = clusters(prompts, context.embed if context else None, mapped=mapped)
            for row, label in zip(rows, clustering.labels, strict=True):
                groups[row] = clustering.groups[label]
            if mapped:
                survey.charts["map"] = _chart(clustering, rows, survey)
        survey.kept["clusters"] = groups
    return survey.kept["clusters"]


def _chart(clustering: Clustering, rows: Sequence[int], survey: Survey) -> dict[str, Any]:
    shown = [rows[place] for place in clustering.shown]
    return {
        "x": [round(float(x), 3) for x in clustering.points[:, 0]],
        "y": [round(float(y), 3) for y in clustering.points[:, 1]],
        "source": [survey.sources[row] for row in shown],
        "text": [masked(survey.asked[row]) for row in shown],
        "cluster": clustering.labels[clustering.shown].tolist(),
        "label": [survey.labels[row] for row in shown],
        "names": [group.name for group in clustering.groups],
        "method": clustering.method,
    }


def clusters(
    prompts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray] | None = None, *, mapped: bool = True
) -> Clustering:
    """Clusters of one prompt or more, the same on each call. ``embed``: (n, width) features, instead of
    TF-IDF. mapped: also place them on the map."""
    import scipy.linalg  # noqa: F401  # before the limit below, which covers libraries that are loaded
    from threadpoolctl import threadpool_limits

    if mapped and imports.installed("sklearn"):
        import sklearn.manifold  # noqa: F401  # likewise
    texts = [prompt[:LETTERS] for prompt in prompts]
    weights, terms = _tfidf(texts)
    if embed is None or len(set(texts)) == 1:  # differences of states do not show what all prompts share
        vectors, least, source = weights, ALIKE_WORDS, "TF-IDF of words"
    else:
        vectors, least, source = _states(texts, embed), ALIKE_STATES, "mean hidden states of the model"
    with threadpool_limits(1):  # sums over threads have no fixed order, and t-SNE amplifies the last digit
        coordinates = features.unit(features.reduced(vectors, min(DIMENSIONS, *vectors.shape)))
        coordinates = np.round(coordinates, 6) + 0.0  # equal texts are equal points
        many = min(usual(len(coordinates)), len(np.unique(coordinates, axis=0)))
        labels = _merged(features.kmeans(coordinates, many), vectors, least)
        shown = np.linspace(0, len(texts) - 1, min(len(texts), MAPPED) if mapped else 0).astype(int)
        points, drawn = _points(coordinates[shown]) if mapped else (np.zeros((0, 2)), "not drawn")
    alike = np.square(_means(vectors, labels)).sum(axis=1)
    names = _names(_means(weights, labels), weights, terms)
    groups: list[PromptCluster] = []
    for name, likeness in zip(names, alike, strict=True):
        tight = bool(likeness >= least)
        groups.append(PromptCluster(name if tight else f"various: {name}", tight))
    return Clustering(labels, groups, shown, points, f"{source}, {drawn}")


def usual(rows: int) -> int:
    """How many clusters k-means makes of so many rows, before clusters that are alike are merged."""
    return max(1, min(CLUSTERS, round((rows / 2) ** 0.5)))


def words(text: str) -> list[str]:
    """In lower case, without English stop words where others are left; of scripts without spaces, pairs of
    letters."""
    parts: list[str] = []
    for word in _WORD.findall(text.lower()):
        parts += (
            [word[start : start + 2] for start in range(max(1, len(word) - 1))]
            if UNSPACED_LETTER.match(word)
            else [word]
        )
    return [word for word in parts if word not in features.STOP_WORDS and len(word) > 1] or parts


def _tfidf(texts: Iterable[str]) -> tuple[Any, list[str]]:
    """Sparse rows of length 1, or 0 where no word is known, and the words: those in two texts or more, if
    there are any."""
    from scipy.sparse import csr_array

    counts_of = [Counter(words(text)) for text in texts]
    names = sorted({"", *chain.from_iterable(counts_of)})  # one column at least
    columns = {name: column for column, name in enumerate(names)}
    places = [columns[word] for counts in counts_of for word in counts]
    numbers = [float(count) for counts in counts_of for count in counts.values()]
    starts = np.cumsum([0, *map(len, counts_of)])
    counts: Any = csr_array((numbers, places, starts), shape=(len(counts_of), len(names)))
    often = np.bincount(counts.indices, minlength=len(names)) > 1
    if often.any():
        counts, names = counts[:, often], list(compress(names, often))
    return features.tfidf(counts), names


def _states(texts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """What ``embed`` returns for each text, as rows of length 1 or 0. Dimensions are standardised: of hidden
    states a few are a hundred times as large as others, and say little."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    states = np.asarray(embed(list(places)), dtype=np.float64)[[places[text] for text in texts]]
    spread = states.std(axis=0)
    spread[spread <= 1e-6 * np.abs(states).max()] = 1.0
    return features.unit((states - states.mean(axis=0)) / spread)


def _means(unit: Any, labels: np.ndarray) -> np.ndarray:
    """(k, width): the dot product of two is the mean cosine of their rows."""
    from scipy.sparse import csr_array

    picks = csr_array((1 / np.bincount(labels)[labels], (labels, np.arange(len(labels)))))
    means = picks @ unit
    return means if isinstance(means, np.ndarray) else means.toarray()


def _merged(labels: np.ndarray, unit: Any, least: float) -> np.ndarray:
    """Merges the two most alike clusters as long as their rows' mean cosine is at least ``least``; then
    numbers them by size."""
    while True:
        _, labels = np.unique(labels, return_inverse=True)
        means = _means(unit, labels)
        alike = np.triu(means @ means.T, 1)
        first, second = np.unravel_index(alike.argmax(), alike.shape)
        if alike[first, second] < least:
            break
        labels[labels == second] = first
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels]


def _names(means: np.ndarray, weights: Any, terms: Sequence[str]) -> list[str]:
    """For each cluster the three words whose weight in its rows exceeds that in all rows the most."""
    telling = means - np.asarray(weights.mean(axis=0)).ravel() / 2
    names: list[str] = []
    for row in telling:
        best = [
            terms[int(column)][:LONGEST] for column in np.argsort(-row, kind="stable")[:3] if row[column] > 0
        ]
        name = ", ".join(best) or "no common words"
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _points(coordinates: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, 2), by t-SNE; by principal components if there are few different points, or no scikit-learn."""
    few = coordinates.shape[1] < 2 or len(np.unique(coordinates, axis=0)) < FEW
    if few or not imports.installed("sklearn"):
        centred = coordinates - coordinates.mean(axis=0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        flat = (left * sizes)[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "two principal components"
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(coordinates) - 1) // 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(
        coordinates
    ), "t-SNE"

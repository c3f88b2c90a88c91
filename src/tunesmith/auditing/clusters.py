"""Clusters of prompts that are about the same, named after their words, and their places on a map.

Features are TF-IDF of words, or hidden states of the user's model, in 50 dimensions; k-means makes many small
clusters, and those whose rows are alike are merged. Whether a cluster is too large is for `diversity`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tunesmith.auditing.views import Survey, View
from tunesmith.checks.content import masked

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
    ``charts["map"]``."""
    if "clusters" not in survey.kept:
        trigrams = survey.kept["diversity"]
        rows = [row for row in survey.training if trigrams[row] is not None and trigrams[row].subject]
        groups: list[PromptCluster | None] = [None] * len(survey)
        if rows:
            clustering = clusters(
                [trigrams[row].subject for row in rows], survey.context.embed if survey.context else None
            )
            for row, label in zip(rows, clustering.labels, strict=True):
                groups[row] = clustering.groups[label]
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
    prompts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray] | None = None
) -> Clustering:
    """Clusters of one prompt or more, the same on each call. ``embed``: (n, width) features, instead of
    TF-IDF."""
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    texts = [prompt[:LETTERS] for prompt in prompts]
    weights, terms = _tfidf(texts)
    if embed is None or len(set(texts)) == 1:  # differences of states do not show what all prompts share
        unit, least, source = weights, ALIKE_WORDS, "TF-IDF of words"
    else:
        unit, least, source = _states(texts, embed), ALIKE_STATES, "mean hidden states of the model"
    with threadpool_limits(1):  # sums over threads have no fixed order, and t-SNE amplifies the last digit
        left, sizes, _ = randomized_svd(unit, min(DIMENSIONS, *unit.shape), random_state=0)
        features = np.round(np.asarray(normalize(left * sizes)), 6) + 0.0  # equal texts are equal points
        labels = _merged(_kmeans(features), unit, least)
        shown = np.linspace(0, len(texts) - 1, min(len(texts), MAPPED)).astype(int)
        points, drawn = _points(features[shown])
    alike = np.square(_means(unit, labels)).sum(axis=1)
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
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    parts: list[str] = []
    for word in _WORD.findall(text.lower()):
        parts += (
            [word[start : start + 2] for start in range(max(1, len(word) - 1))]
            if UNSPACED_LETTER.match(word)
            else [word]
        )
    return [word for word in parts if word not in ENGLISH_STOP_WORDS and len(word) > 1] or parts


def _tfidf(texts: Iterable[str]) -> tuple[Any, list[str]]:
    """Sparse rows of length 1, or 0 where no word is known, and the words: those in two texts or more, if
    there are any."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import TfidfTransformer

    words_of = [words(text) for text in texts]
    vectorizer = DictVectorizer()
    counts: Any = vectorizer.fit([{"": 0}, *map(Counter, words_of)]).transform(
        map(Counter, words_of)
    )  # one column at least
    terms = np.array(vectorizer.feature_names_)
    often = np.bincount(counts.indices, minlength=len(terms)) > 1
    if often.any():
        counts, terms = counts[:, often], terms[often]
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts), list(map(str, terms))


def _states(texts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """What ``embed`` returns for each text, as rows of length 1 or 0. Dimensions are standardised: of hidden
    states a few are a hundred times as large as others, and say little."""
    from sklearn.preprocessing import normalize

    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    states = np.asarray(embed(list(places)), dtype=np.float64)[[places[text] for text in texts]]
    spread = states.std(axis=0)
    spread[spread <= 1e-6 * np.abs(states).max()] = 1.0
    return np.asarray(normalize((states - states.mean(axis=0)) / spread))


def _kmeans(features: np.ndarray) -> np.ndarray:
    """(n,) labels of the `usual` number of clusters, never more than there are different points."""
    from sklearn.cluster import KMeans

    many = min(usual(len(features)), len(np.unique(features, axis=0)))
    starts: Any = 3
    return KMeans(many, n_init=starts, random_state=0).fit_predict(features)


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


def _points(features: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, 2), by t-SNE; by principal components if there are few different points."""
    from sklearn.manifold import TSNE

    if features.shape[1] < 2 or len(np.unique(features, axis=0)) < FEW:
        centred = features - features.mean(axis=0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        flat = (left * sizes)[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "two principal components"
    perplexity = min(30, (len(features) - 1) // 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(
        features
    ), "t-SNE"

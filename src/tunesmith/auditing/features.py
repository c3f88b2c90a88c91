"""Words as vectors: weights by TF-IDF, fewer dimensions by a randomised singular value decomposition, groups
by k-means.

The same numbers as scikit-learn's TfidfTransformer, randomized_svd and KMeans. scikit-learn takes a second to
import, mostly for scipy.stats and pandas. Sparse tables are scipy's csr arrays, (n, terms)."""

from __future__ import annotations

from typing import Any

import numpy as np

STARTS, MOST_PASSES, TOLERANCE = 3, 300, 1e-4
"""k-means starts from so many draws and keeps the best result. A start ends when the centres move by less
than this share of the variance."""
OVERSAMPLES = 10
NOTHING = 1e-12  # a shorter vector is rounding

STOP_WORDS = frozenset(
    """
a about above across after afterwards again against all almost alone along already also although always am
among amongst amoungst amount an and another any anyhow anyone anything anyway anywhere are around as at
back be became because become becomes becoming been before beforehand behind being below beside besides
between beyond bill both bottom but by call can cannot cant co con could couldnt cry de describe detail do
done down due during each eg eight either eleven else elsewhere empty enough etc even ever every everyone
everything everywhere except few fifteen fifty fill find fire first five for former formerly forty found
four from front full further get give go had has hasnt have he hence her here hereafter hereby herein
hereupon hers herself him himself his how however hundred i ie if in inc indeed interest into is it its
itself keep last latter latterly least less ltd made many may me meanwhile might mill mine more moreover
most mostly move much must my myself name namely neither never nevertheless next nine no nobody none noone
nor not nothing now nowhere of off often on once one only onto or other others otherwise our ours
ourselves out over own part per perhaps please put rather re same see seem seemed seeming seems serious
several she should show side since sincere six sixty so some somehow someone something sometime sometimes
somewhere still such system take ten than that the their them themselves then thence there thereafter
thereby therefore therein thereupon these they thick thin third this those though three through throughout
thru thus to together too top toward towards twelve twenty two un under until up upon us very via was we
well were what whatever when whence whenever where whereafter whereas whereby wherein whereupon wherever
whether which while whither who whoever whole whom whose why will with within without would yet you your
yours yourself yourselves
    """.split()
)
"""English words that say nothing about a subject: the list of scikit-learn, made by the Glasgow Information
Retrieval Group."""


def tfidf(counts: Any) -> Any:
    """Rows of length 1 or 0: each count c as 1 + ln c, times the inverse document frequency."""
    weights = counts.copy()
    n, terms = weights.shape
    frequency = np.bincount(weights.indices, minlength=terms).astype(weights.dtype)
    rarity = np.log((n + 1) / (frequency + 1)) + 1
    weights.data = (np.log(weights.data) + 1) * rarity[weights.indices]
    row_of = np.repeat(np.arange(n), np.diff(weights.indptr))
    lengths = np.sqrt(np.bincount(row_of, weights.data**2, minlength=n))
    weights.data = (weights.data / lengths[row_of]).astype(counts.dtype)
    return weights


def unit(rows: np.ndarray) -> np.ndarray:
    """(n, width), each row divided by its length; 0 for rows that are 0 up to rounding."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return np.where(lengths > NOTHING, rows / np.maximum(lengths, NOTHING), 0.0)


def reduced(table: Any, dimensions: int) -> np.ndarray:
    """(n, dimensions): the rows of ``table`` along its largest singular vectors, times the singular values.

    Halko, Martinsson and Tropp, arXiv 0909.4061, with normalised power iterations."""
    from scipy import linalg

    def normalised(block: np.ndarray) -> np.ndarray:
        factors: Any = linalg.lu(block, permute_l=True, check_finite=False)
        return factors[0]

    passes = 7 if dimensions < 0.1 * min(table.shape) else 4
    wide = table.shape[0] < table.shape[1]
    matrix = table.T if wide else table
    basis = np.random.RandomState(0).normal(size=(matrix.shape[1], dimensions + OVERSAMPLES))
    basis = basis.astype(table.dtype, copy=False)
    for _ in range(passes):
        basis = normalised(matrix.T @ normalised(matrix @ basis))
    orthogonal: Any = linalg.qr(matrix @ basis, mode="economic", check_finite=False)
    basis = orthogonal[0]
    left, sizes, right = linalg.svd(basis.T @ matrix, full_matrices=False)
    vectors = right.T if wide else basis @ left
    largest = np.abs(vectors).argmax(axis=0)  # of each vector the largest entry is positive
    vectors = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return vectors[:, :dimensions] * sizes[:dimensions]


def kmeans(points: np.ndarray, clusters: int) -> np.ndarray:
    """(n,) label of each point, the same on each call. ``clusters``: at most as many as there are different
    points."""
    tolerance = points.var(axis=0).mean() * TOLERANCE
    points = points - points.mean(axis=0)
    random = np.random.RandomState(0)
    best, least = np.zeros(len(points), dtype=int), np.inf
    for _ in range(STARTS):
        labels, spread = _lloyd(points, _first_centres(points, clusters, random), tolerance)
        if spread < least and (least == np.inf or not _same(labels, best)):
            best, least = labels, spread
    return best


def _first_centres(points: np.ndarray, clusters: int, random: np.random.RandomState) -> np.ndarray:
    """(clusters, width): k-means++ with several candidates for each (Arthur and Vassilvitskii, 2007)."""
    n = len(points)
    squares = np.einsum("ij,ij->i", points, points)
    candidates = 2 + int(np.log(clusters))

    def distances(places: np.ndarray) -> np.ndarray:
        """(candidates, n), squared."""
        products = points[places] @ points.T
        return np.maximum(-2 * products + squares[places][:, None] + squares, 0)

    chosen = [int(random.choice(n, p=np.full(n, 1 / n)))]
    nearest = distances(np.array(chosen))[0]
    total = nearest.sum()
    for _ in range(1, clusters):
        drawn = np.searchsorted(np.cumsum(nearest), random.uniform(size=candidates) * total)
        drawn = np.minimum(drawn, n - 1)
        then = np.minimum(nearest, distances(drawn))
        totals = then.sum(axis=1)
        best = int(totals.argmin())
        nearest, total = then[best], totals[best]
        chosen.append(int(drawn[best]))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray, tolerance: float) -> tuple[np.ndarray, float]:
    """(n,) labels, and the sum of squared distances to the centres."""

    def assigned(centres: np.ndarray) -> np.ndarray:
        return (np.einsum("ij,ij->i", centres, centres) - 2 * points @ centres.T).argmin(axis=1)

    labels = np.full(len(points), -1)
    for _ in range(MOST_PASSES):
        before, labels = labels, assigned(centres)
        moved = _centres(points, labels, centres)
        shift = np.square(moved - centres).sum()
        centres = moved
        if np.array_equal(labels, before):
            break
        if shift <= tolerance:
            labels = assigned(centres)
            break
    else:
        labels = assigned(centres)
    return labels, float(np.square(points - centres[labels]).sum())


def _centres(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Means of the points of each label. A cluster without points moves to a point that is far from its
    centre."""
    from scipy.sparse import csr_array

    members = csr_array(
        (np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(len(centres), len(labels))
    )
    sums, sizes = members @ points, np.bincount(labels, minlength=len(centres)).astype(float)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        far = np.square(points - centres[labels]).sum(axis=1)
        for cluster, place in zip(
            empty, np.argpartition(far, -len(empty))[: -len(empty) - 1 : -1], strict=True
        ):
            sums[labels[place]] -= points[place]
            sizes[labels[place]] -= 1
            sums[cluster], sizes[cluster] = points[place], 1
    largest = sizes.argmax()
    means = sums * (1 / np.maximum(sizes, 1))[:, None]
    means[sizes == 0] = means[largest]
    return means


def _same(labels: np.ndarray, others: np.ndarray) -> bool:
    """Whether both name the same clusters, perhaps in another order."""
    return len(set(zip(labels.tolist(), others.tolist(), strict=True))) == len(set(labels.tolist()))

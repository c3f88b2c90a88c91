"""The numbers are scikit-learn's, without its import."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix
from scipy.stats import binomtest, false_discovery_control
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfTransformer
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from tunesmith.auditing import features
from tunesmith.auditing.rules import balance, labels


@pytest.fixture(params=[(300, 80), (80, 300), (31, 31), (2, 5)], ids=str)
def counts(request) -> csr_array:
    random = np.random.default_rng(7)
    n, terms = request.param
    table = random.poisson(0.1, (n, terms)) + np.eye(n, terms)
    table[-1] = 0
    return csr_array(table)


def test_weights_are_those_of_a_tfidf_transformer(counts):
    expected = TfidfTransformer(sublinear_tf=True).fit_transform(csr_matrix(counts))
    np.testing.assert_allclose(features.tfidf(counts).toarray(), expected.toarray(), rtol=1e-14)


def test_fewer_dimensions_are_those_of_a_randomised_svd(counts):
    table = features.tfidf(counts)
    dimensions = min(20, *table.shape)
    left, sizes, _ = randomized_svd(table, dimensions, random_state=0)
    reduced = features.reduced(table, dimensions)
    np.testing.assert_allclose(reduced, left * sizes, atol=1e-12)
    np.testing.assert_allclose(features.unit(reduced)[:-1], normalize(left * sizes)[:-1], atol=1e-9)
    assert not features.unit(reduced)[-1].any(), "rounding has no direction"


@pytest.mark.parametrize("clusters", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", ["spread", "grouped", "repeated"])
def test_clusters_are_those_of_kmeans(clusters, kind):
    random = np.random.default_rng(clusters)
    points = random.normal(size=(600, 12))
    if kind == "grouped":
        points += 5 * random.normal(size=(9, 12))[random.integers(9, size=600)]
    if kind == "repeated":
        points = np.round(points[random.integers(40, size=600)], 6)
        clusters = min(clusters, len(np.unique(points, axis=0)))
    starts: Any = 3
    expected = KMeans(clusters, n_init=starts, random_state=0).fit_predict(points)
    np.testing.assert_array_equal(features.kmeans(points, clusters), expected)


def test_a_cluster_that_loses_its_points_takes_one_that_is_far_away():
    points = np.array([[0.0], [1.0], [10.0]])
    centres = features._centres(points, np.array([0, 0, 0]), np.array([[0.0], [50.0]]))
    np.testing.assert_array_equal(centres, [[0.5], [10.0]])


def test_stop_words_are_those_of_scikit_learn():
    assert features.STOP_WORDS == ENGLISH_STOP_WORDS


def test_tests_of_labels_are_those_of_scipy_and_scikit_learn():
    random = np.random.default_rng(0)
    for _ in range(200):
        trials, share = int(random.integers(1, 400)), float(random.choice([random.random(), 0.5, 0.0, 1.0]))
        successes = int(random.integers(trials + 1))
        expected = binomtest(successes, trials, share).pvalue
        assert balance.binomial_test(successes, trials, share) == pytest.approx(
            expected, rel=1e-8, abs=1e-290
        )
    chances = random.random(50) ** 3
    np.testing.assert_allclose(balance.false_discovery_rates(list(chances)), false_discovery_control(chances))
    scores, good = random.integers(20, size=100).astype(float), random.random(100) < 0.3
    assert labels.skill_of(scores + good, good).area == pytest.approx(roc_auc_score(good, scores + good))

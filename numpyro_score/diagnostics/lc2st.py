r"""Local classifier two-sample test at one observation (l-C2ST, Linhart et al. 2023).

A classifier d is trained on pairs (truth, observation), label 1, and (posterior draw,
observation), label 0, of many simulations. If the posterior is exact at :math:`y_o`,
the optimal d is 1/2 there and the statistic

.. math:: t(y_o) = E_{x \sim q(\cdot | y_o)} (d(x, y_o) - 1/2)^2

is 0. Its null distribution is that of classifiers trained on pairs with labels of no
effect. In latent space, to which the posterior's flow maps truths, label 0 are standard
normal draws, and under the null hypothesis both labels are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_score.checks import check_count, check_key, check_rows_finite
from numpyro_score.diagnostics.c2st import import_sklearn
from numpyro_score.diagnostics.replicate import (
    as_dict,
    check_draws,
    flatten,
    loc_and_scale,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey


class LC2STResult(NamedTuple):
    """Result of :func:`lc2st`.

    - **statistic**: t(y_o), mean of (d - 1/2)^2, at most 1/4.
    - **p_value**: (1 + number of null statistics >= statistic) / (1 + num_null).
    - **null**: statistics under the null hypothesis.
    - **probabilities**: d at each draw given the observation, the estimated probability
      of label 1 (truth). Above 1/2 the posterior density is too low.
    """

    statistic: float
    p_value: float
    null: np.ndarray
    probabilities: np.ndarray


@renamed(key="rng_key")
def lc2st(
    rng_key: PRNGKey,
    truths: Any,
    draws: Any,
    observations: Any,
    observation: Any,
    draws_at: Any,
    *,
    num_null: int = 100,
    classifier: Any = None,
) -> LC2STResult:
    """Return the l-C2ST of a posterior at one observation.

    Args:
        rng_key: random key of labels and classifiers.
        truths: parameters, simulation on axis 0; an array or a dict of arrays.
        draws: one posterior draw for each simulation, shaped as the truths.
        observations: simulation on axis 0, an array or a dict of arrays.
        observation: the observation y_o of the test.
        draws_at: posterior draws given ``observation``, draw on axis 0.
        num_null: number of classifiers for the null distribution; the p-value is at
            least 1 / (num_null + 1).
        classifier: scikit-learn classifier with ``predict_proba``; None for a
            multilayer perceptron with early stopping.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for shapes that do not fit, or values that are not finite.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> normal = np.random.default_rng(0).normal
        >>> y = normal(size=(500, 1))
        >>> truths, draws, there = y + normal(size=(3, 500, 1))
        >>> result = lc2st(
        ...     jax.random.key(0), truths, draws + 0.5, y, y[0], there - y + y[0],
        ...     num_null=20, classifier=LogisticRegression(),
        ... )
        >>> result.p_value < 0.05
        True
    """
    check_key("rng_key", rng_key)
    as_draws = jax.tree.map(lambda a: np.asarray(a)[:, None], draws)
    first, second = check_draws(truths, as_draws)
    pair = np.stack([flatten(first, 1), flatten(second, 2)[:, 0]])
    points = flatten(as_dict(draws_at, "draws_at"), 1)
    if points.shape[1] != pair.shape[2]:
        raise ValueError(
            "`draws_at` must have the shape of `truths`, with draws on axis 0. "
            f"Got {points.shape[1]} numbers per draw and {pair.shape[2]}."
        )
    loc, scale = loc_and_scale(pair[0])
    pair, points = (pair - loc) / scale, (points - loc) / scale

    def null_pair(rng: np.random.Generator) -> np.ndarray:
        swap = rng.random((pair.shape[1], 1)) < 0.5
        return np.where(swap, pair[::-1], pair)

    return _test_at(
        rng_key,
        pair,
        null_pair,
        observations,
        observation,
        points,
        num_null,
        classifier,
    )


@renamed(key="rng_key", num_draws="num_samples")
def lc2st_latent(
    rng_key: PRNGKey,
    latents: Any,
    observations: Any,
    observation: Any,
    *,
    num_samples: int = 1000,
    num_null: int = 100,
    classifier: Any = None,
) -> LC2STResult:
    """Return the l-C2ST in latent space, where truths should be standard normal.

    The test of Linhart et al. 2023 for normalizing flows (l-C2ST-NF), here for the
    probability flow of a score. It needs no posterior draws.

    Args:
        rng_key: random key of normal draws, labels and classifiers.
        latents: truths encoded by the posterior's flow given their observations, see
            :func:`numpyro_score.solver.encode`; simulation on axis 0.
        observations: simulation on axis 0.
        observation: the observation y_o of the test.
        num_samples: standard normal draws over which the statistic averages.
        num_null: number of classifiers for the null distribution.
        classifier: as in :func:`lc2st`.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for shapes that do not fit, or values that are not finite.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> y, noise = np.random.default_rng(0).normal(size=(2, 400, 1))
        >>> result = lc2st_latent(
        ...     jax.random.key(0), noise + 0.6, y, np.array([2.0]),
        ...     num_null=20, classifier=LogisticRegression(),
        ... )
        >>> result.p_value < 0.05
        True
    """
    check_key("rng_key", rng_key)
    check_count("num_samples", num_samples, "a number of normal draws", least=2)
    rows = flatten(as_dict(latents, "latents"), 1)
    check_draws(rows, rows[:, None])
    rng = _generator(rng_key)
    points = rng.normal(size=(num_samples, rows.shape[1]))
    pair = np.stack([rows, rng.normal(size=rows.shape)])

    def null_pair(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=pair.shape)

    rng_key = jax.random.fold_in(rng_key, 1)
    return _test_at(
        rng_key,
        pair,
        null_pair,
        observations,
        observation,
        points,
        num_null,
        classifier,
    )


def _test_at(
    key: PRNGKey,
    pair: np.ndarray,
    null_pair: Callable[[np.random.Generator], np.ndarray],
    observations: Any,
    observation: Any,
    points: np.ndarray,
    num_null: int,
    classifier: Any,
) -> LC2STResult:
    """Return the test at ``observation`` from a classifier and its null copies."""
    context = flatten(as_dict(observations, "observations"), 1)
    rows = jax.tree.map(lambda value: np.asarray(value)[None], observation)
    at = np.concatenate([v.ravel() for v in as_dict(rows, "observation").values()])
    _check_fit(pair, context, at, points, num_null)
    loc, scale = loc_and_scale(context)
    context, at = (context - loc) / scale, (at - loc) / scale
    where = np.concatenate([points, np.broadcast_to(at, (len(points), len(at)))], 1)
    rng = _generator(key)

    def probabilities(pair: np.ndarray) -> np.ndarray:
        model = _clone(classifier, seed=int(rng.integers(2**31)))
        rows = np.concatenate([np.c_[side, context] for side in pair])
        labels = np.repeat([1, 0], len(context))
        return model.fit(rows, labels).predict_proba(where)[:, 1]

    found = probabilities(pair)
    every = np.array([probabilities(null_pair(rng)) for _ in range(num_null)])
    null = np.square(every - 0.5).mean(axis=1)
    statistic = float(np.square(found - 0.5).mean())
    p_value = float((1 + (null >= statistic).sum()) / (1 + num_null))
    return LC2STResult(statistic, p_value, null, found)


def _generator(key: PRNGKey) -> np.random.Generator:
    return np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))


def _clone(classifier: Any, seed: int) -> Any:
    """Return an untrained copy of the classifier with a seed."""
    if classifier is None:
        # larger: sees finer errors, slower; not tuned
        classifier = import_sklearn("neural_network").MLPClassifier(
            hidden_layer_sizes=(64, 64), early_stopping=True, max_iter=1000
        )
    model = import_sklearn("base").clone(classifier)
    if "random_state" in model.get_params():
        model.set_params(random_state=seed)
    return model


def _check_fit(
    pair: np.ndarray,
    context: np.ndarray,
    at: np.ndarray,
    points: np.ndarray,
    num_null: int,
) -> None:
    if len(context) != pair.shape[1]:
        raise ValueError(
            "`observations` must have a row for each of the truths. "
            f"Got {len(context)} and {pair.shape[1]}."
        )
    if context.shape[1] != at.size:
        raise ValueError(
            "`observation` must have the shape of one of `observations`. "
            f"Got {at.size} numbers and {context.shape[1]}."
        )
    check_count("num_null", num_null, "a number of classifiers")
    finite = {"observations": context, "observation": at[None], "draws_at": points}
    for name, values in finite.items():
        check_rows_finite(name, values)

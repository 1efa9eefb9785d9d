"""Laws whose scores are exact at every noise level of every process.

A law is a frozen dataclass with ``log_density``, ``score`` and ``denoised`` at a level
given by ``alpha`` and ``sigma`` (the law of alpha x_0 + sigma n), its moments and exact
draws of x_0. ``score_model`` makes a :class:`~numpyro_score.ScoreModel` of it. Laws and
their score functions are hashable, so equal ones share compiled programs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

from numpyro_score import SDE, ScoreModel


@dataclass(frozen=True)
class Gaussian:
    """Normal(mean, sd) with independent coordinates, of any event shape.

    Args:
        mean: nested tuples of the event shape, or a number.
        sd: standard deviations, of the same shape.
    """

    mean: tuple | float
    sd: tuple | float

    @property
    def event_shape(self) -> tuple[int, ...]:
        return np.shape(self.mean)

    def log_density(self, x, alpha=1.0, sigma=0.0):
        scale = jnp.sqrt(self.variances(alpha, sigma))
        return norm.logpdf(x, alpha * jnp.array(self.mean), scale).sum()

    def score(self, x, alpha=1.0, sigma=0.0):
        return (alpha * jnp.array(self.mean) - x) / self.variances(alpha, sigma)

    def denoised(self, x, alpha, sigma):
        """Return the conjugate posterior mean of x_0, not by way of the score."""
        precision = 1 / jnp.array(self.sd) ** 2 + alpha**2 / sigma**2
        prior = jnp.array(self.mean) / jnp.array(self.sd) ** 2
        return (prior + alpha * x / sigma**2) / precision

    def means(self, alpha=1.0, sigma=0.0):
        return alpha * jnp.array(self.mean)

    def variances(self, alpha=1.0, sigma=0.0):
        return (alpha * jnp.array(self.sd)) ** 2 + sigma**2

    def sample(self, key, shape=()):
        noise = jax.random.normal(key, (*shape, *self.event_shape))
        return jnp.array(self.mean) + jnp.array(self.sd) * noise

    def score_model(self, sde: SDE) -> ScoreModel:
        return ScoreModel.from_fn(ExactScore(self, sde), sde, self.event_shape)


@dataclass(frozen=True)
class Mixture:
    """Mixture of isotropic Gaussians on vectors.

    Args:
        weights: one per component, summing to 1.
        locs: one vector per component.
        scales: one standard deviation per component.
    """

    weights: tuple[float, ...]
    locs: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (len(self.locs[0]),)

    def _component_variances(self, alpha, sigma):
        """Return variances (components, dimensions); ``sigma`` may be a vector."""
        own = (alpha * jnp.array(self.scales))[:, None] ** 2
        return own + jnp.broadcast_to(sigma, self.event_shape) ** 2

    def _log_joint(self, x, alpha, sigma):
        scale = jnp.sqrt(self._component_variances(alpha, sigma))
        log_density = norm.logpdf(x, alpha * jnp.array(self.locs), scale).sum(-1)
        return jnp.log(jnp.array(self.weights)) + log_density

    def log_density(self, x, alpha=1.0, sigma=0.0):
        return logsumexp(self._log_joint(x, alpha, sigma))

    def responsibilities(self, x, alpha=1.0, sigma=0.0):
        """Return the posterior probability of every component at one point."""
        return jax.nn.softmax(self._log_joint(x, alpha, sigma))

    def score(self, x, alpha=1.0, sigma=0.0):
        pulls = alpha * jnp.array(self.locs) - x
        pulls = pulls / self._component_variances(alpha, sigma)
        return self.responsibilities(x, alpha, sigma) @ pulls

    def denoised(self, x, alpha, sigma):
        """Return E[x_0 | x_t] as the mean over components of conjugate updates."""
        own = jnp.array(self.scales)[:, None] ** 2
        gain = alpha * own / (alpha**2 * own + sigma**2)
        locs = jnp.array(self.locs)
        return self.responsibilities(x, alpha, sigma) @ (
            locs + gain * (x - alpha * locs)
        )

    def means(self, alpha=1.0, sigma=0.0):
        return alpha * jnp.array(self.weights) @ jnp.array(self.locs)

    def variances(self, alpha=1.0, sigma=0.0):
        weights, locs = jnp.array(self.weights), jnp.array(self.locs)
        between = weights @ (locs - weights @ locs) ** 2
        within = weights @ jnp.array(self.scales) ** 2
        return alpha**2 * (between + within) + sigma**2

    def sample(self, key, shape=()):
        key_component, key_noise = jax.random.split(key)
        logits = jnp.log(jnp.array(self.weights))
        component = jax.random.categorical(key_component, logits, shape=shape)
        noise = jax.random.normal(key_noise, (*shape, *self.event_shape))
        scales = jnp.array(self.scales)[component]
        return jnp.array(self.locs)[component] + scales[..., None] * noise

    def score_model(self, sde: SDE) -> ScoreModel:
        return ScoreModel.from_fn(ExactScore(self, sde), sde, self.event_shape)


@dataclass(frozen=True)
class ExactScore:
    """The function (x, t) -> score of a law under a process."""

    law: Gaussian | Mixture
    sde: SDE

    def __call__(self, x, t):
        return self.law.score(x, *self.sde.marginal(t))


class LinearProblem(NamedTuple):
    """Observations y = A x + sd n of a mixture, whose posterior is a mixture again.

    The law of Cardoso et al. 2024 (MCGDiff), section 5: 25 components on a grid.
    """

    weights: np.ndarray
    locs: np.ndarray
    operator: np.ndarray
    sd: float
    y: np.ndarray

    @classmethod
    def draw(
        cls,
        seed: int,
        dimension: int,
        num_observed: int,
        weights: np.ndarray | None = None,
    ) -> "LinearProblem":
        """Draw weights unless given, an operator, its noise and observations."""
        rng = np.random.default_rng(seed)
        square = rng.normal(size=25) ** 2
        weights = square / square.sum() if weights is None else weights
        locs = grid_locs(dimension)
        shape = (num_observed, dimension)
        left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        values = np.sort(rng.uniform(size=num_observed))[::-1]
        operator = left @ np.diag(values) @ right
        sd = rng.uniform() * values[0]
        x = locs[rng.choice(25, p=weights)] + rng.normal(size=dimension)
        y = operator @ x + sd * rng.normal(size=num_observed)
        return cls(weights, locs, operator, sd, y)

    @property
    def _evidence_covariance(self):
        return self.operator @ self.operator.T + self.sd**2 * np.eye(len(self.y))

    def _log_joint(self):
        """Return log weight plus log evidence of every component."""
        error = self.y - self.locs @ self.operator.T
        covariance = self._evidence_covariance
        square = np.einsum("ki,ki->k", error @ np.linalg.inv(covariance), error)
        log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
        return np.log(self.weights) - 0.5 * (square + log_det)

    def log_evidence(self):
        return float(logsumexp(jnp.asarray(self._log_joint())))

    def sample_posterior(self, seed: int, num: int) -> np.ndarray:
        """Draw exactly from the posterior, a mixture again."""
        rng = np.random.default_rng(seed)
        log_joint = self._log_joint()
        shares = np.exp(log_joint - log_joint.max())
        gain = self.operator.T @ np.linalg.inv(self._evidence_covariance)
        means = self.locs + (self.y - self.locs @ self.operator.T) @ gain.T
        component = rng.choice(25, p=shares / shares.sum(), size=num)
        # a draw of the prior, corrected by what it gets wrong of the data
        prior = rng.normal(size=(num, self.locs.shape[1]))
        noise = self.sd * rng.normal(size=(num, len(self.y)))
        return means[component] + prior - (prior @ self.operator.T + noise) @ gain.T


def grid_locs(dimension: int) -> np.ndarray:
    """Return the 25 points (8i, 8j, 8i, 8j, ...), i and j from -2 to 2."""
    pairs = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    return np.array([np.tile(pair, dimension // 2) for pair in pairs])


def sliced_wasserstein(a, b, seed=0, num_projections=1000):
    """Return the sliced Wasserstein-1 distance of two samples of equal size."""
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    return np.abs(np.sort(a @ directions, 0) - np.sort(b @ directions, 0)).mean()


STANDARD_NORMAL = Gaussian(0.0, 1.0)
GAUSSIAN = Gaussian((0.2, -0.3), (0.5, 1.2))
MIXTURE = Mixture(  # mean 0, about unit variance, modes of unequal weight
    weights=(0.3, 0.7),
    locs=((-1.26, -0.7), (0.54, 0.3)),
    scales=(0.3, 0.5),
)


def z_scores(draws, expected, slack=0.0):
    """Return how many Monte Carlo standard errors the mean of draws is off.

    ``draws`` are independent along the first axis; ``slack`` is the bias allowed.
    """
    draws = np.asarray(draws, float)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    excess = np.maximum(np.abs(draws.mean(axis=0) - np.asarray(expected)) - slack, 0)
    return excess / error


def assert_law(draws, law, alpha=1.0, sigma=0.0, *, num_errors=5.0, slack=0.0):
    """Check means, variances and mode weights of independent draws of a law.

    ``slack`` is the bias allowed, relative to the standard deviations.
    """
    mean, variance = law.means(alpha, sigma), law.variances(alpha, sigma)
    sd = np.sqrt(variance)
    assert np.all(z_scores(draws, mean, slack * sd) < num_errors)
    squares = (np.asarray(draws) - np.asarray(mean)) ** 2
    assert np.all(z_scores(squares, variance, 2 * slack * variance) < num_errors)
    if isinstance(law, Mixture):
        weigh = jax.jit(jax.vmap(lambda x: law.responsibilities(x, alpha, sigma)))
        z = z_scores(weigh(draws), law.weights, slack)
        assert np.all(z < num_errors)


@contextmanager
def unchecked() -> Iterator[None]:
    """Leave annotations unchecked, as for users, so that our own errors are seen."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)

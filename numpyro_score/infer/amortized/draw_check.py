r"""Check of draws given one observation, by the exact score of the model at them.

A net learns averages over simulations; given a rare observation it may be far off
without a sign of it. Where the model's joint density is tractable, its gradient
:math:`g = \nabla_z \log p(z, y)` tells. For draws z of the posterior, of any shape,
Stein's identities hold:

.. math:: E[g] = 0, \qquad -E[(z - E z)\, g^T] = I .

For draws of another law q with mean m and covariance C, and a posterior that is nearly
Gaussian where they lie, the left sides are :math:`H (\mu - m)` and :math:`C H`, with
:math:`\mu` and :math:`H^{-1}` the posterior's mean and covariance. So one gradient per
draw gives the error of the mean, in posterior sd, and the ratio of standard deviations.
Errors of the estimates are those of a jackknife over groups of draws.

Densities that jump in z do not satisfy the identities, and are not judged
(:mod:`~numpyro_score.infer.amortized.discontinuity`).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.amortized.discontinuity import has_discontinuities
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.objective import stein_residuals
from numpyro_score.infer.amortized.simulator import Simulations, Simulator, finite_rows

NUM_DRAWS = 1000  # whose gradients are computed; the model may be expensive
MIN_DRAWS = 64
DRAWS_PER_DIMENSION = 16  # below, the estimate of a covariance is noise
NUM_GROUPS = 8  # of the jackknife
NUM_ERRORS = 4.0  # standard errors beyond a limit: no alarm by chance
MAX_OFFSET = 0.5  # of the mean, in posterior sd
MAX_RATIO = 1.5  # of the sd, or its inverse
MIN_CURVATURE = 1e-9  # of a direction, over the largest
MAX_LOST = 0.01  # share of draws without a finite gradient; more are not judged
NAMED = 3  # coordinates in one warning
REMEDY = (
    "Use `importance` with its k-hat, MCMC from `warm_start`, `NPSE.fit_rounds` for "
    "this observation, or more simulations. `fit(check=False)` silences this."
)

Points = Float[np.ndarray, "rows size"]
Numbers = Float[np.ndarray, " size"]
Flags = Bool[np.ndarray, " size"]


class DrawErrors(NamedTuple):
    """Errors of draws by coordinate, each with its standard error.

    - **offset**: mean of the draws less that of the posterior, in posterior sd.
    - **offset_error**: standard error of ``offset``.
    - **log_ratio**: log of the sd of the draws over the posterior sd.
    - **log_ratio_error**: standard error of ``log_ratio``.
    """

    offset: Numbers
    offset_error: Numbers
    log_ratio: Numbers
    log_ratio_error: Numbers

    @property
    def is_off(self) -> Flags:
        """True where the mean is off by more than half an sd."""
        return np.abs(self.offset) > MAX_OFFSET + NUM_ERRORS * self.offset_error

    @property
    def has_wrong_width(self) -> Flags:
        """True where the sd is wrong by more than half."""
        limit = np.log(MAX_RATIO) + NUM_ERRORS * self.log_ratio_error
        return np.abs(self.log_ratio) > limit

    def words(self, names: Sequence[str]) -> str:
        """Return the worst coordinates in words; empty if nothing is found."""
        badness = np.maximum(self.is_off, self.has_wrong_width) * (
            np.abs(self.offset) + np.abs(self.log_ratio)
        )
        worst = [int(i) for i in np.argsort(-badness) if badness[i] > 0]
        texts = [f"{names[i]} {', '.join(self._sizes(i))}" for i in worst[:NAMED]]
        rest = len(worst) - len(texts)
        return "; ".join(texts) + (f"; and {rest} more" if rest else "")

    def _sizes(self, i: int) -> Iterator[str]:
        if self.is_off[i]:
            direction = "high" if self.offset[i] > 0 else "low"
            yield f"is off by about {abs(self.offset[i]):.1f} sd ({direction})"
        if self.has_wrong_width[i]:
            wide = self.log_ratio[i] > 0
            factor = np.exp(abs(self.log_ratio[i]))
            yield f"is about {factor:.1f} times too {'wide' if wide else 'narrow'}"


def draw_errors(z: Points, score: Points) -> DrawErrors | None:
    """Return the errors of draws, given the score of the posterior at them.

    None where the score has no peak between them, as for draws between modes.

    Args:
        z: draws.
        score: gradient of the log density in z.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(256, 2))
        >>> errors = draw_errors(z, -z)  # exact draws
        >>> errors.words(("a", "b"))
        ''
        >>> errors = draw_errors(3.0 + 2.0 * z, -(3.0 + 2.0 * z))
        >>> errors.offset.round(), np.exp(errors.log_ratio).round()
        (array([3., 3.]), array([2., 2.]))
    """
    group = np.arange(len(z)) * NUM_GROUPS // len(z)
    whole = _offset_and_log_ratio(z, score)
    parts = [
        _offset_and_log_ratio(z[group != i], score[group != i])
        for i in range(NUM_GROUPS)
    ]
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < NUM_GROUPS:
        return None
    jackknife = np.std(known, axis=0) * np.sqrt(NUM_GROUPS - 1)
    return DrawErrors(whole[0], jackknife[0], whole[1], jackknife[1])


def breaks_identities(z: Points, score: Points) -> bool:
    """Return whether Stein's identities fail by more than half and by no chance.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(256, 1))
        >>> breaks_identities(z, -z), breaks_identities(z, z)
        (False, True)
    """
    mean, error = stein_residuals(z, score)
    return bool((np.abs(mean) > MAX_OFFSET + NUM_ERRORS * error).any())


def describe_errors(names: Sequence[str], z: Points, score: Points) -> str:
    """Return in words how draws are wrong; empty if they are not.

    Also empty where nothing can be said: fewer draws than 64 or 16 for each dimension,
    or more than 1 % of scores not finite.

    Args:
        names: of the coordinates.
        z: draws.
        score: gradient of the log density in z.
    """
    good = finite_rows(z, score)
    count = num_judged(len(z), z.shape[1])
    if count == 0 or good.mean() < 1 - MAX_LOST:
        return ""
    z, score = z[good].astype(float), score[good].astype(float)
    errors = draw_errors(z, score)
    if errors is not None:
        return errors.words(names)
    return "no peak of its density is among them" * breaks_identities(z, score)


def num_judged(available: int, size: int) -> int:
    """Return how many of the draws are judged; 0 if they are too few.

    Example:
        >>> num_judged(5000, 2), num_judged(5000, 100), num_judged(63, 2)
        (1000, 1600, 0)
    """
    required = DRAWS_PER_DIMENSION * size
    if available < max(MIN_DRAWS, required):
        return 0
    return min(available, max(NUM_DRAWS, required))


def warn_of_wrong_draws(
    simulator: Simulator,
    z: Float[Array, "rows size"],
    contexts: Float[Array, "observations ..."],
    remedy: str = REMEDY,
) -> None:
    """Warn of draws that the score of the model shows to be wrong.

    Models without a tractable joint density, or with one that jumps, are not judged.

    Args:
        simulator: the model.
        z: draws in unconstrained space.
        contexts: the observations, independent given the latents.
        remedy: what to do, the end of the warning.
    """
    count = num_judged(*z.shape)
    if simulator.intractable or count == 0:
        return
    rows = np.asarray(z[:count])
    score = np.asarray(_scores(simulator, rows, contexts))
    found = describe_errors(coordinate_names(simulator.latents), rows, score)
    if not found:
        return
    one = np.asarray(contexts[0])
    given = np.broadcast_to(one, (len(rows), *one.shape))
    if not jumps_near(simulator, rows, given):
        warn_caller(
            "Given this observation the draws are not those of the posterior, by the "
            "exact score of the model at them (in unconstrained space, in posterior "
            f"sd): {found}. {remedy}"
        )


def jumps_near(
    simulator: Simulator, z: Points, contexts: Float[np.ndarray, "rows ..."]
) -> bool:
    """Return whether the joint density jumps near the finite ones of some points.

    Args:
        simulator: a model with a tractable joint density.
        z: latents in unconstrained space.
        contexts: observations, one per row.
    """
    good = finite_rows(z, contexts)
    return has_discontinuities(simulator, Simulations(z[good], contexts[good]))


def _offset_and_log_ratio(z: Points, score: Points) -> np.ndarray | None:
    """Return both for every coordinate; None if there is no posterior covariance."""
    centered = z - z.mean(axis=0)
    values, vectors = np.linalg.eigh(centered.T @ centered / len(z))
    if values[0] <= 0:
        return None
    root = vectors * np.sqrt(values)  # in its coordinates the draws have covariance I
    score = score @ root
    product = -np.linalg.solve(root, centered.T) @ score / len(z)
    curvature, directions = np.linalg.eigh((product + product.T) / 2)
    if curvature[0] <= MIN_CURVATURE * max(1.0, curvature[-1]):
        return None
    half = root @ directions / np.sqrt(curvature)  # times its transpose: covariance
    own_sd, posterior_sd = np.linalg.norm([root, half], axis=2)
    shift = half @ (directions.T @ score.mean(axis=0) / np.sqrt(curvature))
    return np.stack([-shift / posterior_sd, np.log(own_sd / posterior_sd)])


@partial(jax.jit, static_argnums=0)
def _scores(simulator: Simulator, z: Array, contexts: Array) -> Array:
    """Return the score of the posterior given all observations at every point."""
    fixed = jax.random.key(0)  # all latents were learned: none is drawn

    def log_density(row: Array) -> Array:
        joint = jax.lax.map(partial(simulator.log_joint, row), contexts).sum()
        if len(contexts) == 1:
            return joint
        prior = simulator.log_prior(row, fixed)  # which every term has
        return joint - (len(contexts) - 1) * prior

    return jax.vmap(jax.grad(log_density))(z)

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

Draws of density zero, or far below the others', are counted first: one of them can hide
all others in these averages, and a few decide means and standard deviations. Densities
that jump in z do not satisfy the identities
(:mod:`~numpyro_score.infer.amortized.discontinuity`), and they exaggerate errors where
the law is skewed. Given the former, and where the estimates are small or their errors
large, a few MCMC steps from the draws decide
(:mod:`~numpyro_score.infer.amortized.mcmc_check`), in unconstrained space and in the
units of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.data.rows import evenly_spaced
from numpyro_score.infer.amortized.discontinuity import (
    is_discontinuous,
    is_discontinuous_near,
)
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.mcmc_check import (
    barker_moves,
    differences,
    is_collapsed,
    scale_root,
    swapped_differences,
)
from numpyro_score.infer.amortized.objective import stein_residuals
from numpyro_score.infer.amortized.simulator import Simulator, finite_rows
from numpyro_score.model.latents import LatentLayout
from numpyro_score.reprs import join_first

NUM_DRAWS = 1000  # means within 1 / 1000^1/2 = 3 % of an sd; the model may be expensive
MIN_DRAWS = 64  # eight in each group of the jackknife
# sampling then changes an sd by a factor of 1 +- 1 / 16^1/2 at most, below MAX_RATIO
# (Marchenko and Pastur 1967)
DRAWS_PER_DIMENSION = 16
NUM_GROUPS = 8  # of the jackknife: a standard error within (1 / 14)^1/2 = 27 %
NUM_ERRORS = 4.0  # standard errors: Student's t of 7 degrees of freedom has .5 % beyond
MAX_OFFSET = 0.5  # of the mean, in posterior sd: a 95 % interval then covers 92 %
MAX_RATIO = 1.5  # of the sd, or its inverse: a 95 % interval then covers 81 or 99.7 %
# the same by MCMC steps, which do not exaggerate: it then covers 94 %, 87 or 99 %
MAX_MOVED_OFFSET, MAX_MOVED_RATIO = 0.3, 1.3
# of a direction, over the largest: float64 leaves seven digits of it
MIN_CURVATURE = 1e-9
MAX_LOST = 0.01  # without a finite gradient: more may hide a probability of .01
# of a density far below the others': moves a probability by .01 at most
MAX_OUTLIERS = 0.01
OUTLIER_DROP = 50.0  # of log density from its median, and for each dimension:
OUTLIER_DROP_PER_DIMENSION = 10.0  # in a funnel its sd is 1.5 each
# standard error above which MCMC steps decide: NUM_ERRORS of them are .4, about the
# limits .3 to log 1.5 = .4
MAX_ERROR = 0.1
# judged, evenly spaced: if 3 % are wrong, one is among them by 1 - .97^100 = 95 %
MAX_OBSERVATIONS = 100
NAMED = 3  # coordinates, or observations, in one warning
NO_PEAK = "no peak of its density is among them"
REMEDY = (
    "Use `importance` with its k-hat, MCMC from `warm_start`, `NPSE.fit_rounds` for "
    "this observation, or more simulations. `fit(check=False)` silences this."
)

Points = Float[np.ndarray, "rows size"]
Numbers = Float[np.ndarray, " size"]
Flags = Bool[np.ndarray, " size"]


class Limits(NamedTuple):
    """Errors that are large enough to be reported.

    - **offset**: of the mean, in posterior sd.
    - **ratio**: of the sd, or its inverse.
    """

    offset: float = MAX_OFFSET
    ratio: float = MAX_RATIO


MOVED_LIMITS = Limits(MAX_MOVED_OFFSET, MAX_MOVED_RATIO)


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
    def is_clear(self) -> bool:
        """True where the standard errors are small."""
        return bool(np.max([self.offset_error, self.log_ratio_error]) <= MAX_ERROR)

    def is_within(self, limits: Limits) -> bool:
        """Return whether no estimate is beyond the limits, by chance or not."""
        offset, log_ratio = np.abs(self.offset), np.abs(self.log_ratio)
        return bool((offset <= limits.offset).all()) and bool(
            (log_ratio <= np.log(limits.ratio)).all()
        )

    def is_off(self, limit: float) -> Flags:
        """Return where the mean is off by more than a limit."""
        return np.abs(self.offset) > limit + NUM_ERRORS * self.offset_error

    def has_wrong_width(self, limit: float) -> Flags:
        """Return where the sd, or its inverse, is wrong by more than a factor."""
        largest = np.log(limit) + NUM_ERRORS * self.log_ratio_error
        return np.abs(self.log_ratio) > largest

    def words(self, names: Sequence[str], limits: Limits = Limits()) -> str:
        """Return the worst coordinates in words; empty if nothing is found."""
        off, wrong = self.is_off(limits.offset), self.has_wrong_width(limits.ratio)
        badness = (off | wrong) * (np.abs(self.offset) + np.abs(self.log_ratio))
        worst = [int(i) for i in np.argsort(-badness) if badness[i] > 0]
        texts = [
            f"{names[i]} {', '.join(self._sizes(i, bool(off[i]), bool(wrong[i])))}"
            for i in worst
        ]
        return join_first(texts, NAMED)

    def _sizes(self, i: int, is_off: bool, has_wrong_width: bool) -> Iterator[str]:
        if is_off:
            direction = "high" if self.offset[i] > 0 else "low"
            yield f"is off by about {abs(self.offset[i]):.1f} sd ({direction})"
        if has_wrong_width:
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
    return _with_jackknife(_offset_and_log_ratio, z, score)


def moved_errors(before: Points, after: Points) -> DrawErrors:
    """Return the errors of draws, by where exact MCMC steps take them.

    Args:
        before: the draws.
        after: where the steps took them.
    """
    errors = _with_jackknife(differences, before, after)
    assert errors is not None
    return errors


def moved_words(
    names: Sequence[str],
    before: Points,
    after: Points,
    *,
    limits: Limits = MOVED_LIMITS,
) -> str:
    """Return in words how MCMC steps change draws; empty if they do not beyond chance.

    Errors of a few wild draws have large standard errors: what pairs that are swapped
    at random do not reach is no chance, either.

    Args:
        names: of the coordinates.
        before: the draws.
        after: where the steps took them.
        limits: of errors.
    """
    errors = moved_errors(before, after)
    if found := errors.words(names, limits):
        return found
    sizes = np.stack([errors.offset, errors.log_ratio])
    large = np.abs(sizes) > np.array([[limits.offset], [np.log(limits.ratio)]])
    columns = large.any(axis=0)
    if not columns.any():
        return ""
    chance = swapped_differences(before[:, columns], after[:, columns])
    sure = np.where(np.abs(sizes) > chance[:, None], sizes, 0.0)
    return _sure_words(names, *sure, limits=limits)


def outlier_words(
    names: Sequence[str],
    is_outlier: Bool[np.ndarray, " rows"],
    z: Points,
    *,
    limits: Limits = MOVED_LIMITS,
) -> str:
    """Return in words how a few outliers change means and sd; empty for little.

    Args:
        names: of the coordinates.
        is_outlier: which draws no exact ones would be.
        z: draws.
        limits: of errors.

    Example:
        >>> z = np.linspace(-1.0, 1.0, 1000)[:, None]
        >>> outlier_words(["z"], np.arange(1001) > 999, np.append(z, [[50.0]], axis=0))
        'z is about 2.9 times too wide'
    """
    if not is_outlier.any() or is_outlier.mean() > MAX_OUTLIERS:
        return ""
    rest = z[~is_outlier]
    sd, shift = rest.std(0), z.mean(0) - rest.mean(0)
    if not sd.all():
        return ""
    return _sure_words(names, shift / sd, np.log(z.std(0) / sd), limits=limits)


def _sure_words(
    names: Sequence[str], offset: Numbers, log_ratio: Numbers, *, limits: Limits
) -> str:
    """Return errors in words that are no chance."""
    none = np.zeros(len(offset))
    return DrawErrors(offset, none, log_ratio, none).words(names, limits)


def are_outliers(
    log_density: Float[np.ndarray, " rows"], size: int
) -> Bool[np.ndarray, " rows"]:
    """Return of which draws the density is zero, NaN, or far below the others'.

    That is 50 and 10 for each dimension below their median, in its logarithm. Exact
    draws do not fall so low, also those of a funnel.

    Args:
        log_density: of the posterior at the draws, up to a constant.
        size: dimension.

    Example:
        >>> are_outliers(np.array([0.0, -1.0, -2.0, -99.0, np.nan]), 2)
        array([False, False, False,  True,  True])
    """
    values = np.where(np.isnan(log_density), -np.inf, log_density)
    limit = np.median(values) - OUTLIER_DROP - OUTLIER_DROP_PER_DIMENSION * size
    return np.asarray((values < limit) | np.isneginf(values))


def breaks_identities(z: Points, score: Points) -> bool:
    """Return whether Stein's identities fail by more than half and by no chance.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(256, 1))
        >>> breaks_identities(z, -z), breaks_identities(z, z)
        (False, True)
    """
    mean, error = stein_residuals(z, score)
    return bool((np.abs(mean) > MAX_OFFSET + NUM_ERRORS * error).any())


class ExactDensity(NamedTuple):
    """Density of the posterior at its draws, and what else it tells of them.

    - **log_values**: logarithms, up to a constant.
    - **scores**: their gradients.
    - **is_discontinuous**: whether it jumps near simulations.
    - **is_discontinuous_near**: returns whether it jumps near the draws.
    - **move**: returns where MCMC steps take draws, given the root of a covariance.
    - **size**: dimension of the law whose density ``log_values`` are of.
    - **num_moved**: largest number of draws from which MCMC steps start.
    - **constrain**: returns the values of draws in the units of the model, of the same
      shape; None for a law whose values have another.
    """

    log_values: Float[np.ndarray, " rows"]
    scores: Points
    is_discontinuous: bool
    is_discontinuous_near: Callable[[], bool]
    move: Callable[[Points, np.ndarray], Array]
    size: int
    num_moved: int = NUM_DRAWS
    constrain: Callable[[Points], Points] | None = None


def find_errors(names: Sequence[str], z: Points, density: ExactDensity) -> str:
    """Return in words how draws are wrong, by their density; empty if they are not.

    Args:
        names: of the coordinates.
        z: draws.
        density: of the posterior at them.
    """
    good = finite_rows(z, density.scores)
    rows, scores = z[good].astype(float), density.scores[good].astype(float)
    is_lost = good.mean() < 1 - MAX_LOST
    errors = None if is_lost else draw_errors(rows, scores)
    found = errors.words(names) if errors else ""
    outliers = are_outliers(density.log_values, density.size)
    low = "of them have a density of zero, or far below the others'"
    if outliers.mean() > MAX_OUTLIERS:
        sizes = f"; {found}" if found and not density.is_discontinuous else ""
        return f"{outliers.mean():.0%} {low}{sizes}"
    words = partial(outlier_words, names, outliers)
    if wild := _words_in_units(words, density.constrain, z.astype(float)):
        return f"{outliers.mean():.1%} {low}, by which {wild}"
    if is_collapsed(z):
        return "some number is the same in most of them"
    is_right = errors and errors.is_clear and errors.is_within(MOVED_LIMITS)
    if is_right and not density.is_discontinuous:
        return ""
    discontinuous = density.is_discontinuous or density.is_discontinuous_near()
    if found and not discontinuous:
        return found
    start = z[: density.num_moved]
    after = np.asarray(density.move(start, scale_root(z)))
    words = partial(moved_words, names)
    found = _words_in_units(words, density.constrain, start, after)
    if found or errors or discontinuous or is_lost:
        return found
    return NO_PEAK * breaks_identities(rows, scores)


def _words_in_units(
    words: Callable[..., str],
    constrain: Callable[[Points], Points] | None,
    *points: Points,
) -> str:
    """Return words on points, or else on their values in the units of the model."""
    if found := words(*points):
        return found
    values = [] if constrain is None else [constrain(x) for x in points]
    if not all(np.isfinite(x).all() and not is_collapsed(x) for x in values):
        return ""
    # the same error is larger in units of a long tail, as of a log-normal law
    found = words(*values, limits=Limits()) if values else ""
    return found and f"{found} (of its values in the model)"


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

    Models without a tractable joint density are not judged.

    Args:
        simulator: the model.
        z: draws in unconstrained space.
        contexts: the observations, independent given the latents.
        remedy: what to do, the end of the warning.
    """
    count = num_judged(*z.shape)
    if simulator.intractable or count == 0:
        return
    if found := _find_errors(simulator, np.asarray(z[:count]), contexts):
        warn_caller(
            "Given this observation the draws are not those of the posterior, by the "
            "exact density of the model at them (in unconstrained space, in posterior "
            f"sd): {found}. {remedy}"
        )


def warn_of_wrong_rows(
    simulator: Simulator,
    z: Float[Array, "observations rows size"],
    contexts: Float[Array, "observations ..."],
) -> None:
    """Warn of draws given each of many observations, as :func:`warn_of_wrong_draws`.

    Given more than 100 observations, 100 of them are judged.

    Args:
        simulator: the model.
        z: draws in unconstrained space, given each observation.
        contexts: the observations.
    """
    count = num_judged(*z.shape[1:])
    if simulator.intractable or count == 0:
        return
    texts, judged = [], evenly_spaced(len(z), MAX_OBSERVATIONS).tolist()
    for j in judged:
        if found := _find_errors(
            simulator, np.asarray(z[j, :count]), contexts[j : j + 1]
        ):
            texts.append(f"in row {j}, {found}")
    rest = len(texts) - NAMED
    if texts:
        named = "; ".join(texts[:NAMED]) + (f"; and in {rest} more" if rest > 0 else "")
        warn_caller(
            f"Given {len(texts)} of the {len(judged)} observations that were judged "
            "the draws are not those of the posterior, by the exact density of the "
            "model at them (in unconstrained space, in posterior sd): "
            f"{named}. {REMEDY}"
        )


def _find_errors(
    simulator: Simulator, z: Points, contexts: Float[Array, "observations ..."]
) -> str:
    """Return in words how draws are wrong; empty if they are not."""
    values, scores = map(np.asarray, _densities(simulator, z, contexts))
    one = np.asarray(contexts[0])
    given = np.broadcast_to(one, (len(z), *one.shape))
    density = ExactDensity(
        values,
        scores,
        is_discontinuous(simulator),
        partial(is_discontinuous_near, simulator, z, given),
        lambda z, root: _moved(simulator, z, root, contexts),
        z.shape[1],
        constrain=_constrain_of(simulator.latents),
    )
    return find_errors(coordinate_names(simulator.latents), z, density)


def _constrain_of(latents: LatentLayout) -> Callable[[Points], Points] | None:
    """Return the map of draws to values, None where these have another shape."""
    if any(site.shape != site.unconstrained_shape for site in latents.sites):
        return None

    def constrain(z: Points) -> Points:
        values = latents.unflatten(jnp.asarray(z)).values()
        parts = [np.reshape(np.asarray(v, float), (len(z), -1)) for v in values]
        return np.concatenate(parts, axis=1)

    return constrain


def _with_jackknife(
    statistic: Callable[[Points, Points], np.ndarray | None], x: Points, y: Points
) -> DrawErrors | None:
    """Return offset and log ratio with standard errors; None where there are none."""
    group = np.arange(len(x)) * NUM_GROUPS // len(x)
    whole = statistic(x, y)
    parts = [statistic(x[group != i], y[group != i]) for i in range(NUM_GROUPS)]
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < NUM_GROUPS:
        return None
    jackknife = np.std(known, axis=0) * np.sqrt(NUM_GROUPS - 1)
    return DrawErrors(whole[0], jackknife[0], whole[1], jackknife[1])


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


def _log_density(simulator: Simulator, contexts: Array, z: Array) -> Array:
    """Return the log density of the posterior given all observations, unnormalized."""
    joint = jax.lax.map(partial(simulator.log_joint, z), contexts).sum()
    if len(contexts) == 1:
        return joint
    prior = simulator.log_prior(z)  # which every term has
    return joint - (len(contexts) - 1) * prior


@partial(jax.jit, static_argnums=0)
def _densities(
    simulator: Simulator, z: Array, contexts: Array
) -> tuple[Float[Array, " rows"], Float[Array, "rows size"]]:
    """Return the log density of the posterior and its gradient at every point."""
    return jax.vmap(jax.value_and_grad(partial(_log_density, simulator, contexts)))(z)


@partial(jax.jit, static_argnums=0)
def _moved(
    simulator: Simulator, z: Array, root: Array, contexts: Array
) -> Float[Array, "rows size"]:
    """Return where MCMC steps take every point; the same at every call."""
    log_density = partial(_log_density, simulator, contexts)
    return barker_moves(log_density, jax.random.key(0), jnp.asarray(z), root)

r"""Langevin steps for shared latents, with the composed score of all groups.

At a noise level r, low against the posterior given one group,
:math:`g_j(x) = (I + r^2 \Lambda_j) s_r(x | y_j)` is the score given group j without
noise, up to terms in :math:`r^2` that vanish for Gaussian posteriors. The posterior
given J groups has the score

.. math:: g(x) = \nabla \log p(x)
          + M \sum_j \big( g_j(x) - g_\lambda(x) - \epsilon(x) \big),

where :math:`g_\lambda` is the score of the prior by the same net, without context:
where the net extrapolates, its errors are alike and cancel. If it is exact,
:math:`\epsilon = 0` and M = I, and the score of the prior has the factor 1 - J.

*Batches.* A batch of M groups estimates the sum by

.. math:: \sum_j g_j(c) + \frac{J}{M} \sum_m \big(g_m(x) - g_m(c)\big),

c being the mean of the particles (control variates: Baker et al. 2019, SGLD-CV). Its
noise in units of the posterior does not grow with J, while that of a batch without c
grows with :math:`(J/M)^{1/2}`.

*Errors of the net.* The score of a likelihood, :math:`l(x, y) = g(x, y) -
g_\lambda(x)`, has two known moments over observations y of the model given x: its mean
is 0, and its covariance V is K, the slope at x' = x of its mean given x'. By as much as
a net fails the first, its errors add up over groups, and the mean of the posterior is
off by :math:`J^{1/2}` times that; by its slope in x, or by the second, its sd is wrong.
All are mended by n groups that are simulated at c, and n around it: :math:`\epsilon(x)`
is the mean of l, linear in x, and :math:`M = K^T V^{-1}`, after which they hold again,
with :math:`-K` as the slope of l. No derivative of the net enters, which is poor where
its values are good. The mean is then consistent for any net, as the root of unbiased
estimating equations, with the covariance :math:`(J K^T V^{-1} K)^{-1}` of Godambe
(1960; for posteriors Ribatet, Cooley and Davison 2012). The simulations leave a
standard error :math:`(J/4n)^{1/2}` of the mean, in posterior sd: the last four of five
rounds are averaged. A correction around one point is right only for narrow posteriors:
where the sd is not below .84 of the prior's in every coordinate there is none.

*Stray particles.* A composed score may point outward where no net has seen groups such
as all of these. Center and metric are those of the particles near the median, the
metric is not wider than the mean slope of the score has it, and particles of narrow
posteriors that are far from all others are replaced.

At the end Stein's identities :math:`E[g] = 0` and :math:`E[g (x - E x)^T] = -I` are
tested on the particles: they hold for every posterior whose score is g.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import expm1, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.infer.amortized.sampling import map_in_batches
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import Position, PRNGKey, Scalar

Particles = Float[Array, "particles size"]
Matrix = Float[Array, "size size"]

# over the sd given one group, in its narrowest direction. The error of the score is of
# order r^2, and vanishes for normal laws; that of a net in (D - x) / r^2 grows as r
# falls: with 0.01 prior sd, particles given eight schools left for 1000 sd of the prior
LEVEL = 0.1
# of groups that are simulated around the center, over the same sd: with 10,000 of them
# a slope is within 1 / (.5 10,000^1/2) = 2 %; larger: less local; not tuned
SPREAD = 0.5
# in relaxation times; exact for a normal law; larger: more bias else; not tuned
STEP = 0.1
NUM_ROUNDS = 5  # each begins with a new center and metric
# two relaxation times: e^-2 = 14 % of an error is left by a round, e^-10 by all
ROUND_STEPS = 20
EVALUATIONS_AT_ONCE = 16_384  # particles times groups; bounds memory
# posterior sd per relaxation time: a step moves 50 (1 - e^-.1) = 5 sd at most
MAX_DRIFT = 50.0
# E[g] in inverse posterior sd: of 256 particles, 4 standard errors of 1/16
MAX_MEAN = 0.25
# of |E[g (x - E x)^T] + I|: of 256 particles, 5 standard errors of (2 / 256)^1/2 = .09
MAX_WIDTH = 0.5
MAX_NOISE = 0.1  # of the variance of the draws, added by batches: an sd 5 % too wide
# of the posterior over the prior's, to correct errors of the net: what is linear around
# the center is wrong far from it. At .25 tau of eight schools is .4 sd off, at .7 .2
MAX_VARIANCE = 0.7
MAX_ERROR = 0.2  # of the mean in posterior sd: a 95 % interval then covers 94.5 %
# robust sd from the median, beyond which particles do not count in center and metric:
# of normal ones 1 in 16,000. One stray particle of the flow at 100 sd would widen the
# metric sixfold, with which the next steps send others away
MAX_DISTANCE = 4.0
# beyond which they are replaced, if the posterior is narrow: where many groups were
# rarely simulated their composed score may point outward. A law with tails like x^-4
# loses 2 / (pi 10) = 6 % of its variance, narrower ones less; not tuned
STRAY_DISTANCE = 10.0
MAX_STRAY = 0.05  # of the particles; more may be a mode, if prior draws reach it
# of metric times precision, 1 for a normal law; above, the metric is made narrower
MAX_SLOPE = 2.0
# of the box, beyond it: no prior draws, so no simulations. Farther off neither the net
# nor the score of the prior is followed; wider: steeper tails of the latter; not tuned
BOX_MARGIN = 0.5
IQR_OF_NORMAL = 1.349  # interquartile range in sd


class Convergence(NamedTuple):
    """Distances of the draws from the posterior of the composed score.

    - **mean**: largest component of E[g], in inverse posterior sd; 0 at the end.
    - **width**: largest absolute entry of :math:`E[g (x - E x)^T] + I`.
    - **noise**: share of the variance of the draws that batches of groups added.
    - **error**: standard error of the mean by the simulations that correct it, in
      posterior sd; 0 without.
    """

    mean: Scalar
    width: Scalar
    noise: Scalar
    error: Scalar

    @property
    def ok(self) -> Bool[Array, ""]:
        """True for draws that have converged."""
        return jnp.asarray((self.mean < MAX_MEAN) & (self.width < MAX_WIDTH))

    def warn(self, batch_size: int, num_simulations: int) -> None:
        """Warn of draws that have not converged; do nothing for traced values."""
        if is_traced(self):
            return
        if not self.ok:
            warn_caller(
                "The shared latents have not converged to the posterior of the "
                "composed score: it may have several modes, or the net's error is "
                "large where the groups agree. The draws are those of the probability "
                "flow alone, which is approximate. Train on more simulations, and "
                "compare with fewer groups. Got a mean score of "
                f"{float(self.mean):.2g} (at most {MAX_MEAN}) in inverse posterior sd, "
                f"and a width off by {float(self.width):.2g} (at most {MAX_WIDTH})."
            )
        if not self.noise < MAX_NOISE:
            warn_caller(
                "Batches of groups add noise to the shared latents. Pass a larger "
                f"`batch_size`. Got {batch_size}, with which "
                f"{100 * float(self.noise):.0f} % of the variance are added."
            )
        if not self.error < MAX_ERROR:
            more = num_simulations * (float(self.error) / MAX_ERROR) ** 2
            warn_caller(
                "The mean of the shared latents is known less well than their "
                "posterior sd allows, as the simulations that correct the net's mean "
                "error are few for so many groups. Pass `num_simulations` of "
                f"{more:.1g} or more. Got {num_simulations}, with a standard error of "
                f"{float(self.error):.2g} posterior sd (at most {MAX_ERROR})."
            )


class Groups(NamedTuple):
    """Groups of one data set, and what the composition requires of them.

    - **contexts**: observations, one group per row.
    - **precisions**: inverse covariance of the shared latents given one group: one for
      each group, or a single one, the mean.
    - **prior_precision**: inverse covariance of the prior.
    """

    contexts: Float[Array, "groups ..."]
    precisions: Float[Array, "_ size size"]
    prior_precision: Matrix


@dataclass(frozen=True)
class ComposedScore:
    """The score of standardized shared latents given all groups, and estimates of it.

    Args:
        score: the score given one group, and without context of the prior.
        prior_score: the score of the prior without noise, of one standardized point.
        simulate: (key, x) -> context of a simulated group; None not to correct.
        groups: all groups.
        batch_size: groups of one batch.
        num_simulations: simulated groups at a center.
        box: lowest and highest prior draws. It was not trained beyond: there the
            score of the likelihood is that at the edge.
    """

    score: ScoreModel
    prior_score: Callable[[Position], Position]
    simulate: Callable[[PRNGKey, Position], Array] | None
    groups: Groups
    batch_size: int
    num_simulations: int = 0
    box: Any = None

    def inside(self, x: Position) -> Position:
        """Return the nearest point in the box."""
        return x if self.box is None else jnp.clip(x, *self.box)

    @property
    def count(self) -> float:
        """The number of groups, whose square may exceed the largest integer."""
        return float(len(self.groups.contexts))

    @property
    def level(self) -> Scalar:
        """The noise level r, one for all groups, so that errors cancel."""
        highest = jnp.linalg.eigvalsh(self.groups.precisions)[:, -1].mean()
        return jnp.maximum(LEVEL / jnp.sqrt(highest), self.score.sde.sigma_min)

    def within(self, x: Particles) -> Particles:
        """Return particles not farther beyond the box than half of its width."""
        if self.box is None:
            return x
        margin = BOX_MARGIN * (self.box[1] - self.box[0])
        return jnp.clip(x, self.box[0] - margin, self.box[1] + margin)

    def learned_prior(self, x: Position) -> Position:
        """Return the score of the prior by the net."""
        return self.one(x, None, self.groups.prior_precision)

    def one(self, x: Position, context: Array | None, precision: Matrix) -> Position:
        """Return (I + r^2 Lambda) (D - x) / r^2 given one group."""
        x, level = self.inside(x), self.level
        denoised = self.score.denoiser(x, level, context)
        noisy = (denoised - x) / level**2
        return noisy + level**2 * precision @ noisy

    def of_groups(self, x: Position, index: Array) -> Float[Array, "batch size"]:
        """Return the scores of some groups at one point."""
        contexts, precisions, _ = self.groups
        rows = precisions[index % len(precisions)]
        return jax.vmap(self.one, (None, 0, 0))(x, contexts[index], rows)

    def total(self, center: Position) -> Position:
        """Return the sum over all groups at one point, in batches."""
        if self.count <= self.batch_size:  # not needed
            return jnp.zeros_like(center)
        each = map_in_batches(
            lambda j: self.of_groups(center, j[None])[0],
            jnp.arange(len(self.groups.contexts)),
            EVALUATIONS_AT_ONCE,
        )
        return each.sum(0)

    def batch(
        self, key: PRNGKey, x: Particles, center: Position, total: Position
    ) -> tuple[Particles, Particles]:
        """Return the sum over all groups at every particle, and its variance."""
        count, size = len(self.groups.contexts), min(self.batch_size, int(self.count))
        everything = count <= self.batch_size
        index = (
            jnp.arange(count)
            if everything
            else jax.random.randint(key, (size,), 0, count)
        )
        known = self.of_groups(center, index)

        def estimate(x: Position) -> tuple[Position, Position]:
            each = self.of_groups(x, index)
            if everything:
                return each.sum(0), jnp.zeros_like(x)
            change = each - known
            noise = self.count**2 * change.var(0) / size
            return total + self.count * change.mean(0), noise

        at_once = max(1, EVALUATIONS_AT_ONCE // size)
        return map_in_batches(estimate, x, at_once)

    def simulated(self, key: PRNGKey, center: Position) -> "ScoreMoments":
        """Return moments of the scores of groups simulated around a point."""
        if self.simulate is None or self.num_simulations == 0:
            return ScoreMoments.exact(center.size)
        precision, spread = self.groups.precisions.mean(0), SPREAD / LEVEL * self.level

        def likelihood(x: Position, context: Array) -> Position:
            return self.one(x, context, precision) - self.learned_prior(x)

        def one(key: PRNGKey) -> Float[Array, "4 size"]:
            assert self.simulate is not None
            key_offset, key_context = jax.random.split(key)
            noise = jax.random.normal(key_offset, center.shape)
            x = self.inside(center + spread * noise)
            # with one key both are nearly alike, so that slopes have little noise
            here, there = (self.simulate(key_context, at) for at in (center, x))
            known, other = likelihood(center, here), likelihood(center, there)
            changes = likelihood(x, there) - known, other - known
            return jnp.stack([known, *changes, x - center])

        keys = jax.random.split(key, self.num_simulations)
        rows = map_in_batches(one, keys, EVALUATIONS_AT_ONCE // 3)
        # failed simulations are left out
        finite = jnp.isfinite(rows).all((1, 2))
        used = jnp.where(finite[:, None, None], rows, 0.0)
        known, moved, information, offset = jnp.swapaxes(used, 0, 1)
        weight = finite / jnp.maximum(finite.sum(), 1)
        mean, slope = weight @ known, _slope(weight, offset, moved)
        return ScoreMoments(
            mean - center @ slope,
            slope,
            (known.T * weight) @ known - jnp.outer(mean, mean),
            _slope(weight, offset, information).T,
        )


def _slope(weight: Float[Array, " rows"], x: Particles, y: Particles) -> Matrix:
    """Return the matrix B of the weighted regression of y on x B."""
    x = x - weight @ x
    floor = jnp.finfo(x.dtype).tiny ** 0.5 * jnp.eye(x.shape[1])
    return jnp.linalg.solve((x.T * weight) @ x + floor, (x.T * weight) @ y)


class ScoreMoments(NamedTuple):
    """Moments of the learned score l of the likelihood of one group, near a point.

    - **mean**: its mean over groups simulated at x, 0 if it is exact, is that
    - **slope**: plus x times this matrix.
    - **covariance**: V, the Fisher information if it is exact.
    - **information**: K, the slope in x of its mean at the point over groups simulated
      at x; the same if it is exact.
    """

    mean: Position
    slope: Matrix
    covariance: Matrix
    information: Matrix

    @classmethod
    def exact(cls, size: int) -> "ScoreMoments":
        """Return the moments of an exact score, in its own units."""
        none, identity = jnp.zeros((size, size)), jnp.eye(size)
        return cls(none[0], none, identity, identity)

    def if_(self, condition: Bool[Array, ""]) -> "ScoreMoments":
        """Return the moments if a condition holds, else those of an exact score."""
        exact = ScoreMoments.exact(len(self.mean))
        return jax.tree.map(lambda own, e: jnp.where(condition, own, e), self, exact)

    def adjustment(self) -> Matrix:
        """Return :math:`K^T V^{-1}`, with singular values limited to [1/2, 2].

        Outside, a coordinate has hardly any information, and V is that of errors. The
        identity if it turned a direction round: the score would then repel.
        """
        size = len(self.mean)
        floor = jnp.finfo(self.mean.dtype).tiny ** 0.5 * jnp.eye(size)
        matrix = jnp.linalg.solve(self.covariance + floor, self.information).T
        left, values, right = jnp.linalg.svd(matrix)
        limited = (left * jnp.clip(values, 0.5, 2.0)) @ right
        attracts = jnp.linalg.eigvalsh(limited + limited.T)[0] > 0
        return jnp.where(attracts, limited, jnp.eye(size))


def langevin(
    rng_key: PRNGKey, x: Particles, target: ComposedScore
) -> tuple[Particles, Convergence]:
    """Return particles after preconditioned Langevin steps with all groups.

    Args:
        rng_key: random key.
        x: standardized particles.
        target: the score.
    """

    def round_(state: tuple, row: tuple) -> tuple[tuple, Convergence]:
        (x, known), (number, key) = state, row
        key_error, key_steps, key_stray = jax.random.split(key, 3)
        bulk = winsorized(x)
        new = target.simulated(key_error, bulk.mean(0))
        # the average over rounds, without the first, whose center is far
        rounds = jnp.maximum(number, 1.0)
        moments = jax.tree.map(lambda k, n: k + (n - k) / rounds, known, new)
        narrow = bulk.var(0) * jnp.diag(target.groups.prior_precision) < MAX_VARIANCE
        used = moments.if_(narrow.all())
        x = jnp.where(narrow.all(), without_strays(key_stray, x, target.box), x)
        x, found = _langevin_round(key_steps, x, target, used)
        error = found.error / jnp.sqrt(rounds * max(target.num_simulations, 1))
        error = jnp.where(narrow.all(), error, 0.0)
        return (x, moments), found._replace(error=error)

    empty = jnp.zeros((x.shape[1], x.shape[1]))
    start: Any = x, ScoreMoments(empty[0], empty, empty, empty)
    rows = jnp.arange(NUM_ROUNDS), jax.random.split(rng_key, NUM_ROUNDS)
    (x, _), rounds = jax.lax.scan(round_, start, rows)
    last = jax.tree.map(lambda values: values[-1], rounds)
    exact = target.num_simulations == 0
    return x, last._replace(error=jnp.zeros(())) if exact else last


def _langevin_round(
    rng_key: PRNGKey, x: Particles, target: ComposedScore, moments: ScoreMoments
) -> tuple[Particles, Convergence]:
    """Return particles after the steps of one round; the error is that of one group.

    A step is exact, whatever its size, for a normal law whose covariance is that of the
    particles: :math:`x' = x + (1 - e^{-h}) C g + (1 - e^{-2h})^{1/2} C^{1/2} n`.
    """
    move, spread = -expm1(-STEP), sqrt(-expm1(-2 * STEP))
    bulk, adjust = winsorized(x), moments.adjustment()
    center = bulk.mean(0)
    total = target.total(center)

    def score(key: PRNGKey, x: Particles) -> tuple[Particles, Particles]:
        sums, variance = target.batch(key, x, center, total)
        prior = jax.vmap(target.prior_score)(x)
        known = jax.vmap(target.learned_prior)(x)
        error = moments.mean + x @ moments.slope
        likelihood = sums - target.count * (known + error)
        return prior + likelihood @ adjust.T, variance

    key_metric, key_steps = jax.random.split(rng_key)
    root = metric_root(bulk, score(key_metric, bulk)[0])

    def step(x: Particles, key: PRNGKey) -> tuple[Particles, tuple]:
        key_batch, key_noise = jax.random.split(key)
        g, variance = score(key_batch, x)
        drift = g @ root  # in posterior sd
        offset = solve_triangular(root, (x - x.mean(0)).T, lower=True)
        added = (0.5 * STEP * variance @ jnp.square(root)).mean()
        noise = jax.random.normal(key_noise, x.shape)
        limited = jnp.clip(drift, -MAX_DRIFT, MAX_DRIFT)
        moved = target.within(x + (move * limited + spread * noise) @ root.T)
        return moved, (drift.mean(0), offset @ drift / len(x), added)

    keys = jax.random.split(key_steps, ROUND_STEPS)
    x, (mean, stein, noise) = jax.lax.scan(step, x, keys)
    width = jnp.abs(stein.mean(0) + jnp.eye(x.shape[1])).max()
    scale = target.count * root.T @ adjust
    error = jnp.einsum("ab,bc,ac->a", scale, moments.covariance, scale).max()
    found = jnp.abs(mean.mean(0)).max(), width, noise.mean(), jnp.sqrt(error)
    return x, Convergence(*found)


def metric_root(x: Particles, score: Particles) -> Matrix:
    """Return the lower root of the particles' covariance, less where it is too wide.

    The mean slope of the score, by Stein's identity, is minus the precision of a normal
    posterior, also at particles that are wider. Steps in a metric 20 times too wide are
    unstable.

    Args:
        x: particles.
        score: of the posterior at them.

    Example:
        >>> x = 3 * jax.random.normal(jax.random.key(0), (4000, 1))
        >>> bool(jnp.abs(metric_root(x, -x) - 1) < 0.1)
        True
    """
    root = jnp.linalg.cholesky(particle_covariance(x))
    u = solve_triangular(root, (x - x.mean(0)).T, lower=True)
    drift = jnp.clip(score @ root, -MAX_DRIFT, MAX_DRIFT)
    slope = -u @ (drift - drift.mean(0)) / len(x)
    values, vectors = jnp.linalg.eigh((slope + slope.T) / 2)
    shrink = jnp.where(values > MAX_SLOPE, 1 / values, 1.0)
    covariance = (root @ vectors * shrink) @ (root @ vectors).T
    return jnp.where(values[-1] > MAX_SLOPE, jnp.linalg.cholesky(covariance), root)


def winsorized(x: Particles, distance: float = MAX_DISTANCE) -> Particles:
    """Return particles with each coordinate within some robust sd of its median.

    The robust sd is that of a normal law with the same interquartile range.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (4000, 1)).at[0].set(1e6)
        >>> bool(jnp.abs(winsorized(x).std() - 1) < 0.03)
        True
    """
    low, median, high = jnp.quantile(x, jnp.array([0.25, 0.5, 0.75]), axis=0)
    reach = distance / IQR_OF_NORMAL * (high - low)
    return jnp.clip(x, median - reach, median + reach)


def without_strays(rng_key: PRNGKey, x: Particles, box: Any = None) -> Particles:
    """Return particles with those far from all others replaced by some of the others.

    More of them than 1 in 20 may be a mode, unless they are where no prior draws are.

    Args:
        rng_key: random key.
        x: particles.
        box: lowest and highest prior draws.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (4000, 1)).at[0].set(1e6)
        >>> bool(without_strays(jax.random.key(1), x).max() < 5)
        True
    """
    is_far = (winsorized(x, STRAY_DISTANCE) != x).any(1)
    low, high = (-jnp.inf, jnp.inf) if box is None else box
    is_impossible = is_far & ((x <= low) | (x >= high)).any(1)
    is_rare = (is_far & ~is_impossible).mean() <= MAX_STRAY
    is_stray = is_impossible | is_far & is_rare
    chosen = jax.random.categorical(
        rng_key, jnp.where(is_far, -jnp.inf, 0.0), shape=(len(x),)
    )
    return jnp.where(is_stray[:, None], x[chosen], x)


def particle_covariance(x: Particles) -> Matrix:
    """Return the covariance of particles, correlations shrunk by d / (d + n).

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (4000, 2))
        >>> bool(jnp.abs(particle_covariance(x) - jnp.eye(2)).max() < 0.1)
        True
    """
    count, size = x.shape
    covariance = jnp.cov(x.T).reshape(size, size)
    variances = jnp.diag(jnp.diag(covariance))
    share = size / (size + count)
    # the smallest: rounding of particles that coincide
    least = jnp.square(jnp.finfo(x.dtype).eps * (1 + jnp.abs(x).max()))
    return (1 - share) * covariance + share * variances + least * jnp.eye(size)

r"""Mass matrix that minimizes the Fisher divergence, from draws and their gradients.

For draws y of a Gaussian with precision P the gradients are h = P (y - m), so that
cov(h) = P cov(y) P whatever the law of the draws: the geometric mean of cov(y) and
cov(h)^-1,

.. math:: \Sigma = C_h^{-1/2} (C_h^{1/2} C_y C_h^{1/2})^{1/2} C_h^{-1/2},

is P^-1 also for chains that are still on their way (Seyboldt, Carlson and Carpenter
2026, arXiv 2603.18845; nutpie). Dense statistics are taken in coordinates that the
present metric whitens, where single precision is enough: each window corrects the
metric by a factor.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.data.covariance import subspace_iteration
from numpyro_score.kernel.whitening import LowRankSqrt

# of unit variances, over the number n of draws; Stan has 1e-3 * 5 / (n + 5)
REGULARIZATION = 5e-3
MAX_CORRECTION = 1e6  # of a variance in one window: its inverse is 8 float32 roundings
UNCORRELATED = (0.5, 2.0)  # eigenvalues that a diagonal metric may leave (nutpie)
# directions of each of draws and gradients: a product costs 4 d times as many; fewer:
# more slow directions stay; not tuned
MAX_RANK = 20
# of all chains, kept for a low-rank metric: four for each direction
MAX_SNAPSHOTS = 4 * 2 * MAX_RANK
MIN_SNAPSHOTS = 4  # of each chain, of which the mean takes one degree of freedom
POWER_ITERATIONS = 8  # of the subspace: (l_21/l_20)^16 of the rest is left

Matrices = tuple[Any, Any, Any]  # inverse mass, mass^(1/2) and its inverse S


class AdaptedMetric(NamedTuple):
    """A metric, and what it leaves to the length of trajectories.

    - **matrices**: inverse mass, mass^(1/2) and its inverse S.
    - **leading**: largest eigenvalue of the covariance in whitened coordinates.
    - **correlated**: whether the metric is more than a diagonal.
    """

    matrices: Matrices
    leading: Float[Array, ""]
    correlated: Any

    def or_else(self, before: Matrices) -> "AdaptedMetric":
        """Return this metric where it is finite, the one before where it is not.

        A metric that is not finite rejects all that comes, and is learned no more.
        """
        leaves = jax.tree.leaves((self.matrices, self.leading))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        choose = partial(jnp.where, finite)
        matrices = jax.tree.map(choose, self.matrices, tuple(before))
        leading = jnp.where(finite, self.leading, 1.0)
        return self._replace(matrices=matrices, leading=leading)


class FisherMoments(NamedTuple):
    """Second moments of whitened draws and gradients of one window.

    - **origin**: positions at the start of the window, from which draws are measured.
    - **number**: of draws of every chain.
    - **mean**, **mean_gradient**: of every chain.
    - **scatter**, **scatter_gradient**: about the means of their chains, summed.
    """

    origin: Float[Array, "chains d"]
    number: Float[Array, " chains"]
    mean: Float[Array, "chains d"]
    mean_gradient: Float[Array, "chains d"]
    scatter: Float[Array, "d d"]
    scatter_gradient: Float[Array, "d d"]

    @classmethod
    def zero(cls, origin: Float[Array, "chains d"]) -> "FisherMoments":
        """Return the moments of no draws."""
        d = origin.shape[-1]
        none, square = jnp.zeros_like(origin), jnp.zeros((d, d), origin.dtype)
        return cls(origin, none[:, 0] if d else none.sum(1), none, none, square, square)

    def update(
        self,
        mass_sqrt: Array,
        sqrt: Array,
        x: Float[Array, "chains d"],
        gradient: Float[Array, "chains d"],
        valid: Array,
        bin_of_draw: Array,
    ) -> "FisherMoments":
        """Return the moments with one draw of every chain that is valid.

        Args:
            mass_sqrt: inverse of S.
            sqrt: S, whose square S^T S is the present metric.
            x: positions.
            gradient: of the potential.
            valid: which chains count.
            bin_of_draw: unused.
        """
        del bin_of_draw
        displacement = x - self.origin
        if sqrt.ndim == 1:
            y, h = displacement * mass_sqrt, gradient * sqrt
        else:
            y, h = displacement @ mass_sqrt, gradient @ sqrt.T
        number = self.number + valid
        share = (valid / jnp.maximum(number, 1))[:, None]
        # a draw that does not count may hold NaN
        gap = jnp.where(valid[:, None], y - self.mean, 0.0)
        gap_gradient = jnp.where(valid[:, None], h - self.mean_gradient, 0.0)
        return FisherMoments(
            self.origin,
            number,
            self.mean + share * gap,
            self.mean_gradient + share * gap_gradient,
            self.scatter + gap.T @ ((1 - share) * gap),
            self.scatter_gradient + gap_gradient.T @ ((1 - share) * gap_gradient),
        )

    def adapted(self, matrices: Matrices, dense: bool | None) -> "AdaptedMetric":
        """Return the metric that the window calls for.

        Args:
            matrices: the present metric.
            dense: whether to keep correlations; None keeps them where an eigenvalue of
                the metric, scaled to a unit diagonal metric, lies outside of [1/2, 2].
        """
        _, mass_sqrt, sqrt = matrices
        count = jnp.maximum(self.number.sum(), 1.0)
        floor = REGULARIZATION / count
        dof = jnp.maximum(count - len(self.number), 1.0)
        cov, cov_gradient = self.scatter / dof, self.scatter_gradient / dof
        scale = _scale(jnp.diagonal(cov), jnp.diagonal(cov_gradient), floor)
        if sqrt.ndim == 1:
            values = jnp.linalg.eigvalsh(cov / jnp.outer(scale, scale))
            leading = spiked_eigenvalue(values, count)
            return AdaptedMetric(_diagonal_matrices(sqrt * scale), leading, False)
        full = _dense(cov, cov_gradient, scale, floor, mass_sqrt, sqrt)
        if dense is None:
            plain = _best_diagonal(cov, cov_gradient, mass_sqrt, sqrt)
            values = jnp.linalg.eigvalsh(full[0] / jnp.outer(plain, plain))
            low, high = UNCORRELATED
            correlated = (values < low).any() | (values > high).any()
            diagonal = jax.tree.map(jnp.diag, _diagonal_matrices(plain))
            full = jax.tree.map(
                lambda a, b: jnp.where(correlated, a, b), full, diagonal
            )
        else:
            correlated = jnp.asarray(True)
        # the change of coordinates from the present ones to the new ones
        change = full[1].T @ sqrt.T
        left = jnp.linalg.eigvalsh(change @ cov @ change.T)
        return AdaptedMetric(full, spiked_eigenvalue(left, count), correlated)


class Snapshots(NamedTuple):
    """Draws and gradients of one window, evenly thinned, for a low-rank metric."""

    origin: Float[Array, "chains d"]
    draws: Float[Array, "chains n d"]
    gradients: Float[Array, "chains n d"]
    valid: Array

    @classmethod
    def zero(cls, origin: Float[Array, "chains d"]) -> "Snapshots":
        """Return no draws."""
        chains, d = origin.shape
        size = max(MIN_SNAPSHOTS, MAX_SNAPSHOTS // chains)
        none = jnp.zeros((chains, size, d), origin.dtype)
        return cls(origin, none, none, jnp.zeros((chains, size), bool))

    def update(
        self,
        mass_sqrt: Any,
        sqrt: Any,
        x: Float[Array, "chains d"],
        gradient: Float[Array, "chains d"],
        valid: Array,
        bin_of_draw: Array,
    ) -> "Snapshots":
        """Return the snapshots, of which that of the draw's bin is the newest.

        Args:
            mass_sqrt: unused.
            sqrt: unused.
            x: positions.
            gradient: of the potential.
            valid: which chains count.
            bin_of_draw: number of the snapshot, in [0, 1) of the window.
        """
        del mass_sqrt, sqrt
        k = (bin_of_draw * self.valid.shape[1]).astype(int)
        keep = valid[:, None]
        return Snapshots(
            self.origin,
            self.draws.at[:, k].set(jnp.where(keep, x - self.origin, self.draws[:, k])),
            self.gradients.at[:, k].set(
                jnp.where(keep, gradient, self.gradients[:, k])
            ),
            self.valid.at[:, k].set(valid | self.valid[:, k]),
        )

    def adapted(self, matrices: Matrices, dense: bool | None) -> AdaptedMetric:
        """Return the metric that the window calls for; a diagonal one stays diagonal.

        Args:
            matrices: the present metric.
            dense: unused.
        """
        del dense
        old = matrices[2]
        draws, gradients, count = self._centered()
        floor = REGULARIZATION / count
        before = old.scale if isinstance(old, LowRankSqrt) else old
        # relative to the present scales, or single precision overflows
        draws, gradients = draws / before, gradients * before
        variances = jnp.square(draws).sum(0), jnp.square(gradients).sum(0)
        ratio = _scale(*variances, floor)
        draws, gradients = draws / ratio, gradients * ratio
        scale = before * ratio
        if not isinstance(old, LowRankSqrt):
            leading = _leading_of_rows(draws, count)
            return AdaptedMetric(_diagonal_matrices(scale), leading, False)
        sqrt = _low_rank(scale, draws, gradients, floor)
        leading = _leading_of_rows(sqrt.whiten_scaled(draws), count)
        correlated = (sqrt.stretch != 1).any()
        found = sqrt.covariance(), sqrt.inverse(), sqrt
        return AdaptedMetric(found, leading, correlated)

    def _centered(self) -> tuple[Array, Array, Array]:
        """Return rows whose products are covariances, and their number."""
        valid = self.valid[..., None]
        each = jnp.maximum(valid.sum(1, keepdims=True), 1)
        count = jnp.maximum(self.valid.sum(), 1)
        # a mean over chains takes one degree of freedom of each
        dof = jnp.maximum(count - len(self.valid), 1)

        def rows(values: Array) -> Array:
            values = jnp.where(valid, values, 0.0)
            mean = values.sum(1, keepdims=True) / each
            centered = jnp.where(valid, values - mean, 0.0)
            return centered.reshape(-1, values.shape[-1]) / jnp.sqrt(dof)

        return rows(self.draws), rows(self.gradients), count


def geometric_mean(
    cov: Float[Array, "d d"], cov_gradient: Float[Array, "d d"], floor: Array | float
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    r"""Return eigenvalues and eigenvectors of the geometric mean of C_y and C_h^-1.

    Directions in which neither draws nor gradients vary, as with fewer draws than
    dimensions, have the eigenvalue 1: what rounding leaves of them says nothing.

    Args:
        cov: covariance C_y of whitened draws.
        cov_gradient: covariance C_h of whitened gradients.
        floor: variance that is added to both.

    Example:
        >>> cov = jnp.diag(jnp.array([4.0, 1.0]))
        >>> values, _ = geometric_mean(cov, jnp.eye(2), 0.0)
        >>> [float(v) for v in values]
        [1.0, 2.0]
    """
    identity = jnp.eye(len(cov), dtype=cov.dtype)
    values, vectors = jnp.linalg.eigh(cov_gradient + floor * identity)
    values = jnp.maximum(values, jnp.maximum(floor, 1e-30))
    root = (vectors * jnp.sqrt(values)) @ vectors.T
    inverse_root = (vectors / jnp.sqrt(values)) @ vectors.T
    inner, basis = jnp.linalg.eigh(root @ (cov + floor * identity) @ root)
    middle = (basis * jnp.sqrt(jnp.maximum(inner, 0.0))) @ basis.T
    mean = inverse_root @ middle @ inverse_root
    values, vectors = jnp.linalg.eigh(0.5 * (mean + mean.T))
    seen, seen_gradient = (
        jnp.sum(vectors * (matrix @ vectors), axis=0) for matrix in (cov, cov_gradient)
    )
    largest = jnp.maximum(jnp.diagonal(cov), jnp.diagonal(cov_gradient)).max()
    # the root of products of both, whose rounding is eps times the largest squared
    limit = jnp.sqrt(jnp.finfo(cov.dtype).eps) * largest
    values = jnp.where(jnp.maximum(seen, seen_gradient) > limit, values, 1.0)
    return jnp.clip(values, 1 / MAX_CORRECTION, MAX_CORRECTION), vectors


def spiked_eigenvalues(
    values: Float[Array, " d"], count: Array | float
) -> Float[Array, " d"]:
    r"""Return eigenvalues of a covariance, from those of a sample.

    Sampling spreads unit eigenvalues over :math:`(1 \pm \sqrt{d/n})^2`; one outside of
    it, :math:`\ell`, is seen at :math:`\ell (1 + (d/n)/(\ell - 1))` (Baik and
    Silverstein 2006), which is solved for it. Those within count as one.

    Args:
        values: eigenvalues of the sample's covariance.
        count: number of draws.

    Example:
        >>> spiked = spiked_eigenvalues(jnp.array([0.9, 1.1, 4.0]), 300.0)
        >>> [round(float(value), 2) for value in spiked]
        [1.0, 1.0, 3.99]
    """
    gamma = len(values) / count
    middle = values + 1 - gamma
    root = jnp.sqrt(jnp.maximum(middle**2 - 4 * values, 0.0))
    # fewer draws than dimensions say nothing of small eigenvalues
    low = (gamma < 1) & (values < (1 - jnp.sqrt(gamma)) ** 2) & (values > 0)
    high = values > (1 + jnp.sqrt(gamma)) ** 2
    spikes = jnp.where(high, middle + root, middle - root) / 2
    return jnp.where(low | high, spikes, 1.0)


def spiked_eigenvalue(
    values: Float[Array, " d"], count: Array | float
) -> Float[Array, ""]:
    """Return the largest of :func:`spiked_eigenvalues`, at least 1.

    Args:
        values: eigenvalues of the sample's covariance.
        count: number of draws.

    Example:
        >>> float(spiked_eigenvalue(jnp.array([0.9, 1.1]), 20.0))
        1.0
    """
    return jnp.max(spiked_eigenvalues(values, count), initial=1.0)


def inverse_gradient_sqrt(gradient: Float[Array, "chains d"]) -> Float[Array, " d"]:
    """Return the square roots of ``1/|g|``, the geometric mean over chains (nutpie).

    Directions without a gradient keep variance 1.

    Args:
        gradient: of the potential, where chains start.

    Example:
        >>> [float(v) for v in inverse_gradient_sqrt(jnp.array([[4.0, 0.0]]))]
        [0.5, 1.0]
    """
    size = jnp.abs(gradient)
    known = jnp.isfinite(size) & (size > 0)
    # the root of a variance that float32 holds, and its inverse
    log = jnp.where(known, jnp.log(jnp.where(known, size, 1.0)), 0.0).mean(0)
    return jnp.exp(-0.5 * jnp.clip(log, -40.0, 40.0))


def _scale(variance: Array, variance_gradient: Array, floor: Array) -> Array:
    """Return the square root of sqrt(var y / var h)."""
    ratio = jnp.sqrt((variance + floor) / (variance_gradient + floor))
    # no gradient and no motion say nothing
    return jnp.sqrt(jnp.clip(ratio, 1 / MAX_CORRECTION, MAX_CORRECTION))


def _dense(
    cov: Array,
    cov_gradient: Array,
    scale: Array,
    floor: Array,
    mass_sqrt: Array,
    sqrt: Array,
) -> Matrices:
    """Return the dense metric, from covariances in coordinates whitened by S."""
    outer = jnp.outer(scale, scale)
    values, vectors = geometric_mean(cov / outer, cov_gradient * outer, floor)
    root, inverse_root = (
        (vectors * values**power) @ vectors.T for power in (0.5, -0.5)
    )
    sqrt = root @ (scale[:, None] * sqrt)
    mass_sqrt = (mass_sqrt / scale) @ inverse_root
    return sqrt.T @ sqrt, mass_sqrt, sqrt


def _best_diagonal(
    cov: Array, cov_gradient: Array, mass_sqrt: Array, sqrt: Array
) -> Float[Array, " d"]:
    """Return the square root of the diagonal metric in original coordinates."""
    variance = jnp.sum(sqrt * (cov @ sqrt), axis=0)
    variance_gradient = jnp.sum(mass_sqrt.T * (cov_gradient @ mass_sqrt.T), axis=0)
    present = jnp.sum(jnp.square(sqrt), axis=0)
    tiny = REGULARIZATION * 1e-3
    # relative to the present variances, which float32 needs
    # rounding leaves negative variances of coordinates that others dwarf
    variance, variance_gradient = (
        jnp.maximum(v, 0.0) for v in (variance / present, variance_gradient * present)
    )
    ratio = (variance + tiny) / (variance_gradient + tiny)
    return jnp.sqrt(present * jnp.sqrt(ratio))


def _diagonal_matrices(sqrt: Array) -> Matrices:
    limits = jnp.finfo(sqrt.dtype)
    sqrt = jnp.clip(sqrt, limits.tiny**0.25, limits.max**0.25)
    return jnp.square(sqrt), 1 / sqrt, sqrt


def _low_rank(
    scale: Array, draws: Array, gradients: Array, floor: Array
) -> LowRankSqrt:
    """Return the metric of scaled draws and gradients, correlations where they pay."""
    k = min(MAX_RANK, draws.shape[-1] // 2)
    span = jnp.concatenate(
        [_leading_subspace(draws, k), _leading_subspace(gradients, k)], axis=1
    )
    span = jnp.linalg.qr(span)[0]
    draws, gradients = draws @ span, gradients @ span
    values, vectors = geometric_mean(draws.T @ draws, gradients.T @ gradients, floor)
    low, high = UNCORRELATED
    values = jnp.where((values > low) & (values < high), 1.0, values)
    return LowRankSqrt(scale, span @ vectors, jnp.sqrt(values))


def _leading_subspace(rows: Float[Array, "n d"], k: int) -> Float[Array, "d k"]:
    """Return a basis of the leading right singular vectors, by subspace iteration."""
    # any start converges
    start = jax.random.normal(jax.random.key(0), (rows.shape[1], k), rows.dtype)

    def apply(basis: Array) -> Array:
        # rows may be zero, which has every basis for its own
        return rows.T @ (rows @ basis) + 1e-20 * start

    return subspace_iteration(apply, jnp.linalg.qr(start)[0], POWER_ITERATIONS)


def _leading_of_rows(rows: Float[Array, "n d"], count: Array) -> Float[Array, ""]:
    """Return the leading eigenvalue of the covariance whose square root rows are."""
    basis = _leading_subspace(rows, min(4, rows.shape[1]))
    values = jnp.linalg.eigvalsh((rows @ basis).T @ (rows @ basis))
    padded = jnp.zeros(rows.shape[1], rows.dtype).at[: len(values)].set(values)
    return spiked_eigenvalue(padded, count)

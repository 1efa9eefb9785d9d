r"""The denoiser E[z_0 | z_t] of a factorized prior, for compositions.

For a prior that is a product over the coordinates of z, as with independent scalar
sites, E[z_0 | z_t] is a one-dimensional integral per coordinate. It is computed by
quadrature, exact up to the resolution of a table of the log density.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.data.standardize import Affine
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.typing import Position, Scalar

HALF_WIDTH = 12.0  # of the table, in prior sd; a Gaussian has 4e-33 of its mass outside
TABLE_SIZE = 4097  # spacing 0.006 sd: interpolation error 4e-6 nats for a Gaussian
NODE_HALF_WIDTH = 8.0  # of a quadrature, in sd of its integrand: 1e-15 outside
NUM_NODES = 129  # spacing 1/8 sd, at which the trapezoidal rule is exact to rounding
MIN_LOG_DENSITY = -1e4  # nats; in place of -inf, which cannot be interpolated
# prior draws: a product that fails at 1 in 4 is seen by 1 - .75^16 = 99 %
NUM_CHECKS = 16
TOLERANCE = 0.02  # nats; float32 rounding of 1e4 nats is 1e-3, interpolation 4e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FactorizedPriorDenoiser:
    r"""E[u_0 given u_0 + r n] for a product of one-dimensional laws.

    Each integral is over :math:`p(u) N(\hat x; u, r^2)`, on an interval of 8 standard
    deviations around the mean of the same product with p replaced by a normal law of
    its mean and variance. Values of log p are interpolated in a table.

    Args:
        table: log density of each coordinate on an equally spaced grid over 12 sd on
            either side of the mean.
        loc: mean of each coordinate.
        scale: standard deviation of each coordinate.

    Example:
        >>> u = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
        >>> normal, zero, one = -0.5 * u[None] ** 2, jnp.zeros(1), jnp.ones(1)
        >>> denoiser = FactorizedPriorDenoiser(normal, zero, one)
        >>> round(float(denoiser(jnp.array([2.0]), 1.0)[0]), 3)
        1.0
    """

    table: Float[Array, "size grid"]
    loc: Float[Array, " size"]
    scale: Float[Array, " size"]

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return E[u_0 given u_0 + level n = x]; the context is ignored."""
        unit = (x - self.loc) / self.scale
        denoised = jax.vmap(_unit_denoised)(unit, level / self.scale, self.table)
        return self.loc + self.scale * denoised


def _unit_denoised(x: Scalar, level: Scalar, table: Float[Array, " grid"]) -> Array:
    """Return E[u_0 given u_0 + level n = x] for one coordinate of mean 0 and sd 1."""
    variance = jnp.square(level) / (1 + jnp.square(level))
    offsets = jnp.linspace(-NODE_HALF_WIDTH, NODE_HALF_WIDTH, NUM_NODES)
    shift = jnp.sqrt(variance) * offsets - x * variance  # nodes minus x
    grid = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, len(table))
    log_prior = jnp.interp(x + shift, grid, table)
    weight = jax.nn.softmax(log_prior - 0.5 * jnp.square(shift / level))
    return x + weight @ shift


def factorized_prior_denoiser(
    simulator: Simulator,
    standardize: Affine,
    draws: Float[Array, "draws size"],
) -> FactorizedPriorDenoiser:
    """Return the denoiser of a model's prior in standardized z.

    Args:
        simulator: the model.
        standardize: the standardization of z of the score.
        draws: prior draws of z, for its mean and standard deviation.

    Raises:
        ValueError: if the prior is not a product over the coordinates of z.
    """
    loc, scale = draws.mean(0), draws.std(0)
    grid = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
    center = jnp.zeros_like(loc)
    # of sites not learned; fixed, so that the check does not vary between calls
    keys = jax.random.split(jax.random.key(0), NUM_CHECKS)

    def log_prior(unit: Array, key: Array) -> Array:
        return jnp.asarray(simulator.log_prior(loc + scale * unit, key))

    def along(i: Array) -> Array:
        """Return the log density on the grid along axis i through the mean."""
        return jax.vmap(lambda v: log_prior(center.at[i].set(v), keys[0]))(grid)

    @jax.jit
    def tabulate() -> tuple[Array, Array, Array]:
        table = jax.vmap(along)(jnp.arange(len(center)))
        points = (draws[:NUM_CHECKS] - loc) / scale
        return table, points, jax.vmap(log_prior)(points, keys)

    table, points, values = tabulate()
    table = table - table.max(axis=1, keepdims=True)
    table = jnp.maximum(jnp.nan_to_num(table, nan=MIN_LOG_DENSITY), MIN_LOG_DENSITY)
    _check_product(np.asarray(table), np.asarray(points), np.asarray(values))
    return FactorizedPriorDenoiser(
        table, (loc - standardize.loc) / standardize.scale, scale / standardize.scale
    )


def _check_product(table: np.ndarray, points: np.ndarray, values: np.ndarray) -> None:
    """Raise unless log p at draws is the sum of the table's terms plus a constant."""
    grid = np.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
    pairs = zip(points.T, table, strict=True)
    terms = sum(np.interp(unit, grid, row) for unit, row in pairs)
    discrepancy = np.ptp(values - terms)
    if not discrepancy < TOLERANCE:
        raise ValueError(
            "The model must have a prior that is a product over the numbers of z, or a "
            "learned prior score: train with `drop_context=0.2` and pass "
            "`learned_prior=True`. The log prior differs from a sum of terms by "
            f"{discrepancy:.2g} nats."
        )

r"""The denoiser of the prior: its diffused score, which compositions divide out.

For a prior that is a product over the numbers of z, as with independent scalar sites,
E[z_0 | z_t] is a one-dimensional integral for each number, done by quadrature: exact up
to the table's resolution for Gaussian, uniform and any other sites.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.infer.simulator import Simulator
from numpyro_score.standardize import Affine
from numpyro_score.typing import Position, Scalar

HALF_WIDTH = 12.0  # of the table, in prior standard deviations
TABLE_SIZE = 4097  # spacing .006 sd
NUM_NODES = 129  # of a quadrature: spacing 1/8 of the width of its integrand
NODE_WIDTH = 8.0  # half width of a quadrature, in standard deviations of a Gaussian one
LEAST = -1e4  # log density that stands for none: infinities cannot be interpolated
TOLERANCE = 1e-3  # nats by which a product's log density may differ, for rounding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductDenoiser:
    r"""E[u_0 | u_0 + r n] for a product of one-dimensional laws of about unit scale.

    Each integral over :math:`p(u) N(\hat x; u, r^2)` runs over eight standard
    deviations of the product with a standard normal law in the place of p. The log
    densities come from a table.

    Args:
        table: log density of each number on an even grid, -12 to 12.

    Example:
        >>> u = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
        >>> denoiser = ProductDenoiser(-0.5 * u[None] ** 2)  # a standard normal law
        >>> round(float(denoiser(jnp.array([2.0]), 1.0)[0]), 3)
        1.0
    """

    table: Float[Array, "size grid"]

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the prior's denoised point; the context does not matter."""
        variance = jnp.square(level) / (1 + jnp.square(level))
        offsets = jnp.linspace(-NODE_WIDTH, NODE_WIDTH, NUM_NODES)
        grid = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, self.table.shape[-1])

        def one(x: Scalar, table: Array) -> Array:
            shift = jnp.sqrt(variance) * offsets - x * variance  # nodes less x
            log_prior = jnp.interp(x + shift, grid, table)
            weight = jax.nn.softmax(log_prior - 0.5 * jnp.square(shift / level))
            return x + weight @ shift

        return jax.vmap(one)(x, self.table)


def product_denoiser(simulator: Simulator, standardize: Affine) -> ProductDenoiser:
    """Return the denoiser of a model's prior, for standardized z.

    Args:
        simulator: the model.
        standardize: the map of z to the unit scale.

    Raises:
        ValueError: if the prior is not a product over the numbers of z.
    """
    grid = jnp.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
    center = jnp.zeros_like(standardize.loc)

    def log_prior(u: Array, key: Array) -> Array:
        return jnp.asarray(simulator.log_prior(standardize.inverse(u), key))

    def along(i: Array) -> Array:
        """Return the log density along axis i through the center."""
        return jax.vmap(lambda v: log_prior(center.at[i].set(v), keys[0]))(grid)

    keys = jax.random.split(jax.random.key(0), 8)  # to probe with, nothing is drawn
    table = jax.jit(jax.vmap(along))(jnp.arange(len(center)))
    table = table - table.max(axis=1, keepdims=True)
    denoiser = ProductDenoiser(jnp.maximum(jnp.nan_to_num(table, nan=LEAST), LEAST))
    _check_product(jax.jit(log_prior), denoiser, keys)
    return denoiser


def _check_product(log_prior: object, denoiser: ProductDenoiser, keys: Array) -> None:
    """Raise unless the density at random points is the sum of the table's terms."""
    assert callable(log_prior)
    table = np.asarray(denoiser.table)
    rng = np.random.default_rng(0)
    index = rng.integers(
        int(0.45 * TABLE_SIZE), int(0.55 * TABLE_SIZE), (len(keys), len(table))
    )
    grid = np.linspace(-HALF_WIDTH, HALF_WIDTH, TABLE_SIZE)
    points = jnp.asarray(grid[index], float)
    got = [float(log_prior(u, key)) for u, key in zip(points, keys, strict=True)]
    terms = table[np.arange(len(table)), index].sum(1)
    spread = np.ptp(np.asarray(got) - terms)
    if not spread < TOLERANCE * (1 + np.ptp(terms)):
        raise ValueError(
            "The model must have a prior that is a product over the numbers of z, or a "
            "learned prior score: train with `drop_context=0.2` and pass "
            "`learned_prior=True`. The log prior differs from a "
            f"sum of terms by {spread:.2g} nats."
        )

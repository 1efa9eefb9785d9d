r"""Gaussian baseline: the denoiser of a normal law, to which a net adds what differs.

For standardized data of mean 0 and covariance :math:`\Sigma = Q \Lambda Q^\top` every
eigenvector has a noise level of its own, :math:`\rho_i = r / \sqrt{\lambda_i}`. With
:math:`y = \Lambda^{-1/2} Q^\top \hat x` and the coefficients c of a parametrization,

.. math:: D(\hat x, r) = Q \Lambda^{1/2} \bigl[c_{skip}(\rho)\, y
          + w\, c_{out}(\rho)\, F(c_{in}(\rho)\, y)\bigr].

For parametrizations with :math:`c_{skip} = 1 / (1 + \rho^2)` a net of output zero gives
the Wiener filter :math:`\Sigma (\Sigma + r^2 I)^{-1} \hat x`, exact for normal laws at
every level. The weight w is 1 where 99.9 % of the data lie and falls to 0 beyond: there
the net has learned nothing, and the score goes over to that of the normal law,
:math:`-(\Sigma + r^2 I)^{-1} \hat x`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.data.covariance import shrunk_covariance
from numpyro_score.score.preconditioning import Parametrization
from numpyro_score.typing import Position, Scalar

MAX_SIZE = 256  # numbers of a point; d^2 multiplications a call, as a layer of an MLP
FLOOR = 1e-6  # of the largest eigenvalue; float32 resolves 1e-7 of it
# Share of the largest sd below which a net learns badly by itself. With priors learned
# from 500 curves posterior sd were up to 6.8 times too wide without it, and up to 1.09
# times with it: `python -m tests.benchmarks.curves --length-scales 0.2 0.1`.
NARROW = 0.1
# of the data's squared distances from their mean: one row in 1000 is beyond
QUANTILE = 0.999


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussianBaseline:
    """Covariance of standardized data, and limit of their squared coordinates.

    Args:
        vectors: eigenvectors Q of the covariance.
        scale: square roots of its eigenvalues.
        max_square: 99.9 % quantile of the mean square of the data's coordinates y.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(4000, 2)) * [1.0, 0.1]
        >>> baseline = GaussianBaseline.fit(rows)
        >>> bool(abs(baseline.scale - jnp.array([0.1, 1.0])).max() < 0.05)
        True
    """

    vectors: Float[Array, "size size"]
    scale: Float[Array, " size"]
    max_square: Float[Array, ""]

    @classmethod
    def fit(cls, rows: Float[np.ndarray, "rows size"]) -> "GaussianBaseline":
        """Return the baseline of standardized rows, of mean 0.

        Args:
            rows: standardized data.
        """
        rows = np.asarray(rows, np.float64)
        values, vectors = np.linalg.eigh(shrunk_covariance(rows))
        scale = np.sqrt(np.maximum(values, FLOOR * values.max()))
        distance = np.square(rows @ vectors / scale).mean(1)
        max_square = np.quantile(distance, QUANTILE, method="higher")
        return cls(*(jnp.asarray(part, float) for part in (vectors, scale, max_square)))

    @property
    def is_narrow(self) -> bool:
        """True if an eigenvector's sd is below a tenth of the largest."""
        return bool(self.scale.min() < NARROW * self.scale.max())

    def denoise(
        self,
        net_fn: Callable[[Position, Scalar], Position],
        x: Float[Array, " size"],
        level: Scalar,
        parametrization: Parametrization,
    ) -> Float[Array, " size"]:
        """Return D(x, level) for a raw net F.

        Args:
            net_fn: (input, noise) -> F.
            x: standardized point x_t / alpha.
            level: noise level r.
            parametrization: coefficients as a function of the noise level.
        """
        y = x @ self.vectors / self.scale
        c = parametrization(level / self.scale)
        inside = jnp.square(c.input * y).mean()
        beyond = jnp.maximum(inside / self.max_square - 1, 0.0)
        correction = net_fn(c.input * y, parametrization(level).noise)
        y = c.skip * y + jnp.exp(-jnp.square(beyond)) * c.out * correction
        return self.vectors @ (self.scale * y)

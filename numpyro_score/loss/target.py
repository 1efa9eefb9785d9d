r"""Regression targets of denoising: x_0, or y of the same conditional mean.

The minimizer of :math:`E |D(x_r, r) - y|^2` is :math:`E[y | x_r]`, so every y with
:math:`E[y | x_r] = E[x_0 | x_r]` gives the same denoiser. The score target of x_0 is
:math:`(x_0 - x_r)/r^2 = -n/r`, whose variance :math:`r^{-2}` is large at small r.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.loss.noise_levels import per_row
from numpyro_score.typing import Points


@runtime_checkable
class RegressionTarget(Protocol):
    """Target y of noisy rows; a frozen dataclass."""

    batch_coupled: bool

    def __call__(
        self,
        x0: Points,
        noise: Points,
        levels: Float[Array, " rows"],
        data_score: Points | None,
    ) -> Points:
        """Return y for every row x_0 + level noise.

        Args:
            x0: standardized data.
            noise: unit noise.
            levels: noise level of each row.
            data_score: score of the standardized data at x0, or None.
        """


@dataclass(frozen=True)
class DataTarget:
    """y = x_0 (Vincent 2011).

    Example:
        >>> x0 = jnp.ones((2, 1))
        >>> bool((DataTarget()(x0, x0, jnp.ones(2), None) == x0).all())
        True
    """

    batch_coupled = False

    def __call__(
        self,
        x0: Points,
        noise: Points,
        levels: Float[Array, " rows"],
        data_score: Points | None,
    ) -> Points:
        """Return x_0."""
        return x0


@dataclass(frozen=True)
class StableTargetField:
    r"""Stable target field: y is the mean of the batch's x_0 given x_r.

    :math:`y = \sum_j w_j x_0^j` with :math:`w_j \propto N(x_r; x_0^j, r^2)` (Xu et al.
    2023, eq. 5). The weights are self-normalized, so the minimizer has a bias of
    O(1/rows): use large batches. Takes rows^2 distances and no evaluation of the net.
    At levels below the distance of neighboring rows y is close to x_0.

    Example:
        >>> x0 = jnp.array([[-1.0], [1.0]])
        >>> y = StableTargetField()(x0, -x0 / 10, jnp.array([10.0, 10.0]), None)
        >>> bool(jnp.allclose(y, 0.0, atol=0.01))
        True
    """

    batch_coupled = True

    def __call__(
        self,
        x0: Points,
        noise: Points,
        levels: Float[Array, " rows"],
        data_score: Points | None,
    ) -> Points:
        """Return the mean of x_0 over the batch given each noisy row."""
        points = x0.reshape(len(x0), -1)
        x = points + levels[:, None] * noise.reshape(len(x0), -1)
        square = jnp.square(x[:, None] - points[None]).sum(-1)
        weight = jax.nn.softmax(-0.5 * square / levels[:, None] ** 2, axis=1)
        return (weight @ points).reshape(x0.shape)


@dataclass(frozen=True)
class TargetScore:
    r"""y = x_0 + a r (n + r g), with g the known score of the data at x_0.

    The score has two unbiased targets, -n/r (Vincent 2011) and
    :math:`g = \nabla \log p(x_0)` (De Bortoli et al. 2024, eq. 6). The combination
    :math:`a g - (1 - a) n / r` with :math:`a = 1/(1 + r^2 I_F / d)` has less variance
    than either. The Fisher information :math:`I_F = E|g|^2` is the mean over the
    *other* rows of the batch, so the combination is unbiased. g is known for draws from
    a NumPyro model: pass ``data_score`` to ``run``.

    Raises:
        ValueError: without ``data_score``.

    Example:
        >>> x0, n = jnp.zeros((2, 1)), jnp.ones((2, 1))
        >>> y = TargetScore()(x0, n, jnp.ones(2), jnp.ones((2, 1)))
        >>> y.tolist()  # a = 1/2
        [[1.0], [1.0]]
    """

    batch_coupled = False

    def __call__(
        self,
        x0: Points,
        noise: Points,
        levels: Float[Array, " rows"],
        data_score: Points | None,
    ) -> Points:
        """Return the combined target of each row."""
        if data_score is None:
            raise ValueError(
                "`data_score` must be given to train with TargetScore(): the gradient "
                "of the log density at each row. Got None."
            )
        square = jnp.square(data_score).reshape(len(x0), -1).mean(1)
        information = (square.sum() - square) / max(1, len(x0) - 1)
        share = 1 / (1 + jnp.square(levels) * information)
        r, a = per_row(levels, x0), per_row(share, x0)
        return x0 + a * r * (noise + r * data_score)

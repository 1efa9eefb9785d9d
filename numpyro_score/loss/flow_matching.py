"""Flow matching, with independent or optimally paired noise."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from numpyro_score.checks import check_flags
from numpyro_score.loss.denoising import BatchDenoiseFn, denoising_error
from numpyro_score.loss.noise_levels import add_noise, stratified_uniform
from numpyro_score.loss.weighting import FlowMatchingWeight
from numpyro_score.sde import SDE
from numpyro_score.typing import Points, PRNGKey


def optimal_pairing(x0: Points, noise: Points) -> Points:
    """Return the noise in the order with the least sum of squared distances to x0.

    The exact optimal assignment within a batch (Kuhn 1955, by Optax), at a cost cubic
    in the batch size.

    Example:
        >>> noise = jnp.array([[4.0], [1.0]])
        >>> optimal_pairing(jnp.array([[0.0], [5.0]]), noise).tolist()
        [[1.0], [4.0]]
    """
    a, b = x0.reshape(len(x0), -1), noise.reshape(len(x0), -1)
    cost = -a @ b.T  # half the squared distances, less terms equal for all pairings
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return noise[jnp.zeros(len(x0), int).at[rows].set(columns)]


@dataclass(frozen=True)
class FlowMatching:
    r"""Flow matching on the straight path x_t = (1 - t) x_0 + t n.

    .. math:: E |u(x_t, t) - (n - x_0)|^2 / d, \qquad t \sim U(0, 1)

    Lipman et al. 2023, eq. 9; Liu et al. 2023. With :math:`u = (x_t - D)/t` this is
    denoising with the weight 1/t^2, for any net and any process.

    With ``paired=True`` noise and data are matched optimally within each batch
    (optimal-transport conditional flow matching: Tong et al. 2024; Pooladian et al.
    2023), which straightens the paths. x_t is then not data plus independent noise: the
    velocity, the probability flow, its draws and its density are right, but
    :math:`(\alpha D - x_t)/\sigma^2` is **not** the score, and ``ScoreModel.score``
    raises. Do not use such a model in SDE solvers or guidance.

    Args:
        paired: True to match noise and data within a batch.

    Example:
        >>> from numpyro_score.sde import RectifiedFlow
        >>> x0 = jax.random.normal(jax.random.key(0), (64, 2))
        >>> exact = lambda x, level: x / (1 + level[:, None] ** 2)
        >>> zero = lambda x, level: 0 * x
        >>> def loss(denoise):
        ...     return FlowMatching()(jax.random.key(1), denoise, x0, RectifiedFlow())
        >>> bool(loss(exact) < loss(zero))
        True
    """

    paired: bool = False

    def __post_init__(self) -> None:
        check_flags(paired=self.paired)

    @property
    def batch_coupled(self) -> bool:
        """True if noise and data of a batch are matched."""
        return self.paired

    def __call__(
        self, key: PRNGKey, denoise: BatchDenoiseFn, x0: Points, sde: SDE
    ) -> Float[Array, ""]:
        """Return the loss of one batch of standardized data."""
        key_t, key_noise, key_order = jax.random.split(key, 3)
        low, high = (r / (1 + r) for r in (sde.sigma_min, sde.sigma_max))
        t = low + (high - low) * stratified_uniform(key_t, len(x0))
        levels = jax.random.permutation(key_order, t / (1 - t))
        noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
        if self.paired:
            noise = optimal_pairing(x0, noise)
        x = add_noise(x0, levels, noise)
        weight: Array = FlowMatchingWeight()(levels, sde)
        return denoising_error(x0, denoise(x, levels), weight)

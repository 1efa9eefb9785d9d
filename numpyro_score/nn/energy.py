r"""Energy nets, whose output is the gradient of a scalar.

The output is :math:`F(y, c) = -\nabla_y \Phi(y, c)` with
:math:`\Phi(y, c) = \langle y, f(y, c) \rangle` and f any net (Salimans and Ho 2021,
section 3; Du et al. 2023, appendix A). For every parametrization
:math:`D = c_{skip} x + c_{out} F(c_{in} x)` the density has the potential

.. math::

    -\log p_r(x) = \frac{1 - c_{skip}}{2 r^2} |x|^2
    + \frac{c_{out}}{c_{in} r^2} \Phi(c_{in} x, c_{noise}) + const(r).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_callable
from numpyro_score.typing import Position, Scalar


class EnergyModule(nnx.Module):
    """Module of :class:`Energy`."""

    def __init__(self, config: "Energy", *, rngs: nnx.Rngs) -> None:
        self.net = config.net(rngs=rngs)

    def energy(
        self, x: Position, noise: Scalar, context: Array | None = None
    ) -> Float[Array, ""]:
        """Return the potential Phi at one point."""
        return jnp.vdot(x, self.net(x, noise, context))

    def __call__(
        self, x: Position, noise: Scalar, context: Array | None = None
    ) -> Position:
        """Return the output F = -grad Phi at one point."""
        return -jax.grad(self.energy)(x, noise, context)


@dataclass(frozen=True)
class Energy:
    """Configuration of an energy net built from another net.

    Its score is the gradient of ``ScoreModel.energy``, which takes one evaluation of
    the net. Each evaluation of the score adds a backward pass through the net f. For
    Metropolis kernels, which need differences of log densities.

    Args:
        net: configuration of the net f, with a smooth activation function.

    Example:
        >>> from numpyro_score.nn import MLP
        >>> net = Energy(MLP(2, width=8, depth=1))(rngs=nnx.Rngs(0))
        >>> net(jnp.zeros(2), 0.0).shape
        (2,)
    """

    net: Callable

    def __post_init__(self) -> None:
        check_callable("net", self.net, "a configuration of a net, such as MLP(2)")

    def __call__(self, *, rngs: nnx.Rngs) -> EnergyModule:
        """Return the module with fresh weights."""
        return EnergyModule(self, rngs=rngs)

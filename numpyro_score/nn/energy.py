r"""An energy net: the gradient of a scalar, so that the learned density has a value.

The net's output is :math:`F(y, c) = -\nabla_y \Phi(y, c)` with
:math:`\Phi(y, c) = \langle y, f(y, c) \rangle` and f any net (Salimans and Ho 2021,
section 3; Du et al. 2023, appendix A). Every parametrization
:math:`D = c_{skip} x + c_{out} F(c_{in} x)` of such an F has an exact potential:

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

from numpyro_score.typing import Position, Scalar


class EnergyModule(nnx.Module):
    """The module that :class:`Energy` builds."""

    def __init__(self, config: "Energy", *, rngs: nnx.Rngs) -> None:
        self.net = config.net(rngs=rngs)

    def energy(
        self, x: Position, noise: Scalar, context: Array | None = None
    ) -> Float[Array, ""]:
        """Return the potential Phi of one point."""
        return jnp.vdot(x, self.net(x, noise, context))

    def __call__(
        self, x: Position, noise: Scalar, context: Array | None = None
    ) -> Position:
        """Return the net's raw output F = -grad Phi for one point."""
        return -jax.grad(self.energy)(x, noise, context)


@dataclass(frozen=True)
class Energy:
    """Configuration of an energy net made from any other net.

    Its score is an exact gradient, and ``ScoreModel.energy`` gives the value for one
    evaluation of the net, up to a constant. Costs about twice the other net in sampling
    and in training. Take it where a Metropolis kernel needs values.

    Args:
        net: configuration of the net f, with a smooth activation, as all of ours.

    Example:
        >>> from numpyro_score.nn import MLP
        >>> net = Energy(MLP(2, width=8, depth=1))(rngs=nnx.Rngs(0))
        >>> net(jnp.zeros(2), 0.0).shape
        (2,)
    """

    net: Callable

    def __call__(self, *, rngs: nnx.Rngs) -> EnergyModule:
        """Build the module with fresh weights."""
        return EnergyModule(self, rngs=rngs)

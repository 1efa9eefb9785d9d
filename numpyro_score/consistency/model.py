r"""Consistency models: draws in one or a few steps.

A consistency function maps every point of a path of the probability flow to the end of
the path, :math:`f(\hat x_\sigma, \sigma) = \hat x_{\sigma_{min}}`. Here

.. math:: f(x, \sigma) = c_{skip}\, x + c_{out}\, F(c_{in} x), \qquad
          c_{skip} = \frac{1}{1 + (\sigma - \sigma_{min})^2}, \quad
          c_{out} = \frac{\sigma - \sigma_{min}}{\sqrt{1 + \sigma^2}},

which is the identity at :math:`\sigma_{min}` (Song et al. 2023, eq. 5 and appendix C,
for data of unit sd).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from numpyro_score.checks import check_key
from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.standardize import Affine
from numpyro_score.nn import MLP
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import (
    count_weights,
    repr_lines,
    short_number,
    short_repr,
)
from numpyro_score.sde import SDE
from numpyro_score.solver.base import draw_start
from numpyro_score.train.optimizer import build
from numpyro_score.typing import Position, PRNGKey, Real, Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConsistencyModel:
    """Map f from noise at any level to draws, made by :func:`distill` and others.

    A pytree; without score and density. Context and ``linear_baseline`` act as in
    :class:`~numpyro_score.score.denoiser.NetDenoiser`. ``config`` is the configuration
    of the net, for :func:`numpyro_score.io.save`.

    Example:
        >>> from numpyro_score import MLP, VE
        >>> net, unit = MLP(2, width=8, depth=1), Affine.identity((2,))
        >>> model = init_model(jax.random.key(0), net, VE(), unit, (2,))  # untrained
        >>> model.sample(jax.random.key(1), (3,), levels=(1.0,)).shape  # in two steps
        (3, 2)
    """

    params: Any
    standardize: Affine
    graphdef: nnx.GraphDef = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})
    event_shape: tuple[int, ...] = field(metadata={"static": True})
    standardize_context: ContextMap | None = None
    linear_baseline: Array | None = None
    config: Any = field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        return repr_lines(type(self).__name__, self.summary())

    def summary(self) -> dict[str, str]:
        """Return the lines of the repr by name; no arrays."""
        low, high = short_number(self.sde.sigma_min), short_number(self.sde.sigma_max)
        net = "a net" if self.config is None else short_repr(self.config)
        return {
            "event shape": str(self.event_shape),
            "process": short_repr(self.sde),
            "noise levels": f"{low} to {high}, in standard deviations of the data",
            "net": f"{count_weights(self.params):,} weights in {net}",
        }

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return f at one standardized point x_0 + level n."""
        baseline = jnp.zeros_like(x)
        if context is not None and self.standardize_context is not None:
            context = self.standardize_context.forward(context)
            if self.linear_baseline is not None:
                baseline = (jnp.ravel(context) @ self.linear_baseline).reshape(x.shape)
        x = x - baseline
        gap = level - self.sde.sigma_min
        norm = jnp.sqrt(1 + jnp.square(level))
        net = nnx.merge(self.graphdef, self.params)
        raw = net(x / norm, jnp.log(level) / 4, context)
        return baseline + x / (1 + gap**2) + gap / norm * raw

    @renamed(key="rng_key")
    def sample(
        self,
        rng_key: PRNGKey,
        shape: tuple[int, ...] = (),
        *,
        levels: Sequence[float] = (),
        context: Array | None = None,
    ) -> Real:
        """Return draws, by one evaluation of the net and one more per level.

        Multistep sampling (Song et al. 2023, algorithm 1): noise is added up to each of
        ``levels`` and removed by f.

        Args:
            rng_key: random key.
            shape: batch shape of the draws.
            levels: decreasing noise levels between those of the process.
            context: values that the model is conditioned on, one for all draws.

        Raises:
            ValueError: for levels outside the range of the process.
        """
        check_key("rng_key", rng_key)
        if any(not self.sde.sigma_min < v < self.sde.sigma_max for v in levels):
            raise ValueError(
                "`levels` must lie between the process's lowest and highest noise "
                f"level, {self.sde.sigma_min} and {self.sde.sigma_max}. Got {levels}."
            )
        steps = jnp.asarray(levels, float)
        draws = _sample(self, rng_key, steps, context, size=prod(shape))
        return draws.reshape(*shape, *self.event_shape)


def default_net(
    net: Callable | None, event_shape: tuple[int, ...], context_size: int = 0
) -> Callable:
    """Return the configuration of the net; that of an MLP for None."""
    return MLP(prod(event_shape), context_size=context_size) if net is None else net


def init_model(
    key: PRNGKey,
    net: Callable | None,
    sde: SDE,
    standardize: Affine,
    event_shape: tuple[int, ...],
    standardize_context: ContextMap | None = None,
    linear_baseline: Array | None = None,
) -> ConsistencyModel:
    """Return an untrained model.

    Args:
        key: random key of the weights.
        net: configuration of the net; None for an MLP.
        sde: noise process.
        standardize: map of data to the unit scale.
        event_shape: shape of one point.
        standardize_context: map of contexts to the unit scale, or None.
        linear_baseline: coefficients that predict the data from their context, or None.
    """
    size = 0 if standardize_context is None else standardize_context.loc.size
    net = default_net(net, event_shape, size)
    params, graphdef = build(net, key)
    return ConsistencyModel(
        params,
        standardize,
        graphdef,
        sde,
        event_shape,
        standardize_context,
        linear_baseline,
        net,
    )


@partial(jax.jit, static_argnames="size")
def _sample(
    model: ConsistencyModel,
    key: PRNGKey,
    levels: Array,
    context: Array | None,
    *,
    size: int,
) -> Array:
    """Return ``size`` draws of multistep sampling."""

    def one(key: PRNGKey) -> Position:
        key, key_start = jax.random.split(key)
        level_max = model.sde.sigma_max
        start = draw_start(key_start, model.event_shape, level_max)
        x = model(start, level_max, context)

        def step(x: Position, inputs: tuple) -> tuple[Position, None]:
            key, level = inputs
            sd = jnp.sqrt(level**2 - model.sde.sigma_min**2)
            noise = jax.random.normal(key, x.shape, x.dtype)
            return model(x + sd * noise, level, context), None

        keys = jax.random.split(key, len(levels))
        x, _ = jax.lax.scan(step, x, (keys, levels))
        return model.standardize.inverse(model.sde.alpha(model.sde.t_min) * x)

    return jax.vmap(one)(jax.random.split(key, size))

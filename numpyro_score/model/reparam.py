r"""Reparameterize a learned site by the probability flow: noise in, draws out.

A solver of the flow with a fixed grid is a smooth map T from standard normal noise to
draws. A site x whose law is learned becomes :math:`x = T(n), n \sim N(0, I)`, and any
kernel or guide that knows how to move n samples the law that the solver pushes forward.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.infer.reparam import Reparam

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import DPMSolverPP, Solver, decode, encode
from numpyro_score.typing import Real


@dataclass(frozen=True)
class ProbabilityFlowReparam(Reparam):
    """Turn a site of a learned law into normal noise pushed through the flow.

    For ``numpyro.handlers.reparam``. The site ``x`` becomes deterministic and the
    latent site is ``x_base``, with independent standard normal coordinates. The law
    sampled is exactly the one the solver pushes forward; more steps move it closer to
    the learned law. One gradient of the model costs one pass of the solver and its
    transpose, so NUTS pays ``num_steps`` evaluations per leapfrog step. For large nets
    use a kernel that takes the score, such as
    :class:`~numpyro_score.kernel.ScoreLangevin`.

    Args:
        solver: a solver of the probability flow with a grid known in advance.
        ts: decreasing times; None for the solver's own grid. Ends at the time of the
            learned site only if the caller makes it so.

    Raises:
        TypeError: for a solver with noise.

    Example:
        >>> import jax
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> def model():
        ...     numpyro.sample("x", ScoreDistribution(score))
        >>> flow = numpyro.handlers.reparam(
        ...     model, config={"x": ProbabilityFlowReparam()}
        ... )
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(flow, 0)).get_trace()
        >>> {name: site["type"] for name, site in trace.items()}
        {'x_base': 'sample', 'x': 'deterministic'}
    """

    solver: Solver = DPMSolverPP()
    ts: Float[Array, " ts"] | None = None

    def __post_init__(self) -> None:
        if self.solver.stochastic:
            raise TypeError(
                "`solver` must solve the probability flow, such as DPMSolverPP(): a "
                f"path with noise is no function of its start. Got {self.solver!r}."
            )

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Real]:
        """Sample the noise and return the site's value.

        Raises:
            TypeError: if the site's distribution is not a learned law, possibly
                expanded or declared an event.
            ValueError: if the site is observed.
        """
        if obs is not None:
            raise ValueError(
                f"Site '{name}' is observed: only latent sites can be reparameterized. "
                "Leave it out of `config`, or do not observe it."
            )
        fn, batch_shape, event_dim = self._unwrap(fn)
        if not isinstance(fn, ScoreDistribution):
            raise TypeError(
                f"Site '{name}' must be a ScoreDistribution, possibly expanded, to be "
                "reparameterized by its flow. For a transformed one sample the learned "
                "point at its own site and transform it by `numpyro.deterministic`. "
                f"Got {type(fn).__name__}."
            )
        base = dist.Normal(0.0, 1.0).expand(fn.event_shape).to_event(fn.event_dim)
        noise = numpyro.sample(f"{name}_base", self._wrap(base, batch_shape, event_dim))
        return None, self.forward(fn, noise)

    def forward(self, fn: ScoreDistribution, noise: Real) -> Real:
        """Return T(noise), the point that the flow makes of standard normal noise."""
        scale, ts = self._start(fn.score)
        x = fn.score.standardize.inverse(scale * noise)
        return decode(fn.score, x, solver=self.solver, ts=ts)

    def inverse(self, fn: ScoreDistribution, x: Real) -> Real:
        """Return the noise of a point, up to the error of the solver."""
        scale, ts = self._start(fn.score)
        top = encode(fn.score, x, solver=self.solver, ts=ts)
        return fn.score.standardize.forward(top) / scale

    def _start(self, score: ScoreModel) -> tuple[Real, Array]:
        """Return the scale of standardized points at the first time, and the grid."""
        ts = self.solver.default_times(score.sde) if self.ts is None else self.ts
        alpha, sigma = score.sde.marginal(ts[0])
        return jnp.sqrt(alpha**2 + sigma**2), ts

r"""Reparameterizations of learned sites: by the probability flow, and of transforms.

A solver of the flow with a fixed grid is a smooth map T from standard normal noise to
draws. A learned site x becomes :math:`x = T(n),\ n \sim N(0, I)`, with n the latent
site of any kernel or guide.

A learned site under a transform, such as a location and scale, becomes a function of
the learned point, with a site of its own: noise is added to that point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.handlers import reparam
from numpyro.infer.reparam import Reparam, TransformReparam

from numpyro_score.model.distribution import ScoreDistribution, find_learned
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import DPMSolverPP, Solver, decode, encode
from numpyro_score.typing import Real


@dataclass(frozen=True)
class ProbabilityFlowReparam(Reparam):
    """Reparameterize a learned site as normal noise transported by the flow.

    For ``numpyro.handlers.reparam``. The site ``x`` becomes deterministic and the
    latent site is ``x_base``, with independent standard normal coordinates. The prior
    law of x is the pushforward of the noise by the solver, which converges to the
    learned law with more steps. One gradient of the model differentiates through the
    solver: ``num_steps`` evaluations of the net and their transposes per leapfrog step
    of NUTS. For large nets use :class:`~numpyro_score.kernel.ScoreLangevin`.

    Args:
        solver: a solver of the probability flow with a fixed grid.
        ts: decreasing times, the last of which should be that of the learned site; None
            for the solver's own grid.

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
        """Return the site's value T(n), with n sampled at the site ``{name}_base``.

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
        score = fn.score
        base = dist.Normal(0, 1).expand(score.event_shape).to_event(score.event_dim)
        noise = numpyro.sample(f"{name}_base", self._wrap(base, batch_shape, event_dim))
        return None, self.forward(fn, noise)

    def forward(self, fn: ScoreDistribution, noise: Real) -> Real:
        """Return x = T(noise) for standard normal noise."""
        scale, ts = self._start(fn.score)
        x = fn.score.standardize.inverse(scale * noise)
        return fn.score.constrain(decode(fn.score, x, solver=self.solver, ts=ts))

    def inverse(self, fn: ScoreDistribution, x: Real) -> Real:
        """Return the noise T^-1(x), up to the error of the solver."""
        scale, ts = self._start(fn.score)
        z = fn.score.unconstrain(x)
        top = encode(fn.score, z, solver=self.solver, ts=ts)
        return fn.score.standardize.forward(top) / scale

    def _start(self, score: ScoreModel) -> tuple[Real, Array]:
        """Return the standard deviation of x_t at the first time, and the times."""
        ts = self.solver.default_times(score.sde) if self.ts is None else self.ts
        return score.sde.prior_scale(ts[0]), ts


class SeparatedModel:
    """A model whose transformed learned sites are functions of points of their own.

    Site ``x`` with ``TransformedDistribution(ScoreDistribution(score), transforms)``
    becomes deterministic, and its learned point the latent site ``x_base``, as with
    NumPyro's ``TransformReparam``. Unchanged are sites whose only transform is the
    bijection of its support, such as exp: their unconstrained value is that point.
    Hashable and comparable by the model.

    Args:
        model: a NumPyro model.
    """

    def __init__(self, model: Callable) -> None:
        self.model = model
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        self._separated = reparam(model, config=_separation)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self._separated(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeparatedModel) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)


def separate_transforms(model: Callable) -> SeparatedModel:
    """Return a model with learned points as sites of their own, see the class."""
    return model if isinstance(model, SeparatedModel) else SeparatedModel(model)


def _separation(site: dict[str, Any]) -> Reparam | None:
    """Return how a site is reparameterized, or None."""
    fn, is_latent = site["fn"], site["type"] == "sample" and not site["is_observed"]
    if not is_latent or find_learned(fn, site["name"]) is None:
        return None
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if not isinstance(fn, dist.TransformedDistribution):
        return None
    # parameters may be traced in one run and known in another, and must not decide
    has_parameters = bool(jax.tree.leaves(fn.transforms))
    if not has_parameters and fn.transforms == [dist.biject_to(fn.support)]:
        return None
    return TransformReparam()

"""One-step posteriors: consistency models distilled from amortized posteriors."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import check_flags, check_key
from numpyro_score.consistency import ConsistencyModel, distill
from numpyro_score.infer.amortized.draw_check import warn_of_wrong_draws
from numpyro_score.infer.amortized.observation_check import (
    context_map_of,
    warn_of_far_observations,
)
from numpyro_score.infer.amortized.sampling import PosteriorGivenData, check_finite
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.amortized.storage import (
    CONSISTENCY_MODEL,
    check_layout,
    check_shapes,
    save_posterior,
)
from numpyro_score.io import load_consistency
from numpyro_score.reprs import repr_lines
from numpyro_score.typing import PRNGKey

REMEDY = (  # for wrong draws
    "Use the posterior from which this was distilled, with its `importance`, or MCMC "
    "on the model. `OneStepPosterior(..., check=False)` silences this."
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneStepPosterior(PosteriorGivenData):
    """A posterior with draws at one evaluation of a net each, without score or density.

    From :func:`distill_posterior` or :meth:`load`.

    Args:
        consistency_model: the map from noise to draws of z.
        simulator: the model, its arguments and the layout of its sites.
        check: whether draws are judged by the exact score of the model, see
            :mod:`~numpyro_score.infer.amortized.draw_check`.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_score import MLP, NPSE
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1))
        >>> from numpyro_score import VE
        >>> from numpyro_score.consistency.model import init_model
        >>> from numpyro_score.data.standardize import Affine
        >>> net, unit = MLP(1, width=8, depth=1, context_size=1), Affine.identity((1,))
        >>> untrained = init_model(jax.random.key(0), net, VE(), unit, (1,))
        >>> posterior = OneStepPosterior(untrained, NPSE(model, "y").simulator())
        >>> posterior.sample(jax.random.key(1), 0.5, 10)["x"].shape
        (10,)
    """

    consistency_model: ConsistencyModel
    simulator: Simulator = field(metadata={"static": True})
    check: bool = field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        check_flags(check=self.check)

    def __repr__(self) -> str:
        rows = self.simulator.summary() | self.consistency_model.summary()
        return repr_lines(type(self).__name__, rows)

    def sample(
        self,
        rng_key: PRNGKey,
        observation: Any,
        num_samples: int = 1000,
        *,
        levels: tuple[float, ...] = (),
    ) -> dict[str, Array]:
        """Return independent draws of the latent sites given one observation.

        Args:
            rng_key: random key.
            observation: the observed value, as in :meth:`AmortizedPosterior.sample
                <numpyro_score.infer.AmortizedPosterior.sample>`.
            num_samples: number of draws.
            levels: decreasing noise levels of further steps, see
                :meth:`ConsistencyModel.sample
                <numpyro_score.consistency.ConsistencyModel.sample>`.

        Raises:
            FloatingPointError: if a draw is not finite.
            ValueError: for observations of another shape or with NaN.

        Warns:
            UserWarning: for observations outside of the support of their site, or far
                from all simulations; and, with ``check``, for 64 draws or more that the
                exact score of the model shows to be wrong.
        """
        observed = self.simulator.observed
        context = observed.parse(observation)
        warn_of_far_observations(
            observed, context, context_map_of(self.consistency_model)
        )
        z = self.consistency_model.sample(
            rng_key, (num_samples,), levels=levels, context=context
        )
        check_finite(jnp.isfinite(z).all())
        if self.check:
            warn_of_wrong_draws(self.simulator, z, context[None], REMEDY)
        return self.simulator.latents.unflatten(z)

    def save(self, path: str | os.PathLike) -> None:
        """Save weights, layout and settings in a new folder, without the model's code.

        Args:
            path: path of the new folder.

        Raises:
            FileExistsError: if ``path`` exists.
        """
        save_posterior(self.consistency_model, self.simulator, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        simulator: Simulator,
        *,
        net: Callable | None = None,
    ) -> "OneStepPosterior":
        """Return a saved one-step posterior of the same model and arguments.

        Args:
            path: the folder.
            simulator: the simulator of the model, ``npse.simulator(*args)``.
            net: the ``net`` of :func:`distill_posterior`, if it is not one of the
                package's configurations.

        Raises:
            FileNotFoundError: if ``path`` is not a saved one-step posterior.
            ValueError: if the model's sites have changed, or files were altered.
        """
        folder = check_layout(path, simulator, CONSISTENCY_MODEL)
        model = load_consistency(folder, net=net)
        check_shapes(folder, model, simulator)
        return cls(model, simulator)


def distill_posterior(
    rng_key: PRNGKey,
    posterior: Any,
    num_steps: int = 10_000,
    *,
    num_simulations: int = 20_000,
    net: Callable | None = None,
    progress_bar: bool = True,
    **options: Any,
) -> tuple[OneStepPosterior, Float[Array, " steps"]]:
    """Return a one-step posterior distilled from a posterior, and the training losses.

    The consistency model is trained on paths of the posterior's probability flow given
    simulated observations.

    Args:
        rng_key: random key.
        posterior: an :class:`~numpyro_score.infer.AmortizedPosterior` whose
            net takes the observation as a vector. If it was fitted with
            ``check=False``, draws of the one-step posterior are not judged either.
        num_steps: training steps.
        num_simulations: number of simulated observations, one path for each.
        net: configuration of the consistency model; None for an MLP.
        progress_bar: whether to show simulations, then steps and loss.
        options: further options of :func:`numpyro_score.consistency.distill`.

    Returns:
        The one-step posterior and its training losses.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_score import MLP, NPSE
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1))
        >>> net = MLP(1, width=8, depth=1, context_size=1)
        >>> npse, key = NPSE(model, "y", net=net), jax.random.key(0)
        >>> posterior = npse.fit(key, 100, num_steps=2, progress_bar=False)
        >>> one_step, losses = distill_posterior(
        ...     key, posterior, 2, num_simulations=16, net=net, batch_size=8
        ... )
        >>> one_step.sample(jax.random.key(2), 0.5, 10)["x"].shape
        (10,)
    """
    check_key("rng_key", rng_key)
    key_simulate, key_distill = jax.random.split(rng_key)
    simulator, check = posterior.simulator, posterior.verdict is not None
    simulations = simulator.simulate(
        key_simulate, num_simulations, progress_bar=progress_bar
    )
    model, losses = distill(
        key_distill,
        posterior.score,
        num_steps,
        net=net,
        context=jnp.asarray(simulations.context),
        progress_bar=progress_bar,
        **options,
    )
    return OneStepPosterior(model, simulator, check), losses

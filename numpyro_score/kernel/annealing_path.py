r"""The path of annealing: from the noised prior to the posterior.

At a level the latents z have the density
:math:`p_t(x_t)\, p(\text{others})\, L(E[x_s|x_t], \text{others})^\beta`: learned sites
are seen through noise (:class:`~numpyro_score.model.handlers.noise_level`) and the
likelihood is tempered (:class:`~numpyro_score.model.handlers.temper`). Without learned
sites only the temperature moves. The likelihood L of a model with discrete sites is the
sum over them, which is tempered as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.handlers import seed, substitute
from numpyro.infer import init_to_sample

from numpyro_score.kernel.tempered_potential import scale_by_beta
from numpyro_score.model.denoising import (
    denoise,
    to_covariance,
    to_physical_units,
    to_solver_units,
)
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.handlers import noise_level, temper
from numpyro_score.model.potential import ModelPotential, model_potential, trace_latents
from numpyro_score.model.trace_checks import (
    is_discrete_latent,
    is_improper,
    is_latent,
    is_weighted,
    trace_anywhere,
    without_own_keys,
)
from numpyro_score.typing import PRNGKey, Time


@dataclass(frozen=True, eq=False)
class AnnealingPath:
    """The densities between prior and posterior of one model and its arguments."""

    model: Callable
    model_args: tuple
    model_kwargs: dict
    num_nodes: int
    num_reverse: int
    learned: dict[str, ScoreDistribution]
    discrete: bool = False

    @classmethod
    def of(
        cls,
        model: Callable,
        model_args: tuple,
        model_kwargs: dict,
        *,
        num_nodes: int,
        num_reverse: int,
    ) -> "AnnealingPath":
        """Return the path of a model, whose learned sites are looked up once.

        Raises:
            ValueError: for a model without latent sites.
        """
        end = model_potential(model, model_args, model_kwargs, num_nodes=num_nodes)
        if not end.prototype:
            raise ValueError(
                "The model has no latent site, so there is nothing to draw. Leave out "
                "`obs` of a site that is to be inferred."
            )
        sites = trace_anywhere(model, model_args, model_kwargs).values()
        arguments = model, model_args, model_kwargs, num_nodes, num_reverse
        return cls(*arguments, end.learned, any(map(is_discrete_latent, sites)))

    def model_at(self, t: Time, beta: Array | float) -> Callable:
        """Return the model at a time and a power of the likelihood."""
        return temper(noise_level(self.model, t), beta)

    def potential(self, t: Time, beta: Array | float) -> ModelPotential:
        """Return the potential at a time and a power of the likelihood."""
        if not self.discrete:
            return self._potential(t, beta)
        # the sum of p(k) p(y|k)^beta over discrete k is no power of a likelihood
        prior, joint = (self._potential(t, end) for end in (0.0, 1.0))

        def tempered(z: Any) -> Array:
            start, end = prior.potential_fn(z), joint.potential_fn(z)
            return start + scale_by_beta(beta, end - start)

        return replace(joint, potential_fn=tempered)

    def _potential(self, t: Time, beta: Array | float) -> ModelPotential:
        """Return the potential with each observed site and factor at the power."""
        model = self.model_at(t, beta)
        return model_potential(
            model, self.model_args, self.model_kwargs, num_nodes=self.num_nodes
        )

    def sample_prior(self, key: PRNGKey, t: Time) -> dict[str, Array]:
        """Draw the latents from the prior at time t, in unconstrained space."""
        # init_to_sample draws, and is uniform where a prior cannot be sampled
        noisy = seed(without_own_keys(noise_level(self.model, t)), key)
        model = substitute(noisy, substitute_fn=init_to_sample)
        return trace_latents(model, self.model_args, self.model_kwargs)

    def log_likelihood(self, z: dict[str, Array], t: Time) -> Float[Array, ""]:
        """Return the log likelihood at z, seen through the noise of time t."""
        prior, posterior = (self.potential(t, beta) for beta in (0.0, 1.0))
        return prior.value(z) - posterior.value(z)

    def undrawn_sites(self) -> list[str]:
        """Return the latent sites whose prior cannot be drawn: there is no evidence.

        Improper ones, and scaled or masked ones: the model draws from another law.
        """
        sites = trace_anywhere(self.model, self.model_args, self.model_kwargs)
        return [
            name
            for name, site in sites.items()
            if is_latent(site) and (is_weighted(site) or is_improper(site))
        ]

    def sample_reverse(
        self, key: PRNGKey, z: dict[str, Array], t: Time, t_next: Time
    ) -> dict[str, Array]:
        """Draw the learned sites at a lower time, by reverse steps of their prior.

        A Gaussian reverse step leaves out the variance of x_0 given x_t, so the way is
        divided into ``num_reverse`` steps, even in the logarithm of the noise level.
        """
        moved = dict(z)
        for j, (name, learned) in enumerate(self.learned.items()):
            sde = learned.score.sde
            ends = jnp.maximum(jnp.stack([t, t_next]), learned.t)
            start, end = jnp.log(sde.noise_level(ends))
            levels = jnp.exp(jnp.linspace(start, end, self.num_reverse + 1))
            times = jnp.maximum(sde.time(levels), learned.t)
            keys = jax.random.split(jax.random.fold_in(key, j), self.num_reverse)

            def step(x: Array, inputs: tuple, learned: Any = learned) -> tuple:
                key, before, after = inputs
                mean, sd = learned.score.reverse_transition(x, before, after)
                return mean + sd * jax.random.normal(key, x.shape, x.dtype), None

            moved[name], _ = jax.lax.scan(step, z[name], (keys, times[:-1], times[1:]))
        return moved

    def denoise(self, z: dict[str, Array], t: Time) -> dict[str, Array]:
        """Return z with learned sites at their expectation given the noise."""
        center = denoise(self.learned, to_solver_units(self.learned, z, t), t)
        return {**z, **to_physical_units(self.learned, center)}

    def denoising_sd(self, z: dict[str, Array], t: Time) -> dict[str, Array]:
        r"""Return a scale per latent: that of x_0 given x_t at learned sites, else 1.

        With unit data variance :math:`r^2 = \sigma^2/(1 + \sigma^2)` at noise level
        sigma, the rule of step sizes of Song and Ermon 2019 for small levels.
        """
        scales = {name: jnp.ones_like(value) for name, value in z.items()}
        for name, learned in self.learned.items():
            level = learned.score.sde.noise_level(jnp.maximum(t, learned.t))
            scale = level / jnp.sqrt(1 + level**2) * learned.score.standardize.scale
            scales[name] = jnp.broadcast_to(scale, z[name].shape)
        return scales

    def ncsn_step_scales(self, z: dict[str, Array], t: Time) -> dict[str, Array]:
        r"""Return the scales of steps by the rule of Song and Ermon 2019.

        :math:`\sigma_i / \sigma_L` times the data's sd at learned sites, else 1.
        """
        scales = {name: jnp.ones_like(value) for name, value in z.items()}
        for name, learned in self.learned.items():
            level = learned.score.sde.noise_level
            ratio = level(jnp.maximum(t, learned.t)) / level(learned.t)
            scale = ratio * learned.score.standardize.scale
            scales[name] = jnp.broadcast_to(scale, z[name].shape)
        return scales

    def likelihood_variance_inflation(
        self, z: dict[str, Array], t: Time
    ) -> Float[Array, ""]:
        r"""Return by how much noise widens the likelihood, in units of its own width.

        The likelihood at E[x_0|x_t] forgets the covariance C of x_0 given x_t, which by
        the second Tweedie formula is :math:`\sigma^2` times the Jacobian of the
        denoiser. Along its gradient g, with curvature kappa, C adds the share
        :math:`w = \kappa\, g^T C g / g^T g` to the variance of a Gaussian likelihood,
        whose power is then 1/(1 + w).
        """
        noisy = to_solver_units(self.learned, z, t)
        center = denoise(self.learned, noisy, t)

        def log_likelihood(u: dict[str, Array]) -> Array:
            x = to_physical_units(self.learned, u)
            return self.log_likelihood({**z, **x}, 0.0)

        gradient = jax.grad(log_likelihood)(center)
        _, product = jax.jvp(jax.grad(log_likelihood), (center,), (gradient,))
        tangent = to_covariance(self.learned, t, gradient)
        _, spread = jax.jvp(lambda u: denoise(self.learned, u, t), (noisy,), (tangent,))
        square, curvature, variance = (
            sum(jnp.vdot(gradient[name], other[name]) for name in center)
            for other in (gradient, product, spread)
        )
        ratio = -curvature * variance / jnp.where(square > 0, square, 1.0) ** 2
        return jnp.maximum(jnp.nan_to_num(ratio), 0.0)

"""Where particles start: noise at learned sites, the prior at ordinary ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.handlers import seed, substitute
from numpyro.infer import init_to_sample

from numpyro_score.infer.twisted.initial_distribution import InitialGaussian
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.denoising import LearnedSites, SiteValues
from numpyro_score.model.potential import trace_latents
from numpyro_score.typing import PRNGKey, Time

Starts = dict[str, InitialGaussian]


def initial_gaussians(learned: LearnedSites, t: Time) -> Starts:
    """Return the Gaussian that draws each learned site at the highest level."""
    return {name: InitialGaussian.of(law, t) for name, law in learned.items()}


def max_signal_to_noise(starts: Starts) -> Float[Array, ""]:
    """Return the longest axis of the data, in units of the noise that is to hide it."""
    return jnp.stack([start.signal_to_noise for start in starts.values()]).max()


def sample_initial(key: PRNGKey, twist: Twist, t: Time, starts: Starts) -> SiteValues:
    """Draw learned sites at the highest level, and ordinary ones given them."""
    key_learned, key_ordinary = jax.random.split(key)
    x = {}
    for j, (name, law) in enumerate(twist.learned.items()):
        shape = twist.potential.prototype[name].shape
        rows = (*shape[: len(shape) - law.score.event_dim], law.score.size)
        u = starts[name].draw(jax.random.fold_in(key_learned, j), rows)
        u = law.score.sde.alpha(t) * u.reshape(shape)
        x[name] = law.score.standardize.inverse(u)
    if not twist.ordinary:
        return x
    center = twist.denoise(x, t)

    def draw(site: dict | None) -> Any:
        if site is None or site["name"] not in center:
            return init_to_sample(site)
        return twist.learned[site["name"]].score.constrain(center[site["name"]])

    model = substitute(seed(twist.model, key_ordinary), substitute_fn=draw)
    z = trace_latents(model, twist.model_args, twist.model_kwargs)
    return {**z, **x}


def initial_log_weight(
    z: SiteValues, learned: LearnedSites, t: Time, starts: Starts
) -> Float[Array, ""]:
    """Return the log density of learned sites under their laws over their start."""
    total = jnp.zeros(())
    for name, law in learned.items():
        u = law.score.standardize.forward(z[name]) / law.score.sde.alpha(t)
        start, rows = starts[name], u.reshape(-1, law.score.size)
        weights = jax.vmap(lambda x, s=start, a=law: s.log_weight(a, t, x))(rows)
        total = total + weights.sum()
    return total

"""Where particles start: noise at learned sites, the prior at ordinary ones."""

from typing import Any

import jax
from numpyro.handlers import seed, substitute
from numpyro.infer import init_to_sample

from numpyro_score.infer.spread import Sites
from numpyro_score.infer.twist import Twist
from numpyro_score.potential import trace_latents
from numpyro_score.typing import PRNGKey, Time


def draw_start(key: PRNGKey, twist: Twist, t: Time) -> Sites:
    """Draw learned sites at the highest level, and ordinary ones given them."""
    key_learned, key_ordinary = jax.random.split(key)
    x = {}
    for j, (name, law) in enumerate(twist.learned.items()):
        shape = twist.potential.prototype[name].shape
        u = law.score.sde.prior_sample(jax.random.fold_in(key_learned, j), shape)
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

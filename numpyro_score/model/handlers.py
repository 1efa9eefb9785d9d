"""Effect handlers: see a model through noise, or at another temperature."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_score.model.distribution import find_learned, replace_learned
from numpyro_score.typing import Scalar, Time


class noise_level(Messenger):  # noqa: N801 (handlers are lower case, as in NumPyro)
    r"""Replace every learned site by its marginal at time t, seen through Tweedie.

    A site ``x ~ ScoreDistribution(score)`` is recorded at :math:`x_t` with the law
    :math:`p_t`, while the model downstream receives the denoised
    :math:`E[x_s | x_t]`, where s is the site's own time (by default the lowest). Any
    differentiable likelihood thereby becomes the guided likelihood of diffusion
    posterior sampling (Chung et al. 2023), by autodiff; other sites are untouched. At
    t = s the model is itself again. A site stays at its own time when t is below.

    Args:
        fn: a NumPyro model.
        t: the time of the scores' process, one for all learned sites; None for the
            lowest noise level.

    Raises:
        TypeError: for a learned site under a transform, whose noise is not Gaussian.

    Example:
        >>> import jax, numpyro
        >>> from numpyro_score import ScoreDistribution, ScoreModel, VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
        ... )
        >>> def model():
        ...     x = numpyro.sample("x", ScoreDistribution(score))
        ...     numpyro.deterministic("seen", x)
        >>> noisy = numpyro.handlers.seed(noise_level(model, VE().time(1.0)), 0)
        >>> trace = numpyro.handlers.trace(noisy).get_trace()
        >>> bool(abs(trace["seen"]["value"] - trace["x"]["value"] / 2) < 1e-3)
        True
    """

    def __init__(self, fn: Callable | None = None, t: Time | None = None) -> None:
        self.t = t
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Swap in the marginal at t."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        learned = find_learned(msg["fn"], msg["name"])
        if learned is None:
            return
        _check_transforms(msg["fn"], msg["name"])
        t = learned.t if self.t is None else jnp.maximum(self.t, learned.t)
        noisy = learned.marginal(t)
        msg["fn"] = replace_learned(msg["fn"], noisy)
        msg["infer"] = {**msg["infer"], "_noise_level": (learned, noisy.t)}

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Hand the denoised value on; outer traces have recorded x_t by now."""
        noisy = msg.get("infer", {}).get("_noise_level")
        if msg["type"] == "sample" and noisy is not None:
            learned, t = noisy
            score = learned.score
            z = score.reverse_transition(score.unconstrain(msg["value"]), t, learned.t)[
                0
            ]
            msg["value"] = score.constrain(z)


def _check_transforms(fn: Any, name: str) -> None:
    """Raise for a learned site whose value is a transform of the learned point."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.TransformedDistribution):
            raise TypeError(
                f"Site '{name}' transforms a ScoreDistribution: noise on the learned "
                "point is not Gaussian after a transform. Sample the learned point at "
                "its own site and transform it by `numpyro.deterministic`."
            )
        fn = fn.base_dist


class temper(Messenger):  # noqa: N801
    r"""Raise the likelihood to the power beta: from the prior (0) to the posterior (1).

    Scales the log density of observed sites and factors; latent sites, and the
    Jacobians of their transforms, stay as they are.

    Args:
        fn: a NumPyro model.
        beta: the power, in [0, 1].

    Example:
        >>> import numpyro
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=3.0)
        >>> def energy(beta):
        ...     tempered = temper(model, beta)
        ...     return numpyro.infer.util.log_density(tempered, (), {}, {"x": 0.0})[0]
        >>> float(energy(0.0)) == float(dist.Normal(0, 1).log_prob(0.0))
        True
    """

    def __init__(self, fn: Callable | None = None, beta: Scalar = 1.0) -> None:
        self.beta = beta
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Scale what is observed."""
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        # NumPyro's factor for the Jacobian of a latent site belongs to its prior
        if not (msg["name"].startswith("_") and msg["name"].endswith("_log_det")):
            scale = 1.0 if msg.get("scale") is None else msg["scale"]
            msg["scale"] = scale * self.beta
            # at power 0 the likelihood is 1 even where it is 0
            msg["fn"] = msg["fn"].mask(jnp.asarray(self.beta) > 0)

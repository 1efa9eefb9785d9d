"""Effect handlers: see a model through noise."""

from collections.abc import Callable
from typing import Any

import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_score.distribution import find_learned, replace_learned
from numpyro_score.typing import Time


class noise_level(Messenger):  # noqa: N801 (handlers are lower case, as in NumPyro)
    r"""Replace every learned site by its marginal at time t, seen through Tweedie.

    A site ``x ~ ScoreDistribution(score)`` is recorded at :math:`x_t` with the law
    :math:`p_t`, while the model downstream receives the denoised
    :math:`E[x_0 | x_t]`. Any differentiable likelihood thereby becomes the guided
    likelihood of diffusion posterior sampling (Chung et al. 2023), by autodiff; other
    sites are untouched. At the lowest time this is the model itself up to the
    denoising of noise that small.

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
        >>> bool(abs(trace["seen"]["value"] - trace["x"]["value"] / 2) < 1e-5)
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
        _refuse_transforms(msg["fn"], msg["name"])
        msg["fn"] = replace_learned(msg["fn"], learned.at(self.t))
        msg["infer"] = {**msg["infer"], "_noise_level_score": learned.score}

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Hand the denoised value on; outer traces have recorded x_t by now."""
        score = msg.get("infer", {}).get("_noise_level_score")
        if msg["type"] == "sample" and score is not None:
            msg["value"] = score.denoise(msg["value"], self.t)


def _refuse_transforms(fn: Any, name: str) -> None:
    """Raise for a learned site whose value is a transform of the learned point."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.TransformedDistribution):
            raise TypeError(
                f"Site '{name}' transforms a ScoreDistribution: noise on the learned "
                "point is not Gaussian after a transform. Sample the learned point at "
                "its own site and transform it by `numpyro.deterministic`."
            )
        fn = fn.base_dist

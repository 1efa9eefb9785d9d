"""Open slots for learned laws: see a model with their densities left out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_score.model.distribution import (
    ScoreDistribution,
    find_learned,
    replace_learned,
)


class _ExcludedDensity(dist.Distribution):
    """Stands for a learned law in a trace: notes the point, returns the input l."""

    arg_constraints: dict = {}
    pytree_aux_fields = ("_learned", "_record")

    def __init__(self, learned: ScoreDistribution, record: Callable) -> None:
        self._learned, self._record = learned, record
        super().__init__(event_shape=learned.event_shape, validate_args=False)

    @property
    def support(self) -> dist.constraints.Constraint:
        """The learned law's support."""
        return self._learned.support

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw from the learned law, for initial values."""
        return self._learned.sample(key, sample_shape)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Note the unconstrained point; return l, and the Jacobian of the support.

        l is zero unless the tracer asks for its weight; the Jacobian is known.
        """
        score = self._learned.score
        point = score.unconstrain(value)
        log_weight = self._record(point)
        if score.support is None:
            return log_weight
        return log_weight - score.support.log_abs_det_jacobian(point, value)


class exclude_learned(Messenger):  # noqa: N801
    """Open every latent learned site: note its point, leave its density out.

    Args:
        fn: a NumPyro model.
        log_weight: the inputs l by site; zero where absent.

    Raises:
        TypeError: for a learned law in a place where its score is not enough.
        ValueError: for a learned site inside a control flow primitive.
    """

    def __init__(
        self, fn: Callable | None = None, log_weight: dict[str, Array] | None = None
    ) -> None:
        self.log_weight = {} if log_weight is None else log_weight
        self.sites: dict[str, ScoreDistribution] = {}
        self.points: dict[str, Array] = {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Put a slot in the place of a learned law."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        name = msg["name"]
        learned = find_learned(msg["fn"], name)
        if learned is None:
            return
        self.sites[name] = learned

        def record(value: Array) -> Array:
            self.points[name] = value
            batch = jnp.shape(value)[: jnp.ndim(value) - learned.score.event_dim]
            return self.log_weight.get(name, jnp.zeros(batch, jnp.result_type(value)))

        msg["fn"] = replace_learned(msg["fn"], _ExcludedDensity(learned, record))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Look for learned sites in a loop or branch, whose messages stay inside."""
        if msg["type"] == "control_flow":
            for node in jax.tree.leaves(msg["value"], is_leaf=_is_trace):
                if _is_trace(node):
                    _check_control_flow(node.trace)


def _is_trace(node: Any) -> bool:
    return isinstance(node, PytreeTrace)


def _check_control_flow(sites: dict[str, dict[str, Any]]) -> None:
    for name, site in sites.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        if find_learned(site["fn"], name) is not None:
            raise ValueError(
                f"Learned site '{name}' must not be inside `scan` or `cond` of "
                "`numpyro.contrib.control_flow`, which hide its score from the "
                "sampler. Sample it outside, all steps at once in a `numpyro.plate`, "
                "and hand the values to `scan` as `xs`."
            )

"""A model's density without the terms of its learned sites."""

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
    """Placeholder of a learned law: its ``log_prob`` is an input, not a density."""

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
        """Return draws of the learned law, for initial values."""
        return self._learned.sample(key, sample_shape)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Record the unconstrained point; return the input less the log Jacobian.

        The input is 0 unless the caller differentiates in it to obtain the weight of
        the site's log density.
        """
        score = self._learned.score
        point = score.unconstrain(value)
        return score.subtract_log_jacobian(self._record(point), point, value)


class exclude_learned(Messenger):  # noqa: N801
    """Replace the log density of every latent learned site by an input, 0 by default.

    The joint log density is linear in the inputs; its derivative in them is the weight
    of each learned term (from masks, plates' scales and ``numpyro.handlers.scale``).
    After a run ``points`` holds the unconstrained value of every learned site and
    ``sites`` its distribution.

    Args:
        fn: a NumPyro model.
        log_densities: the inputs by site; zero where absent.

    Raises:
        TypeError: for a learned law inside a distribution whose score is not a function
            of the learned score alone, see
            :func:`~numpyro_score.model.distribution.find_learned`.
        ValueError: for a learned site inside a control flow primitive.
    """

    def __init__(
        self, fn: Callable | None = None, log_densities: dict[str, Array] | None = None
    ) -> None:
        self.log_densities = {} if log_densities is None else log_densities
        self.sites: dict[str, ScoreDistribution] = {}
        self.points: dict[str, Array] = {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace a learned law by its placeholder."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        name = msg["name"]
        learned = find_learned(msg["fn"], name)
        if learned is None:
            return
        self.sites[name] = learned

        def record(value: Array) -> Array:
            self.points[name] = value
            zeros = zero_log_densities({name: learned}, {name: jnp.asarray(value)})
            return self.log_densities.get(name, zeros[name])

        msg["fn"] = replace_learned(msg["fn"], _ExcludedDensity(learned, record))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Raise for learned sites in a loop or branch, whose messages end there."""
        if msg["type"] == "control_flow":
            for node in jax.tree.leaves(msg["value"], is_leaf=_is_trace):
                if _is_trace(node):
                    _check_control_flow(node.trace)


def zero_log_densities(
    learned: dict[str, ScoreDistribution], points: dict[str, Any]
) -> dict[str, Array]:
    """Return zeros of the batch shapes of learned sites.

    Args:
        learned: the laws of the sites.
        points: their values, or arrays' shapes and dtypes.
    """
    return {
        name: jnp.zeros(x.shape[: x.ndim - learned[name].score.event_dim], x.dtype)
        for name, x in points.items()
    }


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

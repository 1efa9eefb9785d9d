"""Checks of a model's trace, before anything is sampled from it."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.constraints import is_dependent
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from numpyro_score.checks import is_traced
from numpyro_score.data.inputs import is_number_dtype
from numpyro_score.model.distribution import base_distribution, is_masked
from numpyro_score.model.host_randomness import refuse_host_randomness
from numpyro_score.model.latent_dependence import used_inputs
from numpyro_score.model.learned_sites import exclude_learned
from numpyro_score.model.tracing_errors import explain_tracing
from numpyro_score.reprs import short_repr
from numpyro_score.typing import PRNGKey

# a site with a density at half of them is named by a chance of 2^-10 = .1 %
NUM_STARTS = 10
NUMPY_ARRAYS = np.ndarray, np.generic, bool, int, float, complex
ARRAYS = jax.Array, *NUMPY_ARRAYS  # of numbers
MAX_ROUNDING = 1e-3  # between two runs of one density, relative: 1e4 float32 terms


def run_anywhere[Result](run: Callable[[], Result]) -> Result:
    """Return the result of a run of a model at arbitrary values of its latent sites.

    Parameters of distributions may be impossible at these values alone, such as a rate
    that overflows: where NumPyro's validation refuses them, the run is without it.

    Args:
        run: what runs the model.
    """
    with explain_tracing():
        try:
            return run()
        except ValueError:
            with validation_enabled(False):
                return run()


def trace_anywhere(
    model: Callable, args: tuple, kwargs: dict, rng_key: PRNGKey | None = None
) -> dict[str, dict[str, Any]]:
    """Return the trace of a model at arbitrary values of its latent sites.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        rng_key: random key; None where kinds and shapes alone are of interest.
    """
    start = start_anywhere(model, jax.random.key(0) if rng_key is None else rng_key)
    return run_anywhere(lambda: trace(start).get_trace(*args, **kwargs))


def start_anywhere(model: Callable, rng_key: PRNGKey | int) -> Callable:
    """Return a model that starts its continuous latent sites at random."""
    return substitute(seed(model, rng_key), substitute_fn=init_to_uniform)


def is_latent(site: dict[str, Any]) -> bool:
    """Return whether a site of a trace is a sample site that is not observed."""
    return site["type"] == "sample" and not site["is_observed"]


def is_discrete_latent(site: dict[str, Any]) -> bool:
    """Return whether a site of a trace is latent, and to be summed out."""
    return is_latent(site) and bool(site["fn"].support.is_discrete)


def is_improper(site: dict[str, Any]) -> bool:
    """Return whether the prior of a site cannot be drawn from, as it has no law."""
    return isinstance(base_distribution(site["fn"]), dist.ImproperUniform)


def is_weighted(site: dict[str, Any]) -> bool:
    """Return whether a site's density is scaled or masked, as far as that is known.

    A model then draws a latent site from another law than its density states.

    Example:
        >>> is_weighted({"fn": dist.Normal(0, 1), "scale": 2.0})
        True
    """
    scale = site.get("scale")
    is_scaled = scale is not None and (
        is_traced(scale) or bool(np.any(np.asarray(scale) != 1))
    )
    return is_scaled or is_masked(site["fn"])


def check_trace(sites: dict[str, dict[str, Any]]) -> None:
    """Raise for random rows, and for observed values that do not fit their law.

    That are no arrays, NaN, of a shape that does not fit, or of complex density. Also
    for latent sites with values of their own.

    Args:
        sites: the trace of a seeded model, with any values of the latents.

    Raises:
        ValueError: naming plate or site, with the shapes where these do not fit.
        TypeError: for observed values that are no array of numbers, and for sites with
            a complex log density.
    """
    for name, site in sites.items():
        if site["type"] == "plate" and _draws_rows(site):
            size, subsample_size = site["args"]
            raise ValueError(
                "The kernels do not support subsampling: the density would change with "
                f"the rows. Leave out `subsample_size` of plate '{name}', or index the "
                f"rows before the model. Got {subsample_size} of {size} rows."
            )
        if site["type"] == "sample":
            if site["is_observed"]:
                _check_observed(name, site)
                _check_shapes(name, site)
            else:
                _check_drawn(name, site)
            _check_real(name, site)


def _check_drawn(name: str, site: dict[str, Any]) -> None:
    """Raise for a latent site that a handler in the model has given a value.

    It gets no random key then; sites of a scan show none, whatever their values.
    """
    is_drawn = site["kwargs"].get("rng_key") is not None
    if not (is_drawn or site.get("_control_flow_done", False)):
        raise ValueError(
            f"Site '{name}' is latent, but the model gives it a value, by `substitute` "
            "or `replay`: samplers would move it, or draw its prior as this value. Fix "
            "it by handlers.condition or handlers.do; let chains start at a value by "
            "`init_params` or init_to_value."
        )


def _check_real(name: str, site: dict[str, Any]) -> None:
    """Raise for a complex log density, of complex values or parameters."""
    parts = jax.tree.leaves((site["fn"], site["value"]))
    if not any(jnp.iscomplexobj(part) for part in parts):
        return
    kind = jax.eval_shape(site["fn"].log_prob, site["value"]).dtype
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(
            f"Site '{name}' must have a real log density, but its values or parameters "
            "are complex. Observe real and imaginary parts, by `.real` and `.imag`. "
            f"Got a log density of type {kind}."
        )


def check_observations(model: Callable, args: tuple, kwargs: dict) -> None:
    """Raise for observations that no value of the latents explains.

    For samplers that trace a model with its arguments, whose values are then unknown.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: naming plate or site, as :func:`check_trace` and
            :func:`check_in_support`.
        TypeError: as :func:`check_trace`.
    """
    with refuse_host_randomness(model, args, kwargs):
        sites = trace_anywhere(exclude_learned(model), args, kwargs)
    check_trace(sites)
    check_in_support(model, args, kwargs, sites)


def check_in_support(
    model: Callable, args: tuple, kwargs: dict, sites: dict[str, dict[str, Any]]
) -> None:
    """Raise for observed values that no latent brings into the support of their law.

    Where latents do not move the support the likelihood is zero whatever they are.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        sites: its trace, with any values of the latents.

    Raises:
        ValueError: naming the site.
    """
    for name, site in sites.items():
        found = _outside(site)
        if found and not _support_moves(name, model, args, kwargs, sites):
            raise ValueError(
                f"Site '{name}' must be observed within the support of its "
                "distribution: the likelihood of other values is zero, whatever the "
                "latents are. Correct the data, or take a distribution whose support "
                f"has them. Got {found} outside of {site['fn'].support}."
            )


def _outside(site: dict[str, Any]) -> str:
    """Return how many observed values are outside of the support, "" for none.

    Those that have a density nevertheless, as behind a mask, do not count.
    """
    if site["type"] != "sample" or not site["is_observed"]:
        return ""
    fn, value = site["fn"], site["value"]
    support = fn.support
    if support is None or is_dependent(support) or is_traced(value, fn, support):
        return ""
    # inside of a program operations are traced, of known numbers too
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the value is outside of the support
        bad = ~np.asarray(support(jnp.asarray(value)))
        if not bad.any():
            return ""
        bad = bad & ~np.isfinite(np.asarray(fn.log_prob(jnp.asarray(value))))
    # enumerated latents and other laws for one value are axes in front of it
    value = np.asarray(value)
    bad = bad.all(axis=tuple(range(bad.ndim - (value.ndim - fn.event_dim))))
    if not bad.any():
        return ""
    return f"{int(bad.sum())} of {bad.size} values, such as {value[bad][0]},"


def _support_moves(
    name: str,
    model: Callable,
    args: tuple,
    kwargs: dict,
    sites: dict[str, dict[str, Any]],
) -> bool:
    """Return whether the support of a site's law is computed from latent sites."""
    if not jax.tree.leaves(sites[name]["fn"].support):
        return False
    latents = {key: site["value"] for key, site in sites.items() if is_latent(site)}
    seeded = seed(exclude_learned(model), 0)

    def ends(values: dict[str, Any]) -> list[Any]:
        found = trace(substitute(seeded, values)).get_trace(*args, **kwargs)
        return jax.tree.leaves(found[name]["fn"].support)

    with validation_enabled(False), explain_tracing():
        return any(used_inputs(ends, latents))


def _draws_rows(site: dict[str, Any]) -> bool:
    """Return whether a plate draws its rows anew at every run."""
    size, subsample_size = site["args"]
    if subsample_size in (None, size):
        return False
    # rows that are given, by `numpyro.handlers.substitute`, need no key
    return site["kwargs"].get("rng_key") is not None


def _check_observed(name: str, site: dict[str, Any]) -> None:
    """Raise for what is no array, and for NaN among values that are not masked."""
    value = site["value"]
    if is_traced(value) or hasattr(value, "__jax_array__"):
        return
    if not isinstance(value, ARRAYS) or not is_number_dtype(np.asarray(value).dtype):
        raise TypeError(
            f"Site '{name}' must be observed as an array of numbers: JAX computes its "
            "density. Convert lists, columns of a frame and labels before the model, "
            "as by `jnp.asarray(y, float)`. "
            f"Got {type(value).__module__}.{type(value).__name__}, {short_repr(value)}."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return
    missing = int(np.isnan(np.asarray(value)).sum())
    if not missing:
        return
    with warnings.catch_warnings():  # that NaN is outside of the support
        warnings.simplefilter("ignore")
        log_prob = site["fn"].log_prob(value)
    # NumPyro's own validation has -inf in the place of NaN
    if is_traced(log_prob) or np.isfinite(log_prob).all():
        return
    raise ValueError(
        f"Site '{name}' has NaN in its observed values, which have no density. Drop "
        "missing rows, or replace their values and mask them by `fn.mask(is_known)`. "
        f"Got {missing} of {np.size(value)} numbers that are NaN."
    )


def _check_shapes(name: str, site: dict[str, Any]) -> None:
    """Raise where each observed value would count under the laws of others."""
    fault = _shape_fault(site)
    if not fault:
        return
    scale = _scale_shape(site)
    raise ValueError(
        f"Site '{name}' must be observed in the shape of its distribution: {fault}. "
        "Reshape the data, as by `y.reshape(-1)` for a column, or the distribution by "
        f"`fn.expand(shape)`. Got values of shape {jnp.shape(site['value'])} for a "
        f"distribution of shape {_unmasked_shape(site['fn'])}"
        f"{f' and a scale of shape {scale}' if scale else ''}."
    )


def _shape_fault(site: dict[str, Any]) -> str:
    """Return what is wrong with the shape of an observed value, "" for nothing.

    Arrays broadcast: a column of shape (n, 1) under a law of shape (n,) has n^2
    densities, those of all pairs. Masks and scales (weights of rows) do the same.
    """
    fn, observed = site["fn"], jnp.shape(site["value"])
    if len(observed) < fn.event_dim:
        return "the values have fewer axes than one event"
    law, event = _unmasked_shape(fn), (1,) * fn.event_dim
    weights = (*_scale_shape(site), *event)
    try:
        full = jnp.broadcast_shapes(law, observed, weights, fn.shape())
    except ValueError:
        known = _density_shape(site, ()) is not None
        return "" if known else "the shapes cannot be combined"
    allowed = law, observed, jnp.broadcast_shapes(law, (*_plate_shape(site), *event))
    if full in allowed or _density_shape(site, full) in allowed:
        return ""
    return f"each value counts under the laws of others, {full} in all"


def _unmasked_shape(fn: Any) -> tuple[int, ...]:
    """Return the shape of a law before a mask has expanded it."""
    if not is_masked(fn):
        return fn.shape()
    inner = fn
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    return jnp.broadcast_shapes(inner.shape(), fn.event_shape)


def _scale_shape(site: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of the weights of a site's log density."""
    scale = site.get("scale")
    return () if scale is None else jnp.shape(scale)


def _plate_shape(site: dict[str, Any]) -> tuple[int, ...]:
    """Return the batch shape that the plates around a site say it has."""
    sizes = {frame.dim: frame.size for frame in site.get("cond_indep_stack", ())}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


def _density_shape(
    site: dict[str, Any], full: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the shape of a site's log density, or None where there is none.

    Args:
        site: an observed site of a trace.
        full: shape of law and value together, whose axes of events are appended.
    """
    fn, value = site["fn"], jnp.asarray(site["value"])
    try:
        with validation_enabled(False):
            density = jax.eval_shape(fn.log_prob, value).shape
    except (TypeError, ValueError, IndexError):
        return None
    density = jnp.broadcast_shapes(density, _scale_shape(site))
    return (*density, *full[len(full) - fn.event_dim :])


def sites_without_density(model: Callable, args: tuple, kwargs: dict) -> str:
    """Return a sentence on the sites whose log density is never finite.

    At some initial values of the latents, for a model that has no valid ones.
    """
    never: dict[str, str] | None = None
    for number in range(NUM_STARTS):
        start = start_anywhere(model, number)
        with validation_enabled(False):  # impossible parameters give NaN
            sites = trace(start).get_trace(*args, **kwargs)
            found = {
                name: text
                for name, site in sites.items()
                if site["type"] == "sample" and (text := _without_density(site))
            }
        never = found if never is None else {k: found[k] for k in never if k in found}
    if not never:
        return ""
    return (
        f"Without a finite log density at each of {NUM_STARTS} initial values: "
        f"{'; '.join(f"'{name}' ({text})" for name, text in never.items())}."
    )


def _without_density(site: dict[str, Any]) -> str:
    """Return how much of a site's value has no finite log density, "" for none."""
    with warnings.catch_warnings():  # of values outside of the support
        warnings.simplefilter("ignore")
        log_prob = _validated_log_prob(site["fn"], site["value"])
    bad = ~np.isfinite(np.asarray(log_prob))
    if not bad.any():
        return ""
    value = np.asarray(site["value"])
    known = "observed" if site["is_observed"] else "latent"
    text = f"{known}, {int(bad.sum())} of {bad.size} values"
    if value.shape == bad.shape and bad.ndim:
        return f"{text}, such as {value[bad][0]:.6g}"
    return text


def _validated_log_prob(fn: dist.Distribution, value: Any) -> jax.Array:
    """Return the log density, which is minus infinity outside of the support.

    Formulas such as that of a Bernoulli law are finite there, and NumPyro masks them
    only where it validates.
    """
    try:
        with validation_enabled(True):
            return fn.log_prob(value)
    except ValueError:  # of impossible parameters of a law that is made within
        return fn.log_prob(value)


class observed_as_arrays(Messenger):  # noqa: N801 (lower case, as in NumPyro)
    """Make observed numbers of Python and NumPy arrays of JAX.

    NumPyro compares others by NumPy with the ends of a support, which may be traced.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Convert what a sample site is observed as."""
        value = msg["value"]
        if msg["type"] != "sample" or not isinstance(value, NUMPY_ARRAYS):
            return
        if is_number_dtype(np.asarray(value).dtype):
            msg["value"] = jnp.asarray(value)


class without_own_keys(Messenger):  # noqa: N801 (lower case, as in NumPyro)
    """Take from latent sites the random keys that the model gives them.

    A model under ``seed`` draws the same values whatever key a sampler draws it with.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Take the key of a site, or of a scan, that is to be drawn."""
        if msg["type"] in ("sample", "control_flow") and msg["value"] is None:
            msg["kwargs"]["rng_key"] = None


class CountedKeys(Messenger):
    """A model, and how many random keys it has taken outside of its sites."""

    def __init__(self, fn: Callable | None = None) -> None:
        self.count = 0
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Count a statement ``numpyro.prng_key()``."""
        self.count += msg["type"] == "prng_key"


def check_no_hidden_draws(
    model: Callable, args: tuple, kwargs: dict, values: dict[str, Any]
) -> None:
    """Raise for a density that depends on random numbers that are no sites.

    A kernel would freeze one draw of them.

    Args:
        model: a model that takes keys by ``numpyro.prng_key()``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        values: of its latent sites and parameters.

    Raises:
        ValueError: if two keys give two densities at these values.
    """

    def density(number: int) -> Any:
        fixed = exclude_learned(seed(model, jax.random.key(number)))
        log_probs, _ = compute_log_probs(fixed, args, kwargs, values)
        return sum((jnp.sum(part) for part in log_probs.values()), jnp.zeros(()))

    first, second = density(1), density(2)
    if is_traced(first, second):
        return
    if not np.isclose(first, second, rtol=MAX_ROUNDING, equal_nan=True):
        raise ValueError(
            "The model must be a function of its latents, but draws random numbers by "
            "`numpyro.prng_key()` that are no sites: a chain would freeze one draw of "
            "them. Make them a site, such as numpyro.sample('noise', dist.Normal(0, "
            f"1)). Got log densities {float(first):.6g} and {float(second):.6g} at the "
            "same latents, for two keys."
        )

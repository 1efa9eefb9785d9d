r"""A model as prior and likelihood, and the densities between prior and posterior.

At inverse temperature :math:`\beta` the latents z in unconstrained space have the
density :math:`\pi_\beta(z) \propto p(z)\, e^{\beta \ell(z)}` with the log likelihood
:math:`\ell`, the sum of all observed sites and factors with the scales and masks that
plates and handlers give them. The potential of the prior and :math:`\ell` are traced
apart, so both are known at every point and a change of :math:`\beta` costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from numpyro_score.model.distribution import (
    find_learned,
)
from numpyro_score.model.handlers import is_likelihood
from numpyro_score.model.potential import (
    Evaluation,
    ModelPotential,
    model_potential,
    trace_latents,
)
from numpyro_score.model.trace_checks import (
    is_discrete_latent,
    is_improper,
    is_latent,
    is_weighted,
    trace_anywhere,
    without_own_keys,
)
from numpyro_score.typing import PRNGKey


class TemperedPoint(NamedTuple):
    """Prior and likelihood at one z.

    - **prior**: potential of the prior: known value, full gradient, learned points.
    - **log_likelihood**: log likelihood.
    - **likelihood_grad**: its gradient.
    """

    prior: Evaluation
    log_likelihood: Array
    likelihood_grad: Any

    def grad(self, beta: Array) -> Any:
        """Return the gradient of the potential at an inverse temperature."""
        return jax.tree.map(
            lambda prior, likelihood: prior - scale_by_beta(beta, likelihood),
            self.prior.grad,
            self.likelihood_grad,
        )


@dataclass(frozen=True, eq=False)
class TemperedPotential:
    """The potential :math:`U_{prior}(z) - beta * log_likelihood(z)`.

    The points that :meth:`evaluate` puts in the place of learned points hold prior and
    likelihood apart (:class:`TemperedPoint`).

    Args:
        prior: the potential of the prior.
        log_likelihood: the log likelihood as a function of z.
        beta: the inverse temperature.
    """

    prior: ModelPotential
    log_likelihood: Callable[[Any], Array]
    beta: Array | float = 1.0

    @property
    def learned(self) -> dict:
        """The learned sites, all of them of the prior."""
        return self.prior.learned

    @property
    def prototype(self) -> dict[str, Array]:
        """A z of the right structure, shapes and dtypes."""
        return self.prior.prototype

    @property
    def transforms(self) -> dict[str, Any]:
        """Transforms of the sites, from unconstrained space to their supports."""
        return self.prior.transforms

    def at(self, beta: Array | float) -> "TemperedPotential":
        """Return the potential at another inverse temperature."""
        return TemperedPotential(self.prior, self.log_likelihood, beta)

    def constrain(self, z: Any) -> dict[str, Array]:
        """Return the values of the sites."""
        return self.prior.constrain(z)

    def point(self, z: Any) -> TemperedPoint:
        """Return prior and likelihood at z."""
        value, grad = jax.value_and_grad(self.log_likelihood)(z)
        return TemperedPoint(self.prior.evaluate(z), value, grad)

    def combine(self, point: TemperedPoint) -> Evaluation:
        """Return value and gradient at the inverse temperature."""
        value = point.prior.value - scale_by_beta(self.beta, point.log_likelihood)
        return Evaluation(value, point.grad(jnp.asarray(self.beta)), point)

    def evaluate(self, z: Any) -> Evaluation:
        """Return value and gradient at z."""
        return self.combine(self.point(z))

    def learned_difference_with_error(
        self, start: TemperedPoint, end: TemperedPoint
    ) -> tuple[Array, Array]:
        """Return the change of the learned part and its estimated error."""
        return self.prior.learned_difference_with_error(
            start.prior.learned, end.prior.learned
        )


def scale_by_beta(beta: Array | float, value: Array) -> Array:
    """Return beta * value, which is 0 at beta = 0 even where the value is infinite."""
    return jnp.where(jnp.asarray(beta) > 0, beta * value, 0.0)


class keep_prior(Messenger):  # noqa: N801 (handlers are lower case, as in NumPyro)
    """Leave the densities of observed sites and factors out of a model."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Mask what is observed; nothing of it is computed."""
        if is_likelihood(msg):
            msg["fn"] = msg["fn"].mask(False)


class keep_likelihood(Messenger):  # noqa: N801
    """Leave the densities of latent sites, and their Jacobians, out of a model."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Mask what is not observed; nothing of it is computed."""
        if msg["type"] == "sample" and not is_likelihood(msg):
            msg["fn"] = msg["fn"].mask(False)


class replace_prior(Messenger):  # noqa: N801
    """Give latent sites other laws, which chains at the lowest rung are drawn from.

    Args:
        fn: a NumPyro model.
        reference: laws by site, of the sites' event shapes and supports.
    """

    def __init__(
        self,
        fn: Callable | None = None,
        reference: dict[str, dist.Distribution] | None = None,
    ) -> None:
        self.reference = {} if reference is None else reference
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Swap in the reference, over the batch shape of the site."""
        name = msg["name"]
        if msg["type"] != "sample" or name not in self.reference:
            return
        given, fn = self.reference[name], msg["fn"]
        _check_reference(name, given, fn, msg["is_observed"])
        msg["fn"] = given.expand(fn.batch_shape)


def _check_reference(
    name: str, given: dist.Distribution, fn: dist.Distribution, observed: bool
) -> None:
    """Raise for a reference that cannot stand for a site's law."""
    if observed or find_learned(fn, name) is not None:
        raise ValueError(
            f"`reference` must name latent sites with a density, but '{name}' is "
            f"{'observed' if observed else 'a learned site, drawn by its own score'}."
        )
    same_support = _plain(given.support) == _plain(fn.support)
    if given.event_shape != fn.event_shape or not same_support:
        raise ValueError(
            f"`reference` of site '{name}' must have the site's event shape and "
            f"support. Got {given.event_shape} and {given.support}, the site has "
            f"{fn.event_shape} and {fn.support}."
        )
    if given.batch_shape not in ((), fn.batch_shape):
        raise ValueError(
            f"`reference` of site '{name}' must have the site's batch shape or none. "
            f"Got {given.batch_shape}, the site has {fn.batch_shape}."
        )


def _plain(support: Any) -> Any:
    """Return a support without the wrapper over no dimensions of improper laws."""
    no_dims = getattr(support, "reinterpreted_batch_ndims", None) == 0
    return support.base_constraint if no_dims else support


class TemperedModel(NamedTuple):
    """A model with its arguments, as prior and likelihood.

    - **model**: the NumPyro model, with the reference in the place of priors.
    - **args**: its positional arguments.
    - **kwargs**: its keyword arguments.
    - **potential**: the potential with prior and likelihood apart.
    - **has_likelihood**: whether anything is observed, or has a reference.
    """

    model: Callable
    args: tuple
    kwargs: dict
    potential: TemperedPotential
    has_likelihood: bool

    def draw_prior(self, key: PRNGKey) -> dict[str, Array]:
        """Return a draw of the prior, in unconstrained space.

        Learned sites come from their score's own solver, ordinary ones from the model.
        """
        drawn = seed(without_own_keys(self.model), key)
        return trace_latents(drawn, self.args, self.kwargs)


def temper_model(
    model: Callable,
    args: tuple,
    kwargs: dict,
    *,
    num_nodes: int,
    reference: dict[str, dist.Distribution] | None = None,
) -> TemperedModel:
    r"""Trace a model into prior and likelihood.

    With a reference q the path is :math:`q^{1-\beta} (p\, e^\ell)^\beta` in these
    sites: what is called prior is q, and the log likelihood is
    :math:`\ell + \log (p/q)`.

    Args:
        model: a NumPyro model whose latents have priors that can be drawn from.
        args: its positional arguments.
        kwargs: its keyword arguments.
        num_nodes: nodes of the line integral over learned scores.
        reference: laws of latent sites at the lowest rung, in the place of their
            priors.

    Raises:
        ValueError: for a latent site whose prior cannot be drawn from: improper, scaled
            or masked; for a reference of no site, or that does not fit its site.
        RuntimeError: for a discrete latent site that cannot be enumerated.
    """

    def potential(model: Callable) -> ModelPotential:
        return model_potential(model, args, kwargs, num_nodes=num_nodes)

    drawn = replace_prior(model, reference) if reference else model
    prior = potential(keep_prior(drawn))
    sites = trace_anywhere(drawn, args, kwargs)
    latent = {name: site for name, site in sites.items() if is_latent(site)}
    _check_names(reference or {}, latent)
    _check_proper(latent)
    if reference or any(map(is_discrete_latent, latent.values())):
        # an enumerated site is summed out of prior and likelihood together
        joint = potential(model)

        def log_likelihood(z: Any) -> Float[Array, ""]:
            return prior.value(z) - joint.value(z)
    else:
        likelihood = potential(keep_likelihood(model))

        def log_likelihood(z: Any) -> Float[Array, ""]:
            return -likelihood.value(z)

    tempered = TemperedPotential(prior, log_likelihood)
    observed = bool(reference) or any(map(is_likelihood, sites.values()))
    return TemperedModel(drawn, args, kwargs, tempered, observed)


def _check_names(reference: dict[str, Any], latent: dict[str, Any]) -> None:
    """Raise for a reference of no latent site."""
    unknown = sorted(reference.keys() - latent.keys())
    if unknown:
        raise ValueError(
            f"`reference` must name latent sites of the model, {sorted(latent)}. "
            f"Got {unknown}."
        )


def _check_proper(latent: dict[str, Any]) -> None:
    """Raise for latent sites whose prior is not the law that the model draws from."""
    for name, site in latent.items():
        if is_improper(site):
            raise ValueError(
                f"Site '{name}' has an improper prior: parallel tempering starts from "
                "draws of the prior, which do not exist. Say by `reference` where it "
                f"should start, for example {{'{name}': dist.Normal(0, 10)}}, give the "
                "site a proper prior, or sample with ScoreLangevin."
            )
        if is_weighted(site):
            raise ValueError(
                f"Site '{name}' has a scaled or masked prior: the model draws from "
                "another law than its density states, so the draws of the prior would "
                "be wrong. Apply `scale` and `mask` to observed sites only."
            )


def ravel_rows(z: Any, num_rows: int) -> Float[Array, "rows d"]:
    """Return positions, or gradients, along the first axis as vectors.

    Args:
        z: a tree of arrays with the rows in front.
        num_rows: how many, for a model without latent sites.
    """
    leaves = [leaf.reshape(num_rows, -1) for leaf in jax.tree.leaves(z)]
    return jnp.concatenate(leaves, axis=1) if leaves else jnp.zeros((num_rows, 0))

r"""A NumPyro model as a known potential and learned scores.

With learned sites x and all latents z in unconstrained space, the posterior is
:math:`\log p(z) = -U(z) + \sum_k w_k \log p_k(x_k(z))`, where only the score
:math:`s_k = \nabla \log p_k` of the learned laws is known, and :math:`w_k` are the
scales and masks of plates and handlers. One traced function
:math:`(z, \ell) \mapsto (U(z) - \sum_k w_k \ell_k, x(z))` gives it all: its derivative
in :math:`\ell` is :math:`-w`, and pulling back the cotangents
:math:`(1, -w_k s_k(x_k))` gives the full gradient in one reverse pass. The value U
leaves the learned laws out; their change between two points is a line integral of the
score (``learned_difference_with_error``). No density is ever faked.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.infer.util import (
    _get_model_transforms,
    _prepare_model_for_potential,
    get_potential_fn,
    potential_energy,
    transform_fn,
)

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.host_randomness import refuse_host_randomness
from numpyro_score.model.latent_dependence import check_independent
from numpyro_score.model.learned_sites import exclude_learned, zero_log_densities
from numpyro_score.model.quadrature import embedded_lobatto, lobatto
from numpyro_score.model.trace_checks import (
    CountedKeys,
    check_in_support,
    check_no_hidden_draws,
    check_trace,
    is_latent,
    observed_as_arrays,
    run_anywhere,
    start_anywhere,
)
from numpyro_score.model.tracing_errors import explain_tracing

# nats: beyond a factor of e an acceptance probability is unknown
MAX_QUADRATURE_ERROR = 1.0


class LearnedPoint(NamedTuple):
    """A learned site at one z: its point, the weights w and the weighted score w s."""

    x: Array
    weight: Array
    score: Array


class Evaluation(NamedTuple):
    """The potential at one z.

    ``value`` is the known part U, ``grad`` the gradient of everything, ``learned`` one
    :class:`LearnedPoint` per learned site.
    """

    value: Array
    grad: Any
    learned: Any


@dataclass(frozen=True, eq=False)
class FunctionPotential:
    """A potential function with its own gradient, or with a score as its force."""

    potential_fn: Callable
    score_fn: Callable | None = None
    prototype: None = None
    learned: None = None

    def constrain(self, z: Any) -> Any:
        """Return z: a function has no other space."""
        return z

    def evaluate(self, z: Any) -> Evaluation:
        """Return the potential and its gradient (or minus the score) at z."""
        if self.score_fn is None:
            value, grad = jax.value_and_grad(self.potential_fn)(z)
        else:
            value = self.potential_fn(z)
            grad = jax.tree.map(jnp.negative, self.score_fn(z))
        return Evaluation(jnp.asarray(value), grad, {})

    def learned_difference_with_error(
        self, start: dict, end: dict
    ) -> tuple[Array, Array]:
        """Return 0 and 0: nothing is learned but perhaps the force."""
        return jnp.zeros(()), jnp.zeros(())


@dataclass(frozen=True, eq=False)
class ModelPotential:
    """The potential of a prepared NumPyro model; made by :func:`model_potential`.

    ``prototype`` is a z of the right structure, shapes and dtypes, and ``constrain``
    maps z to the values of the sites, each by its transform of ``transforms``.
    """

    potential_fn: Callable[[Any], Array]
    constrain: Callable[[Any], dict[str, Array]]
    prototype: dict[str, Array]
    learned: dict[str, ScoreDistribution]
    num_nodes: int
    transforms: dict[str, Any] = dataclasses.field(default_factory=dict)
    score_fn: Callable | None = None

    def with_force(self, score_fn: Callable | None) -> "ModelPotential":
        """Return the potential with a score as its force in place of its gradient.

        Raises:
            ValueError: if the model has learned sites, whose force is their score.
        """
        if score_fn is not None and self.learned:
            raise ValueError(
                "`score_fn` replaces the force of a known potential, but the model has "
                "learned sites, whose force is their own score. "
                f"Got learned sites {sorted(self.learned)}."
            )
        return dataclasses.replace(self, score_fn=score_fn)

    def value(self, z: dict[str, Array]) -> Array:
        """Return the known part of the potential at z."""
        return self._known(z, {})[0]

    def learned_points(self, z: dict[str, Array]) -> dict[str, Array]:
        """Return the unconstrained points of the learned sites at z."""
        return self._known(z, {})[1]

    def learned_weights(self, z: dict[str, Array]) -> dict[str, Array]:
        """Return the weights of the log densities of the learned sites at z."""
        fall = jax.grad(lambda ell: self._known(z, ell)[0])(self._zeros(z))
        return jax.tree.map(jnp.negative, fall)

    def evaluate(self, z: dict[str, Array]) -> Evaluation:
        """Return the known value, the full gradient and the learned points at z."""
        if not self.learned:
            return FunctionPotential(self.potential_fn, self.score_fn).evaluate(z)
        zeros = self._zeros(z)
        (value, points), pullback = jax.vjp(self._known, z, zeros)
        one, none = jnp.ones_like(value), jax.tree.map(jnp.zeros_like, points)
        weight = jax.tree.map(jnp.negative, pullback((one, none))[1])
        learned = {k: self._point(k, points[k], weight[k]) for k in points}
        cotangents = {k: -point.score for k, point in learned.items()}
        return Evaluation(value, pullback((one, cotangents))[0], learned)

    def learned_difference_with_error(
        self, start: dict[str, LearnedPoint], end: dict[str, LearnedPoint]
    ) -> tuple[Array, Array]:
        r"""Return the change of :math:`-\sum_k w_k \log p_k`, and its error.

        The line integral of the score by Gauss-Lobatto quadrature, whose outer nodes
        are the ends, where the score is known. Antisymmetric in its ends; exact for a
        conservative field as the number of nodes grows.

        The error, by a rule of fewer nodes, is symmetric in start and end, so that a
        kernel may refuse moves across which the integral is not known, and stay
        reversible.
        """
        change, error = jnp.zeros(()), jnp.zeros(())
        for name in start:
            fine, coarse = self._line_integrals(name, start[name], end[name])
            change, error = change - fine, error + fine - coarse
        return change, jnp.abs(error)

    def _known(
        self, z: dict[str, Array], log_densities: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return U - sum(w l) for log densities l, and the learned points."""
        rest = exclude_learned(self.potential_fn, log_densities)
        return rest(z), rest.points

    def _zeros(self, z: dict[str, Array]) -> dict[str, Array]:
        """Return a log density of 0 for every point of every learned site."""
        return zero_log_densities(self.learned, jax.eval_shape(self.learned_points, z))

    def _score(self, name: str, x: Array) -> Array:
        learned = self.learned[name]
        return learned.score.score(x, learned.t)

    def _point(self, name: str, x: Array, weight: Array) -> LearnedPoint:
        return LearnedPoint(
            x, weight, self._spread(name, weight) * self._score(name, x)
        )

    def _spread(self, name: str, weight: Array) -> Array:
        """Give batch-shaped weights the event's dimensions."""
        event_dim = self.learned[name].score.event_dim
        return weight.reshape(*weight.shape, *([1] * event_dim))

    def _line_integrals(
        self, name: str, start: LearnedPoint, end: LearnedPoint
    ) -> tuple[Array, Array]:
        """Return the integral of w s from start to end by a fine and a coarse rule.

        For an energy net it is the difference of energies, without a rule.
        """
        law = self.learned[name]
        if law.score.has_energy:
            fall = law.score.energy(start.x, law.t) - law.score.energy(end.x, law.t)
            known = jnp.vdot(0.5 * (start.weight + end.weight), fall)
            return known, known
        nodes, fine, coarse = embedded_lobatto(self.num_nodes)
        move = end.x - start.x
        middle_weight = self._spread(name, 0.5 * (start.weight + end.weight))
        scores = [
            middle_weight * self._score(name, start.x + node * move)
            for node in nodes[1:-1]
        ]
        work = [jnp.vdot(s, move) for s in (start.score, *scores, end.score)]
        return sum(map(mul, fine, work)), sum(map(mul, coarse, work))


@runtime_checkable
class Potential(Protocol):
    """Interface of potentials to kernels.

    ``learned`` of an :class:`Evaluation` is opaque to them: it is what
    ``learned_difference_with_error`` compares.
    """

    @property
    def prototype(self) -> Any:
        """A z of the right structure, shapes and dtypes, or None."""

    @property
    def learned(self) -> Any:
        """The learned sites, if any."""

    def constrain(self, z: Any) -> Any:
        """Return the values of the sites at z."""

    def evaluate(self, z: Any) -> Evaluation:
        """Return the known value, the full gradient and the learned points at z."""

    def learned_difference_with_error(
        self, start: Any, end: Any
    ) -> tuple[Array, Array]:
        """Return the change of the learned part from start to end, and its error."""


def potential_difference(
    potential: Potential, before: Evaluation, after: Evaluation, max_error: float
) -> Array:
    """Return U(after) - U(before), or infinity where the learned part is uncertain.

    The estimated error of the line integral is symmetric in both ends: where it is too
    large the way back is refused too.

    Args:
        potential: the target.
        before: the evaluation at the start.
        after: the evaluation at the end.
        max_error: largest error of the learned part, in nats.
    """
    change, error = potential.learned_difference_with_error(
        before.learned, after.learned
    )
    change = jnp.where(error <= max_error, change, jnp.inf)
    return after.value - before.value + change


def model_potential(
    model: Callable, model_args: tuple, model_kwargs: dict, *, num_nodes: int = 3
) -> ModelPotential:
    """Trace a NumPyro model into its potential, as NumPyro's own kernels do.

    Args:
        model: a NumPyro model, with or without learned sites.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
        num_nodes: Gauss-Lobatto nodes of the line integral over learned scores.

    Raises:
        TypeError: for a learned law in a place where its score is not enough.
        ValueError: for a latent site with a Delta distribution, for a learned law that
            depends on a latent site, for plates with random rows, NaN in observed
            values and such outside of their support, and random numbers that are no
            sites, also of NumPy and Python.
    """
    lobatto(num_nodes)
    model = observed_as_arrays(model)
    counted = CountedKeys(model)
    rest = exclude_learned(start_anywhere(counted, jax.random.key(0)))
    with refuse_host_randomness(model, model_args, model_kwargs):
        transforms, replay, enum, trace = run_anywhere(
            lambda: _get_model_transforms(rest, model_args, model_kwargs)
        )
    _check_delta(trace)
    check_trace(trace)
    check_in_support(model, model_args, model_kwargs, trace)
    if counted.count:
        check_no_hidden_draws(model, model_args, model_kwargs, _values(trace))
    prepared = _prepare_model_for_potential(model, trace, enum=enum)
    _, constrain = get_potential_fn(
        prepared,
        transforms,
        enum=enum,
        replay_model=replay,
        model_args=model_args,
        model_kwargs=model_kwargs,
    )

    def energy_fn(z: dict[str, Array]) -> Float[Array, ""]:
        with explain_tracing():
            energy = potential_energy(prepared, model_args, model_kwargs, z, enum=enum)
        # a model without latent sites has a plain number for its energy
        return jnp.asarray(energy)

    prototype = _prototype(trace, transforms)
    if rest.sites:
        check_independent(energy_fn, prototype)
    sites = rest.sites, num_nodes, transforms
    return ModelPotential(energy_fn, constrain, prototype, *sites)


def trace_latents(
    model: Callable, model_args: tuple, model_kwargs: dict
) -> dict[str, Array]:
    """Run a seeded model; return its continuous latents in unconstrained space."""
    with explain_tracing():
        transforms, _, _, trace = _get_model_transforms(model, model_args, model_kwargs)
    return _prototype(trace, transforms)


def _values(trace: dict) -> dict[str, Array]:
    """Return the values of latent sites and parameters."""
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "param" or is_latent(site)
    }


def _check_delta(trace: dict) -> None:
    for name, site in trace.items():
        if is_latent(site) and isinstance(site["fn"], dist.Delta):
            raise ValueError(
                f"Site '{name}' has a Delta distribution, which has no density. "
                "Use `numpyro.deterministic` for a computed value."
            )


def _prototype(trace: dict, transforms: dict) -> dict[str, Array]:
    """Return an unconstrained value of every continuous latent site."""
    values = {
        name: site["value"]
        for name, site in trace.items()
        if is_latent(site) and not site["fn"].support.is_discrete
    }
    return transform_fn(transforms, values, invert=True)

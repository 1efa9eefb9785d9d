"""Dependence of learned laws on latent sites, read off the model's jaxpr.

A score is the gradient of a log density in x: the normalizer drops out of it. Where a
law moves with another latent, through its net, its time or its weight, the normalizer
moves too and belongs to the posterior of that latent. A score does not give it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from numpyro_score.model.learned_sites import exclude_learned, zero_log_densities

Parts = dict[str, dict[str, Array]]


def check_independent(
    potential_fn: Callable[[Any], Array], z: dict[str, Array]
) -> None:
    """Raise for a learned law that depends on a latent site.

    Args:
        potential_fn: the potential of a model, in unconstrained space.
        z: an unconstrained value of every latent site.

    Raises:
        ValueError: naming the learned site, what of it depends, and on which latents.
    """
    if len(z) < 2:
        return
    closed, shapes = jax.make_jaxpr(
        lambda z: _law_parts(potential_fn, z), return_shape=True
    )(z)
    for name, parts in shapes.items():
        used = {part: _used_latents(closed, shapes, name, part, z) for part in parts}
        moving = [part for part, latents in used.items() if latents]
        if moving:
            _refuse(name, moving, sorted(set().union(*used.values())))


def _law_parts(potential_fn: Callable, z: dict[str, Array]) -> Parts:
    """Return score, time and weight of every learned site, at points that stay put.

    The denoised point stands for the score: each is a function of the other.
    """
    rest = exclude_learned(potential_fn)
    rest(z)
    points = {name: jnp.zeros(x.shape, x.dtype) for name, x in rest.points.items()}
    zeros = zero_log_densities(rest.sites, points)
    weight = jax.grad(lambda added: exclude_learned(potential_fn, added)(z))(zeros)
    return {
        name: {
            "score": law.score.denoise(points[name], law.t),
            "time `t`": jnp.asarray(law.t),
            "scale or mask": weight[name],
        }
        for name, law in rest.sites.items()
        if name in points  # a site that is masked as a whole is not evaluated
    }


def _used_latents(
    closed: Any, shapes: Any, name: str, part: str, z: dict[str, Array]
) -> set[str]:
    """Return the latents that one part of one learned law is computed from."""
    outputs = [
        path[0].key == name and path[1].key == part
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    _, used = dce_jaxpr(_without_side_effects(closed.jaxpr, outputs), outputs)
    return {name for name, reads in zip(sorted(z), used, strict=True) if reads}


def used_inputs(fn: Callable, *args: Any) -> list[bool]:
    """Return which leaves of the arguments the results of a function depend on.

    Example:
        >>> used_inputs(lambda x, y: x + 0.0 * jnp.ones_like(y), 1.0, 2.0)
        [True, False]
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    outputs = [True] * len(jaxpr.outvars)
    return list(dce_jaxpr(_without_side_effects(jaxpr, outputs), outputs)[1])


def inputs_of_outputs(fn: Callable, *args: Any) -> dict[str, list[bool]]:
    """Return which leaves of the arguments each entry of a function's dict depends on.

    Example:
        >>> inputs_of_outputs(lambda x, y: {"a": x, "b": [x, 2 * y]}, 1.0, 2.0)
        {'a': [True, False], 'b': [True, True]}
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    owners = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    found = {}
    for name in shapes:
        outputs = [owner == name for owner in owners]
        jaxpr = _without_side_effects(closed.jaxpr, outputs)
        found[name] = list(dce_jaxpr(jaxpr, outputs)[1])
    return found


def is_linear(fn: Callable, point: Any) -> bool:
    """Return whether a function is known to be linear, up to a constant.

    Its derivative is then computed without the point where it is taken.

    Example:
        >>> is_linear(lambda x: 2 * x[0] - x[1] + 1, jnp.ones(2))
        True
        >>> is_linear(lambda x: x[0] * x[1], jnp.ones(2))
        False
    """

    def derivative(point: Any, change: Any) -> Any:
        return jax.jvp(fn, (point,), (change,))[1]

    size = len(jax.tree.leaves(point))
    return not any(used_inputs(derivative, point, point)[:size])


def _without_side_effects(jaxpr: Any, outputs: list[bool]) -> Any:
    """Leave out what runs for its effect alone, which is no dependence.

    A ``jax.debug.print`` of a latent, also inside ``jit``, would be kept otherwise.
    """
    chosen = zip(jaxpr.outvars, outputs, strict=True)
    needed = {id(var) for var, wanted in chosen if wanted}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(map(id, eqn.outvars)):
            needed.update(map(id, eqn.invars))
            kept.append(eqn)
    return jaxpr.replace(eqns=kept[::-1])


def _refuse(name: str, parts: list[str], latents: list[str]) -> None:
    sites = ", ".join(f"'{latent}'" for latent in latents)
    raise ValueError(
        f"Learned site '{name}' must not depend on latent sites, but its "
        f"{' and '.join(parts)} depends on {sites}: the normalizer then depends on "
        "them too, and a score does not know it, so that their posterior would be "
        "wrong. Learn a law that does not depend on latents; for a latent location "
        "and scale use `TransformedDistribution(ScoreDistribution(score), "
        "AffineTransform(loc, scale))`."
    )

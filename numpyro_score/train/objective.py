"""Loss of a batch of data in physical units, as a function of a net's weights."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.data.far_points import choose_rows
from numpyro_score.data.rows import Batch
from numpyro_score.data.support import Support
from numpyro_score.loss.denoising import BatchDenoiseFn, Loss
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.score.preconditioning import Parametrization
from numpyro_score.sde import SDE
from numpyro_score.train.state import FixedParts
from numpyro_score.typing import Params, PRNGKey, Scalar


@dataclass(frozen=True)
class ScoreMatchingProblem:
    """Problem of :class:`~numpyro_score.train.ScoreMatching`, whose fields these are.

    ``objective`` is its ``loss``; ``net`` is its configuration of the net, None if it
    was given as a module.
    """

    sde: SDE
    objective: Loss
    net: Any
    parametrization: Parametrization
    drop_context: float
    compute_dtype: Any

    @property
    def per_coordinate(self) -> bool:
        """True if the objective gives the net one noise level per coordinate."""
        return getattr(self.objective, "per_coordinate", False)

    def denoiser(self, params: Params, fixed: FixedParts) -> NetDenoiser:
        """Return the net as denoiser of standardized data."""
        return NetDenoiser(
            params,
            fixed.graphdef,
            fixed.standardize_context,
            self.net,
            self.parametrization,
            None,
            fixed.linear_baseline,
            fixed.gaussian_baseline,
            self.sde.sigma_min if self.per_coordinate else None,
            fixed.covariance,
        )

    def loss(
        self, params: Params, fixed: FixedParts, key: PRNGKey, batch: Batch
    ) -> Scalar:
        """Return the objective of a batch.

        Raises:
            ValueError: if a context is missing or not expected, or if numbers are not
                known and the objective needs all.
        """
        _check_context(self.objective, fixed, batch)
        self._check_known(batch)
        denoiser = replace(
            self.denoiser(params, fixed), compute_dtype=self.compute_dtype
        )
        x0, data_score = standardize_batch(fixed, batch)
        context = batch.context
        parts = {"data_score": data_score, "known": batch.known}
        extra = {name: part for name, part in parts.items() if part is not None}
        if self.drop_context > 0 and context is not None:
            key_drop, key = jax.random.split(key)
            denoise = drop_context(denoiser, context, key_drop, self.drop_context)
        elif context is not None:
            denoise = lambda x, level: jax.vmap(denoiser)(x, level, context)  # noqa: E731
        else:
            denoise = jax.vmap(denoiser)
        return self.objective(key, denoise, x0, self.sde, **extra)

    def _check_known(self, batch: Batch) -> None:
        if batch.known is not None and not self.per_coordinate:
            raise ValueError(
                "`known` needs one noise level per coordinate, since what is not known "
                "is learned given what is: train with loss=DenoisingScoreMatching("
                f"noise=PerCoordinate()). Got {self.objective}."
            )


def standardize_batch(fixed: FixedParts, batch: Batch) -> tuple[Array, Array | None]:
    r"""Return rows and their data scores on the unit scale.

    With x = T(z) and z = loc + scale u, the score of u is
    :math:`scale (J_T^\top \nabla \log p(x) + \nabla_z \log |\det J_T|)`.
    """
    z, data_score = batch.x, batch.data_score
    if fixed.support is not None:
        z = fixed.support.unconstrain(batch.x)
        if data_score is not None:
            data_score = _unconstrained_score(fixed.support, z, data_score)
    if data_score is not None:
        data_score = fixed.standardize.scale * data_score
    return jax.vmap(fixed.standardize.forward)(z), data_score


def keep_rows(fixed: FixedParts, rows: Batch) -> FixedParts:
    """Return the parts with some of these rows for the score to keep.

    Unchanged for rows with a context, whose laws differ, and for too few rows.

    Args:
        fixed: the maps to the unit scale.
        rows: data in physical units.
    """
    if rows.context is not None:
        return fixed
    x = jnp.asarray(rows.x)
    if fixed.support is not None:
        x = fixed.support.unconstrain(x)
    chosen = choose_rows(fixed.standardize.forward(x))
    return fixed if chosen is None else fixed._replace(rows=chosen)


def _unconstrained_score(support: Support, z: Array, data_score: Array) -> Array:
    """Return the scores in z of laws with the given scores in x = T(z)."""

    def one(z: Array, score: Array) -> Array:
        def log_det(z: Array) -> Array:
            return support.log_abs_det_jacobian(z, support.constrain(z)).sum()

        _, vjp = jax.vjp(support.constrain, z)
        return vjp(score)[0] + jax.grad(log_det)(z)

    return jax.vmap(one)(z, data_score)


def drop_context(
    denoiser: NetDenoiser, context: Array, key: PRNGKey, share: float
) -> BatchDenoiseFn:
    """Return a denoiser that gets no context in a random ``share`` of the rows.

    The number of such rows is fixed, so the net runs once per row. Which rows they are
    is random, because stratified noise levels increase along the batch.
    """
    order = jax.random.permutation(key, len(context))
    count = max(1, round(share * len(context)))
    inverse = jnp.argsort(order)

    def denoise(x: Array, level: Array) -> Array:
        x, level = x[order], level[order]
        without = jax.vmap(denoiser)(x[:count], level[:count])
        given = jax.vmap(denoiser)(x[count:], level[count:], context[order[count:]])
        return jnp.concatenate([without, given])[inverse]

    return denoise


def _check_context(objective: Loss, fixed: FixedParts, batch: Batch) -> None:
    """Raise if a context is missing or not expected, or if the objective mixes rows.

    Raises:
        ValueError: in these cases.
    """
    expected = fixed.standardize_context
    shape = None if expected is None else expected.loc.shape
    got = None if batch.context is None else jnp.shape(batch.context)[1:]
    if shape != got:
        raise ValueError(
            "`context` must be given for every row exactly if training began with it, "
            f"and in the same shape. Got {got}, expected {shape}."
        )
    if got is not None and getattr(objective, "batch_coupled", False):
        raise ValueError(
            "`loss` uses the whole batch as draws of one law, but each row has its own "
            "`context`: use an objective that looks at one row at a time, such as "
            f"DenoisingScoreMatching(). Got {objective}."
        )

r"""Conditional laws from a denoiser that takes one noise level per coordinate.

Noise :math:`x_t = x_0 + r n` and observations :math:`y_i = x_{0,i} + s_i n_i` of some
coordinates are together one Gaussian observation of x_0, of diagonal precision
:math:`\Lambda` and centre :math:`\mu`,

.. math:: \Lambda_{ii} = \frac{1}{r^2} + \frac{1}{s_i^2}, \qquad
          \mu = \Lambda^{-1} \Big(\frac{x_t}{r^2} + \frac{y}{s^2}\Big), \qquad
          E[x_0 \mid x_t, y] = D(\mu, \Lambda^{-1/2}),

with :math:`1/s_i^2 = 0` where nothing is observed and :math:`\Lambda^{-1/2}_{ii} = 0`
for :math:`s_i = 0`. The identity is exact; D is what was learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.data.far_points import remoteness
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.reprs import short_repr
from numpyro_score.score.denoiser import check_output
from numpyro_score.solver.base import start_center
from numpyro_score.typing import Position, PRNGKey, Real, Scalar

Numbers = ArrayLike | Sequence[Any]
REMEDY = (
    "Train with loss=DenoisingScoreMatching(noise=PerCoordinate()), or use "
    "ScoreModel.from_coordinate_denoiser."
)


def joint_level(level: Real | float, sd: Real | float) -> Real:
    r"""Return :math:`(1/r^2 + 1/s^2)^{-1/2}`, the sd of two observations together.

    Args:
        level: noise level r, positive.
        sd: sd s of the other observation; inf for none, 0 for one without noise.

    Example:
        >>> joint_level(3.0, jnp.array([jnp.inf, 4.0, 0.0])).tolist()
        [3.0, 2.4000000953674316, 0.0]
    """
    return level * jnp.sqrt(_share(level, sd))


def _share(a: Real | float, b: Real | float) -> Real:
    """Return b^2 / (a^2 + b^2) for b in [0, inf], the weight of a."""
    return 1 / (1 + jnp.square(jnp.asarray(a) / b))


def _summary_of(denoiser: Any) -> dict[str, str]:
    """Return lines of the repr of a denoiser inside of another."""
    describe = getattr(denoiser, "summary", None)
    return describe() if describe else {"denoiser": short_repr(denoiser)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CoordinateFnDenoiser:
    """Denoiser of a function of a point and one noise level per coordinate.

    ``fn`` is a :class:`jax.tree_util.Partial`, whose bound arrays are leaves.
    """

    fn: Callable

    @property
    def per_coordinate(self) -> bool:
        """True: levels may have the shape of a point."""
        return True

    def __call__(
        self, x: Position, level: Real | float, context: Array | None = None
    ) -> Position:
        """Return D(x, levels) for one point; a single level holds for all."""
        levels = jnp.broadcast_to(jnp.asarray(level, x.dtype), x.shape)
        return self.fn(x, levels) if context is None else self.fn(x, levels, context)

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: the name of the function."""
        fn = getattr(self.fn, "func", self.fn)
        return {"function": f"{short_repr(fn)}, one noise level per coordinate"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoisyDenoiser:
    r"""Denoiser of the law of z = x_0 + l n, which has noise of its own, standardized.

    From x = z + r n, :math:`E[z \mid x] = x + \frac{r^2}{r^2 + l^2} (D(x, (r^2 +
    l^2)^{1/2}) - x)`, by Tweedie's formula at both levels.

    Args:
        denoiser: D(x, levels) of the law of x_0.
        level: l, one for each coordinate.
        highest: the highest level that D knows.
    """

    denoiser: Callable
    level: Position
    highest: Scalar

    @property
    def per_coordinate(self) -> bool:
        """True: levels may have the shape of a point."""
        return True

    def __call__(
        self, x: Position, level: Real | float, context: Array | None = None
    ) -> Position:
        """Return E[z | x] for one point; a single level holds for all."""
        level = jnp.broadcast_to(jnp.asarray(level, x.dtype), x.shape)
        total = jnp.sqrt(jnp.square(level) + jnp.square(self.level))
        share = jnp.where(self.level > 0, _share(self.level, level), 1.0)
        denoised = self.denoiser(x, jnp.minimum(total, self.highest), context)
        return x + share * (denoised - x)

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: those of the law before."""
        return _summary_of(self.denoiser)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConditionedDenoiser:
    """Denoiser of the law given observations of coordinates, standardized.

    Args:
        denoiser: D(x, levels) of the law before.
        value: observed values; 0 where nothing is observed.
        sd: their sd; inf where nothing is observed, 0 for values that are fixed.
        center: origin of the coordinates of this denoiser in those of ``denoiser``.
    """

    denoiser: Callable
    value: Position
    sd: Position
    center: Position

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return E[x_0 given x_t, y] for one point x = x_t / alpha."""
        x = x + self.center
        mean = _share(level, self.sd) * x + _share(self.sd, level) * self.value
        levels = joint_level(level, self.sd)
        denoised = self.denoiser(mean, levels, context)
        return jnp.where(self.sd == 0, self.value, denoised) - self.center

    def draw_observed(
        self, key: PRNGKey, x: Position, level: Scalar, context: Array | None
    ) -> Position:
        """Return x with its observed coordinates drawn from x_0 given x_t = x.

        That law is Normal(D, joint level) where all else is flat on the scale of
        ``level``. So fixed values come out as given, and those with an sd below the
        noise of x as narrow as they are.
        """
        noise = jax.random.normal(key, x.shape, x.dtype)
        drawn = self(x, level, context) + joint_level(level, self.sd) * noise
        return jnp.where(jnp.isfinite(self.sd), drawn, x)

    def log_density_ratio(
        self, x: Position, level: Scalar, context: Array | None
    ) -> Float[Array, ""]:
        r"""Return log of the density of :meth:`draw_observed` over that of x_t, at x.

        By Bayes' rule with :math:`x_t = x_0 + r n`, at any value of x_t and so at x:
        the sum of :math:`\log N(x_i; D_i, \ell_i^2) - \log N(x_i; x_i, r^2)` over
        observed coordinates, :math:`\ell_i` the joint level.
        """
        levels = joint_level(level, self.sd)
        error = jnp.square((x - self(x, level, context)) / levels)
        terms = -0.5 * error - jnp.log(levels / level)
        return jnp.where(jnp.isfinite(self.sd), terms, 0.0).sum()

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: those of the law before, and what is observed."""
        rows = _summary_of(self.denoiser)
        if is_traced(self.sd):
            return rows
        observed, fixed = np.isfinite(self.sd).sum(), (np.asarray(self.sd) == 0).sum()
        given = f"{observed} of {self.sd.size} coordinates, {fixed} of them exactly"
        return rows | {"given": given}


@jax.jit
def draw_observed(
    keys: PRNGKey,
    denoiser: ConditionedDenoiser,
    standardize: Affine,
    points: Float[Array, "draws *event"],
    alpha: Scalar,
    level: Scalar,
    context: Array | None,
) -> Float[Array, "draws *event"]:
    """Return draws of x_t with observed coordinates drawn from x_0, in data units.

    One compiled program per shape; see :meth:`ConditionedDenoiser.draw_observed`.
    """

    def one(key: PRNGKey, x: Position) -> Position:
        u = standardize.forward(x) / alpha
        return standardize.inverse(denoiser.draw_observed(key, u, level, context))

    return jax.vmap(one)(keys, points)


def condition(
    denoiser: Any,
    standardize: Affine,
    support: Support | None,
    sigma_max: float,
    values: Numbers,
    sd: Numbers,
) -> tuple[ConditionedDenoiser, Affine]:
    """Return denoiser and standardization of the law given observed coordinates.

    The standardization has its origin near the conditional mean: samplers start from a
    normal law around the origin at the highest noise level.

    Args:
        denoiser: the denoiser, which must take one level per coordinate.
        standardize: map of unconstrained data to the unit scale.
        support: support of the data, or None.
        sigma_max: highest noise level.
        values: one datum, NaN where nothing is observed.
        sd: sd of the observations, a number or one per coordinate.

    Raises:
        TypeError: if the denoiser takes one level only, or is conditioned already.
        ValueError: for values or sd of another shape, infinite or outside the support.
    """
    _check_per_coordinate(denoiser)
    shape = standardize.loc.shape
    values, sd = _check_observations(values, sd, shape, support)
    if support is not None:
        values = support.unconstrain(values)
    observed = ~jnp.isnan(values)
    value = jnp.where(observed, standardize.forward(values), 0.0)
    sd = jnp.where(observed, sd / standardize.scale, jnp.inf)
    start = ConditionedDenoiser(denoiser, value, sd, jnp.zeros_like(value))
    center = _center(start, jnp.asarray(sigma_max))
    moved = standardize.recentered(center)
    return ConditionedDenoiser(denoiser, value, sd, center), moved


def warn_of_far(denoiser: ConditionedDenoiser, rows: Array | None) -> None:
    """Warn of observations that lie far from all data; not while traced.

    Args:
        denoiser: of the law given the observations.
        rows: standardized data that the law was learned from; None for none.
    """
    if rows is None or is_traced(denoiser.value, denoiser.sd, rows):
        return
    known = np.isfinite(denoiser.sd)
    if not known.any():
        return
    value, sd = np.asarray(denoiser.value)[known], np.asarray(denoiser.sd)[known]
    data = np.asarray(rows, np.float64)[:, known]
    # fixed: the same observations warn in every call
    noise = np.random.default_rng(0).normal(size=data.shape)
    words = remoteness(value, data + sd * noise).words
    if words:
        warn_caller(
            "`values` are far from all data that the score was learned from: it is a "
            "guess there, and draws given them mean little. Learn from data that reach "
            "there, or see whether the values belong to this law. "
            f"Got {words}."
        )


@jax.jit
def _center(denoiser: ConditionedDenoiser, level: Array) -> Position:
    """Return about E[x_0 given y], by the denoiser at the highest level.

    For a net with a context, which is not known here, the mean of each coordinate by
    itself under a standard normal law.
    """
    if getattr(denoiser.denoiser, "standardize_context", None) is not None:
        return _share(denoiser.sd, 1.0) * denoiser.value
    return start_center(denoiser, denoiser.value.shape, level)


def _check_per_coordinate(denoiser: Any) -> None:
    """Raise unless a denoiser takes one noise level per coordinate.

    Raises:
        TypeError: for any other, and for one that is conditioned already.
    """
    if isinstance(denoiser, ConditionedDenoiser):
        raise TypeError(
            "`condition` must be called once, with all observations: this score is "
            "conditioned already. Call it on the score before."
        )
    if not getattr(denoiser, "per_coordinate", False):
        raise TypeError(
            "`condition` needs a score that takes one noise level per coordinate: with "
            f"one level for all it does not know any conditional law. {REMEDY} Got "
            f"{type(denoiser).__name__}."
        )


def _check_observations(
    values: Numbers, sd: Numbers, shape: tuple[int, ...], support: Support | None
) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
    """Return observed values and their sd as arrays of a shape.

    Raises:
        TypeError: for a support that mixes coordinates, or noise on data with one.
        ValueError: for other shapes, infinite values, or sd that are negative, NaN or
            infinite.
    """
    if np.ma.is_masked(values):
        values = np.ma.filled(np.ma.asarray(values, float), np.nan)
    values, sd = _as_floats("values", values), _as_floats("sd", sd)
    if values.shape != shape or sd.shape not in ((), shape):
        raise ValueError(
            "`values` must have the score's event shape, with NaN where nothing is "
            "observed, and `sd` must be one number or one per coordinate. Got "
            f"{values.shape} and {sd.shape}, event shape {shape}."
        )
    sd = jnp.broadcast_to(sd, shape)
    if support is not None:
        _check_support(support, values, sd)
    if is_traced(values, sd):
        return values, sd
    if np.isinf(values).any():
        raise ValueError(
            "`values` must be finite, or NaN where nothing is observed. "
            f"Got {int(np.isinf(values).sum())} infinite values."
        )
    is_sd = (np.asarray(sd) >= 0) & np.isfinite(sd)
    if not (is_sd | np.isnan(values)).all():
        raise ValueError(
            "`sd` must be finite and at least 0 at every observed coordinate: it is "
            "the sd of the observation's noise, and 0 fixes the value. For no "
            f"observation set `values` to NaN. Got {np.asarray(sd)[~is_sd][:10]}."
        )
    return values, sd


def _as_floats(name: str, given: Numbers) -> Array:
    """Return an argument as an array of floats."""
    try:
        return jnp.asarray(given, float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be numbers, one per coordinate of one datum. Got {given!r}."
        ) from error


def _check_support(support: Support, values: Array, sd: Array) -> None:
    """Raise unless observations mean the same in unconstrained space."""
    support.check_single_numbers("`condition` needs")
    is_exact = not is_traced(sd) and bool((sd == 0).all())
    if not is_exact:
        raise TypeError(
            "`sd` must be 0 for data with a support: noise that is Gaussian on the "
            "data is not in the unconstrained space of the score. Observe the numbers "
            f"in a NumPyro model and use ScoreSDE. Support: {support.name}."
        )
    if is_traced(values):
        return
    known = np.asarray(values)[~np.isnan(values)]
    filled = jnp.where(
        jnp.isnan(values), support.constrain(jnp.zeros_like(values)), values
    )
    if not (
        bool(support.constraint(filled))
        and np.isfinite(support.unconstrain(filled)).all()
    ):
        raise ValueError(
            "`values` must lie inside the support, not on its edge, where they are "
            f"observed. Got {known[:10]} for {support.name}."
        )


def check_levels_apart(
    denoiser: CoordinateFnDenoiser, event_shape: tuple[int, ...]
) -> None:
    """Raise unless a function maps zeros to a finite point at levels 1, 0 and both.

    Raises:
        TypeError: for another type.
        ValueError: for another shape, for NaN or infinity.
    """
    point = jnp.zeros(event_shape)
    check_output(jax.eval_shape(denoiser, point, point), event_shape, "fn")
    alternate = (jnp.arange(point.size) % 2).reshape(event_shape).astype(point.dtype)
    evaluate = jax.jit(lambda denoiser, levels: denoiser(point, levels))
    for name, levels in (("1", point + 1), ("0", point), ("0 and 1", alternate)):
        output = evaluate(denoiser, levels)
        if not is_traced(output) and not jnp.isfinite(output).all():
            raise ValueError(
                "`fn` must be finite, also where the noise level of a coordinate is 0, "
                "which says that it is known: there E[x_0 | x] = x. Got NaN or "
                f"infinity at x = 0, levels {name}."
            )

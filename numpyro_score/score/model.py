"""Score models: denoiser, score, density and draws of a learned law."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import (
    as_points,
    check_callable,
    check_flags,
    check_kind,
    check_positive,
    check_shape,
    is_traced,
)
from numpyro_score.data.far_points import choose_rows
from numpyro_score.data.rows import check_data
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import repr_lines, short_number, short_repr
from numpyro_score.score import density
from numpyro_score.score.conditioning import (
    ConditionedDenoiser,
    CoordinateFnDenoiser,
    Numbers,
    check_levels_apart,
    condition,
    draw_observed,
    warn_of_far,
)
from numpyro_score.score.denoiser import (
    DirectScore,
    EnergyDenoiser,
    ScoreFnDenoiser,
    check_output,
)
from numpyro_score.score.level import level_in_use as measure_level
from numpyro_score.score.prediction import (
    FnDenoiser,
    NoiseInput,
    TimeInput,
    TimestepInput,
    as_partial,
    check_data_scale,
    check_finite,
    check_predicted_noise,
    split_data,
    split_noise,
    split_v,
    split_velocity,
)
from numpyro_score.score.start_check import warn_of_start
from numpyro_score.sde import SDE, VE, DiscreteVP, RectifiedFlow
from numpyro_score.sde.discrete import as_process
from numpyro_score.sde.tweedie import (
    noise_from_denoised,
    score_from_denoised,
)
from numpyro_score.solver import DPMSolverPP, Solver
from numpyro_score.solver import sample as run_solver
from numpyro_score.solver.base import start_center
from numpyro_score.typing import Position, PRNGKey, Real, Scalar, ScoreFn, Time

GIVEN = ScoreFnDenoiser | FnDenoiser | CoordinateFnDenoiser  # functions of others
LEVEL_ROUNDING = 1.001  # up to rounding of float32 in noise levels of times


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreModel:
    r"""Law given by its scores :math:`\nabla \log p_t`, in physical units.

    With standardized data u = (x - loc)/scale the process acts as
    :math:`x_t = loc + scale (\alpha(t) u_0 + \sigma(t) n)`. Methods take points of
    shape ``batch + event_shape`` and one time, or one per point; ``t=None`` is the
    lowest noise level. A pytree, valid under ``jit`` and ``vmap``.

    For data with a support, noise is added in unconstrained space: points, scores,
    denoised points and ``event_shape`` refer to unconstrained points, ``sample`` and
    ``log_prob`` to data; :meth:`constrain` and :meth:`unconstrain` map between them.

    ``rows`` are at most 2,048 standardized rows of the data, from which
    :attr:`level_in_use` is measured; None for a score that is exact or conditional.

    Made by :meth:`~numpyro_score.train.ScoreMatching.run`, or of what was trained
    elsewhere by :meth:`from_fn`, :meth:`from_denoiser`, :meth:`from_noise_prediction`,
    :meth:`from_v_prediction`, :meth:`from_velocity` and
    :meth:`from_coordinate_denoiser`.

    Example:
        >>> from numpyro_score.sde import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> score.sample(jax.random.key(0), (3,)).shape
        (3, 2)
        >>> round(float(score.log_prob(jnp.zeros(2))), 3)
        -1.838
    """

    denoiser: Callable
    standardize: Affine
    sde: SDE = field(metadata={"static": True})
    event_shape: tuple[int, ...] = field(metadata={"static": True})
    support: Support | None = None
    velocity_only: bool = field(default=False, metadata={"static": True})
    rows: Float[Array, "rows *event"] | None = None

    @classmethod
    def from_fn(
        cls,
        score_fn: ScoreFn,
        sde: SDE,
        event_shape: tuple[int, ...],
        *,
        data: Any = None,
    ) -> "ScoreModel":
        """Return the score model of a given score function.

        Args:
            score_fn: (x_t, t) -> score of p_t, for one point of shape ``event_shape``.
            sde: the process of x_t; its ``sigma_max`` must be many times the data's sd.
            event_shape: shape of one point.
            data: rows that the score was learned from, for :attr:`level_in_use`; None
                for a score that is exact.

        Raises:
            TypeError: if the score does not return a floating-point array.
            ValueError: if the score returns another shape than ``event_shape``, or is
                not that of ``data`` with noise: of another sign, scale or time.
        """
        event_shape = check_shape("event_shape", event_shape)
        given: Any = score_fn  # may be of any type
        if not callable(given) or not isinstance(sde, SDE):
            raise TypeError(
                "`score_fn` must be a function of x_t and t, and `sde` its process, "
                f"such as VE(). Got {score_fn!r} and {sde!r}."
            )
        point = jax.ShapeDtypeStruct(event_shape, jnp.result_type(float))
        time = jax.ShapeDtypeStruct((), jnp.result_type(float))
        check_output(jax.eval_shape(score_fn, point, time), event_shape, "score_fn")
        unit = Affine.identity(event_shape)
        rows, denoiser = _rows(unit, data), ScoreFnDenoiser(score_fn, sde)
        if rows is not None:
            check_predicted_noise(denoiser, sde, unit, rows)
        return cls(denoiser, unit, sde, event_shape, rows=rows)

    @classmethod
    def from_denoiser(
        cls,
        fn: Callable,
        process: SDE | Sequence[float] | Any,
        event_shape: tuple[int, ...],
        *,
        standardize: Affine | None = None,
        integer_steps: bool = True,
        data: Any = None,
    ) -> "ScoreModel":
        """Return the score model of a function that estimates x_0, of x_t.

        Args:
            fn: (x_t, t) -> E[x_0 | x_t], for one point.
            process: as in :meth:`from_noise_prediction`.
            event_shape: shape of one point.
            standardize: as in :meth:`from_noise_prediction`.
            integer_steps: as there.
            data: as there.

        Raises:
            TypeError: if ``fn`` does not return a floating-point array.
            ValueError: as :meth:`from_noise_prediction`.

        Example:
            >>> from numpyro_score import VE
            >>> score = ScoreModel.from_denoiser(
            ...     lambda x, t: x / (1 + VE().sigma(t) ** 2), VE(), (2,)
            ... )
            >>> round(float(score.log_prob(jnp.zeros(2))), 3)
            -1.838
        """
        sde = as_process(process)
        noise_input = _noise_input(sde, integer_steps)
        return cls._from_prediction(
            fn, split_data, sde, event_shape, standardize, noise_input, data
        )

    @classmethod
    def from_noise_prediction(
        cls,
        fn: Callable,
        process: SDE | Sequence[float] | Any,
        event_shape: tuple[int, ...],
        *,
        standardize: Affine | None = None,
        integer_steps: bool = True,
        data: Any = None,
    ) -> "ScoreModel":
        """Return the score model of a function that estimates the noise n (DDPM).

        Args:
            fn: (x_t, t) -> E[n | x_t] for one point, or (x_t, t, context); a
                ``jax.tree_util.Partial(fn, weights)`` keeps weights as arguments of
                programs.
            process: the process of x_t. For a table of betas, or a
                :class:`~numpyro_score.sde.DiscreteVP`, ``fn`` takes steps, counted
                from 0, in place of t.
            event_shape: shape of one point.
            standardize: map from data to the scale of ``fn``, such as
                ``Affine.from_range(0, 255, event_shape)``; None for that of data.
            integer_steps: False if ``fn`` takes fractional steps, which halves the
                evaluations.
            data: rows in physical units, to check the scale and for
                :attr:`level_in_use`; None for neither.

        Raises:
            TypeError: if ``fn`` does not return a floating-point array.
            ValueError: for another shape, NaN, betas outside of (0, 1), or data that
                ``fn`` denoises worse than a linear map would.

        Example:
            >>> process = DiscreteVP.linear(1000)
            >>> def predict(x, step):  # for standard normal data n = sigma x
            ...     return process.sigma((step + 1) / 1000) * x
            >>> score = ScoreModel.from_noise_prediction(predict, process.betas, (2,))
            >>> round(float(score.score(jnp.ones(2), 0.5)[0]), 3)
            -1.0
        """
        sde = as_process(process)
        noise_input = _noise_input(sde, integer_steps)
        return cls._from_prediction(
            fn, split_noise, sde, event_shape, standardize, noise_input, data
        )

    @classmethod
    def from_v_prediction(
        cls,
        fn: Callable,
        process: SDE | Sequence[float] | Any,
        event_shape: tuple[int, ...],
        *,
        standardize: Affine | None = None,
        integer_steps: bool = True,
        data: Any = None,
    ) -> "ScoreModel":
        """Return the score model of a function that estimates v = alpha n - sigma x_0.

        Args:
            fn: (x_t, t) -> E[v | x_t], for one point (Salimans and Ho 2022).
            process: as in :meth:`from_noise_prediction`.
            event_shape: shape of one point.
            standardize: as in :meth:`from_noise_prediction`.
            integer_steps: as there.
            data: as there.

        Raises:
            TypeError: if ``fn`` does not return a floating-point array.
            ValueError: as :meth:`from_noise_prediction`.

        Example:
            >>> score = ScoreModel.from_v_prediction(  # v = 0 for standard normal data
            ...     lambda x, step: 0.0 * x, DiscreteVP.cosine(100), (2,)
            ... )
            >>> round(float(score.score(jnp.ones(2), 0.5)[0]), 3)
            -1.0
        """
        sde = as_process(process)
        noise_input = _noise_input(sde, integer_steps)
        return cls._from_prediction(
            fn, split_v, sde, event_shape, standardize, noise_input, data
        )

    @classmethod
    def from_velocity(
        cls,
        fn: Callable,
        event_shape: tuple[int, ...],
        process: SDE = RectifiedFlow(),
        *,
        standardize: Affine | None = None,
        data: Any = None,
    ) -> "ScoreModel":
        """Return the score model of a function that estimates dx/dt (flow matching).

        Args:
            fn: (x_t, t) -> E[alpha' x_0 + sigma' n | x_t] for one point, which is
                E[n - x_0 | x_t] on straight lines. Time goes from data at 0 to noise
                at 1: of v with noise at 0 take ``lambda x, t: -v(x, 1 - t)``.
            event_shape: shape of one point.
            process: the process of x_t.
            standardize: as in :meth:`from_noise_prediction`.
            data: as there.

        Raises:
            TypeError: if ``fn`` does not return a floating-point array.
            ValueError: as :meth:`from_noise_prediction`.

        Example:
            >>> def velocity(x, t):  # of standard normal data on straight lines
            ...     return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
            >>> score = ScoreModel.from_velocity(velocity, (2,))
            >>> round(float(score.score(jnp.ones(2), 0.5)[0]), 3)
            -2.0
        """
        noise_input = TimeInput()
        return cls._from_prediction(
            fn, split_velocity, process, event_shape, standardize, noise_input, data
        )

    @classmethod
    def from_coordinate_denoiser(
        cls,
        fn: Callable,
        event_shape: tuple[int, ...],
        process: SDE = VE(),
        *,
        standardize: Affine | None = None,
    ) -> "ScoreModel":
        """Return the score model of a denoiser with one noise level per coordinate.

        Such a score gives conditional laws by :meth:`condition`.

        Args:
            fn: (x, levels) -> E[x_0 | x_0 + levels * n = x] for one point and levels of
                the same shape, zeros among them; or (x, levels, context).
            event_shape: shape of one point.
            process: the noise process, whose ``sigma_max`` must be many times the sd
                of data on the scale of ``fn``.
            standardize: map from data to the scale of ``fn``; None for that of data.

        Raises:
            TypeError: if ``fn`` does not return a floating-point array.
            ValueError: for another shape, or NaN, at levels of 0 as well.

        Example:
            >>> cov = jnp.array([[1.0, 0.8], [0.8, 1.0]])
            >>> def denoise(x, levels):
            ...     return cov @ jnp.linalg.solve(cov + jnp.diag(levels**2), x)
            >>> score = ScoreModel.from_coordinate_denoiser(denoise, (2,))
            >>> given = score.condition(jnp.array([2.0, jnp.nan]))
            >>> [round(float(x), 1) for x in given.denoise(jnp.zeros(2), t=1.0)]
            [2.0, 1.6]
        """
        event_shape = check_shape("event_shape", event_shape)
        check_callable("fn", fn, "a function of a point and its noise levels")
        check_kind("process", process, SDE, "a noise process, such as VE()")
        standardize = _checked_map(standardize, event_shape)
        denoiser = CoordinateFnDenoiser(as_partial(fn))
        check_levels_apart(denoiser, event_shape)
        return cls(denoiser, standardize, process, event_shape)

    @classmethod
    def _from_prediction(
        cls,
        fn: Callable,
        split: Callable,
        sde: SDE,
        event_shape: tuple[int, ...],
        standardize: Affine | None,
        noise_input: NoiseInput,
        data: Any,
    ) -> "ScoreModel":
        """Return the checked score model of a function and how its output splits."""
        event_shape = check_shape("event_shape", event_shape)
        check_callable("fn", fn, "what is predicted, a function of x_t and t")
        check_kind("process", sde, SDE, "a noise process, such as VE()")
        standardize = _checked_map(standardize, event_shape)
        denoiser = FnDenoiser(as_partial(fn), split, noise_input, sde)
        check_finite(denoiser, event_shape)
        if data is not None:
            check_data_scale(denoiser, standardize, data)
            check_predicted_noise(denoiser, sde, standardize, data)
        rows = _rows(standardize, data)
        return cls(denoiser, standardize, sde, event_shape, rows=rows)

    def __repr__(self) -> str:
        return repr_lines(type(self).__name__, self.summary())

    def summary(self) -> dict[str, str]:
        """Return the lines of the repr by name; no arrays.

        Example:
            >>> from numpyro_score.sde import VE
            >>> score = ScoreModel.from_fn(lambda x, t: -x, VE(), event_shape=(2,))
            >>> score.summary()["noise levels"]
            '0.01 to 20, in standard deviations of the data'
        """
        low, high = short_number(self.sde.sigma_min), short_number(self.sde.sigma_max)
        describe = getattr(self.denoiser, "summary", None)
        rows = {
            "event shape": str(self.event_shape),
            "process": short_repr(self.sde),
            "noise levels": f"{low} to {high}, in standard deviations of the data",
            **(describe() if describe else {"denoiser": short_repr(self.denoiser)}),
        }
        if self.support is not None:
            rows["event shape"] += f", unconstrained; {self.support.name} of data"
        if self.velocity_only:
            rows["process"] += ", only along the flow: it has no score"
        return rows

    @property
    def level_in_use(self) -> float:
        """Lowest noise level that can be trusted off the data, in standardized units.

        Measured at first use, see :mod:`numpyro_score.score.level`, and then saved with
        the score; the lowest level of the process for a score without ``rows``.
        ``ScoreDistribution`` uses it.
        """
        found = measure_level(self)
        return float(self.sde.sigma_min) if found is None else found

    @property
    def size(self) -> int:
        """Number of numbers of one point."""
        return math.prod(self.event_shape)

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one point."""
        return len(self.event_shape)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum; for a simplex one number more than a point."""
        if self.support is None:
            return self.event_shape
        return self.support.data_shape(self.event_shape)

    def condition(self, values: Numbers, sd: Numbers = 0.0) -> "ScoreModel":
        r"""Return the law of the whole point given observations of coordinates.

        The law of x_0 given :math:`y_i = x_{0,i} + s_i n_i` for the coordinates i at
        which ``values`` is not NaN, these coordinates included. Exact, without guidance
        or particles, up to the error of the denoiser: noise and observations are one
        Gaussian observation (:mod:`numpyro_score.score.conditioning`). Draws are
        independent, fixed values come out of ``sample`` as they are, and one compiled
        program serves all patterns of NaN.

        The denoiser must take one noise level per coordinate: train with
        ``loss=DenoisingScoreMatching(noise=PerCoordinate())``. For observations of
        anything but coordinates use :class:`~numpyro_score.ScoreSDE`.

        Args:
            values: one datum in physical units, NaN where nothing is observed; all NaN
                gives the law as it was.
            sd: sd of the observations' noise, in physical units: one number or one per
                coordinate. 0 fixes the value, and is the only sd for data with a
                support.

        Raises:
            TypeError: if the score takes one level for all coordinates, is conditioned
                already, or has a support whose coordinates are mixtures of numbers.
            ValueError: for other shapes, infinite values, values outside of the
                support, or sd that are negative or not finite.

        Warns:
            UserWarning: for values far from all data that the score was learned from,
                where these are known.

        Example:
            >>> def denoise(x, levels):  # independent standard normal coordinates
            ...     return x / (1 + levels**2)
            >>> score = ScoreModel.from_coordinate_denoiser(denoise, (2,))
            >>> draw = score.condition([1.5, jnp.nan]).sample(jax.random.key(0))
            >>> float(draw[0])
            1.5
        """
        denoiser, standardize = condition(
            self.denoiser,
            self.standardize,
            self.support,
            self.sde.sigma_max,
            values,
            sd,
        )
        warn_of_far(denoiser, self.rows)
        # the rows are those of the law before conditioning
        return replace(self, denoiser=denoiser, standardize=standardize, rows=None)

    def constrain(self, z: Real) -> Real:
        """Return data of unconstrained points; the same points without a support."""
        return z if self.support is None else self.support.constrain(z)

    def unconstrain(self, x: Real) -> Real:
        """Return unconstrained points of data; the same points without a support."""
        return x if self.support is None else self.support.unconstrain(x)

    def subtract_log_jacobian(self, log_prob: Real, z: Real, x: Real) -> Real:
        """Return log densities of data x, from those of the unconstrained points z."""
        if self.support is None:
            return log_prob
        return log_prob - self.support.log_abs_det_jacobian(z, x)

    def denoise_standardized(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D(x, level) for one standardized point x = u_t / alpha."""
        return self.denoiser(x, level, context)

    def start_center(self, level: Scalar, context: Array | None = None) -> Position:
        """Return the mean of the law that draws start from, in standardized units.

        About that of the data for given functions, 0 for data that training has
        standardized.
        """
        if not self._is_given:
            return jnp.zeros(self.event_shape)
        return start_center(
            lambda x, level: self.denoiser(x, level, context), self.event_shape, level
        )

    def denoise(
        self, x: Real, t: Time | Array | None = None, context: Array | None = None
    ) -> Real:
        """Return E[x_0 | x_t = x] in physical units."""
        return self.map_points(self._denoise_one, x, t, context)

    def reverse_transition(
        self, x: Real, t: Time, t_next: Time, context: Array | None = None
    ) -> tuple[Real, Array]:
        r"""Return mean and sd of :math:`x_s | x_t = x` for s = ``t_next`` below t.

        In coordinates u/alpha at noise levels r, for x_0 = D: mean
        :math:`D + (r_s/r_t)^2 (x - D)`, variance :math:`r_s^2 (1 - (r_s/r_t)^2)` (Ho et
        al. 2020, eq. 7). The mean is exact; the variance lacks the contribution
        :math:`(1 - (r_s/r_t)^2)^2 \mathrm{Cov}[x_0 | x_t]`.
        """

        def mean(x: Position, t: Time, context: Array | None) -> Position:
            u, denoised = self._standardized(x, t, context)
            u = denoised + share * (u / self.sde.alpha(t) - denoised)
            return self.standardize.inverse(self.sde.alpha(t_next) * u)

        level = self.sde.noise_level(t_next)
        share = jnp.square(level / self.sde.noise_level(t))
        sd = self.sde.alpha(t_next) * level * jnp.sqrt(jnp.maximum(1 - share, 0.0))
        return self.map_points(mean, x, t, context), sd * self.standardize.scale

    def score(
        self, x: Real, t: Time | Array | None = None, context: Array | None = None
    ) -> Real:
        """Return the gradient of log p_t at x, in inverse physical units.

        Raises:
            ValueError: for a model of optimally paired flow matching, which has none.
        """
        if self.velocity_only:
            raise ValueError(
                "`score` is not known to a model of FlowMatching(paired=True), whose "
                "x_t is not data plus independent noise. Use `velocity`, `sample` with "
                "an ODE solver or `log_prob`, or train with paired=False."
            )
        return self.map_points(self._score_one, x, t, context)

    def noise(
        self, x: Real, t: Time | Array | None = None, context: Array | None = None
    ) -> Real:
        """Return E[n | x_t = x], the expected noise, of unit sd."""
        return self.map_points(self._noise_one, x, t, context)

    @property
    def has_energy(self) -> bool:
        """True if :meth:`energy` can be evaluated: the net is an energy net."""
        denoiser: Any = self.denoiser
        return isinstance(denoiser, EnergyDenoiser) and denoiser.has_energy

    def energy(
        self, x: Real, t: Time | Array | None = None, context: Array | None = None
    ) -> Real:
        """Return -log p_t(x) + const(t), in nats, by one evaluation of the net.

        Minus its gradient is exactly :meth:`score`.

        Raises:
            TypeError: if the score is not that of an energy net.
        """
        if not self.has_energy:
            raise TypeError(
                "`energy` needs a net whose score is a gradient: train with "
                "nn.Energy(net), or use `log_prob`. "
                f"Got {type(self.denoiser).__name__} without an energy."
            )
        return self.map_points(self._energy_one, x, t, context)

    def velocity(
        self, x: Real, t: Time | Array | None = None, context: Array | None = None
    ) -> Real:
        r"""Return dx/dt of the probability flow at x, in physical units.

        :math:`v = \alpha' E[x_0 | x_t] + \sigma' E[n | x_t] = f - g^2 s / 2` (Song et
        al. 2021, eq. 13); on the straight path this is E[n - x_0 | x_t].
        """
        return self.map_points(self._velocity_one, x, t, context)

    def log_prob(
        self,
        x: Real,
        t: Time | Array | None = None,
        context: Array | None = None,
        *,
        divergence: density.Divergence | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
    ) -> Real:
        """Return log p_t(x) by the probability flow, in nats.

        For data with a support this is the density of data, not of unconstrained
        points.

        Args:
            x: data of shape ``batch + data_shape``.
            t: time of the density; None for the lowest noise level.
            context: what the score is conditioned on, one for all points.
            divergence: rule for the trace; None for the exact trace up to 64 numbers
                per point and 16 fixed random signs above.
            rtol: relative tolerance of the integration.
            atol: absolute tolerance of the integration, in standardized units and nats.

        Raises:
            ValueError: given values without noise (:meth:`condition`), unless ``t`` is
                given: x_0 has no density then.
        """
        if t is None:
            self._check_density()
        self._check_start()
        if divergence is None:
            divergence = density.default_divergence(self.size)
        check_positive("rtol", rtol, "a relative tolerance")
        check_positive("atol", atol, "an absolute tolerance")
        check_kind("divergence", divergence, density.Divergence, "a rule for the trace")
        x = as_points("x", x, self.data_shape)
        if t is not None:
            self.sde.check_time("t", t)
        z = self.unconstrain(x)
        value = density.log_prob(self, z, t, context, rtol, atol, divergence=divergence)
        if t is None and isinstance(self.denoiser, ConditionedDenoiser):
            value = value + self.map_points(self._observed_ratio, z, t, context)
        return self.subtract_log_jacobian(value, z, x)

    @renamed(key="rng_key")
    def sample(
        self,
        rng_key: PRNGKey,
        shape: tuple[int, ...] = (),
        *,
        solver: Solver = DPMSolverPP(),
        ts: Float[Array, " ts"] | None = None,
        context: Array | None = None,
    ) -> Real:
        """Return draws of data by :func:`numpyro_score.solver.sample`.

        Args:
            rng_key: random key.
            shape: batch shape of the draws.
            solver: solver of the probability flow or the reverse SDE.
            ts: decreasing times; None for those of the solver.
            context: values that the score is conditioned on, one for all draws.

        Warns:
            UserWarning: for a given function whose data the highest noise level does
                not hide (:mod:`numpyro_score.score.start_check`).
        """
        self._check_start()
        draws = run_solver(rng_key, self, shape, solver=solver, ts=ts, context=context)
        if isinstance(self.denoiser, ConditionedDenoiser):
            t = self.sde.t_min if ts is None else ts[-1]
            draws = self._draw_observed(
                jax.random.fold_in(rng_key, 1), draws, t, context
            )
        return self.constrain(draws)

    @property
    def _is_given(self) -> bool:
        """True for a function that is not known to be of standardized data."""
        inner: Any = self.denoiser
        while (guided := getattr(inner, "denoiser", None)) is not None:
            inner = guided
        return isinstance(inner, GIVEN)

    def _check_start(self) -> None:
        """Warn where a given function is of data that no level hides.

        Laws that are guided or conditioned are not checked, each of which is new.
        """
        if isinstance(self.denoiser, GIVEN):
            warn_of_start(self)

    def noise_of_draws(self) -> Real | float:
        """Return the noise level of the numbers of :meth:`sample`, 0 if observed."""
        lowest = self.sde.sigma_min
        if not isinstance(self.denoiser, ConditionedDenoiser):
            return lowest
        return jnp.where(jnp.isfinite(self.denoiser.sd), 0.0, lowest)

    def _draw_observed(
        self, key: PRNGKey, x: Real, t: Time, context: Array | None
    ) -> Real:
        """Return points at the lowest level with observed coordinates without noise."""
        level = self.sde.noise_level(t)
        points = x.reshape(-1, *self.event_shape)
        drawn = draw_observed(
            jax.random.split(key, len(points)),
            self.denoiser,
            self.standardize,
            points,
            self.sde.alpha(t),
            level,
            context,
        )
        # at other levels draws of x_t are asked for
        is_lowest = level <= LEVEL_ROUNDING * self.sde.sigma_min
        return jnp.where(is_lowest, drawn.reshape(x.shape), x)

    def _observed_ratio(self, x: Position, t: Time, context: Array | None) -> Array:
        """Return log of the density of draws of :meth:`sample` over that of x_t."""
        denoiser: Any = self.denoiser
        alpha, sigma = self.sde.marginal(t)
        u = self.standardize.forward(x) / alpha
        return denoiser.log_density_ratio(u, sigma / alpha, context)

    def _check_density(self) -> None:
        """Raise if coordinates are fixed, unless that cannot be known in a trace."""
        sd = getattr(self.denoiser, "sd", None)
        if not isinstance(self.denoiser, ConditionedDenoiser):
            return
        if not is_traced(sd) and (np.asarray(sd) == 0).any():
            raise ValueError(
                "`log_prob` of x_0 is not defined where values are fixed by sd=0: they "
                "have no density. Pass `t`, such as score.sde.t_min, for the density "
                "of x_t, of which the fixed coordinates are independent and normal, or "
                "condition with sd > 0. "
                f"Got {int((np.asarray(sd) == 0).sum())} fixed coordinates."
            )

    def _denoise_one(self, x: Position, t: Time, context: Array | None) -> Position:
        return self.standardize.inverse(self._standardized(x, t, context)[1])

    def _score_one(self, x: Position, t: Time, context: Array | None) -> Position:
        denoiser: Any = self.denoiser
        if isinstance(denoiser, DirectScore):
            alpha, sigma = self.sde.marginal(t)
            u = self.standardize.forward(x) / alpha
            score = denoiser.score_standardized(u, sigma / alpha, context)
            return score / (alpha * self.standardize.scale)
        u, denoised = self._standardized(x, t, context)
        score = score_from_denoised(u, denoised, self.sde.marginal(t))
        return score / self.standardize.scale

    def _noise_one(self, x: Position, t: Time, context: Array | None) -> Position:
        u, denoised = self._standardized(x, t, context)
        return noise_from_denoised(u, denoised, self.sde.marginal(t))

    def _energy_one(self, x: Position, t: Time, context: Array | None) -> Array:
        alpha, sigma = self.sde.marginal(t)
        u = self.standardize.forward(x)
        denoiser: Any = self.denoiser
        return denoiser.energy(u / alpha, sigma / alpha, context)

    def _velocity_one(self, x: Position, t: Time, context: Array | None) -> Position:
        u, denoised = self._standardized(x, t, context)
        t = jnp.asarray(t, float)
        marginal, rate = jax.jvp(self.sde.marginal, (t,), (jnp.ones_like(t),))
        noise = noise_from_denoised(u, denoised, marginal)
        return self.standardize.scale * (rate.alpha * denoised + rate.sigma * noise)

    def _standardized(
        self, x: Position, t: Time, context: Array | None
    ) -> tuple[Position, Position]:
        """Return u_t and D(u_t)."""
        alpha, sigma = self.sde.marginal(t)
        u = self.standardize.forward(x)
        return u, self.denoiser(u / alpha, sigma / alpha, context)

    def map_points(
        self, one: Callable, x: Real, t: Time | Array | None, context: Array | None
    ) -> Real:
        """Return one(x, t, context) over the leading dimensions of x and t.

        Args:
            one: function of one point, one time and the context.
            x: points of shape ``batch + event_shape``.
            t: one time, or one per point; None for the lowest noise level.
            context: the context of all points.

        Raises:
            ValueError: for points of another shape.
        """
        x = as_points("x", x, self.event_shape)
        rank = len(self.event_shape)
        batch = x.shape[: x.ndim - rank]
        t = self._as_times(t, batch, x.dtype)
        if t.ndim == 0:
            out = jax.vmap(lambda x: one(x, t, context))(
                x.reshape(-1, *self.event_shape)
            )
        else:
            t = t.reshape(-1)
            points = x.reshape(-1, *self.event_shape)
            out = jax.vmap(lambda x, t: one(x, t, context))(points, t)
        return out.reshape(*batch, *out.shape[1:])

    def _as_times(
        self, t: Time | Array | None, batch: tuple[int, ...], dtype: Any
    ) -> Array:
        """Return one time, or one per point.

        Raises:
            ValueError: for times that are no numbers, outside of the process, or of
                another shape than the batch of points.
        """
        if t is None:
            return jnp.asarray(self.sde.t_min, dtype)
        self.sde.check_time("t", t)
        times = jnp.asarray(t, dtype)
        if times.ndim == 0:
            return times
        try:
            return jnp.broadcast_to(times, batch)
        except ValueError:
            raise ValueError(
                "`t` must be one time, or one per point of `x`. "
                f"Got shape {times.shape} for points of batch shape {batch}."
            ) from None


def _rows(standardize: Affine, data: Any) -> Array | None:
    """Return the rows of given data that a score keeps."""
    if data is None:
        return None
    rows = check_data(data, event_shape=standardize.loc.shape)
    return choose_rows(jax.vmap(standardize.forward)(rows))


def _checked_map(standardize: Any, event_shape: tuple[int, ...]) -> Affine:
    """Return the map to the unit scale, the identity for None.

    Raises:
        TypeError: for anything but an ``Affine``.
        ValueError: for another shape, or a scale that is not positive and finite.
    """
    if standardize is None:
        return Affine.identity(event_shape)
    check_kind("standardize", standardize, Affine, "an Affine")
    standardize.check("standardize")
    if np.shape(standardize.loc) != event_shape:
        raise ValueError(
            "`standardize` must have the event shape: it maps points. "
            f"Got {np.shape(standardize.loc)}, expected {event_shape}."
        )
    return standardize


def _noise_input(sde: SDE, integer_steps: bool) -> NoiseInput:
    """Return what a function takes as time: steps of a table of betas, or t."""
    check_flags(integer_steps=integer_steps)
    return TimestepInput(integer_steps) if isinstance(sde, DiscreteVP) else TimeInput()

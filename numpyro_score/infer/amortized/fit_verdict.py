r"""The verdict on an amortized posterior, from held-out simulations.

For simulations (z, y) of the model and draws of the posterior given y, the rank of each
:math:`z_j` among its draws is uniform *and independent of y* if the posterior is exact
(Talts et al. 2018; Modrák et al. 2023). With q the normal quantile of the rank, four
statistics of n simulations have known laws, for posteriors of any shape: the mean of q,
its sum of squares, its distance from the normal law (Kolmogorov-Smirnov) and its
correlation with a function of y. A fifth counts how often z lies far out among its
draws, as few wild draws hardly change ranks. Direction and size come from the residuals
:math:`u = (z - m)/s` by the mean m and sd s of the draws.

Ranks alone do not tell the prior from the posterior. The mean of the exact posterior
has the least squared error of all functions of y, so a regression on ranks
(:mod:`~numpyro_score.infer.amortized.rank_regression`) that predicts z better shows
information that the posterior has missed.

Nor do ranks of z tell a posterior that is calibrated but wider than need be, as after
short training. Ranks of the joint density p(z, y) do, where it is tractable: if a
Gaussian posterior of dimension d is r times too wide, log densities of draws fall below
that of z by :math:`(r^2 - 1)/2` times a chi-squared variable with d degrees of freedom.

Where it is not, distances tell widths within modes, which ranks do not see between two
modes: z and its draws are exchangeable, and so are their distances to the nearest other
point. If draws are locally Gaussian and r times too wide, the mean logarithm of the
distance of z less that of draws is :math:`(r^{-2} - 1)/2`.

Of integers such as codes, the number of other points that are equal says the same. A
code that follows from y, but is drawn with the shares of its neighbors, has uniform
ranks: it is drawn too low as often as too high. It equals draws more often than these
equal each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped
from numpyro.distributions import constraints
from scipy import stats
from scipy.special import ndtr, ndtri

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import check_count, check_kind, check_numbers
from numpyro_score.data.support import Support
from numpyro_score.infer.amortized.rank_regression import (
    normal_scores,
    predict_scores,
)
from numpyro_score.infer.amortized.sampling import SamplingSettings, draw_each
from numpyro_score.infer.amortized.simulator import Simulations, Simulator
from numpyro_score.model.latents import LatentLayout, LatentSite, site_index
from numpyro_score.reprs import join_first
from numpyro_score.run_verdict import Finding
from numpyro_score.typing import PRNGKey

NUM_DRAWS = 31  # per simulation: 32 ranks; noise of their mean 3 % of its variance
MIN_DRAWS = 5  # below 4 the mean square of standardized residuals is infinite
MIN_ROWS = 40  # an sd is known within 11 % (one standard error)
MIN_AFFORDED_ROWS = 100  # also after short training: an sd within 7 %
MAX_ROWS = 300  # within 4 %
# evaluations of the net, over those of the training: a tenth of the time at most
COST = 0.1
EVALUATIONS = 3  # of one training row: forward and backward
JOINT_DRAWS = 15  # whose joint density is judged: 16 ranks; the model may be expensive
MAX_FALL = 1e30  # in place of infinite log densities
# chance of a finding about ranks, all coordinates together; lower: sees less; not tuned
FALSE_ALARM = 1e-3
# of ranks, above which sizes may be noise and are left out; conventional
SIZE_P_VALUE = 0.01
MAX_RATIO = 1.2  # of the sd, or its inverse; a 95 % interval then covers 90 to 98 %
MAX_OFFSET = 0.2  # of the mean in posterior sd: a 95 % interval then covers 94.5 %
MAX_MISSED = 1.15  # rms error over that of the regression: its square is a third larger
FAR = 2.0  # interquartile ranges from the median: 2.7 sd of a normal law
# of residuals u, 2e-9 of a normal law: far too narrow is then all that is said
CLIP = 6.0
NAMED = 3  # coordinates named in one finding
TRAIN = "Simulate more, train for longer (`num_steps`), or give a larger `net`."
INFORM = (
    "Look at the observed numbers: scale them, take logarithms of skewed ones or "
    "observe summaries. " + TRAIN
)

Matrix = Float[np.ndarray, "rows _"]


class FitKind(StrEnum):
    """Kind of what is judged: one coordinate, or draws as points of their space."""

    COORDINATE = "coordinate"
    DENSITY = "joint density of the draws"
    DISTANCE = "distance to the nearest draw"
    EQUALITY = "share of equal draws"

    @property
    def is_rough(self) -> bool:
        """True where the size of an error is rough."""
        return self in (FitKind.DISTANCE, FitKind.EQUALITY)


@dataclass(frozen=True)
class CoordinateFit:
    """Errors of one coordinate of the latents in unconstrained space.

    Args:
        name: site and index.
        p_value: that the ranks are those of an exact posterior.
        width: posterior sd over the right one.
        offset: of the posterior mean, in posterior sd; positive if too large.
        response: correlation of q with the prediction of a regression on y; 0 if exact,
            positive if the posterior follows the observation too little.
        error: rms error of the posterior mean, in units of the prior.
        baseline: the same of the regression.
        missed: standard errors by which the former's square exceeds the latter's.
        kind: what is judged; only coordinates have more than a width.
    """

    name: str
    p_value: float
    width: float
    offset: float
    response: float
    error: float
    baseline: float
    missed: float
    kind: FitKind = FitKind.COORDINATE

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CoordinateFit":
        """Return the errors that a file holds; in old ones the name tells the kind."""
        check_kind("name", config["name"], str, "a site and index")
        named = (kind for kind in FitKind if config["name"].startswith(kind))
        config = {"kind": next(named, FitKind.COORDINATE), **config}
        for key in config.keys() - {"name", "kind"}:
            check_numbers(key, config[key], "errors of a posterior")
        if not 0 <= config["p_value"] <= 1:
            raise ValueError(f"`p_value` must lie in [0, 1]. Got {config['p_value']}.")
        texts = {"name": str, "kind": FitKind}
        return cls(**{key: texts.get(key, float)(config[key]) for key in config})

    @property
    def words(self) -> str:
        """Direction and size of the errors in words; empty if they may be noise."""
        sizes = self._size() if self.p_value < SIZE_P_VALUE else ()
        return ", ".join(text for text in (*sizes, self._information()) if text)

    def _size(self) -> Iterator[str]:
        if self.width > MAX_RATIO or self.width < 1 / MAX_RATIO:
            direction = "too wide" if self.width > 1 else "too narrow"
            how = "as if " * (self.kind is not FitKind.COORDINATE) + direction
            yield f"{how} by about {100 * abs(self.width - 1):.0f} %"
        if abs(self.offset) > MAX_OFFSET:
            direction = "high" if self.offset > 0 else "low"
            yield f"mean off by {abs(self.offset):.1f} sd ({direction})"

    def _information(self) -> str:
        if not self.lacks_information:
            return ""
        return (
            f"error {self.error:.2f} prior sd where a regression on ranks has "
            f"{self.baseline:.2f}"
        )

    @property
    def lacks_information(self) -> bool:
        """True if a regression on ranks predicts the latent better than the mean."""
        critical = -float(ndtri(FALSE_ALARM / 2))
        return self.error > MAX_MISSED * self.baseline and self.missed > critical


@dataclass(frozen=True)
class FitVerdict:
    """The verdict on a posterior, from held-out simulations; print it.

    Args:
        coordinates: one for each latent number in unconstrained space, and one for all
            together: the joint density of draws or, where there is none, distances; and
            one for each integer: the share of draws that are equal.
        num_simulations: on which it rests; fewer than 40 say nothing.

    Example:
        >>> print(FitVerdict((), 12))
        not judged: 12 held-out rows, 40 are required
    """

    coordinates: tuple[CoordinateFit, ...]
    num_simulations: int

    @property
    def ok(self) -> bool:
        """True if nothing was found; also if nothing was judged."""
        return not self.findings

    @property
    def p_value(self) -> float:
        """That all ranks are right, by Bonferroni's correction."""
        smallest = min((fit.p_value for fit in self.coordinates), default=1.0)
        return min(1.0, smallest * len(self.coordinates))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings, the most important first."""
        return (*_information(self.coordinates), *_ranks(self.coordinates))

    @property
    def names(self) -> str:
        """The names of the findings, or "ok", or "not judged"."""
        if not self.coordinates:
            return "not judged"
        return ", ".join(finding.name for finding in self.findings) or "ok"

    @property
    def headline(self) -> str:
        """One line for the repr."""
        if not self.coordinates:
            return (
                f"not judged: {self.num_simulations} held-out rows, "
                f"{MIN_ROWS} are required"
            )
        found = "no finding" if self.ok else f"poor ({self.names})"
        return f"{found}, p = {self.p_value:.2g} on {self.num_simulations} held out"

    def __str__(self) -> str:
        if self.coordinates and not self.ok:
            return "\n".join(f"- {finding}" for finding in self.findings)
        return self.headline

    def describe(self) -> dict[str, str]:
        """Return direction and size in words, by coordinate."""
        return {fit.name: fit.words or "no finding" for fit in self.coordinates}

    def to_config(self) -> dict[str, Any]:
        """Return the verdict in the types of JSON."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FitVerdict":
        """Return the verdict of :meth:`to_config`.

        Raises:
            TypeError: or KeyError, AttributeError or ValueError, for anything else.
        """
        check_kind("coordinates", config["coordinates"], (list, tuple), "a list")
        num_simulations = config["num_simulations"]
        check_count("num_simulations", num_simulations, "a number of rows", least=0)
        fits = tuple(CoordinateFit.from_config(fit) for fit in config["coordinates"])
        return cls(fits, num_simulations)


def with_verdict(
    rng_key: PRNGKey,
    posterior: Any,
    simulations: Simulations,
    held_out: Simulations | None,
    training_rows: int,
) -> Any:
    """Return a posterior with its verdict; warn once of everything that was found.

    Arguments are those of :func:`held_out_verdict`.

    Warns:
        UserWarning: if something was found.
    """
    verdict = held_out_verdict(rng_key, posterior, simulations, held_out, training_rows)
    warn_if_poor(verdict, "The learned posterior fails on held-out simulations")
    return replace(posterior, verdict=verdict)


def warn_if_poor(verdict: FitVerdict, failure: str) -> None:
    """Warn once of everything that was found, and of nothing else.

    Args:
        verdict: at the end of a training.
        failure: what fails on which data, the beginning of the warning.
    """
    if not verdict.ok:
        warn_caller(
            f"{failure} (`verdict` of the result holds this; `check=False` omits it):"
            f"\n{verdict}"
        )


def held_out_verdict(
    rng_key: PRNGKey,
    posterior: Any,
    simulations: Simulations,
    held_out: Simulations | None,
    training_rows: int,
) -> FitVerdict:
    """Return the verdict on a trained posterior from simulations that were held out.

    Args:
        rng_key: random key.
        posterior: an :class:`~numpyro_score.infer.AmortizedPosterior`.
        simulations: on which it was trained; for the regression on ranks.
        held_out: other simulations of the same law.
        training_rows: rows of all training steps together; bounds the cost.
    """
    available = 0 if held_out is None else len(held_out.z)
    if held_out is None or available < MIN_ROWS:
        return FitVerdict((), available)
    rows = num_rows(available, training_rows, posterior.num_steps)
    z, contexts = held_out.z[:rows], held_out.context[:rows]
    key_draw, key_ties = jax.random.split(rng_key)
    draws = _unconstrained_draws(key_draw, posterior, contexts)
    return judge_fit(
        np.random.default_rng(np.asarray(jax.random.key_data(key_ties))),
        coordinate_names(posterior.latents),
        z,
        draws,
        simulations.z,
        predict_scores(simulations.z, simulations.context, contexts),
        joint_densities(posterior.simulator, z, draws[:, :JOINT_DRAWS], contexts),
    )


def joint_densities(
    simulator: Simulator,
    z: Matrix,
    draws: Float[np.ndarray, "rows draws _"],
    contexts: Float[np.ndarray, "rows ..."],
) -> Float[np.ndarray, "rows points"] | None:
    """Return log p(z, y) of z and of draws; None if it is not tractable.

    Args:
        simulator: the model.
        z: true latents; first column of the result.
        draws: of the posterior given each observation.
        contexts: the observations.
    """
    if simulator.intractable:
        return None
    points = np.concatenate([z[:, None], draws], axis=1)
    of_row = jax.vmap(simulator.log_joint, (0, None))
    each = jax.jit(lambda rows: jax.lax.map(lambda row: of_row(*row), rows))
    values = np.asarray(each((points, contexts)), float)
    return np.where(np.isfinite(values), values, -np.inf)


def _unconstrained_draws(
    rng_key: PRNGKey, posterior: Any, contexts: Float[np.ndarray, "rows ..."]
) -> Float[np.ndarray, "rows draws _"]:
    """Return ``NUM_DRAWS`` draws of z given each observation."""
    size = posterior.latents.size
    site = LatentSite("z", Support.of(constraints.real_vector, (size,)), (size,))
    settings = SamplingSettings(
        LatentLayout((site,)), posterior.solver, posterior.num_steps
    )
    keys = jax.random.split(rng_key, len(contexts))
    draws, _ = draw_each(
        posterior.score,
        keys,
        jnp.asarray(contexts),
        settings=settings,
        num_samples=NUM_DRAWS,
    )
    return np.asarray(draws["z"])


def judge_fit(
    rng: np.random.Generator,
    names: tuple[str, ...],
    z: Matrix,
    draws: Float[np.ndarray, "rows draws _"],
    reference: Float[np.ndarray, "simulations _"],
    predictions: Matrix,
    log_joint: Float[np.ndarray, "rows _"] | None = None,
) -> FitVerdict:
    """Return the verdict on draws of a posterior given held-out simulations.

    Args:
        rng: random generator; splits ranks evenly.
        names: of the coordinates of z.
        z: true latents in unconstrained space.
        draws: of the posterior given each observation.
        reference: other latents of the prior, which fix the units of errors.
        predictions: of the normal scores of z, by a regression that saw neither.
        log_joint: of z and of draws, by :func:`joint_densities`; None for none.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z, y = rng.normal(size=(200, 1)), np.zeros((200, 1))
        >>> draws = 1.5 * rng.normal(size=(200, 31, 1))
        >>> fit = judge_fit(rng, ("x",), z, draws, z, y)
        >>> "too wide by about" in fit.describe()["x"]
        True
    """
    if len(z) < MIN_ROWS or draws.shape[1] < MIN_DRAWS:
        return FitVerdict((), len(z))
    scores = normal_scores(reference, z), normal_scores(reference, draws)
    fits = []
    for j, name in enumerate(names):
        score, score_draws = scores[0][:, j], scores[1][:, :, j]
        q = _quantiles(rng, z[:, j], draws[:, :, j])
        p_values, response = _rank_tests(q, predictions[:, j])
        p_values += (_far_test(z[:, j], draws[:, :, j]),)
        p_value = float(min(1.0, len(p_values) * min(p_values)))
        size = _residual_sizes(z[:, j], draws[:, :, j])
        missed = _missed_information(score, score_draws, predictions[:, j])
        fits.append(CoordinateFit(name, p_value, *size, response, *missed))
    if log_joint is not None:
        fits.append(_joint_fit(rng, log_joint, len(names)))
    else:
        fits.append(_nearest_fit(rng, names, z, draws))
    return FitVerdict(tuple(fits), len(z))


def coordinate_names(latents: LatentLayout) -> tuple[str, ...]:
    """Return site and index of every coordinate of z."""
    return tuple(
        site_index(site.name, index)
        for site in latents.sites
        for index in np.ndindex(*site.unconstrained_shape)
    )


def num_rows(available: int, training_rows: int, num_steps: int) -> int:
    """Return how many held-out simulations to draw for: 100 to 300 of those there are.

    So many that the net is evaluated a tenth as often as in training.

    Args:
        available: number of held-out simulations.
        training_rows: rows of all training steps together.
        num_steps: of the solver.

    Example:
        >>> num_rows(200, 8000 * 256, 64), num_rows(9000, 100, 64)
        (200, 100)
    """
    affordable = COST * EVALUATIONS * training_rows / (NUM_DRAWS * num_steps)
    return min(available, int(np.clip(affordable, MIN_AFFORDED_ROWS, MAX_ROWS)))


def _quantiles(
    rng: np.random.Generator,
    truth: Float[np.ndarray, " rows"],
    draws: Float[np.ndarray, "rows draws"],
) -> Float[np.ndarray, " rows"]:
    """Return normal quantiles of ranks, standard normal if the posterior is exact."""
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    rank = below + rng.random(len(truth)) * (ties + 1)
    return ndtri(np.clip(rank / (draws.shape[1] + 1), 1e-9, 1 - 1e-9))


def _rank_tests(
    q: Float[np.ndarray, " rows"], predicted: Float[np.ndarray, " rows"]
) -> tuple[tuple[float, ...], float]:
    """Return the p-values of four tests, and the correlation of the last."""
    count = len(q)
    spread = predicted.std()
    at = (predicted - predicted.mean()) / spread if spread > 0 else 0.0 * predicted
    square = stats.chi2.cdf(np.square(q).sum(), count)
    p_values = (
        2 * ndtr(-abs(q.sum()) / np.sqrt(count)),
        2 * min(square, 1 - square),
        stats.kstest(q, "norm").pvalue,
        2 * ndtr(-abs(q @ at) / np.sqrt(count)),
    )
    response = q @ at / (count * max(q.std(), 1e-9))
    return tuple(map(float, p_values)), float(response)


def _far_test(
    truth: Float[np.ndarray, " rows"], draws: Float[np.ndarray, "rows draws"]
) -> float:
    """Return the p-value that truths lie as often far out as their draws do."""
    points = np.concatenate([truth[:, None], draws], axis=1).astype(float)
    low, middle, high = np.quantile(points, (0.25, 0.5, 0.75), axis=1)[..., None]
    return _exchangeable_p_value(np.abs(points - middle) > FAR * (high - low))


def _exchangeable_p_value(values: Shaped[np.ndarray, "rows points"]) -> float:
    """Return the two-sided p-value that a function of a truth is as that of its draws.

    Given the set of a truth and its draws each is the truth with the same chance: mean,
    variance and skewness of the sum over truths follow, and a Pearson law of type III
    has these.

    Args:
        values: of the truth in the first column, and of draws.
    """
    centered = values - values.mean(1, keepdims=True)
    variance, third = (np.power(centered, k).mean(1).sum() for k in (2, 3))
    if variance == 0:
        return 1.0
    law = stats.pearson3(third / variance**1.5)
    excess = centered[:, 0].sum() / np.sqrt(variance)
    return float(min(1.0, 2 * min(law.cdf(excess), law.sf(excess))))


def _joint_fit(
    rng: np.random.Generator, log_joint: Float[np.ndarray, "rows _"], size: int
) -> CoordinateFit:
    """Return the p-value that draws are as dense as truths, and the width that follows.

    One-sided: too narrow posteriors show in the ranks of z. From medians, as the tails
    of draws may have hardly any density.
    """
    truth, draws = log_joint[:, 0], log_joint[:, 1:]
    q = _quantiles(rng, truth, draws)
    p_value = float(ndtr(-q.sum() / np.sqrt(len(q))))
    lower = np.maximum(np.median(draws, axis=1), -MAX_FALL)
    fall = float(np.median(np.maximum(truth, -MAX_FALL) - lower))
    width = float(np.sqrt(1 + 2 * max(fall, 0.0) / float(stats.chi2.median(size))))
    kind = FitKind.DENSITY
    return CoordinateFit(str(kind), p_value, width, 0.0, 0.0, 0.0, 0.0, 0.0, kind)


def _nearest_fit(
    rng: np.random.Generator,
    names: tuple[str, ...],
    z: Matrix,
    draws: Float[np.ndarray, "rows draws _"],
) -> CoordinateFit:
    """Return the p-value that z is as near to draws as these are to each other."""
    points = np.concatenate([z[:, None], draws], axis=1).astype(float)
    centered = points - points.mean(1, keepdims=True)
    tiny = np.finfo(float).tiny
    centered /= np.maximum(centered.std(1, keepdims=True), tiny)
    square = np.square(centered).sum(-1)
    product = np.einsum("rid,rjd->rij", centered, centered)
    apart = square[:, :, None] + square[:, None] - 2 * product
    apart[:, np.eye(points.shape[1], dtype=bool)] = np.inf
    log_distance = np.log(np.maximum(apart.min(-1), tiny)) / 2
    q = _quantiles(rng, log_distance[:, 0], log_distance[:, 1:])
    p_value = float(2 * ndtr(-abs(q.sum()) / np.sqrt(len(q))))
    excess = np.mean(log_distance[:, 0] - log_distance[:, 1:].mean(1))
    width = float(1 / np.sqrt(np.clip(1 + 2 * excess, 0.1, 100)))
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    kind = FitKind.DISTANCE
    name = f"{kind} of {', '.join(names[:NAMED])}{rest}"
    return CoordinateFit(name, p_value, width, 0.0, 0.0, 0.0, 0.0, 0.0, kind)


def judge_integers(
    name: str,
    truth: Float[np.ndarray, " rows"],
    draws: Float[np.ndarray, "rows draws"],
) -> CoordinateFit:
    """Return the p-value that an integer equals draws as these equal each other.

    The width is the share of unequal pairs of draws over that of draws and truths.

    Args:
        name: of the integer.
        truth: its true values.
        draws: of it, given what else is known of each row.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> codes = rng.integers(2, size=(200, 32)).astype(float)
        >>> judge_integers("n", codes[:, 0], codes[:, 1:]).p_value > 0.01
        True
    """
    points = np.concatenate([truth[:, None], draws], axis=1)
    others = points.shape[1] - 1
    equal = (points[:, :, None] == points[:, None]).sum(-1) - 1
    wrong = 1 - equal[:, 0].mean() / others
    unequal = 1 - (equal[:, 1:] - (draws == truth[:, None])).mean() / (others - 1)
    least = 1 / (len(points) * others)
    width = float(np.clip(max(unequal, least) / max(wrong, least), 0.1, 10))
    p_value = _exchangeable_p_value(equal)
    kind = FitKind.EQUALITY
    name = f"{kind} of {name}"
    return CoordinateFit(name, p_value, width, 0.0, 0.0, 0.0, 0.0, 0.0, kind)


def _residual_sizes(
    truth: Float[np.ndarray, " rows"], draws: Float[np.ndarray, "rows draws"]
) -> tuple[float, float]:
    """Return the ratio of sd and the offset of the mean, from standardized residuals.

    The mean square of exact Gaussian draws is (1 + 1/L)(L - 1)/(L - 3) for L draws.
    """
    count = draws.shape[1]
    spread = np.maximum(draws.std(axis=1, ddof=1), np.finfo(np.float32).tiny)
    u = np.clip((truth - draws.mean(1)) / spread, -CLIP, CLIP)
    square = (1 + 1 / count) * (count - 1) / (count - 3)
    return float(np.sqrt(square) / max(u.std(), 1e-9)), float(-u.mean())


def _missed_information(
    truth: Float[np.ndarray, " rows"],
    draws: Float[np.ndarray, "rows draws"],
    predicted: Float[np.ndarray, " rows"],
) -> tuple[float, float, float]:
    """Return rms errors of the mean and the regression, and their standard errors."""
    noise = draws.var(axis=1, ddof=1) / draws.shape[1]  # of the mean of the draws
    own = np.square(truth - draws.mean(1)) - noise
    other = np.square(truth - predicted)
    excess = own - other
    error = excess.std() / np.sqrt(len(truth)) + 1e-9
    rms = [float(np.sqrt(max(part.mean(), 1e-9))) for part in (own, other)]
    return rms[0], rms[1], float(excess.mean() / error)


def _information(fits: tuple[CoordinateFit, ...]) -> Iterator[Finding]:
    found = [fit for fit in fits if fit.lacks_information]
    if found:
        worst = sorted(found, key=lambda fit: -fit.error / fit.baseline)
        yield Finding(
            "information",
            "the error of the posterior mean over that of a regression on ranks, at "
            f"worst ({_named(worst)}),",
            worst[0].error / worst[0].baseline,
            MAX_MISSED,
            INFORM,
        )


def _ranks(fits: tuple[CoordinateFit, ...]) -> Iterator[Finding]:
    """Return findings about coordinates whose ranks are not those of the posterior."""
    limit = FALSE_ALARM / max(1, len(fits))
    found = [fit for fit in fits if fit.p_value < limit]
    widths, offsets = lambda fit: abs(np.log(fit.width)), lambda fit: abs(fit.offset)
    kinds: tuple[tuple[str, str, Callable, float], ...] = (
        ("width", "posterior sd over the right one", widths, np.log(MAX_RATIO)),
        ("mean", "offset of the mean in posterior sd", offsets, MAX_OFFSET),
    )
    explained: set[str] = set()
    for kind, what, measure, threshold in kinds:
        odd = [fit for fit in found if measure(fit) > threshold]
        if odd:
            explained |= {fit.name for fit in odd}
            odd.sort(key=lambda fit: (fit.kind.is_rough, -measure(fit)))
            yield _sized(kind, what, odd)
    rest = [fit for fit in found if fit.name not in explained]
    if rest:
        yield _unexplained(sorted(rest, key=lambda fit: fit.p_value))


def _sized(kind: str, what: str, worst: list[CoordinateFit]) -> Finding:
    first = worst[0]
    limit = MAX_RATIO if first.width > 1 else 1 / MAX_RATIO
    number, threshold = (
        (first.width, limit) if kind == "width" else (first.offset, MAX_OFFSET)
    )
    return Finding(kind, f"{what} ({_named(worst)})", number, threshold, TRAIN)


def _unexplained(worst: list[CoordinateFit]) -> Finding:
    if abs(worst[0].response) > MAX_OFFSET:
        how = "little" if worst[0].response > 0 else "much"
        return Finding(
            "response",
            f"the posterior of {worst[0].name} follows the observation too {how}: the "
            "correlation of ranks with a regression on it",
            worst[0].response,
            MAX_OFFSET,
            TRAIN,
        )
    return Finding(
        "calibration",
        f"the p-value of uniform ranks of {worst[0].name}",
        worst[0].p_value,
        FALSE_ALARM,
        TRAIN,
    )


def _named(worst: list[CoordinateFit]) -> str:
    """Return the words of the worst coordinates and the number of the others."""
    return join_first([f"{fit.name}: {fit.words}" for fit in worst], NAMED)

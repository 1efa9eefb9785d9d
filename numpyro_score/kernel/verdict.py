r"""The verdict on a run: findings with numbers, thresholds and remedies.

Made from the streaming moments of all chains
(:mod:`~numpyro_score.kernel.run_moments`), so that it costs a run next to nothing and
can be given at its end. A verdict without findings is no proof: modes that no chain has
visited leave no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.kernel.run_moments import RunMoments, Thinning
from numpyro_score.kernel.tempering_checks import (
    DRAWS_PER_RESTART,
    MAX_GAP,
    MIN_RESTARTS,
)
from numpyro_score.model.weighted_rows import ChainMoments, WeightedRows
from numpyro_score.run_verdict import (
    MIN_EFFICIENCY,
    MIN_JUDGED,
    Finding,
    Verdict,
    fewest_effective,
)
from numpyro_score.smc.evidence import fewest_ancestors

MAX_R_HAT = 1.05  # half-chain means then differ by .3 sd (1.05^2 - 1 = .32^2)

ON_THE_WAY_R_HAT = 1.5  # half-chain means differ by 1.1 sd (1.5^2 - 1 = 1.1^2)
GOOD_R_HAT = 1.01  # Vehtari et al. 2021: what R-hat should be where draws suffice
MIN_E_BFMI = 0.3  # Betancourt 2016, as in Stan
MIN_LINEARITY = 0.5  # R^2: below, more than half of the force is not a metric's
# of proposals, by the linearity of the least linear latent over MIN_LINEARITY; Stan
# reports any; higher: misses necks of funnels and horns; not tuned
MAX_DIVERGENT = 0.01
# divergent proposals per place; measured: 1.0 in separable logistic regressions, where
# draws are right, 3 and more in horns, where they are not
MIN_RECURRENCE = 1.5
# the share at learned sites, where most are refusals: a tenth of the moves
MAX_REFUSED = 0.1
MIN_MOVING = 1e-3  # of proposals accepted: 1000 draws are one or two values
MAX_ROW = 50  # rejections in a row: at an acceptance of .3, .7^50 = 2e-8
# of weighted particles that may stay: a draw of 20, as MIN_EFFICIENCY
MAX_STAYING = 0.05
# in units of the metric, whose quarter period is pi / 2: 1,600 steps across
MIN_STEP = 1e-3
MIN_VIRIAL = 0.1  # 1 for proper densities; the share of the variance that was explored
MIN_FORCE = 3.0  # standard errors; without a force one in 700 runs has more, 1 - Phi(3)
ALL = slice(None)
TEMPER = "Raise `num_samples`, `num_warmup` or `num_rungs`."
MAX_MISSED = 20.0  # draws; independent ones have none by a chance of e^-20 = 2e-9
CONFIDENCE = 0.95  # of the upper limit of an effective sample size; conventional
# chance of a finding `unmixed` in independent draws; lower: sees less; not tuned
FALSE_ALARM = 1e-3
# nats, by which a density at a proposal may exceed that of all draws: e^3 = 20
MAX_HIGHER = 3.0
MAX_DRIFT = 0.1  # sd, of the mean of particles between halves; R-hat 1.01 is .14
# of the particles: weights with an sd of 3 means (1 / .1 - 1 = 3^2)
MIN_ESS_SHARE = 0.1


@dataclass(frozen=True)
class RunKind:
    """Parts of a run that may be judged; no arrays.

    Args:
        energy: whether the potential is known and momentum drawn anew for each
            trajectory, so that E-BFMI means something.
        learned: whether there are learned sites, where a proposal is refused if the
            line integral of the score is not known well.
        tempered: whether chains swap with others, so that their moves are not local.
        weighted: whether chains are particles whose weights have set the shares of
            modes, so that they may stay in different ones.
        halves: whether the kernel could halve its steps where need be, and does not.
        most_steps: cap of a number of steps that is adapted; None where it is fixed.
    """

    energy: bool
    learned: bool
    tempered: bool = False
    weighted: bool = False
    halves: bool = False
    most_steps: int | None = None


class Chains(NamedTuple):
    """Report of chains when a run ends; every array may have axes of chains in front.

    - **moments**, **step_size**, **num_steps**: of every chain, the latter as adapted.
    - **whitened**: mean positions and gradients of both halves in whitened coordinates
      (until they are computed, the metric), or None where each chain has its own.
    - **scale**: metrics of the chains as standard deviations, where they are diagonal
      and the chains' own; None otherwise.
    - **tempering**: :class:`~numpyro_score.kernel.stepping_stone.Crossings` of every
      chain (until they are computed, what they are computed from), in parallel
      tempering; None otherwise.
    - **rows**: of learned sites, weighted by the likelihood, or None.
    - **ess**, **ancestors**: effective sample size of annealed particles at the last
      level, and their effective number of draws of the prior; None otherwise.
    """

    moments: RunMoments
    step_size: Any
    num_steps: Any
    whitened: tuple[Any, Any] | None
    scale: Any
    tempering: Any = None
    ess: Any = None
    ancestors: Any = None
    rows: WeightedRows | None = None

    def groups(self, size: int) -> list["Chains"]:
        """Return the chains as NumPy arrays, in groups of so many, or all if fewer.

        In double precision, where squares and products of moments cannot overflow.
        """
        lead = np.ndim(self.step_size)
        total = int(np.size(self.step_size))

        def flat(value: Any) -> np.ndarray:
            value = np.asarray(value)
            if jnp.issubdtype(value.dtype, jnp.floating):
                value = value.astype(np.float64)
            return value.reshape(total, *value.shape[lead:])

        whole = jax.tree.map(flat, self)
        starts = range(0, total, size)
        return [jax.tree.map(lambda x, i=i: x[i : i + size], whole) for i in starts]


class RunRecord(NamedTuple):
    """Record of a run for its verdict, with an axis of chains in front.

    - **chains**: what they report, as NumPy arrays.
    - **thinning**: of the run.
    - **kind**: what may be judged.
    """

    chains: Chains
    thinning: Thinning
    kind: RunKind

    @property
    def size(self) -> int:
        """Number of latents."""
        return self.chains.moments.origin.shape[-1] - 1

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return len(self.chains.moments.counts)


def judge(record: RunRecord) -> Verdict:
    """Return the verdict on a run.

    Args:
        record: of all chains.
    """
    if not record.size or record.thinning.num_samples < MIN_JUDGED:
        return Verdict(())
    if record.kind.tempered:
        mixing = _mixing(record, False)
        crossings = *_missed(record), *_restarts(record), *_gap(record)
        return Verdict((*_misplaced(record), *mixing, *crossings))
    if not np.isfinite(np.asarray(record.chains.moments.rows)).all():
        return Verdict((_runaway(float("nan")),))
    symptoms = [*_stuck(record), *_divergent(record), *_step_size(record)]
    on_the_way = np.nanmax(split_r_hat(record)) > ON_THE_WAY_R_HAT
    if not on_the_way:
        symptoms += _energy(record)
    linearity = measure_linearity(record)
    curved = linearity < MIN_LINEARITY
    if record.kind.weighted:
        mixing = [*_degenerate(record), *_drifting(record)]
    else:
        mixing = _mixing(record, curved)
    moving = _moving(record)  # copies of a draw tell of no density
    virial = smallest_virial(record, moving) if moving.any() else 1.0
    if mixing and virial < MIN_VIRIAL:
        return Verdict((_runaway(virial), *mixing, *symptoms))
    if mixing:
        mixing = [*mixing, *_length(record)]
    if curved and not on_the_way and (mixing or symptoms):
        # a posterior may be curved and still be sampled well
        mixing = [*mixing, _curved(linearity, record.kind.halves)]
    if not (mixing or symptoms):
        symptoms = _unentered(record)
    return Verdict((*_misplaced(record), *mixing, *symptoms))


def split_r_hat(record: RunRecord) -> np.ndarray:
    """Return the split R-hat of the latents and of the potential (Gelman et al. 2013).

    Args:
        record: of all chains.
    """
    within, means = _within(record), _half_means(record)
    half = record.thinning.half
    between = means.var(axis=0, ddof=1)
    ratio = between / np.where(within > 0, within, 1.0)
    ratio = np.where((within == 0) & (between > 0), np.inf, ratio)
    return np.sqrt((half - 1) / half + ratio)


def effective_sample_size(record: RunRecord) -> np.ndarray:
    """Return the effective sample size of the means, from means of batches.

    It is at most the number of observations. Latents that do not move have none; the
    energy of a law that is known by its score alone is constant, and has no limit.

    Args:
        record: of all chains.
    """
    moments, thinning = record.chains.moments, record.thinning
    observed = 2 * thinning.half
    count = observed // thinning.batch
    _, means, scatters = np.moveaxis(np.asarray(moments.batch), 1, 0)
    means, scatter = means + moments.origin, scatters.sum(0)
    scatter = scatter + count * np.square(means - means.mean(0)).sum(0)
    total = record.num_chains * observed
    batches = scatter / max(record.num_chains * count - 1, 1)
    between = _half_means(record).var(axis=0, ddof=1)
    variance = _within(record) + between
    size = total * variance / (thinning.batch * np.where(batches > 0, batches, 1.0))
    unmoved = np.where(np.arange(len(batches)) < record.size, 0.0, np.inf)
    return np.where(batches > 0, np.minimum(size, total), unmoved)


def measure_linearity(record: RunRecord) -> float:
    """Return the squared correlation of whitened steps and gradients of a usual chain.

    1 for a Gaussian; low where the curvature changes over the posterior. The mean over
    the latents.

    Args:
        record: of all chains.
    """
    shares, known = _linear_shares(record)
    mean = np.where(known, shares, 0.0).sum(-1) / np.maximum(known.sum(-1), 1)
    return float(np.median(np.where(known.any(-1), mean, 1.0)))


def _smallest_linearity(record: RunRecord) -> float:
    """Return the smallest share of a force that is linear, over latents."""
    shares, known = _linear_shares(record)
    return float(np.median(np.where(known, shares, 1.0), axis=0).min())


def _linear_shares(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared correlations, chains by latents, and which are known."""
    increments = np.asarray(record.chains.moments.increments)
    steps, gradients, products = np.moveaxis(increments, 1, 0)
    norm = steps * gradients
    return np.square(products) / np.where(norm > 0, norm, 1.0), norm > 0


def smallest_virial(record: RunRecord, chosen: np.ndarray | slice = ALL) -> float:
    r"""Return the smallest :math:`Cov(z_i, \partial_i U)` of a latent.

    It is 1 for every density that falls to 0, also with heavy tails, by integration by
    parts (Stein 1981); 0 where the density is flat, negative where it grows outwards.
    Of chains that hardly moved it is the share of the variance that they explored. The
    median over half-chains, or the value over all draws, whichever is larger: chains
    in different modes are judged by themselves, slow ones together.

    Args:
        record: of all chains.
        chosen: the chains to look at.
    """
    moments = jax.tree.map(lambda x: np.asarray(x)[chosen], record.chains.moments)
    relative = np.asarray(moments.mean, float)[..., :-1]
    origin = np.asarray(moments.origin, float)[:, None, :-1]
    gradient = np.asarray(moments.gradient_mean, float)
    product = np.asarray(moments.virial, float)
    within = np.median(product - relative * gradient, axis=(0, 1))
    pooled = (product + origin * gradient).mean((0, 1))
    pooled = pooled - (relative + origin).mean((0, 1)) * gradient.mean((0, 1))
    return float(np.maximum(within, pooled).min())


def _runaway(virial: float) -> Finding:
    return Finding(
        "runaway",
        "the smallest covariance of a latent and the gradient, 1 for every density "
        "that falls to 0,",
        virial,
        MIN_VIRIAL,
        "No force holds the chains: the density is flat or grows without bound there, "
        "so that no draw means anything, or they have seen less than a tenth of its "
        "variance. Give every site a proper prior, check signs of factors and that the "
        "data enter the likelihood, or start elsewhere by `init_params`.",
    )


def _force_between_chains(record: RunRecord) -> float:
    """Return in standard errors the force that draws apart chains back together.

    Chains that differ within one mode feel it: the mean gradients of their halves grow
    along the direction in which the mean positions differ. Between modes there is none.

    Args:
        record: of all chains, in coordinates that can be made common.
    """
    y, h, changes = _common_coordinates(record)
    y = y - y.mean(0)
    direction = np.linalg.svd(y, full_matrices=False)[2][0]
    along, force = y @ direction, h @ direction
    variance = np.square(direction) @ changes / record.thinning.half
    norm = np.square(along).sum()
    slope, error = along @ force / norm, np.sqrt(variance / norm)
    return float(slope / error) if error > 0 else float("inf")


def _common_coordinates(record: RunRecord) -> tuple[np.ndarray, ...]:
    """Return mean positions and gradients of all halves, and variances of gradients.

    Chains with diagonal metrics of their own are compared in their geometric mean.
    """
    observed = 2 * record.thinning.half
    # increments of independent draws have twice their variance
    changes = record.chains.moments.increments[:, 1] / (2 * max(observed - 1, 1))
    if record.chains.whitened is not None:
        y, h = record.chains.whitened
    else:
        scale = np.asarray(record.chains.scale)
        common = np.exp(np.log(scale).mean(0))
        means = record.chains.moments.mean + record.chains.moments.origin[:, None]
        y, h = means[..., :-1] / common, record.chains.moments.gradient_mean * common
        changes = changes * np.square(common / scale)
    flat = (np.reshape(means, (-1, record.size)) for means in (y, h))
    return *flat, changes.mean(0)


def _largest_size(record: RunRecord) -> np.ndarray:
    """Return an upper limit of the effective sample size, from means of halves."""
    means, within = _half_means(record), _within(record)
    between = means.var(axis=0, ddof=1)
    limit = _chi2_quantile(CONFIDENCE, len(means) - 1)
    size = len(means) * limit * within / np.where(between > 0, between, 1.0)
    return np.where(between > 0, size, np.inf)


def _half_means(record: RunRecord) -> np.ndarray:
    moments = record.chains.moments
    means = np.asarray(moments.mean + moments.origin[:, None])
    return means.reshape(-1, means.shape[-1])


def _within(record: RunRecord) -> np.ndarray:
    """Return the mean variance within halves."""
    return np.asarray(record.chains.moments.scatter).mean((0, 1)) / (
        record.thinning.half - 1
    )


def _mixing(record: RunRecord, curved: bool) -> list[Finding]:
    r_hat = split_r_hat(record)
    # batches do not show correlations longer than they are
    size = np.minimum(effective_sample_size(record), _largest_size(record))
    total = record.num_chains * record.thinning.num_samples
    limit = fewest_effective(total)
    low = size.min() < limit
    worst = float(np.nanmax(r_hat))
    apart = worst > MAX_R_HAT and _is_significant(record, r_hat)
    if apart or (low and worst > GOOD_R_HAT):
        threshold = MAX_R_HAT if apart else GOOD_R_HAT
        return [_unmixed(record, worst, threshold, curved)]
    if low:
        return [_slow(record, float(size.min()), limit)]
    return []


def _drifting(record: RunRecord) -> list[Finding]:
    """Return a finding for particles whose mean moves from one half to the other.

    Their places are draws together, so none of them has to go everywhere.
    """
    moments = record.chains.moments
    means = np.asarray(moments.mean + moments.origin[:, None])
    moves = means[:, 1] - means[:, 0]
    drift, error = moves.mean(0), moves.std(0) / max(len(moves) - 1, 1) ** 0.5
    sd = np.sqrt(_within(record) + means.mean(1).var(axis=0))
    size = np.abs(drift) / np.where(sd > 0, sd, 1.0)
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * len(size)))
    size = np.where(np.abs(drift) > limit * error, size, 0.0)
    if size.max() <= MAX_DRIFT:
        return []
    return [
        Finding(
            "unmixed",
            "the move of the particles' mean between the halves of the run, in sd,",
            float(size.max()),
            MAX_DRIFT,
            "The particles have not reached the posterior. Raise `num_warmup`, for "
            "more transitions per level, and `num_samples`.",
        )
    ]


def _degenerate(record: RunRecord) -> list[Finding]:
    """Return findings for few effective particles, or few draws that they come from."""
    if record.chains.ess is None:
        return []
    size = record.num_chains
    ess, ancestors = np.min(record.chains.ess), np.min(record.chains.ancestors)
    found = []
    if not ess >= MIN_ESS_SHARE * size:
        what = "the effective sample size of the particles at the last level"
        remedy = "Raise `levels`, `num_warmup` or `num_chains`."
        found.append(Finding("ess", what, float(ess), MIN_ESS_SHARE * size, remedy))
    if ancestors < fewest_ancestors(size):
        what = "the effective number of draws of the prior that particles descend from"
        remedy = (
            "The shares of separate modes and the evidence rest on these few. Raise "
            "`num_chains`, or `num_warmup` for more transitions per level."
        )
        limit = fewest_ancestors(size)
        found.append(Finding("ancestors", what, float(ancestors), limit, remedy))
    return found


def _is_significant(record: RunRecord, r_hat: np.ndarray) -> bool:
    """Return whether so large an R-hat is unlikely for so many effective draws."""
    moments, thinning = record.chains.moments, record.thinning
    count = 2 * thinning.half // thinning.batch
    batches = moments.batch[:, 2].mean(0) / max(count - 1, 1)
    error = batches * thinning.batch / thinning.half
    between = _half_means(record).var(axis=0, ddof=1)
    limit = _chi2_quantile(1 - FALSE_ALARM / len(r_hat), 2 * record.num_chains - 1)
    return bool((between > limit * error)[r_hat > MAX_R_HAT].any())


def _chi2_quantile(probability: float, dof: int) -> float:
    """Return a quantile of chi-squared over its mean (Wilson and Hilferty 1931)."""
    variance = 2 / (9 * dof)
    return (1 - variance + NormalDist().inv_cdf(probability) * variance**0.5) ** 3


def _unmixed(
    record: RunRecord, r_hat: float, threshold: float, curved: bool
) -> Finding:
    if record.kind.tempered:
        return Finding("unmixed", "the largest split R-hat", r_hat, threshold, TEMPER)
    comparable = record.chains.whitened is not None or record.chains.scale is not None
    several = record.num_chains > 1 and comparable
    is_apart = r_hat > MAX_R_HAT and not curved
    if several and is_apart and _force_between_chains(record) < MIN_FORCE:
        return Finding(
            "modes",
            "the largest split R-hat",
            r_hat,
            threshold,
            "Chains differ in where they are, and no force draws them together: they "
            "sit in different modes. Use a kernel that moves between modes, such as "
            "ParallelTempering.",
        )
    return Finding(
        "unmixed",
        "the largest split R-hat",
        r_hat,
        threshold,
        "Chains have not reached a common distribution. Raise `num_warmup` and "
        "`num_samples`, or start nearer by `init_strategy`.",
    )


def _slow(record: RunRecord, size: float, limit: float) -> Finding:
    remedy = "Raise `num_samples`, or reparameterize the model."
    if record.kind.tempered:
        remedy = TEMPER
    what = "the smallest effective sample size"
    return Finding("slow", what, size, limit, remedy)


def _curved(linearity: float, halves: bool) -> Finding:
    steps = ", or halve steps by `max_step_halvings=5`" if halves else ""
    return Finding(
        "curved",
        "the share of the gradient that is linear in the latents",
        linearity,
        MIN_LINEARITY,
        "No metric fits the whole posterior: reparameterize the model, for example by "
        f"LocScaleReparam or TransformReparam{steps}.",
    )


def _stuck(record: RunRecord) -> list[Finding]:
    accepted, _, _, longest, *_ = record.chains.moments.counts.T
    # particles are draws together, also where some of them stay
    few = MAX_STAYING if record.kind.weighted else 0.0
    whose = f", of all but {100 * few:.0f} % of the particles" if few else ""
    share = float(np.quantile(accepted, few)) / record.thinning.num_samples
    if share < MIN_MOVING:
        return [
            Finding(
                "stuck",
                f"the smallest share of proposals that a chain accepted{whose}",
                share,
                MIN_MOVING,
                "Its draws are copies. Start elsewhere by `init_params` or "
                "`init_strategy`, or lengthen `num_warmup`.",
            )
        ]
    limit, row = _longest_row(record), float(np.quantile(longest, 1 - few))
    if row <= limit:
        return []
    return [
        Finding(
            "stuck",
            f"the largest number of rejections in a row{whose}",
            row,
            limit,
            "A chain cannot leave a narrow part of the posterior with this step size, "
            "and may never enter others. Raise `target_accept_prob`, or reparameterize "
            "the model.",
        )
    ]


def _longest_row(record: RunRecord) -> float:
    return max(MAX_ROW, MIN_EFFICIENCY * record.thinning.num_samples)


def _moving(record: RunRecord) -> np.ndarray:
    """Return which chains are not stuck."""
    accepted, _, _, longest, *_ = np.asarray(record.chains.moments.counts).T
    moves = accepted / record.thinning.num_samples >= MIN_MOVING
    return moves & (longest <= _longest_row(record))


def _length(record: RunRecord) -> list[Finding]:
    """Return a finding for trajectories that are as long as adaptation makes them."""
    most, num_steps = record.kind.most_steps, int(np.max(record.chains.num_steps))
    if most is None or num_steps < most:
        return []
    return [
        Finding(
            "length",
            "the adapted number of steps, at its cap,",
            num_steps,
            most,
            "Trajectories end before they have crossed the posterior. Reparameterize "
            "the model, or set `num_steps` to a larger number.",
        )
    ]


def _divergent(record: RunRecord) -> list[Finding]:
    """Return a finding for divergent proposals, of which fewer count in curved laws.

    There they are where the chain cannot enter, such as the tip of a horn, and few of
    them may hide much of its variance. From the same place they come again and again;
    those that overshoot at a steep side of the law come once from each.
    """
    counts = record.chains.moments.counts.sum(0)
    share = float(counts[1] / (record.num_chains * record.thinning.num_samples))
    limit = MAX_REFUSED if record.kind.learned else MAX_DIVERGENT
    if not record.kind.learned and counts[1] >= MIN_RECURRENCE * counts[4]:
        limit *= min(1.0, _smallest_linearity(record) / MIN_LINEARITY)
    if share <= limit:
        return []
    options = ["`num_nodes`"] * record.kind.learned
    options += ["`max_step_halvings` (to 5)"] * record.kind.halves
    raised = ", ".join([*options, "`target_accept_prob`"])
    return [
        Finding(
            "divergent",
            "the share of divergent proposals",
            share,
            limit,
            f"Raise {raised}, or reparameterize the model.",
        )
    ]


def _energy(record: RunRecord) -> list[Finding]:
    r"""Return a finding for an E-BFMI that is low.

    With momentum p drawn anew, :math:`E[(\Delta K)^2] = d` and the energy has the
    variance :math:`Var(U) + d/2`, whose ratio is the E-BFMI.
    """
    if not record.kind.energy:
        return []
    observed = 2 * record.thinning.half
    variance = record.chains.moments.scatter[..., -1].sum(-1) / max(observed - 2, 1)
    fraction = float(record.size / (variance.mean() + record.size / 2))
    if fraction >= MIN_E_BFMI:
        return []
    return [
        Finding(
            "energy",
            "the E-BFMI",
            fraction,
            MIN_E_BFMI,
            "The energies of the posterior vary far more than momentum can change "
            "them: its tails are reached rarely. Reparameterize the model.",
        )
    ]


def _restarts(record: RunRecord) -> list[Finding]:
    """Return a finding for chains that hardly ever came from the prior."""
    fewest = float(np.min(record.chains.tempering.restarts))
    limit = min(MIN_RESTARTS, record.thinning.num_samples // DRAWS_PER_RESTART)
    if fewest >= limit:
        return []
    what = "the smallest number of a chain's restarts from the prior"
    return [Finding("restarts", what, fewest, limit, TEMPER)]


def _gap(record: RunRecord) -> list[Finding]:
    """Return a finding for evidence that differs between both directions."""
    gap = float(np.max(record.chains.tempering.gap))
    if gap <= MAX_GAP:
        return []
    what = (
        "the difference of a chain's log evidence from the prior up and from the "
        "posterior down, in nats,"
    )
    remedy = f"{TEMPER} Data other than those of the warm-up need one of their own."
    return [Finding("gap", what, gap, MAX_GAP, remedy)]


def _missed(record: RunRecord) -> list[Finding]:
    """Return a finding for places of high likelihood that the draws lack."""
    missed = float(np.max(record.chains.tempering.missed))
    if not missed > MAX_MISSED:
        return []
    what = (
        "the draws that a chain should have for each visit at a higher temperature of "
        "a place of higher likelihood than all of its draws (a mode is lost),"
    )
    return [Finding("missed", what, missed, MAX_MISSED, TEMPER)]


def _unentered(record: RunRecord) -> list[Finding]:
    r"""Return a finding for proposals of far higher density than all draws.

    The lowest of n potentials of one law has an exponential spread of about
    :math:`\mathrm{sd} / \sqrt{2 \log n}` below which others are rare.
    """
    lowest = record.chains.moments.lowest
    if lowest is None:
        return []
    drawn, proposed = np.asarray(lowest, float).min(0)
    total = record.num_chains * record.thinning.num_samples
    spread = float(np.sqrt(_within(record)[-1] / (2 * np.log(total))))
    limit = max(MAX_HIGHER, -np.log(FALSE_ALARM) * spread)
    if not (np.isfinite(drawn) and drawn - proposed > limit):
        return []
    return [
        Finding(
            "missed",
            "the log density at a refused proposal, over the largest of all draws,",
            float(drawn - proposed),
            limit,
            "Chains have met a place of high density, and cannot enter it: it is "
            "narrower than their steps. Use ParallelTempering, or a `step_size` or "
            "`max_step_halvings` that fits it.",
        )
    ]


def _misplaced(record: RunRecord) -> list[Finding]:
    """Return findings for draws off the data of a score, or at the end of a support.

    Also for scores used at levels where they are not trusted.
    """
    moments, observed = record.chains.moments, 2 * record.thinning.half
    counts = [c for c in (moments.off_data, moments.rounded) if c is not None]
    found = [finding for c in counts for finding in c.findings(observed)]
    found += moments.off_data.level_findings() if moments.off_data else []
    return found + _beside_rows(record)


def _beside_rows(record: RunRecord) -> list[Finding]:
    """Return findings where draws differ from rows weighted by the likelihood."""
    if record.chains.rows is None:
        return []
    means, ess = _half_means(record), effective_sample_size(record)
    sd = np.sqrt(_within(record) + means.var(axis=0))
    moments = means.mean(0), sd, np.minimum(ess, _largest_size(record))
    return record.chains.rows.findings(ChainMoments(*moments))


def _step_size(record: RunRecord) -> list[Finding]:
    step_size = float(np.min(record.chains.step_size))
    if step_size >= MIN_STEP:
        return []
    return [
        Finding(
            "step_size",
            "the smallest step size, in units of the metric,",
            step_size,
            MIN_STEP,
            "The posterior has features far narrower than its width, or the score "
            "does not fit the potential. Check the model, or reparameterize it.",
        )
    ]


def combine(records: Sequence[RunRecord]) -> RunRecord:
    """Return the record of all chains, from records of some each.

    Args:
        records: of chains of one run that were run apart, with metrics of their own.
    """
    parts = [record.chains for record in records]
    chains = jax.tree.map(lambda *part: np.concatenate(part), *parts)
    return records[0]._replace(chains=chains)

"""Reports of the chains of a run at its end, and the verdict on it.

The streaming moments of the run, from which the warning of
:mod:`numpyro_score.run_verdict` is made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.kernel.run_moments import (
    Point,
    RunMoments,
    Thinning,
    update_moments,
)
from numpyro_score.kernel.stepping_stone import Crossings, TemperingRecord
from numpyro_score.kernel.verdict import (
    Chains,
    RunKind,
    RunRecord,
    combine,
    judge,
)
from numpyro_score.kernel.whitening import (
    LowRankSqrt,
    Metric,
    RavelledPosition,
    whiten,
    whiten_displacement,
)
from numpyro_score.model.weighted_rows import WeightedRows, weigh_rows
from numpyro_score.run_verdict import (
    ReportCollector,
    RunLength,
    Verdict,
    apply_if,
    call_when_due,
    is_last,
)


class RunView(NamedTuple):
    """Part of a state that a verdict is made from, of one chain or of a batch.

    - **moments**: of the run, or None where none is due.
    - **number**: of the last transition in its run, from 1; 0 in warm-up; one for all
      chains.
    - **point**: where the chains are.
    - **diverging**, **step_size**: of the last transition.
    - **num_steps**: of a trajectory, as adapted.
    - **metric**: the square root S of the metric, and its inverse.
    - **shared**: whether the chains of a batch have one metric.
    - **kind**: what may be judged; no arrays.
    - **proposed_energy**: potential at the last proposal, or None where not known.
    - **tempering**: of parallel tempering, what its crossings are computed from, or
      None.
    - **ess**, **ancestors**: of annealed particles, the same for all, or None.
    """

    moments: RunMoments | None
    number: Any
    point: Point
    diverging: Array
    step_size: Array
    num_steps: Array
    metric: tuple[Metric, Metric]
    shared: bool
    kind: RunKind
    proposed_energy: Array | None = None
    tempering: TemperingRecord | None = None
    ess: Array | None = None
    ancestors: Array | None = None

    def kept(self) -> Chains:
        """Return what is reported of the chains, with their metric as it is."""
        assert self.moments is not None
        metric: Any = self.metric if self.shared else None
        rest = self.scale, self.tempering, self.ess, self.ancestors
        return Chains(self.moments, self.step_size, self.num_steps, metric, *rest)

    @property
    def scale(self) -> Array | None:
        """Diagonal metrics of the chains' own, as standard deviations, or None."""
        sqrt = self.metric[0]
        blocks = list(sqrt.values()) if isinstance(sqrt, dict) else [sqrt]
        rank = self.step_size.ndim + 1
        low_rank = any(isinstance(block, LowRankSqrt) for block in blocks)
        if self.shared or low_rank or any(block.ndim != rank for block in blocks):
            return None
        return jnp.concatenate(blocks, axis=-1)


def count_in_run(state: Any, run: RunLength | None) -> Any:
    """Return a state, of one chain or of a batch, in the run that it now belongs to.

    Args:
        state: after a transition, with ``i``, ``plan`` and ``span``.
        run: the length of the run that calls; None where it is not known.
    """
    if run is None or state.span is None:
        return state
    return state._replace(span=state.span.at(state.i - state.plan.num_warmup, run))


def number_in_run(state: Any) -> Any:
    """Return the number of a state's last transition in its run; 0 in warm-up."""
    drawn = state.i - state.plan.num_warmup
    return drawn if state.span is None else state.span.number(drawn)


def follow(
    before: Point, after: RunView, run: RunLength | None, potential: Any = None
) -> RunMoments | None:
    """Return the moments of a run with one transition taken in.

    Args:
        before: where the chains were.
        after: the state after the transition, adapted.
        run: its length; None where it is not known.
        potential: of the model, for draws of learned sites that lie off their data.
    """
    moments = after.moments
    if run is None or moments is None or not jax.tree.leaves(before.z):
        return moments
    update = partial(update_moments, potential=potential)
    if after.step_size.ndim:
        axes = None, None, 0, None if after.shared else 0, 0, 0, 0, 0
        update = jax.vmap(update, axes)
    thinning = Thinning.of(run.num_samples)
    proposals = after.diverging, after.proposed_energy
    chains = moments, after.metric, before, after.point, *proposals
    return update(after.number, thinning, *chains)


def report_at_end(
    view: RunView, run: RunLength | None, potential: Callable[[], Any]
) -> None:
    """Give the verdict, when the program runs, after the last transition of the run.

    Args:
        view: of one chain or of a batch of chains, after a transition.
        run: its length; None where it is not known.
        potential: returns that of the model, for rows of its learned sites, weighted by
            the likelihood.
    """
    if run is None or view.moments is None:
        return
    num_chains, thinning, kind = run.num_chains, Thinning.of(run.num_samples), view.kind

    def records(report: Chains) -> list[RunRecord]:
        groups = report.groups(num_chains)
        return [RunRecord(group, thinning, kind) for group in groups]

    collector = ReportCollector(
        num_chains, records, lambda record: record.num_chains, combine, judge
    )
    report = call_when_due(collector.receive, _summarize)
    due = is_last(view.number, run)
    report(due, view.kept()._replace(rows=_weighted_rows(view, run, potential, due)))


def judge_run(view: RunView, run: RunLength, potential: Callable[[], Any]) -> Verdict:
    """Return the verdict on a run that is over.

    Args:
        view: of its last state, with all of its chains.
        run: its length.
        potential: as in :func:`report_at_end`.
    """
    rows = _weighted_rows(view, run, potential, jnp.ones((), bool))
    (group,) = _summarize(view.kept()._replace(rows=rows)).groups(run.num_chains)
    return judge(RunRecord(group, Thinning.of(run.num_samples), view.kind))


def _weighted_rows(
    view: RunView, run: RunLength, potential: Callable[[], Any], due: Array
) -> WeightedRows | None:
    """Return rows of the learned sites weighted by the likelihood, if due, else 0."""
    if view.moments is None or view.moments.off_data is None:
        return None
    single = view.step_size.ndim == 0
    z = jax.tree.map(lambda x: x[None], view.point.z) if single else view.point.z
    position = RavelledPosition.of(view.metric[0], jax.tree.map(lambda x: x[0], z))
    sites = view.moments.off_data.sites
    starts = {site.name: position.start(z, site.name) for site in sites}
    compute = partial(weigh_rows, potential(), starts, run.num_chains)
    shapes = jax.eval_shape(compute, z)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    rows = apply_if(due, lambda _: compute(z), zeros)
    return jax.tree.map(lambda x: x[0], rows) if single else rows


def _summarize(kept: Chains) -> Chains:
    """Return what is reported of chains, with what is computed at the end of a run.

    Whitened means take the place of the metric, crossings that of their sums.
    """
    runs = kept.step_size.ndim - 1  # axes of runs that are mapped
    if kept.tempering is not None:
        crossings = _mapped(Crossings.of, runs)(kept.tempering)
        kept = kept._replace(tempering=crossings)
    if kept.whitened is not None:
        means = _mapped(jax.vmap(_whitened_means, (None, 0)), runs)
        kept = kept._replace(whitened=means(kept.whitened, kept.moments))
    return kept


def _mapped(function: Callable, times: int) -> Callable:
    for _ in range(times):
        function = jax.vmap(function)
    return function


def _whitened_means(
    metric: tuple[Metric, Metric], moments: RunMoments
) -> tuple[Array, Array]:
    sqrt, inverse = metric
    means = (moments.mean + moments.origin)[:, :-1]
    return (
        jax.vmap(partial(whiten_displacement, inverse))(means),
        jax.vmap(partial(whiten, sqrt))(moments.gradient_mean),
    )

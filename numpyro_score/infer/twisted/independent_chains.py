"""The verdict on chains whose proposals know nothing of the chain."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_score.model.data_range import OffDataCounts
from numpyro_score.run_verdict import MIN_JUDGED, Finding, ReportCollector, Verdict

# Of independent proposals with acceptance a, ESS per draw is at most a / (2 - a): about
# .05, the efficiency below which the other kernels are found slow, at this acceptance.
MIN_ACCEPTED = 0.1


class IndependentChains(NamedTuple):
    """Report of chains of independent proposals.

    - **num_draws**: after warm-up.
    - **accept_prob**: mean acceptance probability.
    - **off_data**: draws of learned sites off their data; None where nothing is known.
    """

    num_draws: Int[Array, "*chains"]
    accept_prob: Float[Array, "*chains"]
    off_data: OffDataCounts | None

    def judge(self) -> Verdict:
        """Return the verdict on all of these chains."""
        found = []
        accepted, drawn = float(np.min(self.accept_prob)), int(np.min(self.num_draws))
        if self.off_data is not None and drawn >= MIN_JUDGED:
            found += self.off_data.findings(drawn)
        if accepted < MIN_ACCEPTED:
            remedy = "Raise `num_particles` or `levels`."
            what = "share of independent proposals that a chain accepts"
            found.append(Finding("stuck", what, accepted, MIN_ACCEPTED, remedy))
        return Verdict(tuple(found))


def _cut(chains: IndependentChains, some: slice) -> IndependentChains:
    return jax.tree.map(lambda x: x[some], chains)


def collect_chains(num_chains: int) -> ReportCollector:
    """Return what judges the chains of a run when all of them have ended."""

    def records(report: IndependentChains) -> list[IndependentChains]:
        """Return one record of a run, or of each of several that are mapped."""
        ndim = np.ndim(report.accept_prob)
        rows = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[ndim:])), report)
        starts = range(0, len(rows.accept_prob), num_chains)
        return [_cut(rows, slice(first, first + num_chains)) for first in starts]

    def combine(parts: list[IndependentChains]) -> IndependentChains:
        return jax.tree.map(lambda *part: np.concatenate(part), *parts)

    def size(record: Any) -> int:
        return len(record.accept_prob)

    return ReportCollector(num_chains, records, size, combine, IndependentChains.judge)

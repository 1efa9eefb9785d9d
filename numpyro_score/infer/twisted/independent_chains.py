"""The verdict on chains whose proposals know nothing of the chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.model.data_range import OffDataCounts
from numpyro_score.run_verdict import (
    MIN_JUDGED,
    Finding,
    ReportCollector,
    Verdict,
    fewest_effective,
)

# Of independent proposals with acceptance a, ESS per draw is at most a / (2 - a): about
# .05, the efficiency below which the other kernels are found slow, at this acceptance.
MIN_ACCEPTED = 0.1
REMEDY = "Raise `num_particles` or `levels`, for evidence that varies less."


class EqualDraws(NamedTuple):
    r"""Rows of equal draws of chains, which a proposal ends that is accepted.

    The mean of n draws in rows of lengths L, each of an independent draw, has the
    variance of :math:`n^2 / \sum L^2` independent draws (Kish 1965).

    - **num_draws**: of a chain, in all rows.
    - **length**: of the present row.
    - **squares**: sum of the squared lengths.
    """

    num_draws: Int[Array, "*chains"]
    length: Float[Array, "*chains"]
    squares: Float[Array, "*chains"]

    @classmethod
    def zero(cls) -> "EqualDraws":
        """Return no draws of one chain."""
        return cls(jnp.zeros((), int), jnp.zeros(()), jnp.zeros(()))

    def add(self, accepted: Bool[Array, ""]) -> "EqualDraws":
        """Return the rows of one chain with one more draw."""
        before = jnp.where(accepted, 0.0, self.length)
        length = before + 1
        squares = self.squares + length**2 - before**2
        return EqualDraws(self.num_draws + 1, length, squares)

    @property
    def effective_size(self) -> float:
        """Effective number of draws of all chains together."""
        squares = np.asarray(self.squares, float).sum()
        return float(np.sum(self.num_draws)) ** 2 / max(float(squares), 1.0)


class IndependentChains(NamedTuple):
    """Report of chains of independent proposals.

    - **accept_prob**: mean acceptance probability.
    - **equal_draws**: rows of equal draws after warm-up.
    - **off_data**: draws of learned sites off their data; None where nothing is known.
    """

    accept_prob: Float[Array, "*chains"]
    equal_draws: EqualDraws
    off_data: OffDataCounts | None

    def judge(self) -> Verdict:
        """Return the verdict on all of these chains."""
        found = []
        accepted, rows = float(np.min(self.accept_prob)), self.equal_draws
        drawn = int(np.min(rows.num_draws))
        if self.off_data is not None and drawn >= MIN_JUDGED:
            found += self.off_data.findings(drawn)
        if accepted < MIN_ACCEPTED:
            what = "share of independent proposals that a chain accepts"
            found.append(Finding("stuck", what, accepted, MIN_ACCEPTED, REMEDY))
        size, limit = rows.effective_size, fewest_effective(int(np.sum(rows.num_draws)))
        if not found and drawn >= MIN_JUDGED and size < limit:
            what = "the effective sample size, by rows of equal draws,"
            found.append(Finding("slow", what, size, limit, REMEDY))
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

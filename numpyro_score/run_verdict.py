"""The verdict on a run of MCMC, and the one warning that gives it when the run ends.

A compiled program cannot raise, so the host is called back, once, after the last
transition. Chains that run apart (parallel, sequential) report one after the other, and
the last of them is answered.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.checks import enclosing_mcmc

UNTRUSTED = "The draws of this run are not to be trusted"
# transitions of a chain: ten batches of ten, halves with sd within 10 %
MIN_JUDGED = 100
MIN_ESS = 400  # Vehtari et al. 2021: below it R-hat and ESS are themselves unreliable
# effective draws per draw, one of 20; lower: slow runs pass; not tuned
MIN_EFFICIENCY = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Args:
        name: ``runaway``, ``modes``, ``unmixed``, ``slow``, ``curved``, ``length``,
            ``energy``, ``divergent``, ``stuck``, ``step_size``, ``off_data``,
            ``level``, ``rows``, ``missed``, ``restarts``, ``gap``, ``ess``, ``start``,
            ``ancestors`` or ``evidence``.
        what: what the number is.
        number: what was measured.
        threshold: beyond which it is a finding.
        remedy: what to do, in words.
    """

    name: str
    what: str
    number: float
    threshold: float
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.what} is {self.number:.4g} (threshold "
            f"{self.threshold:.4g}). {self.remedy}"
        )


@dataclass(frozen=True)
class Verdict:
    """Findings on a run, or none.

    Args:
        findings: the most important first.

    Example:
        >>> Verdict(()).ok
        True
        >>> print(Verdict(()))
        No finding. Modes that no chain has visited leave no trace.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    @property
    def names(self) -> str:
        """The names of the findings, or "ok"."""
        return ", ".join(finding.name for finding in self.findings) or "ok"

    def __str__(self) -> str:
        if self.ok:
            return "No finding. Modes that no chain has visited leave no trace."
        return "\n".join(f"- {finding}" for finding in self.findings)


class RunLength(NamedTuple):
    """Length of the present run: transitions after warm-up, and chains."""

    num_samples: int
    num_chains: int


def enclosing_run() -> RunLength | None:
    """Return the length of the run of ``MCMC`` that calls, if it can be judged.

    None outside of a run, and in one of fewer than 100 draws per chain. The verdict
    must wait for the end of the run.

    Example:
        >>> enclosing_run() is None
        True
    """
    host = enclosing_mcmc()
    if host is None:
        return None
    length = getattr(host.sampler, "num_samples", host.num_samples)
    return RunLength(length, host.num_chains) if length >= MIN_JUDGED else None


def fewest_effective(num_draws: int) -> float:
    """Return the effective sample size below which a run of so many draws is slow.

    Example:
        >>> fewest_effective(8000), fewest_effective(1000)
        (400, 50.0)
    """
    return min(MIN_ESS, MIN_EFFICIENCY * num_draws)


class RunSpan(NamedTuple):
    """Place of the present run among all transitions since warm-up.

    A state may go on in another run, of the same or of another length.

    - **before**: transitions of earlier runs.
    - **num_samples**: those of the present run; 0 before the first.
    """

    before: Array
    num_samples: Array

    @classmethod
    def zero(cls) -> "RunSpan":
        """Return the span before the first run."""
        return cls(jnp.zeros((), int), jnp.zeros((), int))

    @classmethod
    def first(cls) -> "RunSpan | None":
        """Return the span before the first run, or None outside of one to be judged."""
        return None if enclosing_run() is None else cls.zero()

    def at(self, drawn: Array, run: RunLength) -> "RunSpan":
        """Return the span of the run that a transition belongs to.

        Args:
            drawn: number of the transition since warm-up, from 1; less in warm-up.
            run: length of the run that calls.
        """
        is_over = drawn > self.before + self.num_samples
        begins = (drawn > 0) & (is_over | (self.num_samples != run.num_samples))
        return RunSpan(
            jnp.where(begins, drawn - 1, self.before),
            jnp.where(begins, run.num_samples, self.num_samples),
        )

    def number(self, drawn: Array) -> Array:
        """Return the number of a transition in its run, from 1; 0 in warm-up."""
        return jnp.where(drawn > 0, drawn - self.before, 0)


def is_last(number: Array, run: RunLength) -> Array:
    """Return whether a run is over after so many of its transitions."""
    return number == run.num_samples


@dataclass(eq=False)
class ReportCollector:
    """Collects the reports of the chains of a run, and warns once.

    Args:
        num_chains: of the run.
        records: returns what was reported, one record per run, each of all its chains.
        size: returns the number of chains of a record.
        combine: returns one record of chains that reported apart.
        judge: returns the verdict on a run, from its record.
    """

    num_chains: int
    records: Callable[[Any], list[Any]]
    size: Callable[[Any], int]
    combine: Callable[[list[Any]], Any]
    judge: Callable[[Any], Verdict]
    reports: list[Any] = field(default_factory=list, init=False)
    lock: Any = field(default_factory=threading.Lock, init=False)

    def receive(self, report: Any) -> None:
        """Take in a report; when all chains have reported, warn of what was found.

        Runs that are mapped report at once, each with all of its chains.
        """
        records = self.records(report)
        if self.size(records[0]) < self.num_chains:
            with self.lock:
                self.reports.extend(records)
                if len(self.reports) < self.num_chains:
                    return
                records, self.reports = [self.combine(self.reports)], []
        bad = [verdict for verdict in map(self.judge, records) if not verdict.ok]
        if bad:
            share = f" ({len(bad)} of {len(records)} runs)" if len(records) > 1 else ""
            warnings.warn(f"{UNTRUSTED}{share}:\n{bad[0]}", stacklevel=2)


def call_when_due(
    receive: Callable[[Any], None], summarize: Callable[[Any], Any] | None = None
) -> Callable[[Array, Any], tuple[()]]:
    """Return a function that calls the host back if due; mapped chains call once.

    Args:
        receive: called on the host with what is reported.
        summarize: what is computed on the device before, if due; None for nothing.
    """

    def call(chains: Any) -> None:
        jax.debug.callback(receive, summarize(chains) if summarize else chains)

    @jax.custom_batching.custom_vmap
    def report(due: Array, chains: Any) -> tuple[()]:
        jax.lax.cond(due, lambda: call(chains), lambda: None)
        return ()

    @report.def_vmap
    def report_all(size: int, batched: Any, due: Array, chains: Any) -> Any:
        def spread(x: Any, is_batched: bool) -> Any:
            return x if is_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

        return report(jnp.any(due), jax.tree.map(spread, chains, batched[1])), ()

    return report


def apply_if(condition: Array, function: Any, operand: Any) -> Any:
    """Return ``function(operand)`` if the condition holds, else the operand.

    A loop of at most one pass: XLA carries its operand in place, where both branches of
    ``lax.cond`` would copy it, and runs that are mapped compute nothing unless one is
    due.

    Args:
        condition: a single number.
        function: from operands to operands.
        operand: of the function.
    """
    carry = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), function(carry[1])),
        (condition, operand),
    )
    return carry[1]

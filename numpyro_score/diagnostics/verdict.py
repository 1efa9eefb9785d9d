"""The verdict on a finished run: what was found, and what to do about it."""

from functools import partial
from typing import Any

from numpyro.infer import MCMC

from numpyro_score.kernel.run_report import RunView, judge_run
from numpyro_score.run_verdict import (
    MIN_JUDGED,
    Finding,
    RunLength,
    Verdict,
)

__all__ = ["Finding", "Verdict", "mark_verdict", "verdict"]


def verdict(mcmc: Any) -> Verdict:
    """Return what is wrong with the draws of a run, as far as its chains can tell.

    The same verdict is given as a warning when a run ends with a finding. Its numbers
    come from streaming moments over at most 400 draws of each chain:

    - *runaway*: a latent and the gradient of the potential have a covariance below 0.1
      (1 for every density that falls to 0) in chains that have not mixed, or values
      overflow: the density is flat or grows without bound;
    - *unmixed*: split R-hat above 1.05, or above 1.01 where draws are too few;
    - *modes*: the same, while no mean force draws the chains together;
    - *slow*: effective sample size below 400 and below 5 % of the draws;
    - *curved*: gradient and whitened latents share less than half of their variance,
      beside another finding (no metric helps);
    - *length*: the adapted number of steps at its cap of 64, beside one of the above;
    - *energy*: E-BFMI below 0.3 (Betancourt 2016);
    - *stuck*: a chain accepted less than one proposal in 1000, or rejected more than 50
      and 5 % of its draws in a row, or less than a tenth of independent proposals
      (``ParticleMetropolis``, of which only *slow*, by rows of equal draws, and
      *off_data* are judged besides);
    - *divergent*: more than 1 % of proposals;
    - *off_data*: more than 1 % of the draws of a learned site lie where 0.1 % of its
      data do (:mod:`numpyro_score.score.level`);
    - *level*: a learned site is used at a noise level below the one at which its score
      is trusted (:attr:`~numpyro_score.score.ScoreModel.level_in_use`);
    - *rows*: draws of a learned site differ from rows of its data that are weighted by
      the likelihood (:mod:`numpyro_score.model.weighted_rows`): a mode is lost, or the
      score does not fit its data;
    - *step_size*: below 1e-3 in units of the metric;
    - *restarts*: fewer than ten, or one in 100 draws, in a chain of parallel tempering;
    - *missed*: a chain of parallel tempering lacks 20 draws or more at a place of
      higher likelihood than all of its draws, visited at higher temperatures only;
      of other kernels, without another finding: a proposal was refused where the log
      density is 3 or more above that of all draws;
    - *gap*: log evidences of a chain of parallel tempering, from the prior up and from
      the posterior down, differ by more than a nat.

    Of ``ScoreSDE`` other things are judged: *ess* (of the weights at any level),
    *start* (of those of the first), *ancestors*, *evidence* (an error of its log above
    0.3 nats) and *off_data*.

    No finding is no proof: modes that no chain has visited leave no trace.

    Args:
        mcmc: after ``run``: an ``MCMC`` with a kernel of this package, or ``ScoreSDE``.

    Returns:
        The verdict, with ``ok`` and ``findings``; print it.

    Raises:
        TypeError: for a kernel that keeps no moments of its run, and other objects.
        ValueError: before a run, after one of fewer than 100 draws per chain, or of
            ``ScoreSDE`` with ``guidance``.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro_score import ScoreLangevin
        >>> mcmc = MCMC(
        ...     ScoreLangevin(lambda: sample("x", dist.Normal())), num_warmup=100,
        ...     num_samples=200, num_chains=2, chain_method="vectorized",
        ...     progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0))
        >>> verdict(mcmc).ok
        True
    """
    if not hasattr(mcmc, "last_state"):
        return _own_verdict(mcmc)
    if hasattr(mcmc.last_state, "independent_chains"):
        return mcmc.last_state.independent_chains.judge()
    view, run = _last_view(mcmc), RunLength(mcmc.num_samples, mcmc.num_chains)
    potential = partial(mcmc.sampler.potential, mcmc._args, mcmc._kwargs)
    return judge_run(view, run, potential)


def mark_verdict(tree: Any, mcmc: MCMC) -> Any:
    """Add the verdict on a run to ArviZ's tree of it, as attributes.

    ``verdict`` holds the names of the findings, or "ok"; ``verdict_findings`` the whole
    text. They travel with the tree into files.

    Args:
        tree: DataTree of :func:`arviz.from_numpyro`, changed in place.
        mcmc: the run.

    Returns:
        The tree.

    Example:
        >>> import arviz, jax, numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro_score import ScoreLangevin
        >>> kernel = ScoreLangevin(lambda: sample("x", dist.Normal()))
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=200, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mark_verdict(arviz.from_numpyro(mcmc), mcmc).attrs["verdict"]
        'ok'
    """
    found = verdict(mcmc)
    marks = {"verdict": found.names, "verdict_findings": str(found)}
    for node in (tree, tree["posterior"]):
        node.attrs.update(marks)
    return tree


def _own_verdict(run: Any) -> Verdict:
    """Return the verdict of a sampler other than MCMC on itself.

    Raises:
        TypeError: for anything without one.
    """
    found = getattr(run, "verdict", None)
    if not isinstance(found, Verdict):
        raise TypeError(
            "`mcmc` must be an MCMC or a ScoreSDE that has run. "
            f"Got {type(run).__name__}."
        )
    return found


def _last_view(mcmc: MCMC) -> RunView:
    """Return what a verdict looks at in the last state of a run.

    Raises:
        TypeError: for a kernel that keeps no moments of its run.
        ValueError: before a run, after a short one, or one that began elsewhere.
    """
    state = mcmc.last_state
    if state is None:
        raise ValueError("`mcmc` must have run: the verdict is on its draws.")
    if not hasattr(state, "run_view"):
        raise TypeError(
            "`mcmc` must have a kernel that keeps a record of its run: ScoreLangevin, "
            "ParallelTempering, AnnealedLangevin or ParticleMetropolis. "
            f"Got {type(mcmc.sampler).__name__}."
        )
    if mcmc.num_samples < MIN_JUDGED:
        raise ValueError(
            f"`mcmc` must have drawn {MIN_JUDGED} or more: halves of shorter runs say "
            f"nothing about them. Got num_samples={mcmc.num_samples}."
        )
    view = state.run_view
    if view.moments is None:
        raise ValueError(
            "`mcmc` must have started its chains itself, in a run of "
            f"{MIN_JUDGED} draws or more: moments are kept from there on."
        )
    return view

"""Attributes of ArviZ's tree that state the law of a run's draws."""

from typing import Any

import numpy as np

from numpyro_score.kernel import AcceptRule

EXACTNESS = {
    AcceptRule.VALUE: "exact",
    AcceptRule.ENERGY: "exact for the learned law",
    AcceptRule.LINE_INTEGRAL: "exact for the learned law up to quadrature",
    AcceptRule.UNADJUSTED: "approximate: biased by the step size",
}


def mark_exactness(tree: Any) -> Any:
    """Return the tree with attributes ``accept_rule`` and ``exactness``.

    Kernels of this package record their accept rule in ``sample_stats``. The attributes
    state it in words, at the root and in the posterior group, and are saved with the
    tree. Of several rules in one run the least exact is stated.

    Args:
        tree: DataTree of :func:`arviz.from_numpyro`, changed in place.

    Returns:
        The tree.

    Raises:
        ValueError: for a tree without ``accept_rule`` in its ``sample_stats``.

    Example:
        >>> import arviz, jax, numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import ScoreLangevin
        >>> kernel = ScoreLangevin(lambda: sample("x", dist.Normal()), adjusted=False)
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mark_exactness(arviz.from_numpyro(mcmc)).attrs["exactness"]
        'approximate: biased by the step size'
    """
    children = getattr(tree, "children", {})
    stats = children.get("sample_stats") if hasattr(children, "get") else None
    if stats is None or "accept_rule" not in stats:
        raise ValueError(
            "`tree` must hold `accept_rule` in its sample_stats: make it by "
            "arviz.from_numpyro(mcmc) from a kernel of numpyro_score. "
            f"Got {type(tree).__name__} with the groups {sorted(children)}."
        )
    rule = AcceptRule(int(np.max(stats["accept_rule"].values)))  # the least exact
    marks = {"accept_rule": rule.name, "exactness": EXACTNESS[rule]}
    for node in (tree, tree["posterior"]):
        node.attrs.update(marks)
    return tree

"""The kernels of the package, two models, and quiet runs of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)

FAMILY: dict[str, Callable] = {  # what is common to them is in the default run once
    "MALA": partial(ScoreLangevin, num_steps=1, friction=None),
    "kinetic": partial(ScoreLangevin, num_steps=3, adjusted=False, friction=1.0),
}


def tempering(
    model: Any, *, init_strategy: Callable | None = None, **options: Any
) -> ParallelTempering:
    """Make few rungs, with the options of Langevin kernels for those of local moves."""
    local = partial(ScoreLangevin, **options)
    return ParallelTempering(
        model, num_rungs=3, local=local, init_strategy=init_strategy
    )


KERNELS: dict[str, Callable] = {
    "ScoreLangevin": ScoreLangevin,
    "AnnealedLangevin": partial(AnnealedLangevin, levels=2, steps_per_level=2),
    "ParallelTempering": tempering,
}


DATA = jnp.array([0.5, -1.0, 2.0])
SDE = VE(sigma_min=0.1)


# models, at the top level so that they can be pickled
def normal_score(x: Any, t: Any) -> Any:
    return -x / (1 - SDE.sigma_min**2 + SDE.sigma(t) ** 2)


LEARNED = ScoreModel.from_fn(normal_score, SDE, (2,))


def ordinary(y: Any) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("ratio", loc / scale)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(loc, scale), obs=y)


def learned(y: Any) -> None:
    x = numpyro.sample("x", ScoreDistribution(LEARNED))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("total", x.sum())
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x.sum(), scale), obs=y)


def first_of(kernels: dict[str, Callable]) -> list[Any]:
    """Return the names; the second is slow, and those after it are long too."""
    slow, long = pytest.mark.slow, pytest.mark.long
    first, second, *others = kernels
    rest = [pytest.param(name, marks=[slow, long]) for name in others]
    return [first, pytest.param(second, marks=slow), *rest]


def sampler(kernel: Any, **options: Any) -> MCMC:
    defaults = {"num_warmup": 10, "num_samples": 8, "progress_bar": False}
    return MCMC(kernel, **(defaults | options))


def draws_of(mcmc: MCMC) -> dict[str, Any]:
    return mcmc.get_samples(group_by_chain=True)


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got, expected)
    assert all(jax.tree.leaves(same)), same


def assert_close(got: Any, expected: Any) -> None:
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, expected
    )


# NumPyro gives away buffers that a batch of chains cannot reuse, for NUTS too
donates = pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")

"""Models that look at the values of their latent sites are told where they do."""

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
    ParticleMetropolis,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.infer import ScoreSDE

SDE = VE()
NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + SDE.sigma(t) ** 2), SDE, ())
KERNELS = (ScoreLangevin, AnnealedLangevin, ParallelTempering, ParticleMetropolis)


def branch(x):
    return x if x > 0 else -x


def loop(x):
    return sum(x for _ in range(int(x)))


def pick(x):
    row = jnp.stack([x, x])
    return row[row > 0].sum()


LOOKS = {
    "branch": branch,
    "loop": loop,
    "pick": pick,
    "number": lambda x: float(x),
    "numpy": lambda x: np.exp(x),
}


def model_of(look, law):
    def model(y):
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(look(x), 1.0), obs=y)

    return model


def start(kernel):
    MCMC(kernel, num_warmup=60, num_samples=1, progress_bar=False).run(
        jax.random.key(0), 1.0
    )


@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("look", LOOKS)
def test_the_line_of_the_model_is_named(kernel, look):
    fn = LOOKS[look]
    model = model_of(fn, ScoreDistribution(NORMAL))
    line = rf"`{fn.__name__}`, line \d+ of test_tracing_errors.py: "
    with pytest.raises(TypeError, match=f"JAX can trace.*{line}"):
        start(kernel(model))


@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_models_without_learned_sites(kernel):
    with pytest.raises(TypeError, match=r"`branch`, line .*: return x if x > 0"):
        start(kernel(model_of(branch, dist.Normal(0.0, 1.0))))


def test_guided_particles():
    run = ScoreSDE(
        model_of(branch, ScoreDistribution(NORMAL)),
        num_samples=10,
        num_particles=10,
        levels=5,
        progress_bar=False,
    )
    with pytest.raises(TypeError, match=r"`branch`, line .*: return x if x > 0"):
        run.run(jax.random.key(0), 1.0)

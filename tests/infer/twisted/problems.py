"""Models of which ScoreSDE's tests know the posterior, and a quiet run."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from numpyro_score import VE, ScoreDistribution
from numpyro_score.infer import ScoreSDE
from tests.targets import STANDARD_NORMAL, Gaussian

PROCESS = VE(0.01, 20.0)
NORMAL = STANDARD_NORMAL.score_model(PROCESS)
NUM_DRAWS = 1000


def conjugate(y):
    """Prior N(0, 1), y = 2, noise 1: posterior N(1, 1/2), evidence N(2; 0, 2)."""
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.deterministic("twice", 2 * x)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def scalar(model, *args, **options):
    """Run quietly with small defaults."""
    settings = {"num_samples": NUM_DRAWS, "num_particles": NUM_DRAWS, "levels": 50}
    inference = ScoreSDE(model, progress_bar=False, **{**settings, **options})
    inference.run(jax.random.key(0), *args)
    return inference


Y = jnp.array(2.0)
EVIDENCE = float(dist.Normal(0, 2**0.5).log_prob(2.0))
LONG = Gaussian((3.0, 0.0, -1.0), (40.0, 1.0, 1.0))  # noise of 20 does not hide it


def learned():
    return ScoreDistribution(NORMAL)


def counts(y):
    x = numpyro.sample("x", learned())
    numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)

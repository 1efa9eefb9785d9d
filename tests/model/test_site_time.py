"""The time of a learned site may be an argument of the model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, AnnealedLangevin, ScoreDistribution
from numpyro_score.infer import ScoreSDE
from numpyro_score.model.noise_levels import SiteTime, level_times
from tests.targets import STANDARD_NORMAL, z_scores

SDE = VE(0.01, 20.0)
SCORE = STANDARD_NORMAL.score_model(SDE)
TIME = SDE.time(0.5)  # the law of x is then Normal(0, 1.25)
Y = 2.0


def model(t, y):
    x = numpyro.sample("x", ScoreDistribution(SCORE, t=t))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def run(t, levels=50) -> ScoreSDE:
    inference = ScoreSDE(
        model, num_samples=1000, num_particles=1000, levels=levels, progress_bar=False
    )
    inference.run(jax.random.key(0), t, jnp.array(Y))
    return inference


@pytest.mark.parametrize("levels", [50, (10.0, 5.0, 2.0, 1.0, 0.7, 0.1)])
def test_reverse_sde_ends_at_a_time_that_is_an_argument(levels):
    inference = run(TIME, levels)
    x, mean = inference.get_samples()["x"], Y * 1.25 / 2.25
    assert (z_scores(x, mean) < 4).all()
    assert (z_scores((x - mean) ** 2, 1.25 / 2.25) < 4).all()
    evidence = dist.Normal(0, 2.25**0.5).log_prob(Y)
    assert abs(inference.log_evidence - evidence) < 0.05


def test_time_outside_of_the_process_is_refused():
    with pytest.raises(ValueError, match="`t` must lie between `t_min` and `t_max`"):
        run(jnp.array(2.0 * SDE.t_max))


def test_traced_time_of_annealed_levels_is_refused():
    def start(t):
        kernel = AnnealedLangevin(model)
        return kernel.init(jax.random.key(0), 100, model_args=(t, Y)).z

    message = re.escape(
        "`t` of learned site 'x' must be known before sampling: noise levels go down "
        "to it. Call the sampler outside of `jax.jit` and `jax.vmap`, or make `t` a "
        "constant there. Got "
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(start)(TIME)
    with pytest.warns(UserWarning, match="without weights"):
        assert jnp.isfinite(start(TIME)["x"])


def test_levels_go_down_to_the_lowest_time_of_all_sites():
    sde = VE(0.1, 10.0)
    sites = {"a": SiteTime(0.5, sde), "b": SiteTime(0.25, sde)}
    np.testing.assert_allclose(level_times(3, sites), [1.0, 0.75, 0.5, 0.25], rtol=1e-5)

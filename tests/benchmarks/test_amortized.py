"""The benchmark of amortized posteriors runs, and its tasks are those of sbibm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer import Predictive

from tests.benchmarks import amortized
from tests.benchmarks.sbibm_tasks import TASKS, Crescent, read_reference


@pytest.fixture(scope="module")
def files(root):
    return root / "tests" / "sbibm"


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_runs(capsys, files, monkeypatch):
    monkeypatch.setattr(amortized, "NUM_DRAWS", 200)
    arguments = "--tasks two_moons --simulations 100 --observations 1 --num-steps 20"
    arguments += " --correct"
    amortized.main(amortized.parse_args([str(files), *arguments.split()]))
    header, line, corrected = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["task", "simulations", "protocol", "C2ST"]
    assert line.split()[:3] == ["two_moons", "100", "RF"]
    assert 0.5 < float(line.split()[3]) <= 1
    assert corrected.split()[2] == "RF*"
    assert "k-hat" in corrected


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_sites_have_their_sizes(name):
    task = TASKS[name]
    sites = trace(seed(task.model, jax.random.key(0))).get_trace()
    assert sites["theta"]["value"].shape == (task.size,)
    assert sites["x"]["value"].shape == (task.data_size,)
    assert jnp.isfinite(sites["x"]["value"]).all()


@pytest.mark.slow
def test_reference_draws_explain_their_observation(files):
    """Two moons is all but deterministic: r (cos a, sin a) is all its noise."""
    reference = read_reference(files, "two_moons", 1)
    theta = jnp.asarray(reference.draws)
    x = Predictive(TASKS["two_moons"].model, {"theta": theta})(jax.random.key(1))["x"]
    assert np.linalg.norm(x - reference.observation, axis=1).max() < 0.3
    assert len(theta) == 200


@pytest.mark.slow
def test_density_of_the_crescent_integrates_to_one():
    grid = (jnp.arange(400) + 0.5) / 400 * 0.4 - 0.2
    points = jnp.stack(jnp.meshgrid(grid, grid), -1)
    density = jnp.exp(Crescent(jnp.zeros(2)).log_prob(points))
    np.testing.assert_allclose(density.sum() * 1e-6, 1.0, atol=2e-3)

"""Reference posteriors of posteriordb, with nothing learned.

The files in ``tests/posteriordb`` hold the data and the reference draws; the models
are those of the posteriors' names. Quantities are compared after warm-up with the
reference: the mean by its standard error, the sd by its ratio.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC

from numpyro_score import ScoreLangevin

FOLDER = Path(__file__).resolve().parents[1] / "posteriordb"


def flat(support: Any, size: tuple[int, ...] = ()) -> dist.Distribution:
    return dist.ImproperUniform(support, (), size)


def eight_schools(J: int, y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    standard = numpyro.sample("standard", dist.Normal(0, 1).expand([J]))
    theta = numpyro.deterministic("theta", mu + tau * standard)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidiq(kid_score: Any, mom_hs: Any, mom_iq: Any, **_: Any) -> None:
    x = jnp.stack([jnp.ones_like(mom_iq), mom_hs, mom_iq, mom_hs * mom_iq], -1)
    regress(x, kid_score, dist.HalfCauchy(2.5))


def regress(x: Any, y: Any, scale_prior: dist.Distribution) -> None:
    beta = numpyro.sample("beta", flat(constraints.real, (x.shape[-1],)).to_event(0))
    sigma = numpyro.sample("sigma", scale_prior)
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def earnings(earn: Any, height: Any, **_: Any) -> None:
    x = jnp.stack([jnp.ones_like(height), height], -1)
    regress(x, jnp.log(earn), flat(constraints.positive))


def nes(partyid7: Any, age_discrete: Any, **x: Any) -> None:
    ages = [age_discrete == group for group in (2, 3, 4)]
    names = ("real_ideo", "race_adj", "educ1", "gender", "income")
    ideology, race, *others = (x[name] for name in names)
    columns = [jnp.ones_like(race), ideology, race, *ages, *others]
    regress(jnp.stack(columns, -1), partyid7, flat(constraints.positive))


def blr(X: Any, y: Any, **_: Any) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([X.shape[-1]]))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def autoregression(K: int, T: int, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([K]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    past = jnp.stack([y[K - k - 1 : T - k - 1] for k in range(K)], -1)
    numpyro.sample("y", dist.Normal(alpha + past @ beta, sigma), obs=y[K:])


def mixture(N: int, y: Any) -> None:
    ordered = dist.transforms.OrderedTransform()
    unordered = numpyro.sample("unordered", flat(constraints.real, (2,)))
    mu = numpyro.deterministic("mu", ordered(unordered))
    jacobian = ordered.log_abs_det_jacobian(unordered, mu)
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum() + jacobian)
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    weights = dist.Categorical(jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


DENSE = {"dense_mass": True}
# raw regressors with an intercept: condition numbers up to a million, until the dense
# metric is learned
MALA = {"num_steps": 1, "friction": None}
POSTERIORS = [
    ("eight_schools-eight_schools_noncentered", eight_schools, {}),
    ("eight_schools-eight_schools_noncentered", eight_schools, MALA),
    ("kidiq-kidscore_interaction", kidiq, DENSE),
    ("sblrc-blr", blr, DENSE),
    ("arK-arK", autoregression, DENSE),
    ("earnings-logearn_height", earnings, DENSE),
    ("nes1980-nes", nes, DENSE),
    ("low_dim_gauss_mix-low_dim_gauss_mix", mixture, {}),
]


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return data and reference draws, chains by draws by quantity."""
    text = (FOLDER / f"{name}.data.json").read_text(encoding="utf-8")
    data = {k: as_data(v) for k, v in json.loads(text).items()}
    with np.load(FOLDER / f"{name}.npz") as file:
        draws = np.moveaxis(file["draws"].astype(float), -1, 0)
        return data, dict(zip(file["names"].tolist(), draws, strict=True))


def as_data(value: Any) -> Any:
    return jnp.asarray(value, float) if isinstance(value, list) else value


def quantities(samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name the entries of vectors as Stan does, counting from one."""
    named = {}
    for name, values in samples.items():
        values = np.asarray(values, float)
        if values.ndim == 2:
            named[name] = values
        else:
            entries = np.moveaxis(values, -1, 0)
            named |= {f"{name}[{j}]": entry for j, entry in enumerate(entries, 1)}
    return named


def compare(draws: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return z of the mean, log ratio of the sds, R-hat and bulk ESS."""
    error = np.hypot(*(mean_error(x) for x in (draws, reference)))
    return {
        "z": float((draws.mean() - reference.mean()) / error),
        "log_sd_ratio": float(np.log(draws.std() / reference.std())),
        "r_hat": float(arviz.rhat(draws)),
        "ess": float(arviz.ess(draws)),
    }


def mean_error(draws: np.ndarray) -> float:
    return float(draws.std() / np.sqrt(arviz.ess(draws, method="mean")))


def passes(comparison: dict[str, float]) -> bool:
    return (
        abs(comparison["z"]) < 5
        and abs(comparison["log_sd_ratio"]) < 0.10
        and comparison["r_hat"] < 1.01
        and comparison["ess"] >= 400
    )


def run(model: Callable, data: dict[str, Any], options: dict[str, Any]) -> dict:
    steps = options.get("num_steps", 8)
    mcmc = MCMC(
        ScoreLangevin(model, **options),
        num_warmup=2000,
        num_samples=6000 // steps,
        num_chains=8,
        thinning=max(1, 6 // steps),
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), **data)
    return quantities(mcmc.get_samples(group_by_chain=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model", "options"), POSTERIORS)
def test_posterior_agrees_with_reference(name, model, options):
    data, reference = load(name)
    draws = run(model, data, options)
    comparisons = {k: compare(draws[k], reference[k]) for k in reference}
    failed = {k: v for k, v in comparisons.items() if not passes(v)}
    assert not failed, failed


@pytest.mark.slow
def test_dense_metric_is_shared_by_chains_that_start_far_apart():
    """The covariance about a common mean would follow the distances of the starts."""
    data, reference = load("kidiq-kidscore_interaction")
    draws = run(kidiq, data, {"dense_mass": True, "share_adaptation": True})
    comparisons = {k: compare(draws[k], reference[k]) for k in reference}
    assert all(map(passes, comparisons.values())), comparisons


def test_comparison_catches_a_shift_and_a_scale():
    _, reference = load("kidiq-kidscore_interaction")
    sigma = reference["sigma"]
    halves = sigma[:5], sigma[5:]
    assert passes(compare(*halves))
    assert not passes(compare(halves[0] + 0.3 * sigma.std(), halves[1]))
    wider = sigma.mean() + 1.15 * (halves[0] - sigma.mean())
    assert not passes(compare(wider, halves[1]))

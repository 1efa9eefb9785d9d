"""A learned law that depends on a latent site is refused; all others are let pass."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions.transforms import AffineTransform
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.infer import ScoreSDE
from numpyro_score.model.potential import model_potential

SDE = VE(sigma_min=0.1)


def normal(loc=0.0) -> ScoreModel:
    return ScoreModel.from_fn(
        lambda x, t: -(x - loc) / (1 + SDE.sigma(t) ** 2), SDE, ()
    )


# models whose law depends on a latent


def centered_at_a_latent():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", ScoreDistribution(normal(mu)))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)


def centered_at_two_latents():
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    unused = numpyro.sample("unused", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.HalfNormal(1.0))
    x = numpyro.sample("x", ScoreDistribution(normal(a * b)))
    numpyro.sample("y", dist.Normal(x + unused, 1.0), obs=2.0)


def centered_at_latents_of_a_plate():
    with numpyro.plate("groups", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 2):
        x = numpyro.sample("x", ScoreDistribution(normal(mu.sum())))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)


def centered_at_a_learned_site():
    first = numpyro.sample("first", ScoreDistribution(normal()))
    numpyro.sample("second", ScoreDistribution(normal(first)))


def centered_where_a_latent_is_positive():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    law = ScoreDistribution(normal(jnp.where(mu > 0, 1.0, -1.0)))
    numpyro.sample("x", law)


def seen_at_a_latent_time():
    u = numpyro.sample("u", dist.Uniform(0.0, 1.0))
    t = SDE.t_min + u * (SDE.t_max - SDE.t_min)
    numpyro.sample("x", ScoreDistribution(normal(), t=t))


def masked_by_a_latent():
    u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    numpyro.sample("x", ScoreDistribution(normal()).mask(u > 0))


def under_a_handler_of_a_latent_mask():
    u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    with handlers.mask(mask=u > 0):
        numpyro.sample("x", ScoreDistribution(normal()))


def scaled_by_a_latent():
    u = numpyro.sample("u", dist.HalfNormal(1.0))
    with handlers.scale(scale=u):
        numpyro.sample("x", ScoreDistribution(normal()))


def masked_by_a_discrete_latent():
    k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    u = numpyro.sample("u", dist.Normal(k, 1.0))
    numpyro.sample("x", ScoreDistribution(normal()).mask(k == 1))
    numpyro.sample("y", dist.Normal(u, 1.0), obs=1.0)


REFUSED = {
    centered_at_a_latent: ("x", "score", "'mu'"),
    centered_at_two_latents: ("x", "score", "'a', 'b'"),
    centered_at_latents_of_a_plate: ("x", "score", "'mu'"),
    centered_at_a_learned_site: ("second", "score", "'first'"),
    centered_where_a_latent_is_positive: ("x", "score", "'mu'"),
    seen_at_a_latent_time: ("x", "score and time `t`", "'u'"),
    masked_by_a_latent: ("x", "scale or mask", "'u'"),
    under_a_handler_of_a_latent_mask: ("x", "scale or mask", "'u'"),
    scaled_by_a_latent: ("x", "scale or mask", "'u'"),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_law_that_depends_on_a_latent_is_refused(model):
    name, parts, latents = REFUSED[model]
    with pytest.raises(ValueError, match="must not depend on latent") as caught:
        model_potential(model, (), {})
    assert str(caught.value) == (
        f"Learned site '{name}' must not depend on latent sites, but its {parts} "
        f"depends on {latents}: the normalizer then depends on them too, and a score "
        "does not know it, so that their posterior would be wrong. Learn a law that "
        "does not depend on latents; for a latent location and scale use "
        "`TransformedDistribution(ScoreDistribution(score), AffineTransform(loc, "
        "scale))`."
    )


@pytest.mark.parametrize(
    "model",
    [centered_at_a_latent, seen_at_a_latent_time],
    ids=lambda model: model.__name__,
)
def test_every_sampler_refuses_before_it_samples(model):
    samplers = [
        MCMC(kernel(model), num_warmup=10, num_samples=10, progress_bar=False)
        for kernel in (ScoreLangevin, AnnealedLangevin)
    ]
    samplers.append(
        ScoreSDE(model, num_samples=10, num_particles=10, progress_bar=False)
    )
    for sampler in samplers:
        with pytest.raises(ValueError, match="Learned site 'x' must not depend on"):
            sampler.run(jax.random.key(0))


def test_mask_by_a_summed_out_site_is_refused():
    """The weight is then a posterior probability, which depends on the latents."""
    with pytest.raises(ValueError, match="its scale or mask depends on 'u'"):
        model_potential(masked_by_a_discrete_latent, (), {})


# models whose law is fixed


def with_latent_location_and_scale():
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    law = dist.TransformedDistribution(
        ScoreDistribution(normal()), AffineTransform(loc, scale)
    )
    x = numpyro.sample("x", law)
    numpyro.sample("y", dist.Normal(x, scale), obs=2.0)


def printed(value):
    jax.debug.callback(lambda value: None, value)
    return 2.0 * value


def fixed_by_arguments(loc, t, mask, weight):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3), handlers.scale(scale=weight):
        x = numpyro.sample("x", ScoreDistribution(normal(loc), t=t).mask(mask))
        jax.debug.callback(lambda mu: None, mu)
        mu = jax.jit(printed)(mu)
        numpyro.sample("y", dist.Normal(x + mu, 1.0), obs=2.0)


def observed_law_of_a_latent():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("x", ScoreDistribution(normal()))
    numpyro.sample("seen", dist.Normal(mu, 1.0), obs=1.0)


def chosen_by_a_discrete_latent():
    """A discrete site is summed out downstream of the learned one."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", ScoreDistribution(normal()))
        k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(x + mu * k, 1.0), obs=2.0)


def in_a_subsampled_plate():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 10, subsample_size=4):
        x = numpyro.sample("x", ScoreDistribution(normal()))
        numpyro.sample("y", dist.Normal(x + mu, 1.0), obs=2.0)


@pytest.mark.parametrize(
    "model",
    [
        with_latent_location_and_scale,
        observed_law_of_a_latent,
        chosen_by_a_discrete_latent,
        handlers.substitute(in_a_subsampled_plate, data={"rows": jnp.arange(4)}),
    ],
    ids=lambda model: getattr(model, "__name__", "in_a_subsampled_plate"),
)
def test_fixed_law_passes(model):
    potential = model_potential(model, (), {})
    assert list(potential.learned) == ["x"]
    evaluation = potential.evaluate(potential.prototype)
    assert jnp.isfinite(evaluation.value)
    assert (evaluation.learned["x"].weight > 0).all()


def test_law_fixed_by_arguments_passes():
    mask = jnp.array([True, False, True])
    args = (jnp.array(1.0), SDE.time(0.5), mask, jnp.array(2.0))
    for run in (lambda f: f, jax.jit):
        weight = run(lambda *args: _weight(fixed_by_arguments, args))(*args)
        assert weight.tolist() == [2.0, 0.0, 2.0]


def _weight(model, args):
    potential = model_potential(model, args, {})
    return potential.evaluate(potential.prototype).learned["x"].weight

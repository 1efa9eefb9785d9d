"""Models that draw by NumPy or Python, which a compiled chain would freeze."""

import functools
import random
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.random import normal
from numpyro.handlers import scale

from numpyro_score.model.potential import model_potential
from numpyro_score.model.trace_checks import check_observations

RNG = np.random.default_rng(0)
OTHER = random.Random(0)


def observe(shift):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=shift)


def by_numpy():
    observe(np.random.normal())  # noqa: NPY002 (what is refused)


def by_imported_function():
    observe(normal())  # noqa: NPY002 (what is refused)


def by_python():
    observe(random.random())


def by_generator():
    observe(RNG.normal())


def by_python_generator():
    observe(OTHER.gauss())


def choose():
    return float(RNG.choice(5))


def by_another_function():
    observe(choose())


def by_argument(rng):
    observe(rng.normal())


HELD = {1: None, "draws": [0, (RNG,)]}


def by_container():
    observe(HELD["draws"][1][0].normal())


def by_object_in_argument(settings):
    observe(settings["source"].rng.normal())


def by_default(rng=RNG, *, other=OTHER):
    observe(rng.normal())


def by_keyword_default(*, other=OTHER):
    observe(other.gauss())


class Model:
    def __init__(self):
        self.rng = np.random.RandomState(0)

    def run(self):
        observe(self.rng.normal())

    def __call__(self):
        self.run()


def by_closure():
    rng = np.random.default_rng(0)

    def model():
        observe(rng.normal())

    return model


MODELS = {
    "numpy": (by_numpy, ()),
    "imported": (by_imported_function, ()),
    "python": (by_python, ()),
    "generator": (by_generator, ()),
    "python generator": (by_python_generator, ()),
    "another function": (by_another_function, ()),
    "argument": (by_argument, (np.random.default_rng(0),)),
    "partial": (functools.partial(by_argument, np.random.default_rng(0)), ()),
    "method": (Model().run, ()),
    "object": (Model(), ()),
    "closure": (by_closure(), ()),
    "container": (by_container, ()),
    "object in an argument": (
        by_object_in_argument,
        ({"source": SimpleNamespace(rng=np.random.default_rng(0)), 3: 1},),
    ),
    "default": (by_default, ()),
    "keyword default": (by_keyword_default, ()),
    "handler": (scale(by_generator, 2.0), ()),
}


@pytest.mark.parametrize("check", [model_potential, check_observations])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_drawn_outside_of_jax_are_refused(name, check):
    model, args = MODELS[name]
    with pytest.raises(ValueError, match=r"by numpy\.random or random"):
        check(model, args, {})


def before_the_model():
    rows = RNG.normal(size=3)

    def model(scale):
        observe(jnp.array(rows.mean() * scale.factor))

    return model


def with_numpy_constants():
    observe(np.pi)


def test_numbers_drawn_before_the_model_pass():
    np.random.seed(0)  # noqa: NPY002 (a state that no run may move)
    RNG.normal()
    model_potential(before_the_model(), (SimpleNamespace(factor=2.0),), {})
    model_potential(with_numpy_constants, (), {})
    model_potential(observe, (1.0,), {})

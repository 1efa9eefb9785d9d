"""One name for one argument, over everything that is public; old names still work."""

import inspect

import jax
import pytest

from numpyro_score import VE, ScoreModel
from numpyro_score.infer.joint.learn_table import LearnedTable
from numpyro_score.renamed_arguments import renamed
from tests.test_public_names import load, public_names

FORBIDDEN = {
    "key": "rng_key",
    "num_draws": "num_samples",
    "n_samples": "num_samples",
    "contexts": "context",
    "held_out": "validation",
    "n_steps": "num_steps",
    "num_iterations": "num_steps",
    "seed": "rng_key",
}
# methods that users override, which are called by position; NumPyro's distributions
OVERRIDDEN = ("step", "sample", "loss")
SCIKIT_LEARN = ("ForestProtocol", "MLPProtocol")  # `seed` of a classifier, an integer
# `get_samples` of arviz-base's adapters
OTHERS = ("numpyro_score.infer.ScoreSDEAdapter.get_samples",)
FROZEN = ("HutchinsonDivergence",)  # `seed` is a field, so that the object is hashable
KEY = jax.random.key(0)


def signatures():
    """Return the public functions, constructors and methods by name."""
    found = {}
    for package, name in public_names():
        thing = load(package, name)
        if inspect.ismodule(thing):
            continue
        found[f"{package}.{name}"] = thing
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if inspect.isfunction(value) and not method.startswith("_"):
                    found[f"{package}.{name}.{method}"] = value
    return found


def forbidden(name, thing):
    try:
        names = set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):  # of built-in types
        return set()
    last = name.rsplit(".", 1)[1]
    if last in OVERRIDDEN and inspect.isfunction(thing):
        names.discard("key")
    if last in (*SCIKIT_LEARN, *FROZEN) or name in OTHERS:
        names.discard("seed")
    return names & set(FORBIDDEN)


def test_one_name_for_one_argument():
    found = {name: forbidden(name, thing) for name, thing in signatures().items()}
    assert len(found) > 200
    assert {name: names for name, names in found.items() if names} == {}
    methods = vars(LearnedTable).items()
    assert not any(
        forbidden(f".{name}", method)
        for name, method in methods
        if inspect.isfunction(method)
    )


def test_keys_come_first():
    odd = [
        name
        for name, thing in signatures().items()
        if inspect.isfunction(thing)
        and "rng_key" in (names := list(inspect.signature(thing).parameters))
        and names.index("rng_key") > (names[0] == "self")
    ]
    # the first moves a run on, the second needs a key for some results alone
    assert set(odd) == {
        "numpyro_score.kernel.run_in_blocks",
        "numpyro_score.infer.to_datatree",
        "numpyro_score.to_datatree",
    }


@renamed(key="rng_key", num_draws="num_samples")
def draw(rng_key, num_samples=1):
    return rng_key, num_samples


def test_old_names_work_and_warn():
    with pytest.warns(FutureWarning, match="`num_draws` of draw is now called `num_s"):
        assert draw(3, num_draws=4) == (3, 4)
    with pytest.warns(FutureWarning) as caught:
        assert draw(num_draws=4, key=3) == (3, 4)
    assert len(caught) == 2
    assert draw(3, num_samples=4) == (3, 4)


def test_both_names_are_refused():
    with pytest.raises(TypeError, match="`key` of draw is the old name of `rng_key`"):
        draw(key=3, rng_key=4)


def test_old_names_of_public_functions_give_the_same_draws():
    score = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (1,))
    with pytest.warns(FutureWarning, match="`key` of ScoreModel.sample is now"):
        old = score.sample(key=KEY, shape=(2,))
    assert (old == score.sample(KEY, (2,))).all()

"""Saved scores: what comes back, and everything that can happen to files."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, VP, ScoreMatching, ScoreModel, UNet, io
from numpyro_score.consistency.model import init_model
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.io.config import from_config, to_config
from numpyro_score.io.folder import LIBRARIES
from numpyro_score.score.preconditioning import EDM
from numpyro_score.sde import DiscreteVP
from tests.targets import unchecked

CONTEXT = jnp.linspace(1.0, 2.0, 16)[:, None]


def untrained(data, context=None, **kwargs):
    trainer = ScoreMatching(**kwargs)
    state = trainer.init(jax.random.key(0), data, context=context)
    noise = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(
        lambda p: p + jax.random.normal(next(noise), p.shape), state.ema_params
    )
    return trainer.get_score(state._replace(ema_params=params))


@pytest.fixture(scope="module")
def score():
    data = jax.random.uniform(jax.random.key(2), (16, 3), minval=0.1)
    return untrained(
        data,
        CONTEXT,
        net=MLP(3, width=8, depth=1, context_size=1),
        sde=VP(sigma_min=0.02),
        support=constraints.interval(0.0, 5.0),
        parametrization=EDM(),
    )


@pytest.fixture
def folder(score, tmp_path):
    io.save(score, tmp_path / "score")
    return tmp_path / "score"


def test_everything_comes_back_bit_for_bit(score, folder):
    loaded = io.load(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(score)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(score)))
    x, context = jnp.ones((2, 3)), CONTEXT[0]
    assert np.array_equal(loaded.score(x, 0.5, context), score.score(x, 0.5, context))


@pytest.mark.parametrize("make", [DiscreteVP.linear, DiscreteVP.cosine])
def test_tables_of_betas_come_back(make, tmp_path):
    score = untrained(jnp.eye(3), net=MLP(3, width=4, depth=1), sde=make(20))
    io.save(score, tmp_path / "score")
    loaded = io.load(tmp_path / "score")
    assert loaded.sde == score.sde
    assert jax.tree.structure(loaded) == jax.tree.structure(score)
    for t in (None, 0.5):
        assert np.array_equal(loaded.score(jnp.ones(3), t), score.score(jnp.ones(3), t))


def test_folder_holds_three_plain_files(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS",
        "header.json",
        "weights.safetensors",
    ]
    header = json.loads((folder / "header.json").read_text())
    assert header["net"]["class"] == "MLP"
    assert header["sde"]["fields"]["sigma_min"] == 0.02
    assert set(header["versions"]) == set(LIBRARIES)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_images_come_back(tmp_path):
    data = jax.random.normal(jax.random.key(0), (4, 3, 3))
    image = untrained(data, net=UNet((3, 3), channels=(2, 4), embedding_width=4))
    io.save(image, tmp_path / "image")
    loaded = io.load(tmp_path / "image")
    assert loaded.denoiser.config == UNet((3, 3), channels=(2, 4), embedding_width=4)
    assert jax.tree.structure(loaded) == jax.tree.structure(image)


FILES = ["SHA256SUMS", "header.json", "weights.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 1 / 3, 1 - 1e-9])
def test_changed_byte_is_caught(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a hash does not match, so a file"):
        io.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_caught(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"altered or cut off"):
        io.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}"):
        io.load(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere, which does not exist"):
        io.load(tmp_path / "nowhere")


def rewrite(folder, **changes):
    """Change the header and make the hashes right again."""
    header = json.loads((folder / "header.json").read_text()) | changes
    (folder / "header.json").write_text(json.dumps(header))
    names = ["weights.safetensors", "header.json"]
    digests = [hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names]
    lines = [f"{digest}  {n}\n" for digest, n in zip(digests, names, strict=True)]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_another_format_is_refused(folder):
    rewrite(folder, format=99)
    with pytest.raises(ValueError, match=r"score of format 1.*Got format 99"):
        io.load(folder)


def test_unknown_class_is_refused(folder):
    rewrite(folder, sde={"class": "Popen", "fields": {}})
    with pytest.raises(ValueError, match=r"names a class .* Got Popen"):
        io.load(folder)


def test_unknown_constraint_is_refused(folder):
    rewrite(folder, support={"support": {"constraint": "np", "parts": {}}})
    with pytest.raises(ValueError, match=r"names a constraint .* Got np"):
        io.load(folder)


def test_weights_of_another_net_are_refused(folder):
    with pytest.raises(ValueError, match=r"`net` must have the weights that were sav"):
        io.load(folder, net=MLP(3, width=4, depth=1, context_size=1))


def test_nothing_is_overwritten(score, folder):
    with pytest.raises(FileExistsError, match=r"`path` must not exist"):
        io.save(score, folder)


def test_nothing_is_written_through_a_link_to_nowhere(score, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"`path` must not exist"):
        io.save(score, tmp_path / "link")


def test_paths_are_paths(score, folder):
    calls = [
        lambda: io.save(folder, score),  # the other way round
        lambda: io.save(score, None),
        lambda: io.load(score),
        lambda: io.load_consistency(3),
        lambda: io.load_prior(b"folder"),
    ]
    with unchecked():
        for call in calls:
            with pytest.raises(TypeError, match=r"`path` must be a folder's name"):
                call()


def test_leftovers_of_an_interrupted_save_do_no_harm(score, tmp_path):
    partial = tmp_path / "score.partial"
    partial.mkdir()
    (partial / "junk").write_text("half a file")
    io.save(score, tmp_path / "score")
    assert io.load(tmp_path / "score").event_shape == (3,)
    assert not partial.exists()


def test_functions_are_refused(tmp_path):
    score = ScoreModel.from_fn(lambda x, t: -x, VE(), ())
    with pytest.raises(TypeError, match=r"code is never loaded"):
        io.save(score, tmp_path / "score")


class Own(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x, noise, context):
        return self.linear(x)


def test_own_net_is_given_again(tmp_path):
    score = untrained(jnp.eye(2), net=Own)
    io.save(score, tmp_path / "score")
    with pytest.raises(ValueError, match=r"`net` must be given: .* It was Own"):
        io.load(tmp_path / "score")
    loaded = io.load(tmp_path / "score", net=Own)
    x = jnp.ones(2)
    assert np.array_equal(loaded.score(x), score.score(x))


def test_states_that_are_not_weights_are_refused(tmp_path):
    score = untrained(jnp.eye(2), net=Own)
    counts = jax.tree.map(lambda leaf: leaf.astype(int), score.denoiser.params)
    denoiser = dataclasses.replace(score.denoiser, params=counts)
    score = dataclasses.replace(score, denoiser=denoiser)
    with pytest.raises(TypeError, match=r"states are floating-point numbers"):
        io.save(score, tmp_path / "score")


def test_process_of_another_class_is_refused():
    class MyVE(VE):
        pass

    with pytest.raises(TypeError, match=r"Only configurations of the package"):
        to_config(MyVE())


@pytest.mark.parametrize(
    ("constraint", "shape"),
    [
        (constraints.positive, (2,)),
        (constraints.interval(-1.0, 2.0), ()),
        (constraints.greater_than(jnp.array([0.0, 1.0])), (2,)),
        (constraints.simplex, (3,)),
    ],
)
def test_supports_come_back(constraint, shape):
    support = Support.of(constraint, shape)
    described = json.loads(json.dumps(to_config(support)))
    back = from_config(described)
    x = support.constrain(jnp.full(support.unconstrained_shape(shape), 0.3))
    np.testing.assert_allclose(back.unconstrain(x), support.unconstrain(x))


def test_consistency_models_come_back(tmp_path):
    unit, context = Affine.identity((2,)), Affine.identity((1,))
    net = MLP(2, width=4, depth=1, context_size=1)
    model = init_model(
        jax.random.key(0), net, VE(0.01, 30.0), unit, (2,), context, jnp.ones((1, 2))
    )
    io.save(model, tmp_path / "student")
    loaded = io.load_consistency(tmp_path / "student")
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(model)))
    with pytest.raises(ValueError, match=r"must hold a score.*holds a consistency"):
        io.load(tmp_path / "student")


def test_scores_are_no_consistency_models(folder):
    with pytest.raises(ValueError, match=r"must hold a consistency model.*holds a sc"):
        io.load_consistency(folder)


def test_other_objects_are_refused_by_name(tmp_path):
    class Posterior:
        def save(self, path): ...

    with unchecked(), pytest.raises(TypeError, match=r"must be a ScoreModel.*Got int"):
        io.save(3, tmp_path / "a")
    own = "Got Posterior[.] It has a method of its own"
    with unchecked(), pytest.raises(TypeError, match=own):
        io.save(Posterior(), tmp_path / "a")

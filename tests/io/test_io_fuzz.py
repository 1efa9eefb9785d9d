"""Every kind of damage to every file of saved scores and posteriors.

Loading returns what was saved, or raises ``ValueError`` or ``FileNotFoundError`` that
names the file; a crafted header with right hashes is refused before it is built.
"""

import json
import shutil
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import safetensors.numpy
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, ScoreMatching, io
from numpyro_score.consistency.model import init_model
from numpyro_score.infer import NPSE, AmortizedPosterior, OneStepPosterior
from numpyro_score.io.folder import SUMS, sums
from numpyro_score.nn import Energy

NET = MLP(1, width=4, depth=1, context_size=1)


def model():
    x = numpyro.sample("x", dist.Uniform(-1.0, 2.0))
    numpyro.sample("y", dist.Normal(x, 0.5))


def make_score(net=NET, size=1, support=None):
    data = jax.random.uniform(jax.random.key(0), (16, size), minval=0.1)
    trainer = ScoreMatching(net, support=support)
    state = trainer.init(jax.random.key(1), data, context=data[:, 0])
    return trainer.get_score(state)


SIMULATOR = NPSE(model, "y").simulator()
LOADS = {
    "score": io.load,
    "posterior": lambda path: NPSE(model, "y").load(path).score,
    "one_step": lambda path: OneStepPosterior.load(path, SIMULATOR).consistency_model,
}


def numbers(learned):
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(learned)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    io.save(make_score(support=constraints.interval(0.0, 5.0)), root / "score")
    score = make_score()
    AmortizedPosterior(score, SIMULATOR).save(root / "posterior")
    affine = score.denoiser.standardize_context
    student = init_model(jax.random.key(0), NET, VE(), score.standardize, (1,), affine)
    OneStepPosterior(student, SIMULATOR).save(root / "one_step")
    return root


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(bytes(data))


def swap(path):
    other = next(p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path)
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = {
    **{f"flip at {p:.2f}": partial(flip, place=p) for p in np.linspace(0, 0.999, 8)},
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "swapped": swap,
    "foreign": lambda path: path.write_bytes(b'{"a": [1, 2]}'),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 64),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", LOADS)
def test_damaged_files_are_refused(saved, tmp_path, kind, damage):
    whole = saved / kind
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    assert len(files) == (3 if kind == "score" else 5)
    for number, name in enumerate(files):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        DAMAGES[damage](path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
            LOADS[kind](path)


@pytest.mark.parametrize("kind", LOADS)
def test_whole_files_come_back(saved, kind):
    learned = LOADS[kind](saved / kind)
    again = LOADS[kind](saved / kind)
    assert numbers(learned) == numbers(again)
    assert learned.event_shape == (1,)


def test_scores_of_two_posteriors_are_not_swapped(saved, tmp_path):
    shutil.copytree(saved / "posterior", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "score")
    io.save(
        make_score(MLP(2, width=4, depth=1, context_size=1), 2, None), tmp_path / "s"
    )
    (tmp_path / "s").rename(tmp_path / "old" / "score")
    with pytest.raises(ValueError, match=r"a hash does not match.*score/SHA256SUMS"):
        LOADS["posterior"](tmp_path / "old")
    # as version 0.1.0 wrote it, without hashes
    layout = json.loads((tmp_path / "old" / "layout.json").read_text())
    del layout["format"]
    (tmp_path / "old" / "layout.json").write_text(json.dumps(layout))
    (tmp_path / "old" / SUMS).unlink()
    with pytest.raises(ValueError, match=r"score must hold what was learned with"):
        LOADS["posterior"](tmp_path / "old")


def craft(folder, change=None, arrays=None):
    """Change the header and the arrays and make the hashes right again."""
    header = json.loads((folder / "header.json").read_text())
    for entry, value in (change or {}).items():
        *places, last = entry.split(".")
        part = header
        for place in places:
            part = part[place]
        if value is DELETED:
            del part[last]
        else:
            part[last] = value
    (folder / "header.json").write_text(json.dumps(header))
    if arrays is not None:
        weights = folder / "weights.safetensors"
        held = safetensors.numpy.load(weights.read_bytes())
        safetensors.numpy.save_file(held | arrays, weights)
    names = ("weights.safetensors", "header.json")
    (folder / SUMS).write_text(sums(folder, names))


@pytest.mark.parametrize("version", [1, 3, "2", None, [2]])
def test_layouts_of_another_format_are_refused(saved, tmp_path, version):
    path = tmp_path / "posterior"
    shutil.copytree(saved / "posterior", path)
    layout = json.loads((path / "layout.json").read_text())
    (path / "layout.json").write_text(json.dumps(layout | {"format": version}))
    (path / SUMS).write_text(sums(path, ("layout.json", f"score/{SUMS}")))
    with pytest.raises(ValueError, match=r"layout.json must have the format 2"):
        LOADS["posterior"](path)


DELETED = object()
VE_SDE = {"class": "VE", "fields": {"sigma_min": 0.01, "sigma_max": 20.0}}
MLP_NET = {"class": "MLP", "fields": {"size": 1}}
INTERVAL = "support.support.parts.base_constraint"
DEEP_NET = MLP_NET
DEEP_SUPPORT = {"constraint": "_Real", "parts": {}, "options": {}}
for _ in range(50):
    DEEP_NET = {"class": "Energy", "fields": {"net": DEEP_NET}}
    DEEP_SUPPORT = {
        "constraint": "_IndependentConstraint",
        "parts": {"base_constraint": DEEP_SUPPORT},
        "options": {"reinterpreted_batch_ndims": 1},
    }
CRAFTED = [
    ("event_shape", [10**12], "event_shape"),
    ("event_shape", [-1], "event_shape"),
    ("event_shape", [2], "event_shape"),
    ("event_shape", "abc", "event_shape"),
    ("event_shape", None, "event_shape"),
    ("event_shape", DELETED, "header"),
    ("extra", 1, "header"),
    ("kind", 3, "path"),
    ("format", "1", "path"),
    ("velocity_only", 0, "velocity_only"),
    ("velocity_only", DELETED, "header"),
    ("sde", MLP_NET, "sde.class"),
    ("sde", None, "sde"),
    ("sde", {"class": "ReverseSDE", "fields": {}}, "sde.class"),
    ("sde.class", ["VE"], "sde.class"),
    ("sde.fields", [], "sde.fields"),
    ("sde.fields.sigma_max", float("inf"), "sde.sigma_max"),
    ("sde.fields.sigma_max", float("nan"), "sde.sigma_max"),
    ("sde.fields.sigma_max", "20", "sde.sigma_max"),
    ("sde.fields.sigma_max", True, "sde.sigma_max"),
    ("sde.fields.sigma_max", 10**400, "sde.sigma_max"),
    ("sde.fields.sigma_max", 1e-3, "sde"),
    ("sde.fields.sigma", 1.0, "sde.fields"),
    ("parametrization", VE_SDE, "parametrization.class"),
    ("net", VE_SDE, "net.class"),
    ("net", {"class": "SetEmbedding", "fields": {"num_features": 1}}, "net.class"),
    ("net", {"name": 3}, "net.name"),
    ("net", {"name": "Own"}, "net"),
    ("net", {}, "net"),
    ("net", DEEP_NET, r"net\.net.*class"),
    ("net.fields.depth", 10**6, "net.depth"),
    ("net.fields.depth", 10**400, "net.depth"),
    ("net.fields.depth", 0, "net"),
    ("net.fields.depth", 2, "net"),
    ("net.fields.depth", 1.0, "net.depth"),
    ("net.fields.width", 10**9, "net.width"),
    ("net.fields.width", -4, "net.width"),
    ("net.fields.size", "1", "net.size"),
    ("net.fields.norm", 1, "net.norm"),
    ("net.fields.size", DELETED, "net.fields"),
    ("support", [], "support"),
    ("support.edge", -1.0, "support"),
    ("support.edge", "a", "support.edge"),
    ("support.support", DEEP_SUPPORT, r"support.*constraint"),
    ("support.support", {"constraint": "_Sphere", "parts": {}, "options": {}}, "supp"),
    ("support.support", {"constraint": "_Positive", "parts": {}, "options": {}}, "su"),
    ("support.support.options", {}, "support.support"),
    ("support.support.options.reinterpreted_batch_ndims", 7, "support"),
    (f"{INTERVAL}.constraint", "Popen", r"support.*constraint"),
    (f"{INTERVAL}.constraint", "_Positive", "support"),
    (f"{INTERVAL}.constraint", "_IntegerInterval", "support"),
    (f"{INTERVAL}.parts.lower_bound", "0", r"support.*lower_bound"),
    (f"{INTERVAL}.parts.lower_bound", [[0.0], [1.0, 2.0]], r"support.*lower_bound"),
    (f"{INTERVAL}.parts.lower_bound", float("nan"), r"support.*lower_bound"),
    (f"{INTERVAL}.parts.lower_bound", [0.0, 1.0, 2.0], "support"),
    (f"{INTERVAL}.parts.lower_bound", 9.0, "support"),
    (f"{INTERVAL}.parts", {"lower_bound": [0, 1], "upper_bound": [2, 3, 4]}, "supp"),
    (f"{INTERVAL}.parts.check", 1.0, "support"),
]


@pytest.mark.parametrize(("entry", "value", "named"), CRAFTED)
def test_crafted_headers_are_refused(saved, tmp_path, entry, value, named):
    shutil.copytree(saved / "score", tmp_path / "score")
    craft(tmp_path / "score", {entry: value})
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"`{named}[^`]*`.*"):
        io.load(tmp_path / "score")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


ARRAYS = {
    "other shape": {"standardize.scale": jnp.ones(2)},
    "negative scale": {"standardize.scale": -jnp.ones(1)},
    "no numbers": {"standardize.scale": jnp.full(1, jnp.nan)},
    "integers": {"standardize.scale": jnp.ones(1, int)},
    "half of an affine map": {"context.scale": jnp.ones(3)},
    "center of another shape": {"center": jnp.ones((3, 1))},
    "unknown": {"beside": jnp.ones(1)},
    "weight too many": {"net['more']": jnp.ones(1)},
    "event of another net": {
        "standardize.loc": jnp.ones(2),
        "standardize.scale": jnp.ones(2),
    },
    "other context": {"context.loc": jnp.ones(2), "context.scale": jnp.ones(2)},
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_crafted_arrays_are_refused(saved, tmp_path, kind):
    shutil.copytree(saved / "score", tmp_path / "score")
    arrays = {name: np.asarray(a) for name, a in ARRAYS[kind].items()}
    craft(tmp_path / "score", arrays=arrays)
    with pytest.raises(ValueError, match=str(tmp_path)):
        io.load(tmp_path / "score")


def test_energy_nets_come_back(tmp_path):
    score = make_score(Energy(NET))
    io.save(score, tmp_path / "score")
    assert numbers(io.load(tmp_path / "score")) == numbers(score)

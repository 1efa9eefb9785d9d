"""Folders of runs: every kind of damage to every file of a checkpoint."""

import json
import os
import shutil
import signal
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import checkpoint
from numpyro_score.checkpoint import RunFolder

KEY = jax.random.key(3)
LIKE = {"a": jnp.zeros(4), "key": KEY, "taken": np.zeros((), int)}
MARKS = {"process": {"sigma": 0.1}, "key": [0, 3]}
REFUSAL = "`path` must be a folder of this run."


def tree(step):
    return {"a": jnp.arange(4.0) * step, "key": KEY, "taken": np.asarray(step)}


def open_folder(path, marks=MARKS):
    return RunFolder.open(path, marks, REFUSAL, keep=None)


def is_same(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return all(bool((jnp.asarray(a) == jnp.asarray(b)).all()) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    folder = open_folder(path)
    for step in (1, 2):
        folder.save(step, tree(step))
    folder.close()
    return path


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 255
    path.write_bytes(bytes(data))


DAMAGES = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1 - 1e-9),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "foreign": lambda path: path.write_bytes(b"[1, 2]"),
}


def test_run_goes_on_before_the_damage(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    flip(path / "2" / "default" / "_METADATA", 0.5)
    with pytest.warns(UserWarning, match=r"2 is damaged"):
        folder = open_folder(path)
    assert is_same(folder.load(1, LIKE, KEY), tree(1))
    folder.save(2, tree(2))
    folder.close()
    again = open_folder(path)
    assert again.steps() == [1, 2]
    assert is_same(again.load(2, LIKE, KEY), tree(2))
    again.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back_on_the_one_before(whole, tmp_path, damage):
    files = [p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file()]
    for number, name in enumerate(files):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        DAMAGES[damage](path / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = open_folder(path)
        assert folder.steps() == [1]
        folder.close()
        (message,) = [str(w.message) for w in caught]
        assert f"{path / '2'} is damaged" in message
        assert name.name in message
        assert (path / "2.damaged").is_dir()


def test_checkpoint_under_another_name_is_damaged(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    shutil.copytree(whole / "1", path / "3")
    with pytest.warns(UserWarning, match=r"3 is damaged .* saved as step 1\."):
        folder = open_folder(path)
    assert folder.steps() == [1, 2]
    folder.close()


def test_whole_checkpoints_are_read_without_a_word(whole):
    folder = open_folder(whole)
    assert is_same(folder.load(2, LIKE, KEY), tree(2))
    assert is_same(folder.load(1, LIKE, KEY), tree(1))
    folder.close()


def test_checkpoint_of_another_run_is_refused(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "run.json").unlink()
    folder = open_folder(path, MARKS | {"key": [0, 4]})
    with pytest.raises(ValueError, match=r"`path` must be .* Got .*2\."):
        folder.load(2, LIKE, KEY)
    folder.close()


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"deleted"}))
def test_damaged_fingerprint_is_named(whole, tmp_path, damage):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    DAMAGES[damage](path / "run.json")
    with pytest.raises(ValueError, match=r"run\.json is damaged.*Delete this file"):
        open_folder(path)
    (path / "run.json").unlink()
    folder = open_folder(path)
    assert is_same(folder.load(2, LIKE, KEY), tree(2))
    folder.close()


def test_altered_number_in_the_fingerprint_is_damage(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    saved = json.loads((path / "run.json").read_text())
    saved["key"] = [0, 4]
    (path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        open_folder(path, MARKS | {"key": [0, 4]})


def test_settings_that_only_the_saved_run_had_are_named(whole):
    marks = {"process": MARKS["process"]}
    with pytest.raises(ValueError, match=r"`path` must be .* differs in key\."):
        open_folder(whole, marks)


EMPTY = {
    "floats": jnp.zeros((3, 0)),
    "flags": jnp.zeros((0, 2), bool),
    "counts": np.zeros(0, int),
    "keys": jax.random.split(KEY, 0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_arrays_without_numbers_are_kept(tmp_path, name):
    """Their shapes are those saved, which differ from block to block."""
    folder = open_folder(tmp_path)
    folder.save(1, {"empty": EMPTY[name], "number": jnp.ones(())})
    like = {"empty": EMPTY[name][..., :0], "number": jnp.zeros(())}
    loaded = folder.load(1, like, KEY)
    folder.close()
    assert type(loaded["empty"]) is type(EMPTY[name])
    assert loaded["empty"].dtype == EMPTY[name].dtype
    assert loaded["empty"].shape == EMPTY[name].shape
    assert loaded["number"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_for_a_checkpoint(tmp_path, monkeypatch, number):
    """A checkpoint that is being written is whole; another signal comes at once."""
    before = signal.signal(number, signal.default_int_handler)
    folder = open_folder(tmp_path)
    write = checkpoint._write_hashes

    def interrupted(path, run, times=1):
        for _ in range(times):
            os.kill(os.getpid(), number)
        write(path, run)

    try:
        monkeypatch.setattr(checkpoint, "_write_hashes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.save(1, tree(1))
        assert is_same(folder.load(1, LIKE, KEY), tree(1))
        twice = partial(interrupted, times=2)
        monkeypatch.setattr(checkpoint, "_write_hashes", twice)
        with pytest.raises(KeyboardInterrupt):
            folder.save(2, tree(2))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
        folder.close()
    assert checkpoint._find_damage(tmp_path / "1") is None
    assert checkpoint._find_damage(tmp_path / "2") is not None

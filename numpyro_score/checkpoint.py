"""Checkpoints of a run on disk: its numbers, and the identity of the run.

A tree of arrays is saved as its leaves, numbered in order, with typed random keys as
the numbers that they hold, and arrays without numbers, which storage refuses, as their
shapes. A fingerprint beside them identifies the run. Every
checkpoint holds the hashes of its files and of the fingerprint, compared before storage
reads a byte, so that one that was altered or belongs to another run is never used.
"""

import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.typing import PRNGKey

FINGERPRINT = "run.json"  # the fingerprint's file, beside the saved numbers
HASHES = "hashes.json"  # a checkpoint's file of hashes, written last
SET_ASIDE = "damaged"  # ending of the name of a checkpoint that is not used
SELF = "sha256"  # entry that holds the hash of all others


@dataclass(frozen=True)
class RunFolder:
    """The checkpoints of one run; made by :meth:`open`.

    Args:
        manager: what writes and reads them.
        path: their folder.
        run: hash of the run's fingerprint.
        refusal: what errors say of another run's checkpoints.
    """

    manager: Any  # orbax's CheckpointManager
    path: Path
    run: str
    refusal: str

    @classmethod
    def open(
        cls, path: Path, fingerprint: dict[str, Any], refusal: str, keep: int | None
    ) -> "RunFolder":
        """Return the folder of a run, made if it does not exist.

        Args:
            path: the folder.
            fingerprint: identity of the run, as JSON.
            refusal: what errors say of another run's folder and what to do.
            keep: how many of the latest checkpoints are kept; None for all.

        Raises:
            ValueError: if the folder belongs to another run, or nobody can say.
        """
        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        _check_fingerprint(path, fingerprint, refusal)
        for step in _steps(path):
            _set_aside_if_damaged(path / str(step))
        import orbax.checkpoint as ocp  # here, as it takes long to import

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        manager = ocp.CheckpointManager(path, options=options)
        return cls(manager, path, _hash_json(fingerprint), refusal)

    def steps(self) -> list[int]:
        """Return the steps that were saved and are whole, in order."""
        return _steps(self.path)

    def save(self, step: int, tree: Any) -> None:
        """Save a tree, complete or not at all."""
        import orbax.checkpoint as ocp  # here, as it takes long to import

        saved = ocp.args.StandardSave(tree_to_arrays(tree))
        with _hold_interrupts():
            self.manager.save(step, args=saved)
            if jax.process_index() == 0:
                _write_hashes(self.path / str(step), self.run)

    def load(self, step: int, like: Any, key: PRNGKey) -> Any:
        """Return a saved tree.

        Args:
            step: when it was saved.
            like: a tree of the same structure.
            key: a key of the implementation that typed keys get.

        Raises:
            ValueError: if it belongs to another run.
        """
        path = self.path / str(step)
        if _read_hashed(path / HASHES)["run"] != self.run:
            raise ValueError(f"{self.refusal} Got {path}.")
        import orbax.checkpoint as ocp  # here, as it takes long to import

        saved = self.manager.restore(step, args=ocp.args.StandardRestore())
        return arrays_to_tree(like, saved, key)

    def set_aside(self, steps: list[int]) -> None:
        """Rename checkpoints that cannot be used, so that their steps are free."""
        for step in steps:
            _set_aside(self.path / str(step))
        self.manager.reload()

    def close(self) -> None:
        """Finish writing."""
        self.manager.close()


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until what is being written is whole; a second one passes.

    Storage that is left in the middle goes on in threads, which fail when Python ends.
    The same holds of SIGTERM where Python handles it.
    """
    handlers: dict[int, Callable] = {}
    if threading.current_thread() is threading.main_thread():  # no other gets signals
        for name in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(name)):
                handlers[name] = handler
    held: list[tuple] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            handlers[number](number, frame)
        held.append((number, frame))

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if held:
        handlers[held[0][0]](*held[0])


def tree_to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by their place, typed keys as their numbers.

    Example:
        >>> tree_to_arrays({"a": jax.numpy.zeros(2), "b": 3})
        {'00000': array([0., 0.], dtype=float32), '00001': array(3)}
    """
    leaves = (np.asarray(key_data(leaf)) for leaf in jax.tree.leaves(tree))
    named = {_name(i, leaf.size): leaf for i, leaf in enumerate(leaves)}
    return {k: v if v.size else np.asarray(v.shape) for k, v in named.items()}


def arrays_to_tree(like: Any, saved: Mapping[str, Any], key: PRNGKey) -> Any:
    """Return the tree that :func:`tree_to_arrays` took apart.

    Args:
        like: a tree of the same structure: arrays, or their shapes and dtypes. Arrays
            of NumPy stay arrays of NumPy.
        saved: the numbers by their place.
        key: a key of the implementation that typed keys get.

    Example:
        >>> like = {"key": jax.random.key(0)}
        >>> same = arrays_to_tree(like, tree_to_arrays(like), jax.random.key(1))
        >>> bool(same["key"] == like["key"])
        True
    """
    kinds, structure = jax.tree.flatten(like)

    def one(kind: Any, value: Any) -> Any:
        if isinstance(kind, np.ndarray):
            return np.asarray(value, kind.dtype)
        if _is_key(kind):
            impl = jax.random.key_impl(key)
            return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        return jnp.asarray(value, kind.dtype)

    def read(i: int) -> Any:
        shape = saved.get(_name(i, 0))
        # of whole numbers, as keys are; `one` makes them what they are
        return saved[_name(i)] if shape is None else np.empty(shape, np.uint32)

    leaves = [one(kind, read(i)) for i, kind in enumerate(kinds)]
    return jax.tree.unflatten(structure, leaves)


def _name(place: int, size: int = 1) -> str:
    """Return the name of a leaf in storage, by its place and number of elements."""
    return f"{place:05d}" if size else f"{place:05d}_shape"


def _check_fingerprint(folder: Path, fingerprint: dict[str, Any], refusal: str) -> None:
    """Write the fingerprint of this run, or compare it with the one that is there.

    Args:
        folder: where the run is saved; it must exist.
        fingerprint: identity of the run, as JSON.
        refusal: what the error says of another run's folder and what to do.

    Raises:
        ValueError: if the folder belongs to another run.
    """
    path = folder / FINGERPRINT
    fingerprint = json.loads(json.dumps(fingerprint))
    if not path.exists():
        _write_hashed(path, fingerprint)
        return
    try:
        saved = _read_hashed(path, needs_hash=False)  # 0.1.0 wrote none
    except ValueError as error:
        raise ValueError(
            f"{error} It says which run the checkpoints beside it belong to. Delete "
            "this file to go on with the same run: every checkpoint holds a hash of "
            "its run, so those of another run are still refused."
        ) from error
    different = [k for k, v in fingerprint.items() if saved.get(k) != v]
    different += [k for k in saved if k not in fingerprint]
    if different:
        names = ", ".join(different)
        raise ValueError(f"{refusal} Got {folder}, which differs in {names}.")


def key_data(leaf: Any) -> Any:
    """Return the numbers of a typed key, and anything else as it is.

    Example:
        >>> key_data(3.0)
        3.0
    """
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    kind = getattr(leaf, "dtype", None)
    return kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)


def _steps(path: Path) -> list[int]:
    folders = (p.name for p in path.iterdir() if p.is_dir())
    return sorted(int(n) for n in folders if n.isdecimal() and str(int(n)) == n)


def _write_hashes(path: Path, run: str) -> None:
    """Write the hashes of a checkpoint's files, and of the run that it belongs to."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    hashes = {p.relative_to(path).as_posix(): _hash_file(p) for p in files}
    content = {"run": run, "step": int(path.name), "files": hashes}
    _write_hashed(path / HASHES, content)


def _set_aside_if_damaged(path: Path) -> None:
    """Rename a checkpoint whose files are not those that were saved, and say so."""
    damage = _find_damage(path)
    if damage is None:
        return
    _set_aside(path)
    warn_caller(
        f"The checkpoint {path} is damaged or was never finished, and is set aside as "
        f"{path.name}.{SET_ASIDE}: {damage} The run goes on after the one before, or "
        "begins anew if there is none."
    )


def _find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    if not (path / HASHES).is_file():
        return f"{HASHES} is not there."
    try:
        saved = _read_hashed(path / HASHES)
    except ValueError as error:
        return str(error)
    if saved["step"] != int(path.name):
        return f"it was saved as step {saved['step']}."
    for name, content in saved["files"].items():
        file = path / name
        if not file.is_file() or _hash_file(file) != content:
            return f"{name} was altered, cut off or removed."
    return None


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.{SET_ASIDE}")
    if jax.process_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(aside))


def _write_hashed(path: Path, content: dict[str, Any]) -> None:
    """Write an object of JSON with its own hash, complete or not at all."""
    # one file for each process, as they may share the folder
    partial = path.with_suffix(f".{jax.process_index()}")
    text = json.dumps(content | {SELF: _hash_json(content)})
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _read_hashed(path: Path, needs_hash: bool = True) -> dict[str, Any]:
    """Return what :func:`_write_hashed` wrote, or raise if it was altered."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    is_whole = isinstance(content, dict)
    if is_whole and (needs_hash or SELF in content):
        is_whole = content.pop(SELF, None) == _hash_json(content)
    if not is_whole:
        raise ValueError(f"{path} is damaged: it was altered or cut off.")
    return content


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

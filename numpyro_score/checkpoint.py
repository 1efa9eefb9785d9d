"""What is kept of a run on disk: its numbers, and which run they belong to.

A tree of arrays is saved as its leaves, numbered in order, with typed random keys as
the numbers that they hold. A fingerprint beside them tells one run from another. Orbax
renames a finished folder into place, so a process killed at any moment leaves the last
complete checkpoint behind.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.typing import PRNGKey

FINGERPRINT = "run.json"  # the fingerprint's file, beside the saved numbers


def tree_to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by their place, typed keys as their numbers.

    Example:
        >>> tree_to_arrays({"a": jax.numpy.zeros(2), "b": 3})
        {'00000': array([0., 0.], dtype=float32), '00001': array(3)}
    """
    leaves = enumerate(jax.tree.leaves(tree))
    return {f"{i:05d}": np.asarray(key_data(leaf)) for i, leaf in leaves}


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
            return np.asarray(value)
        if _is_key(kind):
            impl = jax.random.key_impl(key)
            return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        return jnp.asarray(value, kind.dtype)

    leaves = [one(kind, saved[f"{i:05d}"]) for i, kind in enumerate(kinds)]
    return jax.tree.unflatten(structure, leaves)


class CheckpointFolder:
    """Trees of arrays in one folder, each under its step.

    Orbax is imported only here: it takes longer to import than this package.

    Args:
        path: the folder, which must exist.
        max_to_keep: how many of the latest steps are kept; None for all.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as path:
        ...     with CheckpointFolder(Path(path)) as folder:
        ...         folder.save(3, {"a": np.zeros(2)})
        ...         folder.steps(), folder.restore(3, tree_to_arrays({"a": np.ones(2)}))
        ([3], {'00000': array([0., 0.])})
    """

    def __init__(self, path: Path, max_to_keep: int | None = None) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(path, options=options)
        self._save, self._restore = ocp.args.StandardSave, ocp.args.StandardRestore

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Return the steps that are saved, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any) -> None:
        """Save a tree of arrays under its step."""
        self._manager.save(step, args=self._save(tree_to_arrays(tree)))

    def restore(
        self, step: int, like: dict[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Return the numbers of a step by their place.

        Args:
            step: one of :meth:`steps`.
            like: numbers whose shapes and dtypes the saved ones must have.
        """
        return self._manager.restore(step, args=self._restore(like))

    def close(self) -> None:
        """Finish writing."""
        self._manager.close()


def check_fingerprint(folder: Path, fingerprint: dict[str, Any], refusal: str) -> None:
    """Write what tells this run from others, or compare it with what is there.

    Args:
        folder: where the run is saved; it must exist.
        fingerprint: what tells one run from another, as JSON.
        refusal: what the error says of another run's folder and what to do.

    Raises:
        ValueError: if the folder belongs to another run.
    """
    path = folder / FINGERPRINT
    fingerprint = json.loads(json.dumps(fingerprint))
    if not path.exists():
        # one file for each process, as they may share the folder
        partial = path.with_suffix(f".{jax.process_index()}")
        partial.write_text(json.dumps(fingerprint), encoding="utf-8")
        partial.replace(path)
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
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

"""Folders of saved scores: arrays, a header in JSON and the hashes of both."""

import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_score.checks import check_kind
from numpyro_score.io.schema import REMEDY

FORMAT = 1  # of the folder, increased when older versions cannot read it
WEIGHTS, HEADER, SUMS = "weights.safetensors", "header.json", "SHA256SUMS"
LIBRARIES = ("numpyro_score", "jax", "flax", "numpyro", "safetensors")


def write(path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """Write arrays and header to a new folder, with their hashes."""
    from safetensors.numpy import save

    origin = {
        "format": FORMAT,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    contents = {
        WEIGHTS: save(arrays),
        HEADER: json.dumps(origin | header, indent=2).encode(),
    }
    contents[SUMS] = _sums(contents).encode()
    with new_folder(path) as partial:
        for name, data in contents.items():
            (partial / name).write_bytes(data)


def check_new(path: str | os.PathLike, what: str) -> Path:
    """Return the path of a new folder.

    Raises:
        FileExistsError: if there is something at ``path``.
        TypeError: for anything but a path.
    """
    path = as_path(path)
    if path.exists() or path.is_symlink():
        raise FileExistsError(
            f"`path` must not exist: a saved {what} is never overwritten. Remove it or "
            f"choose another name. Got {path}."
        )
    return path


def as_path(path: str | os.PathLike) -> Path:
    """Return the path of a folder.

    Raises:
        TypeError: for anything but a path.
    """
    check_kind("path", path, (str, os.PathLike), "a folder's name")
    return Path(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to ``path`` when it is complete.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with new_folder(Path(parent) / "new") as folder:
        ...         _ = (folder / "file").write_text("content")
        ...     (Path(parent) / "new" / "file").read_text()
        'content'
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and header of a folder, unaltered since it was written.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered or cut off, or is of another format.
    """
    contents = _read_bytes(path)
    try:
        header = json.loads(contents[HEADER])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path / HEADER} must be an object of JSON. {REMEDY}")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`path` must hold a score of format {FORMAT}, which this version of "
            "numpyro_score reads. Load it with the version that saved it. Got format "
            f"{reprlib.repr(header.get('format'))}, saved by "
            f"{reprlib.repr(header.get('versions'))}, in {path}."
        )
    return _read_arrays(path / WEIGHTS, contents[WEIGHTS]), header


def _read_arrays(file: Path, content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a file, which must be finite floating-point numbers.

    Raises:
        ValueError: otherwise.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} must hold arrays in the format of safetensors. {REMEDY} "
            f"Cause: {error}"
        ) from error
    for name, array in arrays.items():
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if not is_float or not np.isfinite(array).all():
            raise ValueError(
                f"`{name}` in {file} must be finite floating-point numbers. {REMEDY} "
                f"Got {array.dtype} of shape {array.shape}."
            )
    return arrays


def sums(path: Path, names: Iterable[str]) -> str:
    """Return the hashes of files in a folder, in the format of ``sha256sum --check``.

    Args:
        path: the folder.
        names: names of the files inside it.
    """
    return _sums({name: (path / name).read_bytes() for name in names})


def check_together(path: Path, names: Iterable[str]) -> None:
    """Raise unless the files of a folder's parts have the hashes in its sums.

    Args:
        path: the folder.
        names: names of the files, such as the sums of each part.

    Raises:
        ValueError: for parts of two folders.
    """
    saved = path / SUMS
    if not saved.is_file() or saved.read_bytes() != sums(path, names).encode():
        raise ValueError(
            "`path` must hold parts that were saved together: a hash does not match. "
            f"Copy the folder again. Got {path}."
        )


def _sums(contents: Mapping[str, bytes]) -> str:
    return "".join(f"{_hash(data)}  {name}\n" for name, data in contents.items())


def _read_bytes(path: Path) -> dict[str, bytes]:
    missing = [name for name in (SUMS, HEADER, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`path` must be a folder made by numpyro_score.io.save. Got {path}, which "
            f"{'lacks ' + ', '.join(missing) if path.exists() else 'does not exist'}."
        )
    contents = {name: (path / name).read_bytes() for name in (WEIGHTS, HEADER)}
    saved = (path / SUMS).read_bytes()
    if saved != _sums(contents).encode():
        altered = [
            n for n, data in contents.items() if _hash(data).encode() not in saved
        ]
        raise ValueError(
            "`path` must hold files as they were saved: a hash does not match, so a "
            "file was altered or cut off. Copy the folder again. "
            f"Got {path}, altered: {', '.join(altered) or SUMS}."
        )
    return contents


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

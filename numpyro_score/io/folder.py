"""A folder of three plain files: arrays, a readable header, and hashes of both."""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # of the folder; raised when an older reader could not understand it
WEIGHTS, HEADER, SUMS = "weights.safetensors", "header.json", "SHA256SUMS"
LIBRARIES = ("numpyro_score", "jax", "flax", "numpyro", "safetensors")


def write(path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """Write a new folder, which appears under its name only when it is complete."""
    from safetensors.numpy import save

    origin = {
        "format": FORMAT,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    contents = {
        WEIGHTS: save(arrays),
        HEADER: json.dumps(origin | header, indent=2).encode(),
    }
    sums = [f"{_hash(data)}  {name}\n" for name, data in contents.items()]
    contents[SUMS] = "".join(sums).encode()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in contents.items():
        (partial / name).write_bytes(data)
    partial.rename(path)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and header of a folder, or raise if it is not what was written.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered or cut off, or is of another format.
    """
    from safetensors.numpy import load

    contents = _read_bytes(path)
    header = json.loads(contents[HEADER])
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`path` must hold a score of format {FORMAT}, which this version of "
            "numpyro_score reads. Load it with the version that saved it. Got format "
            f"{header.get('format')}, saved by {header.get('versions')}, in {path}."
        )
    return load(contents[WEIGHTS]), header


def _read_bytes(path: Path) -> dict[str, bytes]:
    missing = [name for name in (SUMS, HEADER, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`path` must be a folder made by numpyro_score.io.save. Got {path}, which "
            f"{'lacks ' + ', '.join(missing) if path.exists() else 'does not exist'}."
        )
    contents = {name: (path / name).read_bytes() for name in (WEIGHTS, HEADER)}
    want = "".join(f"{_hash(data)}  {name}\n" for name, data in contents.items())
    sums = (path / SUMS).read_bytes()
    if sums != want.encode():
        altered = [
            n for n, data in contents.items() if _hash(data).encode() not in sums
        ]
        raise ValueError(
            "`path` must hold files as they were saved: a hash does not match, so a "
            "file was altered or cut off. Copy the folder again. "
            f"Got {path}, altered: {', '.join(altered) or SUMS}."
        )
    return contents


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

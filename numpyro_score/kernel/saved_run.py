"""Save an MCMC run while it runs, so that it can be killed and goes on.

Every block, of warm-up or of draws, is saved when it is done: its draws and the
kernel's state after it. A process killed at any moment leaves the last complete block
behind, and a second call with the same arguments goes on after it: on a CPU with the
same draws, bit for bit.
"""

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from tqdm import tqdm

from numpyro_score.checkpoint import (
    CheckpointFolder,
    arrays_to_tree,
    check_fingerprint,
    key_data,
)
from numpyro_score.checks import check_count
from numpyro_score.kernel.resumable_run import Block, BlockResult, BlockRun, plan_blocks
from numpyro_score.typing import PRNGKey

REFUSAL = (
    "`path` must be a folder of this very run, or new: draws of two runs cannot be "
    "joined. Choose another folder, or repeat the arguments of the first call."
)


def run_in_blocks(
    mcmc: MCMC,
    rng_key: PRNGKey,
    *args: Any,
    path: str | os.PathLike,
    num_blocks: int = 20,
    extra_fields: tuple[str, ...] = (),
    init_params: Any = None,
    **kwargs: Any,
) -> None:
    """Do what ``mcmc.run`` does, in blocks that are saved in a folder.

    After it ``mcmc`` holds the draws as after ``run``, also when Ctrl-C stops it: then
    those of the blocks done so far. Call it again, in the same process or another, to
    go on. Works for the kernels of this package and for those of NumPyro that keep
    their progress in their state, such as NUTS. Blocks of one length share a compiled
    program, except with parallel chains, which NumPyro compiles anew in every block.

    Args:
        mcmc: a sampler; its kernel, chains, ``num_warmup`` and ``num_samples`` count,
            its progress bar does not.
        rng_key: as in ``run``.
        args: positional arguments of the model.
        path: folder of this very run; made if it does not exist.
        num_blocks: blocks of warm-up and draws together, at least; ``thinning`` and
            remainders may add to them.
        extra_fields: as in ``run``.
        init_params: as in ``run``.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: for a folder with another run's blocks, ``num_blocks`` below 1, or
            ``num_samples`` below ``thinning``.

    Example:
        >>> import tempfile
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro_score.kernel import ScoreLangevin
        >>> def model():
        ...     sample("x", dist.Normal(0, 1))
        >>> mcmc = MCMC(
        ...     ScoreLangevin(model), num_warmup=20, num_samples=20, progress_bar=False
        ... )
        >>> with tempfile.TemporaryDirectory() as path:
        ...     run_in_blocks(mcmc, jax.random.key(0), path=path, num_blocks=4)
        >>> mcmc.get_samples()["x"].shape
        (20,)
    """
    check_count("num_blocks", num_blocks, "the number of blocks")
    plan = plan_blocks(mcmc.num_warmup, mcmc.num_samples, mcmc.thinning, num_blocks)
    inputs = rng_key, args, kwargs, tuple(extra_fields), init_params
    run = BlockRun(mcmc, mcmc.sampler, *inputs)
    folder = Path(path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    check_fingerprint(folder, fingerprint(run, num_blocks), REFUSAL)
    with CheckpointFolder(folder) as saved:
        _run(run, plan, saved)


def _run(run: BlockRun, plan: list[Block], saved: CheckpointFolder) -> None:
    """Run the blocks that are not saved yet; hand all draws to the sampler."""
    # a copy: NumPyro's own kernels cannot start twice
    trial = replace(run, kernel=copy.copy(run.kernel))
    likes = jax.eval_shape(lambda: trial.run(plan[0], None))
    done = set(saved.steps())
    results = [
        arrays_to_tree(likes, saved.restore(block.end), run.rng_key)
        for block in plan
        if block.end in done
    ]
    programs: dict[tuple[int, int], Callable] = {}
    try:
        for block in tqdm(plan[len(results) :], disable=not run.mcmc.progress_bar):
            state = results[-1].state if results else None
            result = _program(run, block, state, programs)(state)
            saved.save(block.end, result)
            results.append(result)
    finally:
        kept = [r for r, block in zip(results, plan, strict=False) if not block.warm]
        if kept:
            _restore_into_mcmc(run, kept)


def _program(
    run: BlockRun, block: Block, state: Any, programs: dict[tuple[int, int], Callable]
) -> Callable[[Any], BlockResult]:
    """Return what runs a block, compiled once for blocks of one length."""

    def program(state: Any) -> BlockResult:
        return run.run(block, state)

    # NumPyro's own call starts the chains, so that they start where `run` starts them
    if state is None or run.mcmc.chain_method == "parallel":
        return program
    return programs.setdefault((block.size, block.thinning), jax.jit(program))


def _restore_into_mcmc(run: BlockRun, results: list[BlockResult]) -> None:
    """Leave the sampler as its own ``run`` leaves it, with the draws of all blocks."""

    def join(*blocks: Any) -> Any:
        return jnp.concatenate(blocks, axis=1)

    mcmc = run.mcmc
    draws, extra = (
        jax.tree.map(join, *(result[j] for result in results)) for j in range(2)
    )
    mcmc._states = {mcmc._sample_field: draws, **extra}
    mcmc._states_flat = None
    mcmc._last_state = results[-1].state
    mcmc._args, mcmc._kwargs = run.args, run.kwargs


def fingerprint(run: BlockRun, num_blocks: int) -> dict[str, Any]:
    """Return what tells one run from another: its key, lengths, kernel and inputs."""
    mcmc, digest = run.mcmc, hashlib.sha256()
    for leaf in jax.tree.leaves((run.args, run.kwargs, run.init_params)):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | str):
            digest.update(np.ascontiguousarray(key_data(leaf)).tobytes())
    options = vars(mcmc.sampler)
    plain = {k: v for k, v in options.items() if isinstance(v, int | float | str)}
    return {
        "key": np.asarray(key_data(run.rng_key)).tolist(),
        "num_warmup": mcmc.num_warmup,
        "num_samples": mcmc.num_samples,
        "thinning": mcmc.thinning,
        "num_chains": mcmc.num_chains,
        "num_blocks": num_blocks,
        "extra_fields": list(run.extra_fields),
        "kernel": type(mcmc.sampler).__name__,
        "kernel's options": {k: plain[k] for k in sorted(plain) if k[0] != "_"},
        "data and initial values": digest.hexdigest(),
    }

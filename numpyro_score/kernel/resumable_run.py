"""Save an MCMC run while it runs, so that it can be killed and goes on.

Every block, of warm-up or of draws, is written by orbax when it is done: its draws and
the kernel's state after it. Orbax renames a finished folder into place, so a process
killed at any moment leaves the last complete block behind, and a second call with the
same arguments goes on after it: on a CPU with the same draws, bit for bit.
"""

import copy
import inspect
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from tqdm.auto import tqdm

from numpyro_score.checkpoint import RunFolder
from numpyro_score.checks import check_count, check_key, check_kind
from numpyro_score.fingerprint import (
    describe,
    describe_key,
    digest,
    digest_host_values,
    digest_program,
)
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.model.potential import (
    FunctionPotential,
    Potential,
    model_potential,
)
from numpyro_score.typing import PRNGKey

REFUSAL = (
    "`path` must be a folder of this very run, or new: draws of two runs cannot be "
    "joined. Choose another folder, or repeat the arguments of the first call."
)


class Block(NamedTuple):
    """Transitions in one go: ``size`` of them, of which every ``thinning``-th is kept.

    Blocks of warm-up keep nothing; ``end`` counts the transitions of all blocks so far.
    """

    end: int
    size: int
    thinning: int
    warm: bool


def plan_blocks(
    num_warmup: int, num_samples: int, thinning: int, num_blocks: int
) -> list[Block]:
    """Return blocks of about equal length, first of warm-up, then of draws.

    Args:
        num_warmup: transitions of warm-up.
        num_samples: transitions after it.
        thinning: transitions per draw.
        num_blocks: about how many blocks.

    Raises:
        ValueError: if not a single draw is kept.

    Example:
        >>> [block.size for block in plan_blocks(10, 20, 1, 4)]
        [8, 2, 8, 8, 4]
    """
    if num_samples < thinning:
        raise ValueError(
            "`num_samples` must be at least `thinning`, or no draw is kept. "
            f"Got num_samples={num_samples}, thinning={thinning}."
        )
    size = -(-(num_warmup + num_samples) // (num_blocks * thinning)) * thinning
    # NumPyro leaves out what thinning cannot divide, at the beginning
    warm = num_warmup + num_samples % thinning
    total = num_warmup + num_samples
    ends = [*range(size, warm, size), *([warm] if warm else [])]
    later = [*range(warm + size, total, size), total]
    blocks, start = [], 0
    for end in [*ends, *later]:
        is_warm = end <= warm
        length = end - start
        thin = length if is_warm else thinning
        blocks.append(Block(end, length, thin, is_warm))
        start = end
    return blocks


@dataclass(frozen=True)
class FixedWarmupKernel(MCMCKernel):
    """A kernel whose warm-up has a length that MCMC, which runs one block, is not told.

    Args:
        kernel: the kernel.
        num_warmup: the length of its warm-up over all blocks.
        num_samples: the transitions after it, over all blocks.
    """

    kernel: MCMCKernel
    num_warmup: int
    num_samples: int

    def init(
        self,
        rng_key: PRNGKey,
        num_warmup: int,
        init_params: Any,
        model_args: tuple,
        model_kwargs: dict,
    ) -> Any:
        """Return the kernel's first state, for the whole warm-up."""
        return self.kernel.init(
            rng_key, self.num_warmup, init_params, model_args, model_kwargs
        )

    def sample(self, state: Any, model_args: tuple, model_kwargs: dict) -> Any:
        """Return the kernel's next state."""
        return self.kernel.sample(state, model_args, model_kwargs)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict) -> Callable:
        """Return the kernel's map from states to draws."""
        return self.kernel.postprocess_fn(model_args, model_kwargs)

    @property
    def sample_field(self) -> str:
        """The kernel's field that holds the draw."""
        return self.kernel.sample_field

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The kernel's fields that are collected without asking."""
        return self.kernel.default_fields

    @property
    def _sample_fn(self) -> Any:
        return getattr(self.kernel, "_sample_fn", None)


class BlockResult(NamedTuple):
    """Result of a block: draws by chain, extra fields, and the state after it."""

    draws: Any
    extra: dict[str, Array]
    state: Any


@dataclass(frozen=True, eq=False)
class BlockRun:
    """A run's sampler and inputs, of which any block can be run."""

    mcmc: MCMC
    kernel: MCMCKernel
    rng_key: PRNGKey
    args: tuple
    kwargs: dict
    extra_fields: tuple[str, ...]
    init_params: Any

    def run(self, block: Block, state: Any) -> BlockResult:
        """Return the result of one block; None as state starts from the beginning."""
        mcmc = self._sampler(block)
        mcmc.post_warmup_state = state
        key, start = self.rng_key, self.init_params
        if state is not None:
            key, start = state.rng_key, None
        mcmc.run(
            key,
            *self.args,
            extra_fields=self.extra_fields,
            init_params=start,
            **self.kwargs,
        )
        extra = mcmc.get_extra_fields(group_by_chain=True)
        draws = mcmc.get_samples(group_by_chain=True)
        return BlockResult(draws, extra, mcmc.last_state)

    def _sampler(self, block: Block) -> MCMC:
        like = self.mcmc
        return MCMC(
            FixedWarmupKernel(self.kernel, like.num_warmup, like.num_samples),
            num_warmup=0,
            num_samples=block.size,
            thinning=block.thinning,
            num_chains=like.num_chains,
            chain_method=like.chain_method,
            postprocess_fn=like.postprocess_fn,
            progress_bar=False,
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
    check_kind("mcmc", mcmc, MCMC, "a sampler of NumPyro, MCMC(kernel, ...)")
    check_kind("path", path, (str, os.PathLike), "a folder's name")
    check_kind(
        "extra_fields", extra_fields, (tuple, list), "a tuple of names of fields"
    )
    check_key("rng_key", rng_key)
    check_count("num_blocks", num_blocks, "the number of blocks")
    plan = plan_blocks(mcmc.num_warmup, mcmc.num_samples, mcmc.thinning, num_blocks)
    inputs = rng_key, args, kwargs, tuple(extra_fields), init_params
    run = BlockRun(mcmc, mcmc.sampler, *inputs)
    marks = fingerprint(run, num_blocks)
    folder = RunFolder.open(Path(path), marks, REFUSAL, keep=None)
    try:
        _run(run, plan, folder)
    finally:
        folder.close()


def _run(run: BlockRun, plan: list[Block], folder: RunFolder) -> None:
    """Run the blocks that are not saved yet; hand all draws to the sampler."""
    # a copy: NumPyro's own kernels cannot start twice
    trial = replace(run, kernel=copy.copy(run.kernel))
    likes = jax.eval_shape(lambda: trial.run(plan[0], None))
    results = _load_blocks(folder, plan, likes, run.rng_key)
    programs: dict[tuple[int, int], Callable] = {}
    try:
        with _progress(run, plan, len(results)) as bar:
            for block in plan[len(results) :]:
                bar.set_description("warmup" if block.warm else "sample")
                state = results[-1].state if results else None
                result = _program(run, block, state, programs)(state)
                folder.save(block.end, result)
                results.append(result)
                bar.update(block.size)
    except KeyboardInterrupt as interrupt:
        saved = plan[len(results) - 1].end if results else 0
        interrupt.add_note(
            f"run_in_blocks: {saved} of {plan[-1].end} transitions, warm-up included, "
            f"are saved in {folder.path}. The sampler holds the draws among them; the "
            "same call goes on from there."
        )
        raise
    finally:
        kept = [r for r, block in zip(results, plan, strict=False) if not block.warm]
        if kept:
            _restore_into_mcmc(run, kept)


def _progress(run: BlockRun, plan: list[Block], num_saved: int) -> tqdm:
    """Return a bar of all transitions, those of blocks saved before among them."""
    return tqdm(
        total=plan[-1].end,
        initial=plan[num_saved - 1].end if num_saved else 0,
        disable=not run.mcmc.progress_bar,
    )


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


def _load_blocks(
    folder: RunFolder, plan: list[Block], like: Any, rng_key: PRNGKey
) -> list[BlockResult]:
    """Return the results of the first blocks, up to one that is not there.

    Later ones are set aside: they must follow on the block before.
    """
    saved = folder.steps()
    first = list(itertools.takewhile(lambda block: block.end in saved, plan))
    results = [folder.load(block.end, like, rng_key) for block in first]
    folder.set_aside(saved[len(first) :])
    return results


def fingerprint(run: BlockRun, num_blocks: int) -> dict[str, Any]:
    """Return the identity of a run: key, lengths, kernel, data and model."""
    mcmc = run.mcmc
    return {
        "key": describe_key(run.rng_key),
        "floating-point type": str(jnp.result_type(float)),
        "num_warmup": mcmc.num_warmup,
        "num_samples": mcmc.num_samples,
        "thinning": mcmc.thinning,
        "num_chains": mcmc.num_chains,
        # such chains may share what they adapt; others differ in rounding alone
        "vectorized chains": mcmc.num_chains > 1 and mcmc.chain_method == "vectorized",
        "num_blocks": num_blocks,
        "extra_fields": list(run.extra_fields),
        "kernel": type(run.kernel).__name__,
        "kernel's options": kernel_options(run.kernel),
        "postprocess_fn": describe(mcmc.postprocess_fn),
        "data and initial values": digest((run.args, run.kwargs, run.init_params)),
        "model at these data": _digest_model(run),
    }


def kernel_options(kernel: MCMCKernel) -> dict[str, Any]:
    """Return the arguments that a kernel was made with, but for its target.

    Example:
        >>> from numpyro.infer import NUTS
        >>> kernel_options(NUTS(lambda: None, max_tree_depth=5))["max_tree_depth"]
        5
    """
    names = inspect.signature(type(kernel).__init__).parameters
    options = {k: getattr(kernel, k, getattr(kernel, f"_{k}", None)) for k in names}
    for target in ("self", "model", "potential_fn"):
        options.pop(target, None)
    inner = options.get("inner_kernel")
    if inner is not None:
        options["inner_kernel"] = {type(inner).__name__: kernel_options(inner)}
    return describe(options)


def _digest_model(run: BlockRun) -> tuple[str, str | None]:
    """Return a digest of the traced target, with its constants: data among them.

    The second one is that of its values, if functions of the host have a part in them.
    Of a kernel around another kernel it is that of the whole run's first transition.
    """
    kernel, args, kwargs = run.kernel, run.args, run.kwargs
    model = getattr(kernel, "model", None)
    target = getattr(kernel, "potential_fn", getattr(kernel, "_potential_fn", None))
    z = run.init_params
    potential: Potential
    if isinstance(kernel, ScoreLangevin):
        potential = kernel.potential(args, kwargs)
    elif model is not None and not hasattr(kernel, "inner_kernel"):
        potential = model_potential(model, args, kwargs)
    elif target is not None:
        potential = FunctionPotential(target)
    else:
        start = Block(1, 1, 1, False)
        trial = replace(run, kernel=copy.copy(kernel))
        return digest_program(lambda: trial.run(start, None)), None
    if potential.prototype is not None:
        z = potential.prototype
    elif run.mcmc.num_chains > 1:
        z = jax.tree.map(lambda leaf: leaf[0], z)

    def program(z: Any) -> Any:
        return potential.evaluate(z), potential.constrain(z)

    return digest_program(program, z), digest_host_values(program, z)

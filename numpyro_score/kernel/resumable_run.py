"""Blocks of an MCMC run: how many transitions each, and how one is run by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_score.typing import PRNGKey


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
    """What a block leaves: draws by chain, extra fields, and the state after it."""

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

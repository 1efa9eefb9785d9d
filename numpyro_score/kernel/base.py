"""Base class of the kernels: fields for NumPyro, rules of acceptance."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
from jaxtyping import Array, UInt32
from numpyro.infer.mcmc import MCMCKernel

from numpyro_score.checks import enclosing_mcmc, is_traced
from numpyro_score.fingerprint import checksum
from numpyro_score.model.potential import Potential


class LangevinKernel(MCMCKernel):
    """A kernel whose state has NumPyro's names and whose attributes never change."""

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the draw."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The fields collected without asking."""
        return ("z", "diverging", "accept_prob", "num_steps", "accept_rule")

    @property
    def _sample_fn(self) -> Callable:
        """Return what MCMC compiles; by it MCMC resumes without a second ``init``."""
        return self.sample

    def refresh_for_data(
        self, state: Any, model_args: tuple, model_kwargs: dict | None
    ) -> Any:
        """Return the state, refreshed if its cached values are those of other data.

        Runs that go on from ``post_warmup_state`` may have other arguments.
        """
        arguments = model_args, model_kwargs or {}
        if state.data is None or _began_here(arguments):
            return state
        return jax.lax.cond(
            state.data == checksum(arguments),
            lambda state: state,
            lambda state: self.refresh(state, model_args, model_kwargs),
            state,
        )


def checksum_of_arguments(
    model_args: tuple, model_kwargs: dict | None
) -> UInt32[Array, ""] | None:
    """Return a checksum of the arguments of a model; None if there are none.

    Args:
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
    """
    arguments = model_args, model_kwargs or {}
    return checksum(arguments) if any(arguments) else None


def with_checksum(state: Any, model_args: tuple, model_kwargs: dict | None) -> Any:
    """Return a state with the checksum of other arguments, if it has one.

    Args:
        state: of a kernel.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
    """
    if state.data is None:
        return state
    return state._replace(data=checksum((model_args, model_kwargs or {})))


def _began_here(arguments: tuple) -> bool:
    """Return whether a run and its first state are parts of one program.

    Its data are then those of the state, and a comparison for each of many runs of a
    ``vmap`` would cost an evaluation of the potential.
    """
    host = enclosing_mcmc()
    if host is None or host.post_warmup_state is not None:
        return False
    keeps_arguments = not getattr(host, "_jit_model_args", True)
    return keeps_arguments and is_traced(arguments)


class AcceptRule(IntEnum):
    """Rule by which a chain accepts proposals; later ones use less of the target.

    ``sample_stats`` of ArviZ and ``mcmc.get_extra_fields()`` hold the number as
    ``accept_rule``; ``AcceptRule(number).name`` is its name.

    - **VALUE** (0): the potential's value, all of which is known: exact.
    - **ENERGY** (1): the known value, and for learned sites that of energy nets: exact
      for the learned law.
    - **LINE_INTEGRAL** (2): the known value, and for at least one learned site a line
      integral of its score: exact up to quadrature.
    - **UNADJUSTED** (3): every finite proposal is accepted; the step biases the draws.

    Example:
        >>> AcceptRule(2).name
        'LINE_INTEGRAL'
    """

    VALUE = 0
    ENERGY = 1
    LINE_INTEGRAL = 2
    UNADJUSTED = 3

    @classmethod
    def of(cls, potential: Potential, adjusted: bool) -> "AcceptRule":
        """Return the rule of a kernel on a potential.

        Args:
            potential: the target.
            adjusted: whether the kernel accepts or rejects at all.
        """
        if not adjusted:
            return cls.UNADJUSTED
        if not potential.learned:
            return cls.VALUE
        energies = all(law.score.has_energy for law in potential.learned.values())
        return cls.ENERGY if energies else cls.LINE_INTEGRAL

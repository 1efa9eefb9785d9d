"""Kernels of BlackJAX beside ours: an optional peer of the benchmark of kernels.

BlackJAX has no warm-up for MALA: its step size is tuned by BlackJAX's own dual
averaging to the acceptance of 0.574. Adjusted MCLMC is tuned by BlackJAX's own search.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_score.model.potential import model_potential

MISSING = "BlackJAX is not installed, so its kernels are left out: pip install blackjax"


def blackjax() -> Any:
    """Return BlackJAX.

    Raises:
        ImportError: with the line that installs it.
    """
    if find_spec("blackjax") is None:
        raise ImportError(MISSING)
    import blackjax

    return blackjax


def target(model: Callable, args: tuple) -> tuple[Callable, Any, Callable]:
    """Return the log density, a position, and the map to the sites' values."""
    potential = model_potential(model, args, {})
    return (
        lambda z: -potential.potential_fn(z),
        potential.prototype,
        potential.constrain,
    )


@dataclass(frozen=True)
class BlackjaxMALA:
    """MALA with one step size for all coordinates, as BlackJAX has it."""

    model: Callable

    def warmup(self, args: tuple, num_warmup: int, key: Any) -> Any:
        """Return state and step size after dual averaging."""
        from blackjax.adaptation.step_size import dual_averaging_adaptation

        log_density, z, _ = target(self.model, args)
        mala = blackjax().mala
        step, (first, update, final) = (
            mala.build_kernel(),
            dual_averaging_adaptation(0.574),
        )

        def body(carry: tuple, key: Any) -> tuple:
            state, adaptation = carry
            step_size = jnp.exp(adaptation.log_step_size)
            state, info = step(key, state, log_density, step_size)
            return (state, update(adaptation, info.acceptance_rate)), None

        carry = mala.init(z, log_density), first(0.01)
        (state, adaptation), _ = jax.lax.scan(
            body, carry, jax.random.split(key, num_warmup)
        )
        return state, final(adaptation)

    def draw(self, args: tuple, num_samples: int, key: Any, warm: Any) -> tuple:
        """Return draws and the number of gradients."""
        log_density, _, constrain = target(self.model, args)
        state, step_size = warm
        step = blackjax().mala.build_kernel()

        def body(state: Any, key: Any) -> tuple:
            state, _ = step(key, state, log_density, step_size)
            return state, constrain(state.position)

        _, draws = jax.lax.scan(body, state, jax.random.split(key, num_samples))
        return draws, jnp.asarray(num_samples)


@dataclass(frozen=True)
class BlackjaxMCLMC:
    """Adjusted microcanonical Langevin, two leapfrog steps on average."""

    model: Callable

    def _kernel(self) -> Callable:
        from blackjax.mcmc import adjusted_mclmc_dynamic as dynamic

        return dynamic.build_kernel(dynamic.make_random_trajectory_length_fn(True))

    def warmup(self, args: tuple, num_warmup: int, key: Any) -> Any:
        """Return state and parameters after BlackJAX's search."""
        log_density, z, _ = target(self.model, args)
        library = blackjax()
        key_init, key_tune = jax.random.split(key)
        state = library.adjusted_mclmc_dynamic.init(
            position=z, logdensity_fn=log_density, random_generator_arg=key_init
        )
        state, parameters, *_ = library.adjusted_mclmc_find_L_and_step_size(
            self._kernel(),
            log_density,
            num_warmup,
            state,
            key_tune,
            target=0.9,
            frac_tune1=0.5,
            frac_tune2=0.5,
        )
        return state, parameters

    def draw(self, args: tuple, num_samples: int, key: Any, warm: Any) -> tuple:
        """Return draws and the number of gradients."""
        log_density, _, constrain = target(self.model, args)
        state, parameters = warm
        step = self._kernel()

        def body(state: Any, key: Any) -> tuple:
            state, info = step(
                key,
                state,
                log_density,
                parameters.step_size,
                inverse_mass_matrix=parameters.inverse_mass_matrix,
                integration_steps_params=(parameters.L / parameters.step_size,),
            )
            return state, (constrain(state.position), info.num_integration_steps)

        keys = jax.random.split(key, num_samples)
        _, (draws, steps) = jax.lax.scan(body, state, keys)
        return draws, steps.sum()

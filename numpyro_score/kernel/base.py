"""What NumPyro asks of every kernel of this package."""

from collections.abc import Callable

from numpyro.infer.mcmc import MCMCKernel


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
        """Tell MCMC that a kernel at hand needs no second ``init`` to resume."""
        return self.sample

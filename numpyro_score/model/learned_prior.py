r"""A learned joint prior of several sites of a model.

Sites with any supports are one vector z in unconstrained space. With mean m and
covariance :math:`A A^\top` of the draws that it was learned from, the score is that of
whitened points :math:`u = A^{-1} (z - m)`, of mean 0 and covariance I, at a noise level
r. A point :math:`u_r = u + r n` has covariance :math:`(1 + r^2) I`, so that

.. math:: z = m + A u_r / \sqrt{1 + r^2}

has the mean and covariance of the draws at every r: the noise widens no Gaussian law.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.diagnostics import print_summary

from numpyro_score.checks import check_key, check_summary
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.latents import LatentLayout
from numpyro_score.reprs import repr_lines
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


class PriorFit(NamedTuple):
    """Held-out check of a learned prior.

    - **discrepancy**: kernel Stein discrepancy of held-out draws from the score.
    - **p_value**: its p-value under the hypothesis that the score is that of the draws.
    - **num_rows**: number of held-out draws.
    - **marginal**: Kolmogorov-Smirnov statistic between draws of the prior and
      held-out ones, of the unconstrained coordinate where it is largest.
    - **neighbors**: the same of the distance to the nearest draw that the prior was
      learned from. None in files of older versions, as the one before.
    """

    discrepancy: float
    p_value: float
    num_rows: int
    marginal: float | None = None
    neighbors: float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LearnedPrior:
    """Joint law of some sites of a model, made by :func:`numpyro_score.learn_prior`.

    For :class:`~numpyro_score.model.handlers.with_prior`, which puts it into a model.

    Args:
        score: score of whitened points, of shape ``(size,)``.
        loc: mean of unconstrained draws.
        factor: square root A of their covariance.
        latents: the sites and their supports.
        level: noise level r of the law that is used.
        fit: the held-out check, or None.
    """

    score: ScoreModel
    loc: Float[Array, " size"]
    factor: Float[Array, "size size"]
    latents: LatentLayout = field(metadata={"static": True})
    level: float = field(metadata={"static": True})
    fit: PriorFit | None = field(default=None, metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the learned sites."""
        return self.latents.names

    @property
    def distribution(self) -> ScoreDistribution:
        """The law of the whitened points at the level in use."""
        with jax.ensure_compile_time_eval():
            t = float(self.score.sde.time(self.level))
        return ScoreDistribution(self.score, t=t)

    def constrain(self, u: Float[Array, "*batch size"]) -> dict[str, Array]:
        """Return the values of all sites at whitened points."""
        return self.latents.unflatten(self.loc + self._shrink(u) @ self.factor.T)

    def _shrink(self, u: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Return whitened points of the covariance that points without noise have."""
        alpha, sigma = self.score.sde.marginal(self.score.sde.time(self.level))
        return u / jnp.sqrt(jnp.square(alpha) + jnp.square(sigma))

    def whiten(self, values: dict[str, Any]) -> Float[Array, "*batch size"]:
        """Return whitened points without noise for values of all sites."""
        centered = self.latents.flatten(values) - self.loc
        flat = centered.reshape(-1, centered.shape[-1])
        return jnp.linalg.solve(self.factor, flat.T).T.reshape(centered.shape)

    def sample_whitened(
        self, key: PRNGKey, shape: tuple[int, ...] = ()
    ) -> Float[Array, "*batch size"]:
        """Return whitened draws of mean 0 and covariance I."""
        return self._shrink(self.distribution.sample(key, shape))

    def sample(self, key: PRNGKey, shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Return draws of all sites, in their supports."""
        return self.constrain(self.distribution.sample(key, shape))

    def print_summary(
        self, rng_key: PRNGKey, num_samples: int = 1000, prob: float = 0.9
    ) -> None:
        """Print a summary of draws, and of the check on held-out draws.

        Args:
            rng_key: random key.
            num_samples: number of draws.
            prob: probability mass of the intervals.
        """
        check_key("rng_key", rng_key)
        check_summary(num_samples, prob)
        draws = self.sample(rng_key, (num_samples,))
        print_summary(draws, prob=prob, group_by_chain=False)
        print(repr(self))

    def __repr__(self) -> str:
        rows = {"sites": ", ".join(self.names), "size": str(len(self.loc))}
        rows["noise level"] = f"{self.level:.3g}, in standard deviations of the draws"
        if self.fit is not None:
            rows["held-out check"] = (
                f"p = {self.fit.p_value:.3f} with {self.fit.num_rows} draws"
            )
        return repr_lines(type(self).__name__, rows)

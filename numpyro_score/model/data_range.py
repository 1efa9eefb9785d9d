"""Draws that lie off the data which the scores of their sites were learned from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool

from numpyro_score.checks import is_traced
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.potential import ModelPotential
from numpyro_score.model.site_counts import SiteCounts
from numpyro_score.run_verdict import Finding
from numpyro_score.score.level import DataRange, data_range, is_off_data

REMEDY = (
    "The score is a guess there, and may have drawn the chains there. Take a higher "
    "level, by `ScoreDistribution(score, t=score.sde.time(level))` or "
    "`learn_prior(..., level=level)`, and see whether the posterior stays, or learn "
    "the score from data that reach there."
)
LEVEL_ROUNDING = 1e-3  # of levels that go through a time and back, in single precision
LEVEL_REMEDY = (
    "Below that level line integrals of the score and draws by its solver are of two "
    "laws: evidence and shares of modes are not to be trusted. See whether they stay "
    "at the higher level, that of `ScoreDistribution(score)`, or train longer or on "
    "more rows."
)


class CheckedSite(NamedTuple):
    """A learned site whose draws are compared with data; no arrays.

    - **name**: of the site.
    - **level**: noise level of its law.
    - **size**: number of its points; several in a plate.
    - **data_range**: what its points are compared with.
    - **level_in_use**: lowest level at which the score is trusted; 0 where it is not
      asked for.
    """

    name: str
    level: float
    size: int
    data_range: DataRange
    level_in_use: float = 0.0

    def findings(self, shares: np.ndarray) -> list[Finding]:
        """Return what is wrong with draws of the site: one finding, or none.

        Args:
            shares: of the draws off the data, for each point.
        """
        share = float(np.max(shares, initial=0.0))
        if share <= self.data_range.max_share:
            return []
        what = (
            f"the share of draws of site '{self.name}', at noise level "
            f"{self.level:.2g}, off the data that its score was learned from"
        )
        return [Finding("off_data", what, share, self.data_range.max_share, REMEDY)]

    def level_findings(self) -> list[Finding]:
        """Return a finding if the law is used below the level that is trusted."""
        if self.level > (1 - LEVEL_ROUNDING) * self.level_in_use:
            return []
        what = f"the noise level of site '{self.name}'"
        return [Finding("level", what, self.level, self.level_in_use, LEVEL_REMEDY)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffDataCounts(SiteCounts):
    """Number of draws off the data, for every point of every checked site."""

    @classmethod
    def zero(
        cls, potential: Any, *, by_line_integrals: bool = False
    ) -> "OffDataCounts | None":
        """Return no draws of the sites of a potential; None if nothing is known of any.

        Args:
            potential: of a model.
            by_line_integrals: whether a kernel knows the laws by line integrals of
                their scores: then the levels at which these are trusted are measured.
        """
        if not isinstance(potential, ModelPotential) or not potential.learned:
            return None
        prototype = potential.prototype
        points = jax.eval_shape(potential.learned_points, prototype)
        pairs = [(n, law, points[n]) for n, law in potential.learned.items()]
        found = [_checked_site(*pair) for pair in pairs]
        sites = tuple(site for site in found if site is not None)
        if by_line_integrals:
            scores = [potential.learned[site.name].score for site in sites]
            sites = tuple(
                site._replace(level_in_use=score.level_in_use)
                for site, score in zip(sites, scores, strict=True)
            )
        return cls.of(sites)

    def add(self, potential: ModelPotential, z: Any) -> "OffDataCounts":
        """Return the numbers with one more draw.

        Args:
            potential: of the model.
            z: the draw, in unconstrained space.
        """
        points = potential.learned_points(z)
        laws = potential.learned
        off = [_is_off(s, laws[s.name], points[s.name]) for s in self.sites]
        return self.count(off)

    def findings(self, num_draws: int) -> list[Finding]:
        """Return findings for the sites whose draws their data do not reach.

        Args:
            num_draws: of each chain.
        """
        each = map(CheckedSite.findings, self.sites, self.shares(num_draws))
        return [finding for findings in each for finding in findings]

    def level_findings(self) -> list[Finding]:
        """Return findings for the sites used below the level that is trusted.

        For kernels that know the law by line integrals of its score.
        """
        return [finding for site in self.sites for finding in site.level_findings()]


def find_off_data(
    laws: dict[str, ScoreDistribution], compute: Callable[[], dict[str, Array]]
) -> list[Finding]:
    """Return findings for learned sites whose draws their data do not reach.

    Args:
        laws: of the learned sites, by name.
        compute: returns their draws, unconstrained, along the first axis; called only
            if the data of a site are known.
    """
    if all(law.score.rows is None for law in laws.values()):
        return []
    found, points = [], compute()
    for name, law in laws.items():
        site = _checked_site(name, law, points[name][0])
        if site is not None:
            off = jax.vmap(partial(_is_off, site, law))(points[name])
            found += site.findings(np.asarray(off).mean(0))
    return found


def _is_off(
    site: CheckedSite, law: ScoreDistribution, points: Array
) -> Bool[Array, " points"]:
    alpha = law.score.sde.alpha(law.t)
    return is_off_data(law.score, site.data_range, points, alpha).reshape(-1)


def _checked_site(name: str, law: ScoreDistribution, points: Any) -> CheckedSite | None:
    """Return what draws of a site are compared with, if it is known."""
    if is_traced(law.t):
        return None
    with jax.ensure_compile_time_eval():
        level = float(law.score.sde.noise_level(law.t))
    found = data_range(law.score, level)
    if found is None:
        return None
    return CheckedSite(name, level, points.size // law.score.size, found)

r"""Noise processes with Gaussian paths :math:`x_t = \alpha(t) x_0 + \sigma(t) n`.

A process is defined by ``alpha`` and ``sigma``; drift and diffusion are (Song et al.
2021; Karras et al. 2022, appendix B)

.. math::

    f(x, t) = \frac{\alpha'}{\alpha} x, \qquad
    g^2(t) = 2 \sigma \sigma' - 2 \frac{\alpha'}{\alpha} \sigma^2 .

The forward SDE is :math:`dx = f dt + g dw`, its reverse (in decreasing t)
:math:`dx = [f - g^2 s] dt + g d\bar w`, its probability flow
:math:`dx = [f - \tfrac12 g^2 s] dt`, with :math:`s = \nabla \log p_t`.

At t = 0 VP and sub-VP have no noise, VE has ``sigma_min``, and a table of betas starts
at step 0, t = 1/K: ``t_min`` is the lowest time of each that samplers use.
"""

from numpyro_score.sde.base import SDE
from numpyro_score.sde.discrete import DiscreteVP
from numpyro_score.sde.rectified_flow import RectifiedFlow
from numpyro_score.sde.variance_exploding import VE
from numpyro_score.sde.variance_preserving import VP, SubVP

__all__ = [
    "SDE",
    "VE",
    "VP",
    "DiscreteVP",
    "RectifiedFlow",
    "SubVP",
]

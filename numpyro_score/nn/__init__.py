"""Nets that estimate scores, in Flax NNX.

A net configuration (:class:`MLP`, :class:`UNet`, :class:`SetTransformer`,
:class:`Energy`) is a frozen dataclass that builds an
``nnx.Module`` when called with ``rngs=``; :class:`EmbedContext` lets any of them see a
set, a series or an image as context. Any module whose call takes
``(x, noise, context)`` for one point works in their place.
"""

from numpyro_score.nn.embed_context import (
    ConvEmbedding,
    EmbedContext,
    SetEmbedding,
)
from numpyro_score.nn.energy import Energy
from numpyro_score.nn.mlp import MLP
from numpyro_score.nn.set_transformer import SetTransformer
from numpyro_score.nn.unet import UNet

__all__ = [
    "MLP",
    "ConvEmbedding",
    "EmbedContext",
    "Energy",
    "SetEmbedding",
    "SetTransformer",
    "UNet",
]

"""Guidance: scores conditioned on further information, which are scores again."""

from numpyro_score.guidance.classifier import classifier_guidance
from numpyro_score.guidance.classifier_free import classifier_free_guidance
from numpyro_score.guidance.discriminator import (
    discriminator_guidance,
    train_discriminator,
)
from numpyro_score.guidance.inpainting import inpaint

__all__ = [
    "classifier_free_guidance",
    "classifier_guidance",
    "discriminator_guidance",
    "inpaint",
    "train_discriminator",
]

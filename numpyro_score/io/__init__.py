"""Saving and loading of scores, consistency models and learned priors."""

from numpyro_score.io.models import load, load_consistency, load_prior, save

__all__ = ["load", "load_consistency", "load_prior", "save"]

"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

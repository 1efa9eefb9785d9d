"""Guided posteriors: twisted sequential Monte Carlo on the reverse SDE."""

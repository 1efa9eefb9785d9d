"""Amortized posteriors: neural posterior score estimation."""

"""Amortized posteriors by neural posterior score estimation (NPSE)."""

"""Sequential Monte Carlo: weights, resampling, tempering and particle noise."""

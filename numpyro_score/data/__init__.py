"""Training data: batches of rows, standardization and supports."""

from numpyro_score.data.rows import Batch
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support

__all__ = ["Affine", "Batch", "Support"]

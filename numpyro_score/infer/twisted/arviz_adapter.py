"""Results of ScoreSDE for ArviZ."""

from typing import Any

from arviz_base import NumPyroInferenceAdapter

from numpyro_score.infer.twisted.score_sde import PER_DRAW, ScoreSDE


class ScoreSDEAdapter(NumPyroInferenceAdapter):
    """Attributes of a finished :class:`ScoreSDE` that ``arviz.from_numpyro`` reads.

    Args:
        inference: a :class:`ScoreSDE` after its run.

    Example:
        >>> issubclass(ScoreSDEAdapter, NumPyroInferenceAdapter)
        True
    """

    def __init__(self, inference: ScoreSDE) -> None:
        shape: Any = (inference.num_chains, inference.num_samples)
        super().__init__(
            inference,
            model=inference.model,
            model_args=inference._args,
            model_kwargs=inference._kwargs,
            sample_shape=shape,
        )
        self.inference = inference

    @property
    def sample_dims(self) -> list[str]:
        """The axes of draws."""
        return ["chain", "draw"]

    def get_samples(self, seed: int | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return draws with the axis of chains."""
        return self.inference.get_samples(group_by_chain=True)

    def get_sample_stats(self, **kwargs: Any) -> dict[str, Any]:
        """Return the extra fields that have one value per draw."""
        fields = self.inference.get_extra_fields(group_by_chain=True)
        return {name: fields[name] for name in PER_DRAW}

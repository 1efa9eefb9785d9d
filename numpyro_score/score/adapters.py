"""Scores of nets that other libraries trained: diffusers' schedulers and EDM."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.checks import (
    check_callable,
    check_count,
    check_flags,
    check_kind,
    check_positive,
    is_real,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.reprs import short_repr
from numpyro_score.score.model import ScoreModel
from numpyro_score.score.prediction import (
    NoiseLevelInput,
    as_partial,
    batch_of_one,
    split_data,
)
from numpyro_score.sde import SDE, VE, DiscreteVP
from numpyro_score.sde.discrete import as_process
from numpyro_score.typing import Position, Scalar

SCHEDULES = {
    "linear": DiscreteVP.linear,
    "scaled_linear": DiscreteVP.scaled_linear,
}
# schedulers of one table of betas, whose nets are told the step of that table
OF_BETAS = (
    "DDIM",
    "DDIMInverse",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverMultistepInverse",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UniPCMultistep",
)
PREDICTIONS = {
    "epsilon": ScoreModel.from_noise_prediction,
    "sample": ScoreModel.from_denoiser,
    "v_prediction": ScoreModel.from_v_prediction,
}


def from_diffusers(
    config: Mapping[str, Any] | str | Path,
    apply_fn: Callable,
    event_shape: tuple[int, ...],
    *,
    batched: bool = True,
    standardize: Affine | None = None,
    integer_steps: bool = True,
    data: Any = None,
) -> ScoreModel:
    """Return the score model of a net and the configuration of its noise scheduler.

    The configuration is ``scheduler_config.json`` of the library diffusers, of the
    DDPM, DDIM, PNDM, Euler or DPM-Solver kind: all describe one table of betas. No
    weights are read: load them from safetensors into the function.

    Args:
        config: the configuration, or the path of its file.
        apply_fn: (x_t, step) -> prediction, for a batch of points and one of steps.
        event_shape: shape of one point, as the net takes it.
        batched: False for a function of one point.
        standardize: as in :meth:`ScoreModel.from_noise_prediction`.
        integer_steps: as there.
        data: as there.

    Raises:
        ValueError: for a schedule or a prediction that is not known, and as
            :meth:`ScoreModel.from_noise_prediction`.

    Example:
        >>> config = {
        ...     "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
        ...     "beta_start": 0.00085, "beta_end": 0.012,
        ...     "prediction_type": "v_prediction",
        ... }  # of standard normal data v is 0
        >>> score = from_diffusers(config, lambda x, step: 0.0 * x, (2,))
        >>> round(float(score.score(jnp.ones(2), 0.5)[0]), 3)
        -1.0
    """
    settings = _read(config)
    check_flags(batched=batched, integer_steps=integer_steps)
    check_callable("apply_fn", apply_fn, "the net, a function of points and steps")
    prediction = settings.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise ValueError(
            "`config['prediction_type']` must be one of "
            f"{', '.join(PREDICTIONS)}: it says what the net estimates. Flow matching "
            f"is taken by ScoreModel.from_velocity. Got {prediction!r}."
        )
    fn = batch_of_one(apply_fn) if batched else apply_fn
    return PREDICTIONS[prediction](
        fn,
        _table(settings),
        event_shape,
        standardize=standardize,
        integer_steps=integer_steps,
        data=data,
    )


def _read(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    kinds = "a scheduler's configuration, or the path of its file"
    check_kind("config", config, (str, os.PathLike), kinds)
    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            "`config` must be a file of JSON, such as scheduler_config.json. "
            f"Got {config}: {error}."
        ) from error
    if not isinstance(settings, Mapping):
        raise ValueError(
            "`config` must be a file with one object of JSON: names and values of a "
            f"scheduler. Got {config}, which holds a {type(settings).__name__}."
        )
    return settings


def _table(config: Mapping[str, Any]) -> SDE:
    """Return the process of a scheduler's table of betas."""
    _check_class(config)
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "`config` must not set rescale_betas_zero_snr: at the last step such a net "
            "sees no data, and its noise level is infinite. Pass "
            "DiscreteVP.from_alphas_cumprod of all steps but the last to "
            "ScoreModel.from_v_prediction. Got rescale_betas_zero_snr=True."
        )
    num_steps = config.get("num_train_timesteps", 1000)
    name = "config['num_train_timesteps']"
    check_count(name, num_steps, "the length of the table of betas", least=2)
    if (betas := config.get("trained_betas")) is not None:
        is_table = isinstance(betas, list | tuple | np.ndarray)
        if not is_table or len(betas) != num_steps:
            raise ValueError(
                "`config['trained_betas']` must have one beta for each of "
                "num_train_timesteps steps. Got "
                f"{len(betas) if is_table else short_repr(betas)}, "
                f"expected {num_steps}."
            )
        return as_process(betas)
    schedule = config.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":
        return DiscreteVP.cosine(num_steps)
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(
            "`config['beta_schedule']` must be one of "
            f"{', '.join(SCHEDULES)}, squaredcos_cap_v2: of another pass the betas as "
            f"`trained_betas`. Got {schedule!r}."
        )
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if not all(map(is_real, ends)):
        raise ValueError(
            "`config['beta_start']` and `config['beta_end']` must be numbers: they are "
            f"the first and the last beta. Got {ends[0]!r}, {ends[1]!r}."
        )
    return SCHEDULES[schedule](num_steps, *ends)


def _check_class(config: Mapping[str, Any]) -> None:
    """Raise for a scheduler without a table of betas, or of nets told other times."""
    given = str(config.get("_class_name", "DDPM"))
    name = given.removeprefix("Flax").removesuffix("Scheduler")
    if name not in OF_BETAS:
        raise ValueError(
            "`config` must be of a scheduler with one table of betas, such as DDPM, "
            "DDIM, Euler or DPM-Solver: others have another process. Use "
            "ScoreModel.from_velocity for flow matching, from_edm for noise levels, "
            "and ScoreModel.from_noise_prediction or its like with DiscreteVP for "
            f"another table. Got {given}."
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            "`config['timestep_type']` must be 'discrete': other nets are told "
            "log(sigma)/4 in place of the step. Give from_edm a function that computes "
            f"it. Got {config['timestep_type']!r}."
        )


def from_edm(
    fn: Callable,
    event_shape: tuple[int, ...],
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float | None = None,
    batched: bool = False,
    standardize: Affine | None = None,
    data: Any = None,
) -> ScoreModel:
    r"""Return the score model of a net that takes the noise's sd, as EDM's.

    The net estimates x_0 of :math:`x_0 + \sigma n` (Karras et al. 2022). With
    ``sigma_data`` it is the raw net F, and the denoiser is :math:`c_{skip} x + c_{out}
    F(c_{in} x, \log(\sigma)/4)` with the coefficients of table 1.

    Args:
        fn: (x, sigma) -> E[x_0 | x], or the raw net if ``sigma_data`` is given.
        event_shape: shape of one point.
        sigma_min: lowest sd of the noise, in the units of the net.
        sigma_max: highest sd of the noise, in the units of the net.
        sigma_data: sd of the training data (0.5 for images in [-1, 1]); None for a net
            that is preconditioned inside.
        batched: whether ``fn`` takes batches.
        standardize: as in :meth:`ScoreModel.from_noise_prediction`.
        data: as there.

    Raises:
        ValueError: for a ``sigma_data`` that is not positive, and as
            :meth:`ScoreModel.from_noise_prediction`.

    Example:
        >>> score = from_edm(lambda x, sigma: x / (1 + sigma**2), (2,))
        >>> round(float(score.log_prob(jnp.zeros(2))), 2)
        -1.84
    """
    check_flags(batched=batched)
    check_callable("fn", fn, "a function of points and noise levels")
    one = batch_of_one(fn) if batched else fn
    if sigma_data is not None:
        check_positive("sigma_data", sigma_data, "the sd of the training data")
        raw = as_partial(one)
        one = jax.tree_util.Partial(_precondition, raw, float(sigma_data))
    sde, noise_input = VE(sigma_min, sigma_max), NoiseLevelInput()
    return ScoreModel._from_prediction(
        one, split_data, sde, event_shape, standardize, noise_input, data
    )


def _precondition(
    fn: Callable, sigma_data: Scalar, x: Position, sigma: Scalar, *context: Any
) -> Position:
    """Return D of a raw net F (Karras et al. 2022, eq. 7 and table 1)."""
    total = jnp.sqrt(jnp.square(sigma) + jnp.square(sigma_data))
    out = fn(x / total, jnp.log(sigma) / 4, *context)
    return (sigma_data / total) ** 2 * x + sigma * sigma_data / total * out

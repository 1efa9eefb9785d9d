r"""Neural posterior score estimation: amortized posteriors trained from the model.

Simulations :math:`(z_i, y_i)` of the model are draws of the joint law, so denoising
score matching on z with y as context learns :math:`\nabla \log p_t(z_t | y)` for every
y at once (Sharrock et al. 2022; Geffner et al. 2023). The NumPyro model is the
simulator: nothing but its sites is needed, not even a likelihood.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from numpyro_score.infer.amortized import AmortizedPosterior
from numpyro_score.infer.files import load_score
from numpyro_score.infer.simulator import Simulations, Simulator
from numpyro_score.loss import DenoisingScoreMatching, KnownScore, Loss
from numpyro_score.nn import MLP
from numpyro_score.parametrization import Bounded, Parametrization
from numpyro_score.sde import SDE, VE
from numpyro_score.train import Checkpoints, Progress, ScoreMatching
from numpyro_score.typing import PRNGKey

MIN_SIMULATIONS = 50  # fewer cannot be split into training and validation


@dataclass(frozen=True)
class NPSE:
    """Train an amortized posterior on simulations of a NumPyro model.

    Latents of every support are learned in unconstrained space, so that no draw leaves
    the prior's support. Latent sites that are not named are integrated out.

    Args:
        model: a NumPyro model that draws its observed sites when it is called without
            values for them; values that its arguments give are ignored.
        observed: names of the sites that will be observed, sample sites or
            deterministic ones.
        latents: names of the sites whose posterior is wanted; None for all.
        net: a configuration for z of the latents' size with the observation as context,
            as in :class:`~numpyro_score.train.ScoreMatching`; None for an MLP.
        sde: the noise process.
        loss: the objective. With ``DenoisingScoreMatching(target=KnownScore())`` the
            gradient of the joint density is used where the model has one.
        optim: an Optax optimizer; None for that of ``ScoreMatching``.
        drop_context: share of each batch that trains the prior's score.
        parametrization: what the net's output means.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(0, scale).expand([3]).to_event(1))
        >>> npse = NPSE(model, "y", net=MLP(1, width=8, depth=1, context_size=3))
        >>> npse.simulator().observed.shape  # npse.fit(key, 10_000) trains on draws
        (3,)
    """

    model: Callable
    observed: str | tuple[str, ...]
    latents: str | tuple[str, ...] | None = None
    net: Callable | nnx.Module | None = None
    sde: SDE = VE(0.002, 80.0)
    loss: Loss = DenoisingScoreMatching()
    optim: optax.GradientTransformation | None = None
    drop_context: float = 0.0
    parametrization: Parametrization = Bounded()

    def simulator(self, *args: Any, **kwargs: Any) -> Simulator:
        """Return the model with these arguments as a simulator."""
        return Simulator.of(self.model, self.observed, self.latents, args, kwargs)

    def fit(
        self,
        rng_key: PRNGKey,
        num_simulations: int,
        *args: Any,
        num_steps: int | None = None,
        batch_size: int | None = None,
        validation_share: float = 0.1,
        patience: int | None = 20,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
        mesh: Mesh | None = None,
        devices: Sequence[jax.Device] | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> AmortizedPosterior:
        """Simulate the model and train on the simulations.

        Args:
            rng_key: random key.
            num_simulations: how often the model is run.
            args: arguments of the model.
            num_steps: training steps; None for a number that grows with the number of
                simulations.
            batch_size: simulations per step; None for a rule of their number.
            validation_share: share of the simulations that is held out; 0 for none.
            patience: blocks of steps, of which a run has twenty, without a new lowest
                held-out loss after which training stops; the weights are those at the
                lowest. None for the last weights.
            checkpoint: as in :meth:`ScoreMatching.run
                <numpyro_score.train.ScoreMatching.run>`, like the next two.
            callbacks: functions called after every block.
            mesh: devices that share the rows of each batch.
            devices: devices that share the simulations.
            progress_bar: whether to show progress.
            kwargs: keyword arguments of the model.

        Raises:
            ValueError: for models without the named sites, and for too few simulations.
        """
        key_simulate, key_train = jax.random.split(rng_key)
        simulator = self.simulator(*args, **kwargs)
        _check_count(num_simulations)
        simulations = simulator.simulate(
            key_simulate, num_simulations, devices=devices, progress_bar=progress_bar
        )
        return self.train(
            key_train,
            simulator,
            simulations,
            num_steps=num_steps,
            batch_size=batch_size,
            validation_share=validation_share,
            patience=patience,
            checkpoint=checkpoint,
            callbacks=callbacks,
            mesh=mesh,
            progress_bar=progress_bar,
        )

    def train(
        self,
        rng_key: PRNGKey,
        simulator: Simulator,
        simulations: Simulations,
        *,
        num_steps: int | None = None,
        batch_size: int | None = None,
        validation_share: float = 0.1,
        patience: int | None = 20,
        **options: Any,
    ) -> AmortizedPosterior:
        """Train on simulations that are there already; arguments as in :meth:`fit`.

        Raises:
            ValueError: if too few of the simulations are left.
        """
        _check_count(len(simulations.z), simulations.num_dropped)
        train, held_out = _split(simulations, validation_share)
        data_score = None
        if isinstance(getattr(self.loss, "target", None), KnownScore):
            data_score = simulator.joint_score(train)
        rows = len(train.z)
        result = self._trainer(simulator).run(
            rng_key,
            default_num_steps(rows) if num_steps is None else num_steps,
            train.z,
            context=train.context,
            data_score=data_score,
            batch_size=min(256, rows) if batch_size is None else batch_size,
            validation=None if held_out is None else held_out.z,
            validation_context=None if held_out is None else held_out.context,
            patience=None if held_out is None else patience,
            **options,
        )
        return AmortizedPosterior(result.score, simulator)

    def load(
        self, path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> AmortizedPosterior:
        """Load a posterior that was saved, for the same model and arguments.

        Raises:
            FileNotFoundError: if ``path`` is no saved posterior.
            ValueError: if the model's sites have changed, or files were altered.
        """
        simulator = self.simulator(*args, **kwargs)
        return AmortizedPosterior(load_score(path, simulator, self.net), simulator)

    def _trainer(self, simulator: Simulator) -> ScoreMatching:
        size, shape = simulator.latents.size, simulator.observed.shape
        net = default_net(size, shape, self.drop_context > 0)
        return ScoreMatching(
            net if self.net is None else self.net,
            self.sde,
            self.loss,
            optim=self.optim,
            drop_context=self.drop_context,
            parametrization=self.parametrization,
        )


def default_net(size: int, shape: tuple[int, ...], optional_context: bool) -> MLP:
    """Return the net of latents of a size and observations of a shape.

    Example:
        >>> default_net(2, (3,), False).context_size
        3
    """
    return MLP(
        size,
        context_size=int(np.prod(shape)),
        optional_context=optional_context,
    )


def default_num_steps(num_simulations: int) -> int:
    """Return how many steps to train for.

    Example:
        >>> default_num_steps(1000)
        4000
    """
    return int(np.clip(2 * num_simulations, 4000, 20_000))


def _check_count(count: int, num_dropped: int = 0) -> None:
    if count < MIN_SIMULATIONS:
        raise ValueError(
            f"`num_simulations` must leave at least {MIN_SIMULATIONS} simulations to "
            "learn from; a few thousand are the rule. "
            f"Got {count} usable ones, {num_dropped} dropped."
        )


def _split(
    simulations: Simulations, share: float
) -> tuple[Simulations, Simulations | None]:
    """Hold out the last part of the simulations, which are in random order."""
    if not 0 <= share < 1:
        raise ValueError(
            "`validation_share` must lie in [0, 1): it is the share of the simulations "
            f"that is held out. Got {share}."
        )
    count = round(share * len(simulations.z))
    if count == 0:
        return simulations, None
    z, context, _ = simulations
    train = Simulations(z[:-count], context[:-count])
    return train, Simulations(z[-count:], context[-count:])

"""A NumPyro model as a simulator of latents and observations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import condition, seed, substitute, trace, uncondition
from numpyro.infer.util import log_density
from tqdm.auto import tqdm

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_count,
    check_devices,
    check_flags,
    check_key,
    check_share,
)
from numpyro_score.data.support import Support
from numpyro_score.infer.amortized.layout import (
    ObservationLayout,
    ObservedSite,
)
from numpyro_score.infer.amortized.model_sites import classify_sites
from numpyro_score.model.distribution import base_distribution
from numpyro_score.model.latents import LatentLayout, LatentSite
from numpyro_score.typing import PRNGKey, Scalar


class Simulations(NamedTuple):
    """Pairs of latents and observations, one simulation per row.

    - **z**: learned latents in unconstrained space.
    - **context**: observations.
    - **num_dropped**: number of simulations dropped because they were not finite.
    """

    z: Float[np.ndarray, "rows size"]
    context: Float[np.ndarray, "rows ..."]
    num_dropped: int = 0


def finite_rows(*parts: Any) -> Bool[np.ndarray, " rows"]:
    """Return for each row whether all its values are finite."""
    flat = [np.isfinite(part).reshape(len(part), -1).all(1) for part in parts]
    return np.logical_and.reduce(flat)


def drop_nonfinite(z: np.ndarray, context: np.ndarray) -> Simulations:
    """Return the finite simulations; warn of the others.

    Example:
        >>> z = np.zeros((2, 1))
        >>> drop_nonfinite(z, z).num_dropped
        0
    """
    good = finite_rows(z, context)
    num_dropped = int((~good).sum())
    if num_dropped:
        bad_latents = int((~finite_rows(z)).sum())
        warn_caller(
            f"{num_dropped} of {len(good)} simulations are not finite and were "
            f"dropped ({bad_latents} of them for a latent at the edge of its support). "
            "The posterior is that of the model given that its simulator succeeds."
        )
    return Simulations(z[good], context[good], num_dropped)


def train_validation_split(
    simulations: Simulations, share: float
) -> tuple[Simulations, Simulations | None]:
    """Return training and validation rows, the latter the last ``share`` of all.

    Simulations are independent, so that their order is random.

    Raises:
        ValueError: unless ``share`` lies in [0, 1).

    Example:
        >>> z = np.zeros((10, 1))
        >>> [len(part.z) for part in train_validation_split(Simulations(z, z), 0.2)]
        [8, 2]
    """
    check_share("validation_share", share, "are held out")
    count = round(share * len(simulations.z))
    if count == 0:
        return simulations, None
    z, context, _ = simulations
    train = Simulations(z[:-count], context[:-count])
    return train, Simulations(z[-count:], context[-count:])


@contextmanager
def _note_on_interrupt() -> Iterator[None]:
    """Say at Ctrl-C how simulations can be kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            "NPSE: interrupted before training, and no simulations are kept. To keep "
            "them, draw them in parts by `npse.simulator(...).simulate` and hand them "
            "to `npse.train`."
        )
        raise


BATCH_SIZE = 10_000  # simulations vmapped at a time; bounds memory


class resample_observed(uncondition):  # noqa: N801
    """Handler that draws the named sites even if the model conditions on values.

    Raises:
        ValueError: for sites whose law has no ``sample``, such as improper priors.
    """

    def __init__(self, fn: Callable, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Remove the observed value of a named site."""
        if msg.get("name") in self.names:  # messages for keys have no name
            super().process_message(msg)
        if msg["type"] == "sample" and msg["value"] is None:
            _check_drawable(msg["name"], msg["fn"])


def _check_drawable(name: str, fn: Any) -> None:
    """Raise for a law that cannot be drawn from."""
    law = type(base_distribution(fn))
    if getattr(law, "sample", None) is Distribution.sample:
        raise ValueError(
            f"Site '{name}' must have a law that can be drawn from: what is learned "
            "are simulations. Give it a proper prior, or a distribution with `sample`. "
            f"Got {law.__name__}."
        )


@dataclass(frozen=True, eq=False)
class Simulator:
    """A model with its arguments and the layout of its sites, from :meth:`of`.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1))
        >>> simulator = Simulator.of(model, "y")
        >>> simulator.simulate(jax.random.key(0), 100).z.shape
        (100, 1)
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    latents: LatentLayout
    observed: ObservationLayout
    nuisance: tuple[str, ...] = ()
    intractable: str = ""

    def summary(self) -> dict[str, str]:
        """Return the latent and the observed sites with their shapes."""
        latents = [f"{site.name} {site.shape}" for site in self.latents.sites]
        observed = [f"{site.name} {site.shape}" for site in self.observed.sites]
        return {"latent sites": ", ".join(latents), "observed": ", ".join(observed)}

    @classmethod
    def of(
        cls,
        model: Callable,
        observed: str | Sequence[str],
        latents: str | Sequence[str] | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        softness: float | None = None,
    ) -> "Simulator":
        """Return the simulator of a model, with the sites of its trace.

        Args:
            model: a NumPyro model whose observed sites can be drawn.
            observed: names of the sites that will be observed: sample sites, or
                deterministic sites with the output of a simulator.
            latents: names of the sites to learn; None for all latent sites.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            softness: softness of the map from intervals to the real numbers, see
                :class:`~numpyro_score.data.support.Support`; None for NumPyro's map.

        Raises:
            ValueError: if the model has no such sites, sites that cannot be drawn, as
                of improper priors, observed complex numbers, or sites whose density
                simulations do not represent: factors, other observed sites, scaled or
                masked sites; or if two runs with one key differ.
        """
        kwargs = {} if kwargs is None else kwargs
        observed = (observed,) if isinstance(observed, str) else tuple(observed)
        latents = (latents,) if isinstance(latents, str) else latents
        sites = classify_sites(
            partial(_trace, model, observed, args, kwargs),
            observed,
            latents,
        )
        shapes = {name: jnp.shape(site["value"]) for name, site in sites.all().items()}
        supports = {
            name: Support.of(site["fn"].support, shapes[name], softness)
            for name, site in sites.latents.items()
        }
        learned = [LatentSite(name, supports[name], shapes[name]) for name in supports]
        dtypes = {n: jnp.result_type(s["value"]) for n, s in sites.observed.items()}
        seen = [
            ObservedSite(name, shapes[name], str(dtype), sites.supports.get(name))
            for name, dtype in dtypes.items()
        ]
        return cls(
            model,
            args,
            kwargs,
            LatentLayout(tuple(learned)),
            ObservationLayout(tuple(seen)),
            sites.nuisance,
            sites.intractable,
        )

    def simulate(
        self,
        rng_key: PRNGKey,
        num_simulations: int,
        *,
        batch_size: int = BATCH_SIZE,
        devices: Sequence[jax.Device] | None = None,
        progress_bar: bool = False,
    ) -> Simulations:
        """Return the finite ones of ``num_simulations`` simulations.

        Simulation i is a function of the key and i, not of batches or devices.

        Args:
            rng_key: random key.
            num_simulations: number of simulations.
            batch_size: simulations per compiled call.
            devices: devices over which each batch is sharded; None for the default one.
            progress_bar: whether to show progress over the batches.
        """
        check_key("rng_key", rng_key)
        check_count("num_simulations", num_simulations, "a number of simulations")
        keys = jax.random.split(rng_key, num_simulations)
        return self.run_keys(
            keys, batch_size=batch_size, devices=devices, progress_bar=progress_bar
        )

    def run_keys(
        self,
        keys: PRNGKey,
        *,
        latents: Float[Array, "rows size"] | None = None,
        batch_size: int = BATCH_SIZE,
        devices: Sequence[jax.Device] | None = None,
        progress_bar: bool = False,
    ) -> Simulations:
        """Return one simulation per key, with latents z from the prior or as given."""
        check_devices(devices)
        check_count("batch_size", batch_size, "a number of simulations")
        check_flags(progress_bar=progress_bar)
        count = len(keys)
        num_devices = 1 if devices is None else len(devices)
        size = min(batch_size, count)
        size = -(-size // num_devices) * num_devices
        parts = []
        with (
            tqdm(total=count, disable=not progress_bar, desc="simulate") as bar,
            _note_on_interrupt(),
        ):
            for start in range(0, count, size):
                index = jnp.minimum(jnp.arange(start, start + size), count - 1)
                given = None if latents is None else latents[index]
                batch = _run(self, _shard(keys[index], devices), given)
                kept = min(size, count - start)
                parts.append([np.asarray(part)[:kept] for part in batch])
                bar.update(kept)
        z, context = (np.concatenate(part) for part in zip(*parts, strict=True))
        return drop_nonfinite(z, context)

    def draw_latents(self, keys: PRNGKey) -> Float[Array, "rows size"]:
        """Return z of the simulations of these keys, without observations."""
        return _run_latents(self, keys)

    def draw_context(
        self, rng_key: PRNGKey, z: Float[Array, " size"]
    ) -> Float[Array, "..."]:
        """Return the context of one simulation at given latents z."""
        return self._one(rng_key, z)[1]

    def draw_nuisance(
        self, rng_key: PRNGKey, z: Float[Array, " size"]
    ) -> dict[str, Array]:
        """Return prior draws of the sites not learned, given the learned ones."""
        sites = self.trace(rng_key, self.latents.unflatten(z))
        return {name: sites[name]["value"] for name in self.nuisance}

    def trace(self, rng_key: PRNGKey, values: dict[str, Array]) -> dict[str, Any]:
        """Return the trace with observed sites drawn, but where values are given."""
        model, names = self.model, self.observed.names
        return _trace(model, names, self.args, self.kwargs, rng_key, values)

    def to_numpyro(self, values: dict[str, Array]) -> dict[str, Array]:
        """Return values of all latent sites in NumPyro's unconstrained space."""
        # draws of observed sites only, which are not used
        sites = self.trace(jax.random.key(0), values)
        return {
            name: biject_to(sites[name]["fn"].support).inv(value)
            for name, value in values.items()
        }

    def log_prior(self, z: Float[Array, " size"], key: PRNGKey | None = None) -> Scalar:
        """Return log p(z) of the learned latents, as a density in z, in nats.

        Other latents are drawn with the key. If the value depends on the key, the
        marginal density of the learned ones is not known; where it is, none is needed.
        """
        key = jax.random.key(0) if key is None else key
        sites = self.trace(key, self.latents.unflatten(z))
        terms = [
            sites[name]["fn"].log_prob(sites[name]["value"]).sum()
            for name in self.latents.names
        ]
        return sum(terms, self.latents.log_abs_det_jacobian(z))

    def log_joint(
        self, z: Float[Array, " size"], context: Float[Array, "..."]
    ) -> Scalar:
        """Return log p(z, y) at one point, as a density in z, in nats.

        Raises:
            ValueError: if the model has no tractable joint density of these sites.
        """
        self.check_tractable()
        values = self.observed.unflatten(context)
        key = jax.random.key(0)  # no site is drawn
        model = condition(seed(self.model, key), data=values)
        latents = self.latents.unflatten(z)
        value, _ = log_density(model, self.args, self.kwargs, latents)
        return value + self.latents.log_abs_det_jacobian(z)

    def check_tractable(self) -> None:
        """Raise unless the joint density of latents and observation is known."""
        if self.intractable:
            raise ValueError(
                "The model must have a tractable likelihood for this: a density of its "
                "observed sites given the latents that were learned. But "
                f"{self.intractable}."
            )

    def joint_score(self, simulations: Simulations) -> Float[np.ndarray, "rows size"]:
        """Return the gradient of log p(z, y) in z at every simulation.

        Raises:
            ValueError: if the model has no tractable joint density of these sites.
        """
        return np.asarray(_joint_score(self, simulations.z, simulations.context))

    def prior_score(
        self, z: Float[Array | np.ndarray, "rows size"]
    ) -> Float[np.ndarray, "rows size"]:
        """Return the gradient of log p(z) at every row; all latents are learned."""
        return self.prior_density(z)[1]

    def prior_density(
        self, z: Float[Array | np.ndarray, "rows size"]
    ) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, "rows size"]]:
        """Return log p(z) and its gradient at every row; all latents are learned."""
        value, slope = _prior_density(self, z)
        return np.asarray(value), np.asarray(slope)

    def _one(self, key: PRNGKey, z: Array | None = None) -> tuple[Array, Array]:
        sites = self.trace(key, {} if z is None else self.latents.unflatten(z))
        values = {name: site["value"] for name, site in sites.items()}
        latents = {name: values[name] for name in self.latents.names}
        return self.latents.flatten(latents), self.observed.flatten(values)


@partial(jax.jit, static_argnums=0)
def _run(
    simulator: Simulator, keys: PRNGKey, z: Array | None = None
) -> tuple[Array, Array]:
    """Return z and context of one simulation per key, in one program."""
    return jax.vmap(simulator._one)(keys, z)


@partial(jax.jit, static_argnums=0)
def _run_latents(simulator: Simulator, keys: PRNGKey) -> Array:
    """Return z alone; XLA removes the computation of the observations."""
    return jax.vmap(lambda key: simulator._one(key)[0])(keys)


@partial(jax.jit, static_argnums=0)
def _joint_score(simulator: Simulator, z: Array, context: Array) -> Array:
    return jax.lax.map(
        lambda row: jax.grad(simulator.log_joint)(*row),
        (z, context),
        batch_size=BATCH_SIZE,
    )


@partial(jax.jit, static_argnums=0)
def _prior_density(simulator: Simulator, z: Array) -> tuple[Array, Array]:
    density = jax.value_and_grad(lambda row: jnp.asarray(simulator.log_prior(row)))
    return jax.lax.map(density, z, batch_size=BATCH_SIZE)


def _trace(
    model: Callable,
    observed: Sequence[str],
    args: tuple,
    kwargs: dict,
    key: PRNGKey,
    values: dict[str, Array] | None = None,
) -> dict:
    """Return the trace with observed sites drawn, but where values are given."""
    drawn = resample_observed(model, observed)
    if values:
        drawn = substitute(drawn, data=values)
    # parameters that are NaN at some draws give simulations that are dropped
    with validation_enabled(False):
        return trace(seed(drawn, key)).get_trace(*args, **kwargs)


def _shard(keys: PRNGKey, devices: Sequence[jax.Device] | None) -> PRNGKey:
    """Return a batch of keys sharded over devices."""
    if devices is None:
        return keys
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    return jax.device_put(keys, jax.sharding.NamedSharding(mesh, jax.P("devices")))

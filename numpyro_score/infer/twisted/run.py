"""One compiled program from keys to draws, over chains that devices share."""

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from numpyro.handlers import seed
from numpyro.infer.util import log_density

from numpyro_score.checks import check_count, is_traced
from numpyro_score.data.inputs import is_number_dtype
from numpyro_score.data.rows import evenly_spaced
from numpyro_score.fingerprint import digest_program
from numpyro_score.infer.twisted.linear_solve import MAX_DENSE, NUM_KRYLOV
from numpyro_score.infer.twisted.replicates import ChainResult, SamplerSizes, run_chain
from numpyro_score.infer.twisted.site_checks import check_latents
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.data_range import find_off_data
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.learned_sites import exclude_learned
from numpyro_score.model.level_covariance import LevelCovariance, measure_covariance
from numpyro_score.model.noise_levels import SiteTime
from numpyro_score.model.potential import model_potential
from numpyro_score.run_verdict import Finding
from numpyro_score.score.identity import IdentityKey
from numpyro_score.typing import PRNGKey

COVARIANCES = ("fixed", "jacobian")
# Not measured but between two measurements: Jacobians are better with 4 observations
# of separate modes, and no better at several times the cost with the 32 observations of
# `python -m tests.benchmarks.twist`.
MAX_DERIVATIVES = 8
# of each chain, compared with the data of a score: a share of .01 is 10 of them
MAX_COMPARED = 1000


def check_covariance(covariance: Any) -> None:
    """Raise for a name that no covariance of x_0 given x_t has."""
    is_name = covariance is None or isinstance(covariance, str)
    if not is_name or covariance not in (None, *COVARIANCES):
        raise ValueError(
            '`covariance` must be "fixed", "jacobian" or None: it names how the '
            f"covariance of x_0 given x_t is found. Got {covariance!r}."
        )


def check_num_particles(num_particles: Any) -> None:
    """Raise for fewer than two particles."""
    why = "the number of particles, which are weighted against each other"
    check_count("num_particles", num_particles, why, least=2)


class _Slot:
    """Stands where an array was."""


_SLOT = _Slot()


class StaticArguments(NamedTuple):
    """Arguments with their arrays taken out; hashable where the rest is.

    ``program`` is a digest of what a model computes with them, where it is known: what
    the model reads besides them, such as a global variable, may differ between runs.
    """

    structure: Any
    leaves: tuple
    program: str = ""

    def combine(self, arrays: list[Array]) -> tuple[tuple, dict]:
        """Return the arguments with arrays put in."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _SLOT else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def partition_arguments(
    args: tuple, kwargs: dict
) -> tuple[StaticArguments, list[Array]]:
    """Return the static part of a model's arguments, and the arrays that fill it.

    Python numbers, strings and None stay in the static part: models branch on them.

    Example:
        >>> static, arrays = partition_arguments((3, np.ones(2)), {"y": None})
        >>> static.combine(arrays)
        ((3, Array([1., 1.], dtype=float32)), {'y': None})
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [_is_array(leaf) for leaf in leaves]
    arrays = [
        jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array
    ]
    rest = [
        _SLOT if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
    ]
    return StaticArguments(structure, tuple(rest)), arrays


def _is_array(leaf: Any) -> bool:
    """Return whether an argument is an array of numbers or keys, not of objects."""
    if isinstance(leaf, np.ndarray):
        return is_number_dtype(leaf.dtype)
    return isinstance(leaf, jax.Array)


def model_arguments(
    model: Callable, args: tuple, kwargs: dict
) -> tuple[StaticArguments, list[Array]]:
    """Return the arguments in two parts, with a digest of the model's program.

    The model is traced for it, so that compiled programs are not used again after what
    it reads besides its arguments has changed.

    Raises:
        TypeError: for an argument that can be neither traced nor hashed.
        ValueError: for discrete latent sites and for a model without learned ones.
    """
    static, arrays = partition_arguments(args, kwargs)
    for leaf in static.leaves:
        if not isinstance(leaf, Hashable):
            raise TypeError(
                "Arguments of `model` must be arrays, numbers, or objects that can be "
                "hashed: the compiled program is kept by them. Pass its values as an "
                f"array, for example by `to_numpy()`. Got {type(leaf).__name__}."
            )

    def read(arrays: list[Array]) -> Any:
        args, kwargs = static.combine(arrays)
        check_latents(model, args, kwargs)
        potential = model_potential(model, args, kwargs)
        z = potential.prototype
        return potential.evaluate(z), potential.constrain(z)

    return static._replace(program=digest_program(read, arrays)), arrays


class RunSettings(NamedTuple):
    """Settings for which a program is compiled."""

    model: Callable
    static: StaticArguments
    sizes: SamplerSizes
    report: Callable[[Any], None] | None


@partial(jax.jit, static_argnames=("model", "static"))
def learned_times(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> dict[str, SiteTime]:
    """Return the times of the learned sites, which may be computed from arguments.

    Raises:
        ValueError: for discrete latent sites and for a model without learned ones.
    """
    args, kwargs = static.combine(arrays)
    return SiteTime.of(check_latents(model, args, kwargs))


def _trace_learned(
    arrays: list[Array] | list[jax.ShapeDtypeStruct],
    model: Callable,
    static: StaticArguments,
) -> dict[str, ScoreDistribution]:
    """Return the learned sites of a model, which is traced and not computed."""
    found: dict[str, ScoreDistribution] = {}

    def look(arrays: list[Array]) -> None:
        args, kwargs = static.combine(arrays)
        found.update(check_latents(model, args, kwargs))

    jax.eval_shape(look, arrays)
    return found


def num_derivatives(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> int:
    """Return how many derivatives of the net a covariance of each point takes.

    One for each observed Normal number, or for each latent one where these are fewer,
    as :mod:`~numpyro_score.infer.twisted.linear_solve` needs them.
    """
    return _one_per_derivative.eval_shape(arrays, model, static).size


@partial(jax.jit, static_argnames=("model", "static"))
def _one_per_derivative(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> Array:
    """Return an array as long as the number of derivatives; traced and never run."""
    args, kwargs = static.combine(arrays)
    twist = Twist.of(model, args, kwargs)
    z = twist.potential.prototype
    num = len(twist.likelihood_terms(z).residual)
    latent = sum(z[name].size for name in twist.learned)
    if num > MAX_DENSE:
        num = latent if latent <= MAX_DENSE else 2 * NUM_KRYLOV
    return jnp.zeros(num)


def choose_covariance(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> str:
    """Return how the covariance of x_0 given x_t is found at the least cost."""
    number = num_derivatives(arrays, model, static)
    return "fixed" if number > MAX_DERIVATIVES else "jacobian"


def learned_covariances(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> dict[str, LevelCovariance]:
    """Return the covariances of x_0 given x_t of each learned site, at all levels.

    A score that was made outside of the model is measured once; one that the model
    makes of its arguments is measured at every run.
    """
    first, again = (_trace_learned(arrays, model, static) for _ in range(2))
    made = [name for name in first if first[name].score is not again[name].score]
    if made:
        return _measure_in_model(arrays, model, static)
    return {
        name: _measure_once(IdentityKey.of(law.score)) for name, law in first.items()
    }


_measure = jax.jit(measure_covariance)


@lru_cache(maxsize=8)
def _measure_once(key: IdentityKey) -> LevelCovariance:
    """Return the covariances of a score, measured once for each of the last eight."""
    return _measure(key.tree)


@partial(jax.jit, static_argnames=("model", "static"))
def _measure_in_model(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> dict[str, LevelCovariance]:
    args, kwargs = static.combine(arrays)
    laws = check_latents(model, args, kwargs)
    return {name: measure_covariance(law.score) for name, law in laws.items()}


@partial(jax.jit, static_argnames=("settings", "num_devices"))
def run_chains(
    keys: PRNGKey,
    ts: Float[Array, " ts"],
    arrays: list[Array],
    settings: RunSettings,
    num_devices: int,
    covariances: dict[str, LevelCovariance] | None = None,
) -> ChainResult:
    """Return the results of independent chains, along their first axis.

    Chains run one after the other on each device, so that they are the same on any
    number of devices.

    Args:
        keys: one per chain.
        ts: decreasing times of the levels.
        arrays: the arrays among the model's arguments.
        settings: model, its other arguments and sizes.
        num_devices: how many devices share the chains; it divides their number.
        covariances: of x_0 given x_t, by learned site, see
            :func:`learned_covariances`; None for those of each point.
    """

    def several(
        keys: PRNGKey, ts: Array, arrays: list[Array], covariances: Any
    ) -> ChainResult:
        args, kwargs = settings.static.combine(arrays)

        def one(key: PRNGKey) -> ChainResult:
            twist = Twist.of(settings.model, args, kwargs, covariances)
            return run_chain(key, twist, ts, settings.sizes, settings.report)

        return jax.lax.map(one, keys)

    if num_devices == 1:
        return several(keys, ts, arrays, covariances)
    mesh = Mesh(jax.devices()[:num_devices], ("chains",))
    chains, whole = PartitionSpec("chains"), PartitionSpec()
    return jax.shard_map(
        several,
        mesh=mesh,
        in_specs=(chains, whole, whole, whole),
        out_specs=chains,
        check_vma=False,
    )(keys, ts, arrays, covariances)


def find_draws_off_data(
    samples: dict[str, Array],
    model: Callable,
    static: StaticArguments,
    arrays: list[Array],
) -> list[Finding]:
    """Return findings for learned sites whose draws their data do not reach.

    Args:
        samples: values of the sites, chains by draws.
        model: the model.
        static: its arguments without arrays.
        arrays: the arrays among them.
    """
    num_draws = len(next(iter(samples.values()))[0])
    chosen = evenly_spaced(num_draws, MAX_COMPARED)
    some = {name: value[:, chosen] for name, value in samples.items()}
    shapes = tuple(jax.typeof(leaf) for leaf in arrays)
    laws = _constant_laws(model, static, shapes)
    if not laws:
        args, kwargs = static.combine(arrays)
        laws = check_latents(model, args, kwargs)
    return find_off_data(laws, partial(_learned_points, arrays, some, model, static))


@lru_cache(maxsize=32)
def _constant_laws(
    model: Callable, static: StaticArguments, shapes: tuple
) -> dict[str, ScoreDistribution]:
    """Return the learned sites if none depends on arrays among the arguments."""
    laws = _trace_learned(
        [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes], model, static
    )
    return {} if any(map(is_traced, laws.values())) else laws


@partial(jax.jit, static_argnames=("model", "static"))
def _learned_points(
    arrays: list[Array],
    samples: dict[str, Array],
    model: Callable,
    static: StaticArguments,
) -> dict[str, Array]:
    """Return the unconstrained points of the learned sites at all draws."""
    args, kwargs = static.combine(arrays)

    def one(values: dict[str, Array]) -> dict[str, Array]:
        slots = exclude_learned(seed(model, jax.random.key(0)))  # nothing is drawn
        log_density(slots, args, kwargs, values)
        return slots.points

    return jax.vmap(one)(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples))


def count_devices(num_chains: int) -> int:
    """Return the largest number of devices that divides the number of chains."""
    available = jax.device_count()
    return max(n for n in range(1, available + 1) if num_chains % n == 0)

"""Objectives and nets on mixtures with known score, on equal data and steps.

Per line: the relative Fisher divergence E|s - s*|^2 / E|s*|^2 at noise levels in sd of
the data, the mean squared error of the predicted noise over all levels, the largest
error of a mode's weight among 10 000 draws, and the seconds of training (with
compilation unless ``--time``; compare within one run only).

    python -m tests.benchmarks.learning --dimensions 2 --num-steps 3000
    python -m tests.benchmarks.learning --density --num-steps 10000
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score import MLP, VE, VP, RectifiedFlow, ScoreMatching, loss
from numpyro_score.data.standardize import Affine
from numpyro_score.loss.noise_levels import LogUniform
from numpyro_score.nn import Energy, SetTransformer
from numpyro_score.score.preconditioning import EDM, NoisePrediction
from tests.targets import Mixture

LEVELS = (0.01, 0.1, 0.3, 1.0, 3.0)
DSM = loss.DenoisingScoreMatching


def mixture(dimensions):
    """Four modes of about unit variance, weights 0.1 to 0.4, in the first two axes."""
    corners = [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]
    locs = tuple(corner + (0.0,) * (dimensions - 2) for corner in corners)
    return Mixture((0.1, 0.2, 0.3, 0.4), locs, (0.25,) * 4)


def trainers(size):
    """What is compared; the first is the default."""
    net = MLP(size, width=64, depth=3)

    def trainer(net=net, sde=VE(), objective=DSM(), **options):
        return ScoreMatching(net, sde, objective, standardize=identity, **options)

    vp, ncsn = VP(), DSM(loss.GeometricLevels(10), loss.SigmaSquaredWeight())
    return {
        "default (DSM, EDM weights, log-normal)": trainer(),
        "DSM, EDM parametrization": trainer(parametrization=EDM()),
        "DSM, log-uniform levels": trainer(objective=DSM(LogUniform())),
        "VP, uniform t, noise prediction": trainer(
            sde=vp,
            objective=DSM(loss.UniformTime(vp), loss.SigmaSquaredWeight()),
            parametrization=NoisePrediction(),
        ),
        "NCSN, 10 levels": trainer(objective=ncsn),
        "flow matching": trainer(sde=RectifiedFlow(), objective=loss.FlowMatching()),
        "known score of the data": trainer(objective=DSM(target=loss.TargetScore())),
        "stable target field": trainer(objective=DSM(target=loss.StableTargetField())),
        "sliced, log-uniform levels": trainer(
            objective=loss.SlicedScoreMatching(LogUniform())
        ),
        "DSM at one level, 0.1": trainer(objective=DSM(loss.SingleLevel(0.1))),
        "sliced, data without noise": trainer(objective=loss.SlicedScoreMatching()),
        "default, bfloat16": trainer(compute_dtype=jnp.bfloat16),
        "default, energy net": trainer(Energy(net)),
        "default, set transformer": trainer(
            SetTransformer((size,), tuple(range(size)), width=32, depth=2)
        ),
    }


def identity(data):
    return Affine.identity(data.shape[1:])


def scores_at(score, law, x0, level, key):
    """Return the noise scale at a level, and learned and exact scores of noisy x0."""
    t = score.sde.time(level)
    alpha, sigma = score.sde.marginal(t)
    x = alpha * x0 + sigma * jax.random.normal(key, x0.shape)
    exact = jax.vmap(lambda x: law.score(x, alpha, sigma))(x)
    return sigma, score.score(x, t), exact


def divergences(score, law, x0):
    """Return the relative Fisher divergence at every level that the process has."""
    found = []
    for level in LEVELS:
        _, learned, exact = scores_at(score, law, x0, level, jax.random.key(11))
        error = jnp.square(learned - exact).sum(1).mean()
        found.append(float(error / jnp.square(exact).sum(1).mean()))
    return found


def mode_error(score, law):
    """Return the largest error of a mode's share of 10 000 draws."""
    draws = score.sample(jax.random.key(12), (10_000,))
    square = jnp.square(draws[:, None] - jnp.array(law.locs)).sum(-1)
    share = np.bincount(square.argmin(1), minlength=len(law.weights)) / len(draws)
    return float(np.abs(share - np.array(law.weights)).max())


def noise_error(score, law, x0, num_levels=20):
    """Return E|n - n*|^2 / d of the predicted noise, mean over geometric levels."""
    found = []
    for level in np.geomspace(score.sde.sigma_min, score.sde.sigma_max, num_levels):
        key = jax.random.key(13)
        sigma, learned, exact = scores_at(score, law, x0, float(level), key)
        found.append(float(jnp.square(sigma * (learned - exact)).mean()))
    return float(np.mean(found))


def density(args):
    """Train on two overlapping modes; print and return the density's mean error."""
    law = Mixture((0.3, 0.7), ((-1.0, -0.5), (0.8, 0.4)), (0.6, 0.4))
    data = law.sample(jax.random.key(0), (1_000_000,))
    x0 = law.sample(jax.random.key(10), (2_000,))
    objective = DSM(target=loss.TargetScore())
    trainer = ScoreMatching(MLP(2), VE(), objective)
    result = trainer.run(
        jax.random.key(2),
        args.num_steps,
        data,
        data_score=jax.vmap(law.score)(data),
        batch_size=1024,
    )
    error = result.score.log_prob(x0) - jax.vmap(law.log_density)(x0)
    relative = jnp.abs(jnp.expm1(error))
    side = jnp.linspace(-4.0, 4.0, 101)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    mass = jnp.exp(result.score.log_prob(grid)).sum() * (side[1] - side[0]) ** 2
    print(f"{args.num_steps} steps of 1024 rows, |density / exact - 1| at draws:")
    print(f"mean {relative.mean():.4f}, median {jnp.median(relative):.4f}")
    print(f"integral of the density {mass:.4f}")
    return float(relative.mean()), float(mass)


def train(trainer, data, data_score, args):
    """Return the result and the seconds of a second run, which compiles nothing."""
    extra = {}
    if isinstance(getattr(trainer.loss, "target", None), loss.TargetScore):
        extra["data_score"] = data_score

    def run(key):
        start = time.perf_counter()
        result = trainer.run(
            jax.random.key(key), args.num_steps, data, progress_bar=False, **extra
        )
        jax.block_until_ready(result.losses)
        return result, time.perf_counter() - start

    if args.time:
        run(1)
    return run(2)


def main(args):
    if args.density:
        density(args)
        return
    law = mixture(args.dimensions)
    data = law.sample(jax.random.key(0), (20_000,))
    x0 = law.sample(jax.random.key(10), (2_000,))
    data_score = jax.vmap(law.score)(data)
    print(f"{args.dimensions}-d mixture, {args.num_steps} steps of 256 rows")
    header = "  ".join(f"{level:>7}" for level in LEVELS)
    print(f"{'':40}  {header}  {'noise':>7}  {'mode':>6}  {'s':>6}")
    for name, trainer in trainers(args.dimensions).items():
        if args.only and args.only not in name:
            continue
        result, seconds = train(trainer, data, data_score, args)
        found = divergences(result.score, law, x0)
        row = "  ".join(f"{value:7.4f}" for value in found)
        noise = noise_error(result.score, law, x0)
        error = mode_error(result.score, law)
        print(
            f"{name:40}  {row}  {noise:7.5f}  {error:6.3f}  {seconds:6.1f}", flush=True
        )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--only", default="", help="part of the names to run")
    parser.add_argument("--density", action="store_true", help="only a density")
    parser.add_argument("--time", action="store_true", help="train twice, time one")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

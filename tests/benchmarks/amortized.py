"""NPSE on the tasks of sbibm: C2ST against its reference draws, one configuration.

Per line: the task, the number of simulations, the protocol (random forest with 2000
draws a side, or sbibm's perceptron with 10 000), the mean C2ST over the observations
(0.5 is perfect), the lowest and the highest, published figures of the same protocol,
and the seconds of training and of the second 10 000 draws. C2ST of different protocols
cannot be compared. ``files`` is what ``pip download --no-deps sbibm`` leaves.

    python -m tests.benchmarks.amortized sbibm-1.1.0-py2.py3-none-any.whl
    python -m tests.benchmarks.amortized FILES --tasks slcp --simulations 1000 --mlp
    python -m tests.benchmarks.amortized FILES --simulations 100000

``--no-likelihood`` trains on simulations alone; by default the gradient of the joint
density is used where the model has one. ``--correct`` also weighs the 10 000 draws by
the model's density and prints the C2ST of 2000 of them, none twice, as protocol RF*;
after it the median k-hat of the observations.
"""

import argparse
import time
import warnings

import jax
import numpy as np

from numpyro_score.diagnostics import ForestProtocol, MLPProtocol, c2st
from numpyro_score.infer import NPSE
from numpyro_score.loss import DenoisingScoreMatching
from tests.benchmarks.sbibm_tasks import TASKS, read_reference

PROTOCOLS = {"RF": (ForestProtocol(), 2000), "MLP": (MLPProtocol(), 10_000)}
NUM_DRAWS = 10_000

# Lueckmann et al. 2021 (NPE, and the best sequential method; MLP), Sharrock et al. 2022
# (NPSE-VE; RF), and the best published by RF; for 1e3, 1e4 and 1e5 simulations.
PUBLISHED = {
    ("two_moons", "MLP"): {
        "NPE": (0.725, 0.606, 0.542),
        "best sequential": (0.643, 0.554, 0.530),
    },
    ("gaussian_linear", "MLP"): {
        "NPE": (0.694, 0.552, 0.506),
        "best sequential": (0.628, 0.544, 0.507),
    },
    ("gaussian_mixture", "MLP"): {
        "NPE": (0.731, 0.661, 0.555),
        "best sequential": (0.697, 0.583, 0.533),
    },
    ("two_moons", "RF"): {"NPSE-VE": (0.570, 0.513, 0.502)},
    ("gaussian_linear", "RF"): {
        "NPSE-VE": (0.705, 0.572, 0.507),
        "best": (0.538, 0.505, 0.499),
    },
    ("gaussian_mixture", "RF"): {
        "NPSE-VE": (0.613, 0.528, 0.502),
        "best": (0.547, 0.511, 0.501),
    },
}
PUBLISHED_SIZES = (1000, 10_000, 100_000)


def train(task, num_simulations, args):
    """Return the posterior and the seconds of training, compilation included."""
    loss = DenoisingScoreMatching() if args.no_likelihood else None
    npse = NPSE(TASKS[task].model, "x", loss=loss)
    start = time.perf_counter()
    posterior = npse.fit(
        jax.random.key(args.seed),
        num_simulations,
        num_steps=args.num_steps,
        check=False,
        progress_bar=False,
    )
    jax.block_until_ready(posterior.score)
    return posterior, time.perf_counter() - start


def draw(posterior, references):
    """Return draws for every observation, and the seconds of the last call."""
    draws = []
    for i, reference in enumerate(references):
        start = time.perf_counter()
        sample = posterior.sample(jax.random.key(i), reference.observation, NUM_DRAWS)
        draws.append(np.asarray(sample["theta"]))
        seconds = time.perf_counter() - start
    return draws, seconds


def accuracies(draws, references, protocol):
    """Return the C2ST of every observation."""
    classifier, count = PROTOCOLS[protocol]
    count = min([count, *map(len, draws)])
    return [
        c2st(reference.draws[:count], drawn[:count], classifier).accuracy
        for drawn, reference in zip(draws, references, strict=True)
    ]


def correct(posterior, references):
    """Return draws that the model's density has corrected, and all k-hat."""
    draws, khats = [], []
    for i, reference in enumerate(references):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of k-hat, which is printed
            weighed = posterior.importance(
                jax.random.key(i), reference.observation, NUM_DRAWS
            )
        few = min(NUM_DRAWS // 5, 2000)
        sample = weighed.resample(jax.random.key(i), few, replace=False)
        draws.append(np.asarray(sample["theta"]))
        khats.append(weighed.khat)
    return draws, khats


def published(task, protocol, num_simulations):
    """Return the published figures as text."""
    if num_simulations not in PUBLISHED_SIZES:
        return ""
    i = PUBLISHED_SIZES.index(num_simulations)
    rows = PUBLISHED.get((task, protocol), {})
    return ", ".join(f"{name} {values[i]:.3f}" for name, values in rows.items())


def main(args):
    numbers = args.observations or range(1, 11)
    print(
        f"{'task':24} {'simulations':>11} {'protocol':>8} {'C2ST':>6} {'min':>6} "
        f"{'max':>6} {'train s':>8} {'10k s':>6}  published"
    )
    for task in args.tasks:
        references = [read_reference(args.files, task, i) for i in numbers]
        for num_simulations in args.simulations:
            posterior, seconds = train(task, num_simulations, args)
            draws, draw_seconds = draw(posterior, references)
            for protocol in PROTOCOLS if args.mlp else ["RF"]:
                found = accuracies(draws, references, protocol)
                times = f"{seconds:8.1f} {draw_seconds:6.2f}"
                known = published(task, protocol, num_simulations)
                report(task, num_simulations, protocol, found, f"{times}  {known}")
            if args.correct:
                draws, khats = correct(posterior, references)
                found = accuracies(draws, references, "RF")
                note = f"k-hat {np.median(khats):.2f}"
                report(task, num_simulations, "RF*", found, note)


def report(task, num_simulations, protocol, found, note):
    """Print one line of the table."""
    print(
        f"{task:24} {num_simulations:11d} {protocol:>8} {np.mean(found):6.3f} "
        f"{min(found):6.3f} {max(found):6.3f} {note}",
        flush=True,
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", help="wheel of sbibm, or a folder with it")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS)[:3], choices=TASKS)
    parser.add_argument("--simulations", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--observations", nargs="+", type=int, help="1 to 10; all")
    parser.add_argument("--num-steps", type=int, help="training steps; NPSE's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mlp", action="store_true", help="by sbibm's protocol too")
    parser.add_argument("--no-likelihood", action="store_true")
    parser.add_argument("--correct", action="store_true", help="by the model's density")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

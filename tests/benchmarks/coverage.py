"""Coverage of posteriors under a prior learned from digits, over many digits.

The tasks, the learned prior and the measure of coverage are those of
``examples/01_digits.py``, whose chains need minutes for each digit. Here
:class:`~numpyro_score.ScoreSDE` draws from the same posteriors, without chains.

    python -m tests.benchmarks.coverage                   # forty digits, two tasks
    python -m tests.benchmarks.coverage --num-digits 3    # fewer
    python -m tests.benchmarks.coverage --evidence        # of the first digit

Coverage of a right posterior agrees with the mass of its intervals, and the error of
its mean with its sd. Particles of one run share ancestors, so that intervals of few
particles are too narrow; the last column, the standard error of the log evidence, says
how few.

The evidence of one digit is compared with that of tempered chains, at the level of the
example and at the level in use. Particles follow the reverse SDE of the score; chains
know line integrals of it beside draws by its solver. Of an exact score all are one law.
"""

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_score import ScoreSDE

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "01_digits.py"


def results_of(
    example: SimpleNamespace, args: Any, task: Any, score: Any, data: Any
) -> tuple[list, list, float]:
    """Return what the example judges, of the learned and the Gaussian prior.

    The last is the mean standard error of the log evidence.
    """
    scale, t = float(score.standardize.scale.mean()), score.sde.time(args.level)
    inference = ScoreSDE(
        example.make_model(score, task.operator),
        num_samples=args.num_particles,
        num_particles=args.num_particles,
        levels=args.num_levels,
        progress_bar=False,
    )
    learned, gaussian, errors = [], [], []
    for index in tqdm(range(args.num_digits), desc=task.name):
        image = data.test[index]
        truth, y = example.measure(args, task, image, scale, index)
        inference.run(jax.random.key(args.seed + index), y, t)
        draws = {k: np.asarray(v)[None] for k, v in inference.get_samples().items()}
        x = draws["x"].reshape(1, -1, 64)
        fit = example.Fit(truth, y, x, draws["noise"], inference.log_evidence)
        learned.append(example.judge_draws(fit, task.hidden))
        level_sd = args.level * scale
        gaussian.append(example.judge_gaussian(task, fit, data.train, level_sd))
        errors.append(float(inference.log_evidence_error))
    return learned, gaussian, float(np.mean(errors))


def compare_evidence(
    example: SimpleNamespace, args: Any, score: Any, data: Any
) -> None:
    """Print the log evidence of the first digit by particles and by chains."""
    print("task        level  ScoreSDE          ParallelTempering, mean and sd")
    scale = float(score.standardize.scale.mean())
    for task in (example.inpainting(), example.blurring()):
        y = example.measure(args, task, data.test[0], scale, 0)[1]
        model = example.make_model(score, task.operator)
        for level in (args.level, score.level_in_use):
            t = score.sde.time(level)
            inference = ScoreSDE(
                model,
                num_samples=args.num_particles,
                num_particles=args.num_particles,
                num_chains=2,
                levels=2 * args.num_levels,
                num_moves=0,
                progress_bar=False,
            )
            inference.run(jax.random.key(0), y, t)
            mcmc = example.sampler_of(model, args)
            mcmc.run(jax.random.key(1), y, t)
            by_chain = np.asarray(mcmc.last_state.log_evidence)
            print(
                f"{task.name:<11} {level:<6.2g} {inference.log_evidence:.2f} ± "
                f"{inference.log_evidence_error:.2f}     "
                f"{by_chain.mean():.2f} ± {by_chain.std(ddof=1):.2f}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Print coverage and error of both priors at pixels that were not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-digits", type=int, default=40)
    parser.add_argument("--num-particles", type=int, default=1024)
    parser.add_argument("--num-levels", type=int, default=64)
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--evidence", action="store_true", help="and no coverage")
    options = vars(parser.parse_args(arguments))
    example = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    args = example.parse(["--no-progress-bar"])
    vars(args).update(options)
    data = example.split_digits(args)
    score = example.learn(args, data).score
    if args.evidence:
        compare_evidence(example, args, score, data)
        return
    rows = []
    for task in (example.inpainting(), example.blurring()):
        learned, gaussian, error = results_of(example, args, task, score, data)
        rows.append([*example.table_row(task, "learned", learned), f"{error:.2f}"])
        rows.append(example.table_row(task, "Gaussian", gaussian))
    print(
        f"Coverage over {args.num_digits} digits (± standard error) and error at "
        "unseen pixels;\nlast, the mean standard error of the log evidence"
    )
    example.print_table(rows)


if __name__ == "__main__":
    main()

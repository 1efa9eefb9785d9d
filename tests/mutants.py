"""Plant faults in a copy of the package, one at a time; print which the tests catch.

    python -m tests.mutants                  all faults
    python -m tests.mutants solver energy    those with a word in file or name
    python -m tests.mutants --slow           slow tests for those that fast ones miss

A fault is a line as a tired programmer would write it. The tests nearest to it run,
fast ones first; one that fails has caught it. A fault marked equivalent changes no
result, and is not run. The exit status is 1 if a fault survives.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("numpyro_score", "tests", "docs", "pyproject.toml", "README.md")
TIME_LIMIT = 900  # seconds of one run of tests: some faults never end


class Fault(NamedTuple):
    """One line that is wrong, and the tests nearest to it.

    - **name**: what is wrong.
    - **file**: in the package.
    - **old**, **new**: the line, or as much of it and its neighbors as is unique.
    - **tests**: arguments of pytest, from the folder of tests.
    - **slow**: those of tests marked slow.
    - **equivalent**: why no result changes, if none does.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str = ""
    slow: str = ""
    equivalent: str = ""


LEVEL_COVARIANCE = (
    Fault(
        "covariance of a Gaussian for every law",
        "model/level_covariance.py",
        "clean = jnp.exp(ratio) * _shrink(variance, above)",
        "clean = _shrink(variance, above)",
        "model/test_level_covariance.py -k trace",
    ),
    Fault(
        "covariance at the lowest level for a site above it",
        "model/level_covariance.py",
        "value = end * (1 - share) + jnp.square(1 - share) * clean",
        "value = clean",
        "model/test_level_covariance.py -k conditional",
    ),
    Fault(
        "rows weighted against the likelihood",
        "model/weighted_rows.py",
        "jnp.where(is_same, -potential.value(moved), -jnp.inf)",
        "jnp.where(is_same, potential.value(moved), -jnp.inf)",
        "model/test_weighted_rows.py -k moments_of",
    ),
    Fault(
        "rows with ten times the noise of their level",
        "model/weighted_rows.py",
        "noisy = rows + score.sde.noise_level(law.t) * noise",
        "noisy = rows + 10 * score.sde.noise_level(law.t) * noise",
        "model/test_weighted_rows.py -k moments_of",
    ),
    Fault(
        "rows weighted in the place of other points of a plate",
        "model/weighted_rows.py",
        ".at[i].set(row.reshape(-1))",
        ".at[0].set(row.reshape(-1))",
        "model/test_weighted_rows.py -k plate",
    ),
)

LANGEVIN = (
    Fault(
        "kick of a whole step",
        "langevin.py",
        "return momentum - 0.5 * step_size * gradient",
        "return momentum - step_size * gradient",
        "test_langevin.py",
    ),
    Fault(
        "refreshment of another variance",
        "langevin.py",
        "jnp.sqrt(1 - jnp.square(eta)) * noise",
        "jnp.sqrt(1 - eta) * noise",
        "test_langevin.py",
    ),
    Fault(
        "second half drift by the old momentum",
        "langevin.py",
        "middle + 0.5 * step_size * after",
        "middle + 0.5 * step_size * before",
        "test_langevin.py",
    ),
    Fault(
        "energy error of BAOAB with another factor",
        "langevin.py",
        "0.125 * step_size**2 * squares",
        "0.25 * step_size**2 * squares",
        "test_langevin.py",
    ),
    Fault(
        "acceptance with the wrong sign",
        "kernel/transition.py",
        "accept &= jnp.log(uniform(words)) < -error",
        "accept &= jnp.log(uniform(words)) < error",
        "kernel/test_score_langevin.py kernel/test_resumable_run.py",
        "kernel/test_kernel_correctness.py",
    ),
    Fault(
        "rejected momentum is kept",
        "kernel/transition.py",
        "return -momentum",
        "return momentum",
        "kernel/test_adaptation.py",
        "kernel/test_kernel_correctness.py",
    ),
    Fault(
        "acceptance without the learned prior",
        "model/potential.py",
        "return after.value - before.value + change",
        "return after.value - before.value",
        "kernel/test_score_langevin.py",
    ),
    Fault(
        "transposed root of a dense metric",
        "kernel/whitening.py",
        "return vector @ sqrt if transpose else sqrt @ vector",
        "return sqrt @ vector if transpose else vector @ sqrt",
        "kernel/test_adaptation.py",
        "kernel/test_score_langevin.py -k metric",
    ),
    Fault(
        "scatter without Welford's factor",
        "kernel/whitening.py",
        "self.scatter.ndim) * (1 - 1 / number)",
        "self.scatter.ndim)",
        "kernel/test_adaptation.py",
        "kernel/test_score_langevin.py kernel/test_posteriordb.py -k metric",
    ),
    Fault(
        "chains apart widen the metric",
        "kernel/whitening.py",
        "< MAX_BETWEEN_WITHIN",
        "> MAX_BETWEEN_WITHIN",
        "kernel/test_adaptation.py",
        "kernel/test_score_langevin.py kernel/test_posteriordb.py -k metric",
    ),
    Fault(
        "energy errors of another order in the step",
        "kernel/adaptation.py",
        "/ step_size**6",
        "/ step_size**4",
        "kernel/test_adaptation.py",
    ),
    Fault(
        "last step size of warm-up is not the average",
        "kernel/adaptation.py",
        "i == self.num_warmup - 1,",
        "i == self.num_warmup,",
        "kernel/test_score_langevin.py kernel/test_kernel_contract.py "
        "kernel/test_kernel_programs.py kernel/test_kernel_starts.py",
    ),
)

SMC = (
    Fault(
        "evidence without the last level's weight",
        "kernel/annealed_smc.py",
        "weights.reweight(log_increment(beta_next))",
        "weights.reweight(log_increment(largest))",
        "smc/test_smc.py",
        "kernel/test_annealed_langevin.py -k evidence",
    ),
    Fault(
        "step size of annealing adapted the wrong way",
        "kernel/annealed_smc.py",
        "miss = accept_prob - chain.plan.target_accept_prob",
        "miss = chain.plan.target_accept_prob - accept_prob",
        "kernel/test_adaptation.py",
        "kernel/test_annealed_langevin.py -k evidence",
    ),
    Fault(
        "heavy tails are widened by half the variance",
        "infer/twisted/gaussian_likelihood.py",
        "jnp.square(law.scale) + share * variance",
        "jnp.square(law.scale) + 0.5 * share * variance",
        "infer/twisted/test_linear_solve.py -k heavy",
    ),
    Fault(
        "heavy-tailed sites are not widened",
        "infer/twisted/twist.py",
        "(change**2 + bends[name] ** 2).mean(0))",
        "0 * change.mean(0))",
        "infer/twisted/test_twisted_sampler.py -k second_order",
        "infer/twisted/test_known_posteriors.py -k heavy",
    ),
    Fault(
        "reverse step of annealing without noise",
        "kernel/annealing_path.py",
        "return mean + sd * jax.random.normal(key, x.shape, x.dtype), None",
        "return mean, None",
        "smc/test_smc.py",
        "kernel/test_annealed_langevin.py -k evidence",
    ),
    Fault(
        "evidence subtracts the mean weight",
        "smc/weights.py",
        "log_evidence=self.log_evidence + total",
        "log_evidence=self.log_evidence - total",
        "smc/test_smc.py",
    ),
    Fault(
        "variance of the evidence without the share of equal weights",
        "smc/weights.py",
        "effective_sample_size(self.log_weight) - 1 / size",
        "effective_sample_size(self.log_weight)",
        "smc/test_smc.py",
        "kernel/test_annealed_langevin.py -k evidence",
    ),
    Fault(
        "resampling at fixed points",
        "smc/resampling.py",
        "jnp.arange(num) + jax.random.uniform(key)",
        "jnp.arange(num) + 0.5",
        "kernel/test_annealed_langevin.py",
    ),
    Fault(
        "weights in another order than particles",
        "smc/resampling.py",
        "weights.log_weight[order])",
        "weights.log_weight)",
        "smc/test_smc.py",
    ),
    Fault(
        "evidence of several runs is their sum",
        "smc/evidence.py",
        "combined = logsumexp(log_evidence) - jnp.log(count)",
        "combined = logsumexp(log_evidence)",
        "infer/twisted/test_twisted_sampler.py -k pooled",
    ),
    Fault(
        "temperature beyond the effective sample size",
        "smc/tempering.py",
        "return jnp.where(good, middle, low), jnp.where(good, high, middle)",
        "return jnp.where(good, low, middle), jnp.where(good, middle, high)",
        "kernel/test_annealed_langevin.py",
    ),
    Fault(
        "tempering of a latent's Jacobian",
        "model/handlers.py",
        '_") and msg["name"].endswith("_log_det"))',
        '_") and msg["name"].endswith("_logdet"))',
        "kernel/test_annealed_langevin.py",
    ),
    Fault(
        "swap ratio upside down",
        "kernel/replica_exchange.py",
        "(log_likelihood[:-1] - log_likelihood[1:])",
        "(log_likelihood[1:] - log_likelihood[:-1])",
        "kernel/test_parallel_tempering.py",
    ),
    Fault(
        "odd pairs never swap",
        "kernel/replica_exchange.py",
        "accepted &= pair % 2 == parity",
        "accepted &= pair % 2 == 0",
        "kernel/test_parallel_tempering.py",
    ),
    Fault(
        "stepping stones of the wrong neighbor",
        "kernel/stepping_stone.py",
        "lower, upper = log_likelihood[:-1], log_likelihood[1:]",
        "lower = upper = log_likelihood[:-1]",
        "kernel/test_parallel_tempering.py",
    ),
    Fault(
        "likelihood at every temperature in full",
        "kernel/tempered_potential.py",
        "point.prior.value - scale_by_beta(self.beta, point.log_likelihood)",
        "point.prior.value - point.log_likelihood",
        "kernel/test_parallel_tempering.py",
    ),
    Fault(
        "error of the evidence without the correlation of batches",
        "kernel/stepping_stone.py",
        "found = wider * (square + correlated)",
        "found = wider * square",
        "kernel/test_parallel_tempering.py -k 'stones or error'",
    ),
    Fault(
        "batches of two restarts whatever the number of rungs",
        "kernel/stepping_stone.py",
        "filled * jnp.minimum(filled / 2, most_needed)",
        "filled * 2",
        "kernel/test_parallel_tempering.py -k 'stones or error'",
    ),
    Fault(
        "half of the draws are lost when batches merge",
        "kernel/stepping_stone.py",
        "merged = jnp.logaddexp(pairs[..., 0, :], pairs[..., 1, :])",
        "merged = pairs[..., 0, :]",
        "kernel/test_parallel_tempering.py -k 'stones or error'",
    ),
    Fault(
        "evidence from below alone",
        "kernel/stepping_stone.py",
        "Evidence(bridge,",
        "Evidence(log_means(stones.log_forward),",
        "kernel/test_parallel_tempering.py -k 'stones or error'",
    ),
    Fault(
        "variance between chains, not of their mean",
        "kernel/stepping_stone.py",
        "wider * estimate.var(ddof=1) / num_chains",
        "wider * estimate.var(ddof=1)",
        "kernel/test_parallel_tempering.py -k combined",
    ),
    Fault(
        "metric of a round without that of the round before",
        "kernel/tempering_adaptation.py",
        "factor = jnp.linalg.solve(sqrt, shrunk[:, None] * factor)",
        "factor = shrunk[:, None] * factor",
        "kernel/test_parallel_tempering.py -k 'metric or correlations'",
    ),
    Fault(
        "small eigenvalues of a sample taken as they are",
        "kernel/fisher_metric.py",
        "low = (gamma < 1) &",
        "low = (gamma > 0) &",
        "kernel/test_fisher_metric.py -k 'eigenvalue'",
        "kernel/test_parallel_tempering.py -k 'metric or correlations'",
    ),
    Fault(
        "a state counts as from the prior forever",
        "kernel/replica_exchange.py",
        "replicas.from_prior.at[last].set(False).at[0].set(True)",
        "replicas.from_prior.at[0].set(True)",
        "kernel/test_parallel_tempering.py -k swaps",
    ),
    Fault(
        "draws of the prior accepted as at the posterior",
        "kernel/replica_exchange.py",
        "gain = betas[k] * (point.log_likelihood",
        "gain = betas[last] * (point.log_likelihood",
        "kernel/test_parallel_tempering.py -k proposed",
    ),
    Fault(
        "short steps are as long as others",
        "kernel/replica_exchange.py",
        "factor * step_size,",
        "step_size,",
        "kernel/test_parallel_tempering.py -k small_mode",
    ),
)

SOLVERS = (
    Fault(
        "multistep coefficient of even grids",
        "solver/multistep.py",
        "ratio = jnp.where(first, 0.0, step / previous)",
        "ratio = jnp.where(first, 0.0, 1.0)",
        "solver/test_solver_orders.py",
        "solver/test_solver.py",
    ),
    Fault(
        "exponential weights from the wrong end",
        "solver/multistep.py",
        "jnp.exp(-rate * (step - s))",
        "jnp.exp(-rate * s)",
        "solver/test_solver_orders.py",
    ),
    Fault(
        "corrector without its own node",
        "solver/multistep.py",
        "solver_state.level, level, order=self.order + 1",
        "solver_state.level, level, order=self.order",
        "solver/test_solver_orders.py",
    ),
    Fault(
        "noise of the forward variance",
        "solver/multistep.py",
        "-jnp.expm1(-2 * noise_rate**2 * step)",
        "jnp.expm1(2 * noise_rate**2 * step)",
        "solver/test_solver_sde.py",
    ),
    Fault(
        "second slope at the first level",
        "solver/runge_kutta.py",
        "(end - denoise(end, level_next)) / level_next",
        "(end - denoise(end, level_next)) / level",
        "solver/test_solver_orders.py",
    ),
    Fault(
        "arithmetic middle of noise levels",
        "solver/runge_kutta.py",
        "middle = jnp.sqrt(level) * jnp.sqrt(level_next)",
        "middle = 0.5 * (level + level_next)",
        "solver/test_solver_orders.py",
    ),
    Fault(
        "ancestral noise of the level before",
        "solver/ancestral.py",
        "variance = level_next**2 * (1 -",
        "variance = level**2 * (1 -",
        "solver/test_solver_sde.py",
    ),
    Fault(
        "score of a point that is not scaled back",
        "solver/ancestral.py",
        "x_t = marginal.alpha * x\n",
        "x_t = x\n",
        "solver/test_solver_sde.py",
    ),
    Fault(
        "corrector with too little noise",
        "solver/predictor_corrector.py",
        "jnp.sqrt(2 * step_size) * noise",
        "jnp.sqrt(step_size) * noise",
        "solver/test_solver.py solver/test_solver_sde.py",
        "solver/test_solver_sde.py -k corrector",
    ),
    Fault(
        "churn by the difference of levels",
        "solver/stochastic_heun.py",
        "jnp.sqrt(jnp.maximum(raised**2 - level**2, 0.0))",
        "jnp.maximum(raised - level, 0.0)",
        "solver/test_solver_sde.py",
    ),
    Fault(
        "start without the variance of the data",
        "solver/base.py",
        "jnp.sqrt(1 + jnp.square(level)) *",
        "level *",
        "solver/test_solver_frame.py -k variance",
    ),
    Fault(
        "antithetic draws with the same noise",
        "solver/integrate.py",
        "jnp.where(jnp.arange(size) % 2 == 0, 1.0, -1.0)",
        "jnp.where(jnp.arange(size) % 2 == 0, 1.0, 1.0)",
        "solver/test_solver_frame.py -k antithetic",
    ),
    Fault(
        "Karras grid with other steps",
        "schedule.py",
        "(start + u * (end - start)) ** rho",
        "(start + u**2 * (end - start)) ** rho",
        "test_schedule.py",
    ),
    Fault(
        "noise of half the variance in the adaptive SDE",
        "solver/adaptive.py",
        "noise_scale = jnp.sqrt(2.0) * tau * level",
        "noise_scale = tau * level",
        "solver/test_solver_sde.py -k adaptive_sde_has",
    ),
    Fault(
        "variance of one draw for that of the mean",
        "solver/control_variates.py",
        "jnp.square(residuals).sum(0) / num_free / len(f)",
        "jnp.square(residuals).sum(0) / num_free",
        "solver/test_solver_frame.py -k errors_of_means",
    ),
)

DENSITIES = (
    Fault(
        "solver's log density without the support's Jacobian",
        "score/density.py",
        "return score.subtract_log_jacobian(value, z, x)",
        "return value",
        "data/test_support.py -k solver",
    ),
    Fault(
        "solver's log density without the signal scale",
        "score/density.py",
        "log_abs_det_jacobian() - size * jnp.log(alpha)",
        "log_abs_det_jacobian()",
        "score/test_density.py -k by_a_solver",
    ),
    Fault(
        "change of volume with the wrong sign",
        "score/density.py",
        "return y[0] - denoised, x.size - trace",
        "return y[0] - denoised, trace - x.size",
        "score/test_density.py",
    ),
    Fault(
        "random probes scaled as unit vectors",
        "score/density.py",
        "return 1.0",
        "return float(size)",
        "score/test_density.py",
    ),
    Fault(
        "energy of a point that is not centered on its context",
        "score/denoiser.py",
        "        x = x - self.baseline(x, context)\n        context",
        "        context",
        "nn/test_net_families.py -k context",
        "nn/test_net_families.py",
    ),
    Fault(
        "energy with a context in physical units",
        "score/denoiser.py",
        "        context = self._unit_context(context)\n        c = ",
        "        c = ",
        "nn/test_net_families.py -k context",
        "nn/test_net_families.py",
    ),
    Fault(
        "reverse step with a level that is not squared",
        "score/model.py",
        "share = jnp.square(level / self.sde.noise_level(t))",
        "share = level / self.sde.noise_level(t)",
        "score/test_score.py model/test_handlers.py",
    ),
    Fault(
        "score in standardized units",
        "score/model.py",
        "score_from_denoised(u, denoised, self.sde.marginal(t))\n"
        "        return score / self.standardize.scale",
        "score_from_denoised(u, denoised, self.sde.marginal(t))\n        return score",
        "score/test_score.py",
    ),
    Fault(
        "draw at a time without its signal scale",
        "model/distribution.py",
        "standardize.inverse(sde.alpha(self.t) * u)",
        "standardize.inverse(u)",
        "model/test_distribution.py",
    ),
    Fault(
        "integral of a linear rate",
        "sde/variance_preserving.py",
        "+ 0.5 * (self.beta_max - self.beta_min) * t**2",
        "+ (self.beta_max - self.beta_min) * t**2",
        "sde/test_sde.py",
    ),
    Fault(
        "diffusion without the drift's part",
        "sde/base.py",
        "2 * sigma * (sigma_dot - log_alpha_dot * sigma)",
        "2 * sigma * sigma_dot",
        "sde/test_sde.py",
    ),
)

CONDITIONING = (
    Fault(
        "precisions that are not added",
        "score/conditioning.py",
        "return level * jnp.sqrt(_share(level, sd))",
        "return jnp.minimum(level, sd)",
        "score/test_conditioning.py",
    ),
    Fault(
        "weights of noise and observation exchanged",
        "score/conditioning.py",
        "mean = _share(level, self.sd) * x + _share(self.sd, level) * self.value",
        "mean = _share(self.sd, level) * x + _share(level, self.sd) * self.value",
        "score/test_conditioning.py",
    ),
    Fault(
        "start far from the conditional mean",
        "score/conditioning.py",
        "return start_center(denoiser, denoiser.value.shape, level)",
        "return jnp.zeros_like(denoiser.value)",
        "score/test_conditioning.py",
    ),
    Fault(
        "draws of a given score start around 0",
        "solver/integrate.py",
        "init_state(solver, x + score.start_center(level, context))",
        "init_state(solver, x)",
        "score/test_start_check.py",
    ),
    Fault(
        "densities of a given score end around 0",
        "score/density.py",
        "logpdf(top, center, scale)",
        "logpdf(top, 0.0, scale)",
        "score/test_start_check.py",
    ),
    Fault(
        "sd of observations in physical units",
        "score/conditioning.py",
        "jnp.where(observed, sd / standardize.scale, jnp.inf)",
        "jnp.where(observed, sd, jnp.inf)",
        "score/test_conditioning.py",
    ),
    Fault(
        "noise of observed coordinates drawn twice as wide",
        "score/conditioning.py",
        "drawn = self(x, level, context) + joint_level(level, self.sd) * noise",
        "drawn = self(x, level, context) + 2 * joint_level(level, self.sd) * noise",
        "score/test_conditioning.py",
    ),
    Fault(
        "density ratio without its Jacobian",
        "score/conditioning.py",
        "terms = -0.5 * error - jnp.log(levels / level)",
        "terms = -0.5 * error",
        "score/test_conditioning.py",
    ),
    Fault(
        "draws at a high time replaced by draws of x_0",
        "score/model.py",
        "return jnp.where(is_lowest, drawn.reshape(x.shape), x)",
        "return drawn.reshape(x.shape)",
        "score/test_conditioning.py",
    ),
    Fault(
        "prior draws of fixed coordinates without noise",
        "score/model.py",
        "return jnp.where(jnp.isfinite(self.denoiser.sd), 0.0, lowest)",
        "return lowest",
        "score/test_conditioning.py",
    ),
    Fault(
        "known coordinates denoised by the net",
        "score/denoiser.py",
        "return jnp.where(levels == 0, x, predicted + residual)",
        "return predicted + residual",
        "score/test_conditioning.py",
    ),
    Fault(
        "normal baseline beside the skip term",
        "score/denoiser.py",
        "residual += denoise_normal(x, levels, self.covariance) - skipped",
        "residual += denoise_normal(x, levels, self.covariance)",
        "score/test_conditioning.py",
    ),
    Fault(
        "shrinkage in the wrong direction",
        "data/covariance.py",
        "(1 - share) * covariance + share * np.diag",
        "share * covariance + (1 - share) * np.diag",
        "data/test_covariance.py",
    ),
    Fault(
        "rows that were kept judge the share",
        "data/covariance.py",
        "rows[fold != k], rows[fold == k]",
        "rows[fold != k], rows[fold != k]",
        "data/test_covariance.py",
    ),
    Fault(
        "slope of a column inverted",
        "data/columns.py",
        "return np.log(lower + upper)",
        "return -np.log(lower + upper)",
        "infer/joint/test_learn_table.py",
    ),
    Fault(
        "EM without the conditional covariance",
        "data/normal_em.py",
        "covariance = (centered.T @ centered + extra) / len(rows)",
        "covariance = (centered.T @ centered) / len(rows)",
        "infer/joint/test_learn_table.py",
    ),
    Fault(
        "weight of known coordinates",
        "loss/denoising.py",
        "jnp.mean(jnp.where(is_target, weight, 0.0) * error)",
        "jnp.mean(weight * error)",
        equivalent="at level 0 the weight is that of level 1 and the error is 0",
    ),
    Fault(
        "masks that are never observed",
        "loss/per_coordinate.py",
        "return joint_level(level, jnp.where(observed, sd, jnp.inf))",
        "return joint_level(level, jnp.where(observed, jnp.inf, jnp.inf))",
        "score/test_conditioning.py",
    ),
    Fault(
        "origin of a conditional law left out",
        "score/conditioning.py",
        "jnp.where(self.sd == 0, self.value, denoised) - self.center",
        "jnp.where(self.sd == 0, self.value, denoised)",
        "score/test_conditioning.py",
    ),
)
POTENTIALS = (
    Fault(
        "inner nodes of the line integral without a mask's weights",
        "model/potential.py",
        "middle_weight * self._score(name, start.x + node * move)",
        "self._score(name, start.x + node * move)",
        "model/test_potential.py",
    ),
    Fault(
        "difference of energies without weights",
        "model/potential.py",
        "jnp.vdot(0.5 * (start.weight + end.weight), fall)",
        "jnp.sum(fall)",
        "model/test_potential.py nn/test_net_families.py",
    ),
    Fault(
        "gradient without the learned score",
        "model/potential.py",
        "cotangents = {k: -point.score for k, point in learned.items()}",
        "cotangents = {k: 0 * point.score for k, point in learned.items()}",
        "model/test_potential.py",
    ),
    Fault(
        "learned site without the Jacobian of its support",
        "model/learned_sites.py",
        "return score.subtract_log_jacobian(self._record(point), point, value)",
        "return self._record(point)",
        "data/test_support.py kernel/test_score_langevin.py",
    ),
    Fault(
        "weights of the rule of three nodes",
        "model/quadrature.py",
        "3: ((-1.0, 0.0, 1.0), (1 / 3, 4 / 3, 1 / 3)),",
        "3: ((-1.0, 0.0, 1.0), (0.5, 1.0, 0.5)),",
        "model/test_quadrature.py",
    ),
)

LEVELS = (
    Fault(
        "Gaussian baseline with one noise level for all directions",
        "score/gaussian_baseline.py",
        "c = parametrization(level / self.scale)",
        "c = parametrization(level / jnp.ones_like(self.scale))",
        "score/test_gaussian_baseline.py",
    ),
    Fault(
        "net that never fades",
        "score/gaussian_baseline.py",
        "jnp.exp(-jnp.square(beyond)) * c.out * correction",
        "c.out * correction",
        "score/test_gaussian_baseline.py",
    ),
    Fault(
        "law at the lowest level, trusted or not",
        "model/distribution.py",
        "if level is None or level <= lowest:",
        "if level is None or level >= lowest:",
        "score/test_level.py",
    ),
    Fault(
        "line integral without its weights",
        "score/level.py",
        "return total + weight * slope",
        "return total + slope",
        "score/test_level.py",
    ),
    Fault(
        "chains of the level that Simpson's rule alone accepts",
        "score/level.py",
        "return jnp.maximum(simpson, (ends * move).sum(0) / 2)",
        "return simpson",
        "score/test_level.py -k two_modes",
    ),
    Fault(
        "off the data at all levels, not at any",
        "score/level.py",
        "~(within.all(0) & inside.all(1))",
        "~(within.any(0) & inside.all(1))",
        "score/test_level.py -k off",
    ),
    Fault(
        "the range of coordinates is not looked at",
        "score/level.py",
        "(within.all(0) & inside.all(1))",
        "within.all(0)",
        "score/test_level.py -k off",
    ),
    Fault(
        "share of draws off the data per chain, not per draw",
        "model/site_counts.py",
        "counts.reshape(-1, counts.shape[-1]).mean(0) / num_draws",
        "counts.reshape(-1, counts.shape[-1]).mean(0)",
        "score/test_level.py",
    ),
    Fault(
        "one axis for all that are left out",
        "model/level_covariance.py",
        "_shrink(variance, rise).sum() + others * _shrink(rest, rise)",
        "_shrink(variance, rise).sum() + _shrink(rest, rise)",
        "model/test_level_covariance.py -k left_out",
    ),
)

TWISTED = (
    Fault(
        "twist without its log determinant",
        "infer/twisted/twist.py",
        "other - 0.5 * (solved.quadratic_form + solved.log_det)",
        "other - 0.5 * solved.quadratic_form",
        "infer/twisted/test_score_sde.py",
        "infer/twisted/test_known_posteriors.py -k 'mixture or quadrature'",
    ),
    Fault(
        "ratio of the proposals without its square",
        "infer/twisted/sampler.py",
        "jnp.vdot(pull, noise[name] + 0.5 * pull)",
        "jnp.vdot(pull, noise[name])",
        "infer/twisted/test_score_sde.py -k 'conjugate'",
    ),
    Fault(
        "denoised points at the signal scale of no noise",
        "model/denoising.py",
        "law.score.standardize.inverse(law.score.sde.alpha(time) * u[name])",
        "law.score.standardize.inverse(u[name])",
        "infer/twisted/test_twisted_sampler.py -k 'data_move or physical'",
    ),
    Fault(
        "reverse step that adds the covariance twice",
        "infer/twisted/reverse_step.py",
        "noise + 0.5 * self.variance_drop /",
        "noise + self.variance_drop /",
        "infer/twisted/test_twisted_sampler.py -k moments",
    ),
    Fault(
        "weight of a site counted twice",
        "infer/twisted/gaussian_likelihood.py",
        "error / scale * jnp.sqrt(weight)",
        "error / scale * weight",
        "infer/twisted/test_linear_solve.py -k residuals",
    ),
    Fault(
        "other sites without their scale",
        "infer/twisted/gaussian_likelihood.py",
        'jnp.asarray(_fit(scale, site["fn"].event_dim - law.event_dim) * log_prob)',
        "jnp.asarray(log_prob)",
        "infer/twisted/test_twisted_sampler.py -k likelihood_of_other",
    ),
    Fault(
        "other sites at the mean alone",
        "infer/twisted/twist.py",
        "jnp.concatenate([a, -a]), away)",
        "0 * jnp.concatenate([a, -a]), away)",
        "infer/twisted/test_twisted_sampler.py -k steep",
        "infer/twisted/test_known_posteriors.py -k steep",
    ),
    Fault(
        "moves of ordinary sites forget their prior",
        "infer/twisted/random_walk.py",
        "proposed.log_target(power) - evaluation.log_target(power)",
        "power * (proposed.log_twist - evaluation.log_twist)",
        "infer/twisted/test_twisted_sampler.py -k ordinary_sites_keep",
    ),
    Fault(
        "start at the denoised origin, not at the mean",
        "infer/twisted/initial_distribution.py",
        "mean = center + axes @ (share / (1 - share) * (center @ axes))",
        "mean = center",
        "infer/twisted/test_twisted_sampler.py -k start",
    ),
    Fault(
        "runs of equal weight, whatever their evidence",
        "infer/twisted/replicates.py",
        "log_weight = (runs.weights.log_weight + log_evidence[:, None]).reshape(-1)",
        "log_weight = runs.weights.log_weight.reshape(-1)",
        "infer/twisted/test_twisted_sampler.py -k in_proportion",
    ),
    Fault(
        "moves along the gradient in other units",
        "infer/twisted/rejuvenation.py",
        "PointState(y, scale * ravel_pytree(evaluation.grad)[0], evaluation)",
        "PointState(y, ravel_pytree(evaluation.grad)[0], evaluation)",
        "infer/twisted/test_twisted_sampler.py -k moves_along",
    ),
)

LOSSES = (
    Fault(
        "weight of EDM without its constant",
        "loss/weighting.py",
        "return 1 + 1 / jnp.square(levels)",
        "return 1 / jnp.square(levels)",
        "loss/test_loss.py",
    ),
    Fault(
        "flow matching at the time as noise level",
        "loss/flow_matching.py",
        "jax.random.permutation(key_order, t / (1 - t))",
        "jax.random.permutation(key_order, t)",
        "loss/test_loss_objectives.py -k flow_matching",
    ),
    Fault(
        "square of the score without its half",
        "loss/implicit.py",
        "jnp.mean(weight * (trace + 0.5 * _dot(s, s))) / size",
        "jnp.mean(weight * (trace + _dot(s, s))) / size",
        "loss/test_loss_objectives.py",
        "loss/test_loss_objectives.py -k minimal",
    ),
    Fault(
        "known score with the wrong sign",
        "loss/target.py",
        "return x0 + a * r * (noise + r * data_score)",
        "return x0 + a * r * (noise - r * data_score)",
        "loss/test_loss_objectives.py",
    ),
    Fault(
        "likelihood weight of another power",
        "loss/weighting.py",
        "jnp.square(diffusion * alpha / sigma**2)",
        "jnp.square(diffusion * alpha / sigma)",
        "loss/test_loss.py",
    ),
    Fault(
        "known score divided by the scale",
        "train/objective.py",
        "data_score = fixed.standardize.scale * data_score",
        "data_score = data_score / fixed.standardize.scale",
        "loss/test_loss_objectives.py",
    ),
    Fault(
        "known score without the support's Jacobian",
        "train/objective.py",
        "return vjp(score)[0] + jax.grad(log_det)(z)",
        "return vjp(score)[0]",
        "loss/test_loss_objectives.py data/test_support.py",
    ),
    Fault(
        "rows without context in another order",
        "train/objective.py",
        "return jnp.concatenate([without, given])[inverse]",
        "return jnp.concatenate([without, given])",
        "train/test_context.py",
    ),
    Fault(
        "stable target with weights of another level",
        "loss/target.py",
        "jax.nn.softmax(-0.5 * square / levels[:, None] ** 2, axis=1)",
        "jax.nn.softmax(-0.5 * square / levels[:, None], axis=1)",
        "loss/test_loss_objectives.py -k stable",
    ),
    Fault(
        "difference over half its width",
        "loss/implicit.py",
        "trace = _dot(v, plus - minus) / (2 * width)",
        "trace = _dot(v, plus - minus) / width",
        "loss/test_loss_objectives.py -k at_one_point",
    ),
    Fault(
        "slices without their factor",
        "loss/implicit.py",
        "return trace + 0.5 * scale * jnp.square(_dot(v, s))",
        "return trace + 0.5 * jnp.square(_dot(v, s))",
        "loss/test_loss_objectives.py -k at_one_point",
    ),
)

TRAINING = (
    Fault(
        "Jacobian of the unit scale with the wrong sign",
        "data/standardize.py",
        "return -jnp.log(self.scale).sum()",
        "return jnp.log(self.scale).sum()",
        "data/test_standardize.py",
    ),
    Fault(
        "shared scale is the mean of scales",
        "data/standardize.py",
        "largest * jnp.sqrt(jnp.mean(jnp.square(scale / largest)))",
        "jnp.mean(scale)",
        "data/test_standardize.py test_inputs.py -k 'shared or units'",
    ),
    Fault(
        "Jacobian of one edge alone",
        "data/support.py",
        "return inner + outer + jnp.log",
        "return inner + jnp.log",
        "data/test_support.py",
    ),
    Fault(
        "held-out rows leak into training",
        "infer/amortized/simulator.py",
        "train = Simulations(z[:-count], context[:-count])",
        "train = Simulations(z, context)",
        "infer/amortized/test_npse.py -k validation_rows",
    ),
    Fault(
        "best weights are not the averaged ones",
        "train/fit.py",
        "best_loss=loss,\n            best_params=state.ema_params",
        "best_loss=loss,\n            best_params=state.params",
        "train/test_train_scale.py",
    ),
    Fault(
        "held-out loss of the last weights",
        "train/fit.py",
        "problem.loss(state.ema_params, state.fixed, key, batch)",
        "problem.loss(state.params, state.fixed, key, batch)",
        "train/test_train_scale.py",
    ),
    Fault(
        "average of another exponent",
        "train/optimizer.py",
        "(1 - 1 / step) ** (EMA_EXPONENT + 1)",
        "(1 - 1 / step) ** EMA_EXPONENT",
        "train/test_train.py -k average",
    ),
    Fault(
        "sum of the parts of a batch",
        "train/optimizer.py",
        "return jax.tree.map(lambda leaf: leaf / self.accumulate, total)",
        "return total",
        "train/test_train_scale.py",
    ),
    Fault(
        "baseline on the scale of the data",
        "train/linear_baseline.py",
        "jnp.asarray(coefficients / sd, float)",
        "jnp.asarray(coefficients, float)",
        "train/test_linear_baseline.py",
    ),
    Fault(
        "patience that is never reset",
        "train/fit.py",
        "blocks_since_best=0 * run.blocks_since_best",
        "blocks_since_best=run.blocks_since_best",
        "train/test_train_scale.py",
    ),
)

AMORTIZED = (
    Fault(
        "error of the mean with the wrong sign",
        "infer/amortized/draw_check.py",
        "np.stack([-shift / posterior_sd,",
        "np.stack([shift / posterior_sd,",
        "infer/amortized/test_draw_check.py -k sizes",
    ),
    Fault(
        "score of groups holds the prior once for each",
        "infer/amortized/group_draw_check.py",
        "scores[..., : self.z.shape[1]].sum(0) - rest * prior_score",
        "scores[..., : self.z.shape[1]].sum(0)",
        "infer/amortized/test_hierarchy.py -k silent",
    ),
    Fault(
        "steps of shared latents hold the prior once for each group",
        "infer/amortized/group_draw_check.py",
        "(len(contexts) - 1) * shared.log_prior(z)",
        "0 * shared.log_prior(z)",
        "infer/amortized/test_group_draw_check.py -k right",
    ),
    Fault(
        "score of several observations holds the prior once for each",
        "infer/amortized/draw_check.py",
        "return joint - (len(contexts) - 1) * prior",
        "return joint - 0 * prior",
        "infer/amortized/test_draw_check.py -k several",
    ),
    Fault(
        "draws between modes are silent",
        "infer/amortized/draw_check.py",
        "return bool((np.abs(mean) > MAX_OFFSET + NUM_ERRORS * error).any())",
        "return bool((np.abs(mean) > MAX_OFFSET + NUM_ERRORS * error).all())",
        "infer/amortized/test_draw_check.py -k shifted",
    ),
    Fault(
        "small errors are not looked at by steps",
        "infer/amortized/draw_check.py",
        "errors.is_clear and errors.is_within(MOVED_LIMITS)",
        "errors.is_clear and not found",
        "infer/amortized/test_draw_check.py -k half_an_sd",
    ),
    Fault(
        "large errors pass for chance without steps",
        "infer/amortized/draw_check.py",
        "errors.is_clear and errors.is_within(MOVED_LIMITS)",
        "errors.is_clear and not errors.words(names, MOVED_LIMITS)",
        "infer/amortized/test_draw_check.py -k not_passed",
    ),
    Fault(
        "local latents stay where they are",
        "infer/amortized/group_draw_check.py",
        "return num_sweeps(missing)",
        "return 1",
        "infer/amortized/test_group_draw_check.py -k groups_say_little",
    ),
    Fault(
        "values of groups are compared in units of 1",
        "infer/amortized/plate_groups.py",
        "atol=TOLERANCE * unit",
        "atol=TOLERANCE",
        "infer/amortized/test_hierarchy.py -k small_units",
    ),
    Fault(
        "sizes of plates by default are not looked at",
        "infer/amortized/plate_groups.py",
        "    kwargs = _with_defaults(model, args, kwargs)\n",
        "",
        "infer/amortized/test_hierarchy.py -k by_default",
    ),
    Fault(
        "draws given each observation are judged by the first",
        "infer/amortized/draw_check.py",
        "np.asarray(z[j, :count]), contexts[j : j + 1]",
        "np.asarray(z[j, :count]), contexts[:1]",
        "infer/amortized/test_draw_check.py -k each_of_many",
    ),
    Fault(
        "densities with jumps are judged by their gradient",
        "infer/amortized/draw_check.py",
        "if found and not discontinuous:",
        "if found:",
        "infer/amortized/test_draw_check.py -k jumps",
    ),
    Fault(
        "a few wild draws pass for chance",
        "infer/amortized/draw_check.py",
        "sure = np.where(np.abs(sizes) > chance[:, None], sizes, 0.0)",
        "sure = np.where(np.abs(sizes) > 9 * chance[:, None], sizes, 0.0)",
        "infer/amortized/test_mcmc_check.py -k wild",
    ),
    Fault(
        "draws of density zero are silent",
        "infer/amortized/draw_check.py",
        "np.asarray((values < limit) | np.isneginf(values))",
        "np.asarray((values < limit) & ~np.isneginf(values))",
        "infer/amortized/test_draw_check.py -k density_zero",
    ),
    Fault(
        "Barker's steps are accepted without the proposal's density",
        "infer/amortized/mcmc_check.py",
        "log_ratio = new[1] - value + back.sum(-1)",
        "log_ratio = new[1] - value",
        "infer/amortized/test_mcmc_check.py -k keep",
    ),
    Fault(
        "given numbers are judged as if they were drawn",
        "infer/joint/draw_check.py",
        "judged = ~known & np.array(",
        "judged = np.array(",
        "infer/joint/test_learn_joint.py -k any_conditional",
    ),
    Fault(
        "composition without the noise's precision",
        "infer/amortized/composition.py",
        "(score + (unit + prior) @ known)",
        "(score + prior @ known)",
        "infer/amortized/test_composition.py -k exact",
    ),
    Fault(
        "evidence is the sum of weights",
        "infer/amortized/importance.py",
        "float(top + np.log(weights.mean()))",
        "float(top + np.log(weights.sum()))",
        "infer/amortized/test_importance.py",
    ),
    Fault(
        "region of the tail",
        "infer/amortized/truncation.py",
        "np.quantile(values[np.isfinite(values)], TAIL_MASS)",
        "np.quantile(values[np.isfinite(values)], 1 - TAIL_MASS)",
        "infer/amortized/test_truncation.py -k region",
    ),
    Fault(
        "observations in another order than latents",
        "infer/amortized/truncation.py",
        "return Simulations(z[order], context[order], dropped)",
        "return Simulations(z[order], context, dropped)",
        "infer/amortized/test_truncation.py -k earlier",
    ),
    Fault(
        "proposals weighted by the prior alone",
        "infer/amortized/truncation.py",
        "order = -log_prior + jax.lax.map(lambda u: _log_mixture(u, white), points)",
        "order = -log_prior",
        "infer/amortized/test_truncation.py -k resampled",
    ),
    Fault(
        "density without the Jacobian of the latents",
        "infer/amortized/posterior.py",
        "value - self.latents.log_abs_det_jacobian(z)",
        "value",
        "infer/amortized/test_npse.py -k jacobian",
    ),
    Fault(
        "sample size by weights that are not squared",
        "infer/amortized/importance.py",
        "1 / np.exp(2 * log_weights).sum()",
        "1 / np.exp(log_weights).sum()",
        "infer/amortized/test_importance.py",
    ),
    Fault(
        "error of one weight for that of their mean",
        "infer/amortized/importance.py",
        "weights.std() / weights.mean() / np.sqrt(len(weights))",
        "weights.std() / weights.mean()",
        "infer/amortized/test_importance.py",
    ),
    Fault(
        "whitening by the covariance, not its root",
        "infer/prior/learn_prior.py",
        "root = np.sqrt(np.maximum(eigenvalues, EIGENVALUE_FLOOR))",
        "root = np.maximum(eigenvalues, EIGENVALUE_FLOOR)",
        "infer/prior/test_learn_prior.py -k whitened",
    ),
    Fault(
        "a prior's fit is checked on rows it was trained on",
        "infer/prior/learn_prior.py",
        "return rows[train], rows[held_out]",
        "return rows, rows[held_out]",
        "infer/prior/test_learn_prior.py -k not_trained_on",
    ),
    Fault(
        "a prior's score is checked at another level",
        "infer/prior/check.py",
        "result = kernel_stein_discrepancy(rng_key, u, score.score(u, t))",
        "result = kernel_stein_discrepancy(rng_key, u, score.score(u))",
        "infer/prior/test_prior_check.py -k right_score",
    ),
    Fault(
        "draws of a prior are compared with rows as noisy as they are",
        "infer/prior/check.py",
        "rows, others, drawn = (x @ factor.T for x in (train, held_out, u))",
        "rows, others, drawn = (x @ factor.T for x in (train, u, u))",
        "infer/prior/test_prior_check.py -k blurred",
    ),
    Fault(
        "held-out rows of a table leak into training",
        "infer/joint/learn_table.py",
        "train = rows.take(slice(held_out, None))",
        "train = rows",
        "infer/joint/test_learn_table.py -k not_trained_on",
    ),
    Fault(
        "draws of missing numbers are targets of their own law",
        "loss/denoising.py",
        "is_target &= known | (known & is_noisy).any(axes, keepdims=True)",
        "is_target &= known | True",
        "loss/test_loss_objectives.py -k drawn_numbers",
    ),
    Fault(
        "law of a learned site shrunk with its path",
        "model/distribution.py",
        "scale = standardize.scale / alpha",
        "scale = standardize.scale",
        "model/test_distribution.py -k shrink",
    ),
    Fault(
        "blocks of a table drawn with the same noise",
        "infer/joint/conditionals.py",
        "jax.random.split(jax.random.fold_in(key, start), size)",
        "jax.random.split(key, size)",
        "infer/joint/test_learn_table.py -k blocks",
    ),
    Fault(
        "density of a row divided by the scale's Jacobian twice",
        "infer/joint/learn_table.py",
        "jacobian = np.sum(slopes, axis=0) - np.log(self.scale).sum()",
        "jacobian = np.sum(slopes, axis=0) - 2 * np.log(self.scale).sum()",
        "infer/joint/test_learn_table.py -k jacobian",
    ),
    Fault(
        "lp is the energy",
        "infer/datatree.py",
        '{"lp": -found, "energy": found}',
        '{"lp": found, "energy": found}',
        "infer/test_datatree.py -k likelihood_and",
    ),
)

FILES = (
    Fault(
        "hashes compared by their length",
        "io/folder.py",
        "if saved != _sums(contents).encode():",
        "if len(saved) != len(_sums(contents).encode()):",
        "io/test_io.py",
    ),
    Fault(
        "baseline is not saved",
        "io/models.py",
        "to_arrays(net.params, affines, net.linear_baseline, rows, covariance)",
        "to_arrays(net.params, affines, None, rows, covariance)",
        "train/test_linear_baseline.py",
    ),
    Fault(
        "content of a checkpoint's files is not compared",
        "checkpoint.py",
        "if not file.is_file() or _hash_file(file) != content:",
        "if not file.is_file():",
        "test_run_folder.py test_checkpoint.py",
    ),
    Fault(
        "checkpoints of another run are loaded",
        "checkpoint.py",
        'if _read_hashed(path / HASHES)["run"] != self.run:',
        'if not _read_hashed(path / HASHES)["run"]:',
        "test_run_folder.py",
    ),
    Fault(
        "settings that only one run has are not compared",
        "checkpoint.py",
        "different += [k for k in saved if k not in fingerprint]",
        "different += []",
        "test_run_folder.py",
    ),
    Fault(
        "blocks joined along chains",
        "kernel/resumable_run.py",
        "return jnp.concatenate(blocks, axis=1)",
        "return jnp.concatenate(blocks, axis=0)",
        "kernel/test_resumable_run.py",
    ),
    Fault(
        "validation data do not count for identity",
        "train/checkpoint.py",
        '"validation": digest(options.validation)',
        '"validation": digest(None)',
        "test_checkpoint.py",
    ),
    Fault(
        "thinning does not count for identity",
        "kernel/resumable_run.py",
        '"thinning": mcmc.thinning',
        '"thinning": 1',
        "kernel/test_resumable_run.py",
    ),
)

JOINT = (
    Fault(
        "joint law: what is given is ignored",
        "infer/joint/learn_joint.py",
        "values = self.layout.parse({} if given is None else given)",
        "values = self.layout.parse({})",
        "infer/joint/test_learn_joint.py -k exact_score",
    ),
    Fault(
        "joint law: given values are put into draws that do not know them",
        "infer/joint/learn_joint.py",
        "rows = draw_rows(rng_key, self.score, u[None], num_samples)[:, 0]",
        "rows = draw_rows(rng_key, self.score, np.nan * u[None], num_samples)[:, 0]",
        "infer/joint/test_learn_joint.py -k exact_score",
    ),
    Fault(
        "joint law: half a simplex is given as nothing",
        "infer/joint/layout.py",
        "if (whole.any(1) != whole.all(1)).any():",
        "if whole.any(1).all() and not whole.all():",
        "infer/joint/test_learn_joint.py -k outside_of_supports",
    ),
    Fault(
        "joint law: values outside of the support of a latent site",
        "infer/joint/layout.py",
        "if not (bool(site.support.constraint(filled)) and np.isfinite(z).all()):",
        "if not np.isfinite(z).all():",
        "infer/joint/test_learn_joint.py -k outside_of_supports",
    ),
    Fault(
        "table: cells of codes filled to their edges",
        "data/columns.py",
        "narrow = (noise + others.sum(0)) / NUM_UNIFORM",
        "narrow = noise",
        "data/test_columns.py",
    ),
    Fault(
        "perfect twist: a constant of the likelihood left out",
        "infer/twisted/coordinate_observations.py",
        "log_constant = log_constant + log_jacobian",
        "log_constant = log_constant",
        "infer/twisted/test_coordinate_observations.py -k one_for_each",
    ),
    Fault(
        "perfect twist: noise of the site's own level left out",
        "score/conditioning.py",
        "share = jnp.where(self.level > 0, _share(self.level, level), 1.0)",
        "share = 1.0",
        "infer/twisted/test_coordinate_observations.py -k denoised_to_noisy",
    ),
    Fault(
        "prior without effect inside scan",
        "model/handlers.py",
        "given = substitute(replaced, data=values)",
        "given = replaced",
        "infer/prior/test_learn_prior.py -k inside_scan",
    ),
    Fault(
        "joint law: integers that are not dequantized",
        "data/columns.py",
        "noise = rng.uniform(-CELL, CELL, (num_rows, len(columns)))",
        "noise = np.zeros((num_rows, len(columns)))",
        "data/test_columns.py",
    ),
    Fault(
        "joint law: integers beyond 32 bits",
        "infer/joint/layout.py",
        "check_finite(jnp.asarray((np.abs(values) <= _largest(dtype)).all()))",
        "check_finite(jnp.asarray(np.isfinite(values).all()))",
        "infer/joint/test_learn_joint.py -k no_float",
    ),
    Fault(
        "joint law: functions of other sites are learned",
        "infer/joint/learn_joint.py",
        "    check_observed(simulator)\n",
        "",
        "infer/joint/test_learn_joint.py -k cannot_be_learned",
    ),
    Fault(
        "joint law: the verdict hides nothing",
        "infer/joint/conditionals.py",
        "known = np.where(hidden, np.nan, true)",
        "known = np.where(hidden & False, np.nan, true)",
        "infer/joint/test_learn_joint.py -k dependence",
    ),
    Fault(
        "verdict: a draw is its own nearest",
        "infer/amortized/fit_verdict.py",
        "apart[:, np.eye(points.shape[1], dtype=bool)] = np.inf",
        "apart[:, np.eye(points.shape[1], dtype=bool)] = 0.0",
        "infer/amortized/test_fit_verdict.py -k distances",
    ),
    Fault(
        "verdict: distances with the wrong sign",
        "infer/amortized/fit_verdict.py",
        "excess = np.mean(log_distance[:, 0] - log_distance[:, 1:].mean(1))",
        "excess = np.mean(log_distance[:, 1:].mean(1) - log_distance[:, 0])",
        "infer/amortized/test_fit_verdict.py -k distances",
    ),
    Fault(
        "table: gaps in all rows are not judged",
        "infer/joint/conditionals.py",
        "(x[~np.isnan(x[:, hidden]).any(1)] for x in (rows, held_out))",
        "(x[~np.isnan(x).any(1)] for x in (rows, held_out))",
        "infer/joint/test_learn_table.py -k gaps_in_all_rows",
    ),
    Fault(
        "held-out rows: equal ones are trained on",
        "train/held_out.py",
        "numbers.setdefault(key, len(numbers)) for key in keys",
        "i for i, _ in enumerate(keys)",
        "train/test_held_out.py",
    ),
    Fault(
        "far points: neighbors are not looked at",
        "data/far_points.py",
        "if is_between and self.to_row > MAX_DISTANCE * self.loneliest:",
        "if is_between and self.to_row > MAX_DISTANCE * self.farthest:",
        "data/test_far_points.py",
    ),
    Fault(
        "observations far from all data: their noise is left out",
        "score/conditioning.py",
        "remoteness(value, data + sd * noise)",
        "remoteness(value, data)",
        "score/test_conditioning.py -k near_data",
    ),
    Fault(
        "learned prior: values from handlers around the model are ignored",
        "model/handlers.py",
        "any(_gives(h, msg) for h in outer)",
        "False",
        "infer/prior/test_learn_prior.py -k refused",
    ),
    Fault(
        "learned prior: the scale of a site is ignored",
        "model/handlers.py",
        'if msg.get("scale") is not None or is_masked(msg["fn"]):',
        'if is_masked(msg["fn"]):',
        "infer/prior/test_learn_prior.py -k refused",
    ),
    Fault(
        "joint law: files of different laws are put together",
        "io/folder.py",
        "if not saved.is_file() or saved.read_bytes() != sums(path, names).encode()",
        "if not saved.is_file() or not sums(path, names).encode()",
        "infer/joint/test_learn_joint.py -k altered",
    ),
    Fault(
        "annealing: the likelihood is tempered within the sum over discrete sites",
        "kernel/annealing_path.py",
        "        if not self.discrete:\n            return self._potential(t, beta)",
        "        if True:\n            return self._potential(t, beta)",
        "kernel/test_annealed_langevin.py -k discrete",
    ),
    Fault(
        "verdict: values that are lost in rounding count as known",
        "model/rounding.py",
        "    return ~(jnp.abs(back - z) <= MAX_ROUNDING)",
        "    return jnp.abs(back - z) < 0",
        "model/test_rounding.py -k latents",
    ),
    Fault(
        "divergent proposals are draws of the metric",
        "kernel/adaptation.py",
        "self._merge(state, z, gradient, ~diverging, place)",
        "self._merge(state, z, gradient, diverging | ~diverging, place)",
        "kernel/test_adaptation.py -k divergent",
    ),
    Fault(
        "acceptance at a temperature is summed over transitions",
        "kernel/replica_exchange.py",
        "state.accept_prob + moved.accept_prob / num",
        "state.accept_prob + moved.accept_prob",
        "kernel/test_parallel_tempering.py -k several_moves",
    ),
    Fault(
        "states that go on with other data keep their values",
        "kernel/base.py",
        "state.data == checksum(arguments)",
        "state.data == state.data",
        slow="kernel/test_kernel_contract.py -k goes_on",
    ),
    Fault(
        "verdict: divergent proposals count alike in curved posteriors",
        "kernel/verdict.py",
        "limit *= min(1.0, _smallest_linearity(record) / MIN_LINEARITY)",
        "limit *= min(1.0, measure_linearity(record) / MIN_LINEARITY)",
        "kernel/test_verdict.py -k divergences",
    ),
    Fault(
        "ScoreSDE: a program is kept when what the model reads has changed",
        "infer/twisted/run.py",
        "static._replace(program=digest_program(read, arrays)), arrays",
        "static, arrays",
        "infer/twisted/test_score_sde.py -k besides",
    ),
    Fault(
        "denoising calibration: the derivative is that of other units",
        "diagnostics/denoising_calibration.py",
        "steps = jax.vmap(score.standardize.inverse)(directions) - origin",
        "steps = directions",
        "diagnostics/test_score_checks.py -k any_units",
    ),
)

NUMBERS = (
    Fault(
        "resampled particles lose their first ancestors",
        "smc/resampling.py",
        "weights._replace(eve=weights.eve[ancestors])",
        "weights",
        "smc/test_smc.py",
    ),
    Fault(
        "offspring of places, not of the particles there",
        "smc/resampling.py",
        "offspring = order[systematic(key, sorted_weights.log_weight)]",
        "offspring = systematic(key, sorted_weights.log_weight)",
        "smc/test_smc.py",
    ),
    Fault(
        "infinite weights are kept",
        "smc/weights.py",
        "jnp.isnan(log_weight) | (log_weight == jnp.inf)",
        "jnp.isnan(log_weight)",
        "smc/test_smc.py",
    ),
    Fault(
        "standard error of all rows, not of pairs",
        "diagnostics/noised_data.py",
        "/ jnp.sqrt(len(means))",
        "/ jnp.sqrt(len(values))",
        "diagnostics/test_score_checks.py -k opposite",
    ),
    Fault(
        "error of a ratio as if its bottom were known",
        "diagnostics/noised_data.py",
        "mean_and_error((top - ratio * bottom) / bottom.mean())",
        "mean_and_error(top / bottom.mean())",
        "diagnostics/test_score_checks.py -k opposite",
    ),
    Fault(
        "ties of all sites are broken alike",
        "diagnostics/sbc.py",
        "jax.random.fold_in(rng_key, j)",
        "jax.random.fold_in(rng_key, 0)",
        "diagnostics/test_calibration.py -k ties",
    ),
    Fault(
        "Stein statistic over pairs that it leaves out",
        "diagnostics/stein.py",
        "kernel.sum() / (number * (number - 1))",
        "kernel.sum() / number**2",
        "diagnostics/test_score_checks.py -k stein",
    ),
    Fault(
        "asymmetry without its half",
        "diagnostics/conservativeness.py",
        "jnp.square(backward)).sum() / 2",
        "jnp.square(backward)).sum()",
        "diagnostics/test_score_checks.py -k asymmetry",
    ),
    Fault(
        "one-sided p-values of identities",
        "diagnostics/stein_identities.py",
        "2 * norm.sf(",
        "norm.sf(",
        "diagnostics/test_score_checks.py -k identities",
    ),
    Fault(
        "observation of a local test in other units",
        "diagnostics/lc2st.py",
        "context, at = (context - loc) / scale, (at - loc) / scale",
        "context = (context - loc) / scale",
        "diagnostics/test_calibration.py -k units",
    ),
    Fault(
        "coupled noise in another order",
        "diagnostics/step_size_bias.py",
        "(eta * noise[0] + noise[1])",
        "(noise[0] + eta * noise[1])",
        "diagnostics/test_step_size_bias.py -k coupled",
    ),
    Fault(
        "bias that halving removes counts as all",
        "diagnostics/step_size_bias.py",
        "share / (1 - 2.0**-order)",
        "share / 1.0",
        "diagnostics/test_step_size_bias.py -k moments",
    ),
    Fault(
        "bias of a variance with the wrong sign of the mean",
        "diagnostics/step_size_bias.py",
        "coarse_square - fine_square - gap *",
        "coarse_square - fine_square + gap *",
        "diagnostics/test_step_size_bias.py -k moments",
    ),
    Fault(
        "known score weighted by its own row",
        "loss/target.py",
        "(square.sum() - square) / max(1, len(x0) - 1)",
        "jnp.full_like(square, square.mean())",
        "loss/test_loss_objectives.py -k known_score",
    ),
    Fault(
        "times of training from 0",
        "loss/noise_levels.py",
        "self.sde.t_min + u * (self.sde.t_max - self.sde.t_min)",
        "u * self.sde.t_max",
        "test_schedule.py -k strata",
    ),
    Fault(
        "chance of a far number, not of a far row",
        "data/context_scale.py",
        "FAR_PROBABILITY * rows / (2 * numbers)",
        "FAR_PROBABILITY * rows / 2",
        "infer/amortized/test_observations.py -k chance",
    ),
    Fault(
        "normal scores of ties from other places",
        "data/context_scale.py",
        "return (sums / count)[place]",
        "return scores[place]",
        "infer/amortized/test_observations.py -k ties",
    ),
    Fault(
        "rounding passes for an atom",
        "data/columns.py",
        "more >= max(least, MIN_TIES * less)",
        "more >= least",
        "data/test_columns.py -k atom",
    ),
    Fault(
        "discriminator without an advantage is used",
        "guidance/discriminator.py",
        "self.advantage >= 2 * self.standard_error",
        "self.advantage >= 0 * self.standard_error",
        "guidance/test_guidance.py -k advantage",
    ),
    Fault(
        "inpainting climbs by the difference of levels",
        "guidance/inpainting.py",
        "jnp.sqrt(level**2 - level_next**2) * noise",
        "(level - level_next) * noise",
        "guidance/test_guidance.py -k climbs",
    ),
    Fault(
        "one-step draws with the noise of a level twice",
        "consistency/model.py",
        "sd = jnp.sqrt(level**2 - model.sde.sigma_min**2)",
        "sd = level",
        "consistency/test_consistency.py -k level_next",
    ),
    Fault(
        "guided step divided by the sum of levels",
        "infer/twisted/guidance.py",
        "fall = levels[0] - levels[1]",
        "fall = levels[0] + levels[1]",
        "infer/twisted/test_twisted_guidance.py",
    ),
    Fault(
        "guidance with the variance of the noise",
        "infer/twisted/guidance.py",
        "variance[name] = level / (1 + level)",
        "variance[name] = level",
        "infer/twisted/test_twisted_guidance.py",
    ),
    Fault(
        "power of other sites to first order",
        "infer/twisted/twist.py",
        "2 / (1 + jnp.sqrt(1 + 4 * change))",
        "1 / (1 + change)",
        "infer/twisted/test_twisted_sampler.py -k power",
    ),
    Fault(
        "curvature of residuals without its half",
        "infer/twisted/twist.py",
        "lambda a, b, c: finite(0.5 * (a + b) - c)",
        "lambda a, b, c: finite((a + b) - 2 * c)",
        "infer/twisted/test_twisted_sampler.py -k curvature",
    ),
    Fault(
        "priors of other sites do not pull",
        "infer/twisted/twist.py",
        "back((-solved.solution, one, one))",
        "back((-solved.solution, one, zero))",
        "infer/twisted/test_twisted_sampler.py -k pull",
    ),
    Fault(
        "evidence with the weights of the start",
        "infer/twisted/sampler.py",
        "weights._replace(log_evidence=zero)",
        "weights._replace()",
        "infer/twisted/test_twisted_sampler.py -k nothing",
    ),
    Fault(
        "acceptance of particles without weight",
        "infer/twisted/sampler.py",
        "jnp.sum(jnp.exp(log_weight) * accept_prob)",
        "jnp.mean(accept_prob)",
        "infer/twisted/test_twisted_sampler.py -k acceptance",
    ),
    Fault(
        "cosine table without its whole angle",
        "sde/discrete.py",
        "(u + offset) / (1 + offset) * np.pi / 2",
        "(u + offset) * np.pi / 2",
        "sde/test_sde.py -k angles",
    ),
    Fault(
        "steps weighted linearly in time",
        "sde/discrete.py",
        "jnp.expm1(excess * width) / jnp.expm1(width)",
        "excess",
        "sde/test_sde.py -k steps",
    ),
    Fault(
        "noise widens the likelihood without the gradient's square",
        "kernel/annealing_path.py",
        "jnp.where(square > 0, square, 1.0) ** 2",
        "jnp.where(square > 0, square, 1.0)",
        "kernel/test_annealed_langevin.py -k widens",
    ),
    Fault(
        "steps of annealing as wide as the noise",
        "kernel/annealing_path.py",
        "level / jnp.sqrt(1 + level**2) *",
        "level *",
        "kernel/test_annealed_langevin.py -k scales",
    ),
    Fault(
        "steps of annealing by the level alone",
        "kernel/annealing_path.py",
        "/ level(learned.t)",
        "",
        "kernel/test_annealed_langevin.py -k scales",
    ),
    Fault(
        "weighted priors count as drawn",
        "kernel/annealing_path.py",
        "(is_weighted(site) or is_improper(site))",
        "is_improper(site)",
        "kernel/test_annealed_langevin.py -k drawn",
    ),
    Fault(
        "tempered step sizes adapted the wrong way",
        "kernel/tempering_adaptation.py",
        "gain * (accept_prob - target)",
        "gain * (target - accept_prob)",
        "kernel/test_parallel_tempering.py -k acceptance",
    ),
    Fault(
        "tempered step sizes forget at another rate",
        "kernel/tempering_adaptation.py",
        "[:, None] ** -STEP_SIZE_DECAY",
        "[:, None] ** -1.0",
        "kernel/test_parallel_tempering.py -k acceptance",
    ),
    Fault(
        "likelihood of zero at the prior",
        "kernel/tempered_potential.py",
        "jnp.where(jnp.asarray(beta) > 0, beta * value, 0.0)",
        "beta * value",
        "kernel/test_parallel_tempering.py -k likelihood",
    ),
    Fault(
        "halved steps forget an earlier failure",
        "kernel/step_halving.py",
        "self.insufficient | later.insufficient",
        "later.insufficient",
        "kernel/test_step_halving.py -k failed",
    ),
    Fault(
        "errors of the net that are the same at all shared sites",
        "infer/amortized/group_langevin.py",
        "moments.mean + x @ moments.slope",
        "moments.mean + x @ (0 * moments.slope)",
        "infer/amortized/test_hierarchy.py -k slope",
    ),
    Fault(
        "stray particles in the metric",
        "infer/amortized/group_langevin.py",
        "winsorized(x, STRAY_DISTANCE) != x",
        "winsorized(x, 1e9) != x",
        "infer/amortized/test_hierarchy.py -k stray",
    ),
    Fault(
        "correlations of particles as they are",
        "infer/amortized/group_langevin.py",
        "(1 - share) * covariance + share * variances",
        "covariance + 0 * share * variances",
        "infer/amortized/test_hierarchy.py -k particles",
    ),
    Fault(
        "last batch repeats the first rows",
        "infer/amortized/sampling.py",
        "jnp.minimum(jnp.arange(num_batches * batch_size), count - 1)",
        "jnp.arange(num_batches * batch_size) % batch_size",
        "infer/amortized/test_hierarchy.py -k batches",
    ),
    Fault(
        "shares of sites cut by their number",
        "model/site_counts.py",
        "np.cumsum([site.size for site in self.sites])",
        "np.cumsum([1 for site in self.sites])",
        "model/test_rounding.py -k shares_are",
    ),
    Fault(
        "error of an identity is that of one row",
        "infer/amortized/objective.py",
        "terms.std(axis=0) / np.sqrt(len(z))",
        "terms.std(axis=0)",
        "infer/amortized/test_objective.py -k identities",
    ),
    Fault(
        "identities without the derivative of z",
        "infer/amortized/objective.py",
        "terms[:, 1 + i] += 1.0",
        "terms[:, i] += 1.0",
        "infer/amortized/test_objective.py -k identities",
    ),
    Fault(
        "draws beyond the other end",
        "infer/prior/check.py",
        "(drawn > rows.max(0)).mean(0)",
        "(drawn < rows.max(0)).mean(0)",
        "infer/prior/test_prior_check.py -k beyond",
    ),
    Fault(
        "a stage that is used again is paid for",
        "solver/adaptive.py",
        "tableau.num_stages - bool(tableau.fsal)",
        "tableau.num_stages",
        "solver/test_solver_choice.py -k stages",
    ),
    Fault(
        "energy distance counts a row with itself",
        "diagnostics/work_precision.py",
        "mean_distance(y, y, m * (m - 1))",
        "mean_distance(y, y, m * m)",
        "solver/test_solver_choice.py -k energy_distance",
    ),
    Fault(
        "weight decay of one size",
        "infer/amortized/weight_decay.py",
        "optax.adamw(rate, weight_decay=decay)",
        "optax.adamw(rate, weight_decay=1.0)",
        "infer/amortized/test_weight_decay.py -k shrinks",
    ),
    Fault(
        "a noisy law asks for levels beyond the highest",
        "score/conditioning.py",
        "jnp.minimum(total, self.highest)",
        "total",
        "infer/twisted/test_coordinate_observations.py -k beyond",
    ),
    Fault(
        "trajectory begins at the signal scale of no noise",
        "solver/integrate.py",
        "_to_data_units(score, first.x, t)[None]",
        "score.standardize.inverse(first.x)[None]",
        "solver/test_solver_frame.py -k trajectory",
    ),
    Fault(
        "trajectory with the scale of the time before",
        "solver/integrate.py",
        "(xs, ts[1:])",
        "(xs, ts[:-1])",
        "solver/test_solver_frame.py -k trajectory",
    ),
    Fault(
        "draws off the data at the signal scale of no noise",
        "model/data_range.py",
        "alpha = law.score.sde.alpha(law.t)",
        "alpha = 1.0",
        "score/test_level.py -k off_the_data",
    ),
    Fault(
        "held-out draws of a prior at the signal scale of no noise",
        "infer/prior/check.py",
        "u = alpha * u + sigma *",
        "u = u + sigma *",
        "infer/prior/test_prior_check.py -k shrink",
    ),
    Fault(
        "whitened draws shrunk as if the signal were whole",
        "model/learned_prior.py",
        "jnp.square(alpha) + jnp.square(sigma)",
        "1 + jnp.square(sigma)",
        "infer/prior/test_prior_check.py -k clean",
    ),
    Fault(
        "data's limits at the signal scale of no noise",
        "score/level.py",
        "noise = level * alpha * unit.score(alpha * u, t)",
        "noise = level * unit.score(alpha * u, t)",
        "score/test_level.py -k energy",
    ),
    Fault(
        "energy errors far from the goal count for nothing",
        "kernel/adaptation.py",
        "/ (6 * 1.5))",
        "/ 1.5)",
        "kernel/test_adaptation.py -k far",
    ),
    Fault(
        "undefined energy errors count as accepted",
        "kernel/adaptation.py",
        "jnp.where(jnp.isnan(energy_errors), jnp.inf, energy_errors)",
        "jnp.where(jnp.isnan(energy_errors), 0.0, energy_errors)",
        "kernel/test_adaptation.py -k accept",
    ),
    Fault(
        "chains that accept least count most at last",
        "kernel/adaptation.py",
        "early = window_idx < HARMONIC_WINDOWS",
        "early = window_idx > HARMONIC_WINDOWS",
        "kernel/test_adaptation.py -k accept",
    ),
    Fault(
        "trajectories shorter in wide directions",
        "kernel/adaptation.py",
        "length = QUARTER_PERIOD * state.scale",
        "length = QUARTER_PERIOD / state.scale",
        "kernel/test_adaptation.py -k trajectories",
    ),
    Fault(
        "friction in other units",
        "kernel/adaptation.py",
        "(self.friction or 0.0) / state.scale",
        "(self.friction or 0.0) * state.scale",
        "kernel/test_adaptation.py -k trajectories",
    ),
    Fault(
        "acceptance by a number of the noise",
        "kernel/threefry.py",
        "words, one, RESERVED_COUNTER), dtype",
        "words, 0 * one, 0 * one), dtype",
        "kernel/test_threefry.py",
    ),
    Fault(
        "acceptance by the next key",
        "kernel/threefry.py",
        "one = jnp.ones_like(words[0])",
        "one = jnp.zeros_like(words[0])",
        "kernel/test_threefry.py -k nothing",
    ),
    Fault(
        "angles of the noise from another number",
        "kernel/threefry.py",
        "_circle(_fraction(b, more[1], dtype) - 0.5)",
        "_circle(_fraction(a, more[1], dtype) - 0.5)",
        "kernel/test_threefry.py",
    ),
    Fault(
        "last row is never in a batch",
        "data/rows.py",
        "0, len(self.rows.x))",
        "0, len(self.rows.x) - 1)",
        "data/test_inputs_of_training.py -k batches",
    ),
    Fault(
        "defaults of a function do not count for identity",
        "fingerprint.py",
        "(*cells, bare.__defaults__, bare.__kwdefaults__)",
        "cells",
        "test_fingerprint.py -k bound",
    ),
    Fault(
        "objects of methods do not count for identity",
        "fingerprint.py",
        'bound.append(describe(getattr(fn, "__self__", None)))',
        "pass",
        "test_fingerprint.py -k bound",
    ),
    Fault(
        "covariance of clean points with the site's own noise",
        "model/denoising.py",
        "level * (moved[name] - share * v[name]) / rest",
        "level * moved[name] / rest",
        "infer/twisted/test_twisted_sampler.py -k clean",
    ),
    Fault(
        "particles sorted about the origin",
        "smc/rqmc.py",
        "points = points - weight @ points",
        "points = points - 0",
        "infer/twisted/test_twisted_sampler.py -k sorted",
    ),
    Fault(
        "particles without weight turn the axis",
        "smc/rqmc.py",
        "points.T @ (weight[:, None] * (points @ axes))",
        "points.T @ (points @ axes)",
        "infer/twisted/test_twisted_sampler.py -k sorted",
    ),
    Fault(
        "learned sites move by the sd of the draws",
        "infer/twisted/rejuvenation.py",
        "if name in twist.learned:",
        "if name not in scales and not twist.learned:",
        "infer/twisted/test_twisted_sampler.py -k scale_of",
    ),
    Fault(
        "draws of the metric from the gradients",
        "kernel/fisher_metric.py",
        "mean = inverse_root @ middle @ inverse_root",
        "mean = root @ middle @ root",
        "kernel/test_fisher_metric.py -k geometric",
    ),
    Fault(
        "covariance of a low rank by its root",
        "kernel/whitening.py",
        "return self._replace(stretch=jnp.square(self.stretch))",
        "return self",
        "kernel/test_fisher_metric.py -k low_rank",
    ),
    Fault(
        "inverse of a low rank as wide as itself",
        "kernel/whitening.py",
        "LowRankSqrt(1 / self.scale, self.basis, 1 / self.stretch)",
        "LowRankSqrt(1 / self.scale, self.basis, self.stretch)",
        "kernel/test_fisher_metric.py -k low_rank",
    ),
    Fault(
        "accepted proposals in a row, not refused ones",
        "kernel/run_moments.py",
        "jnp.where(accepted, 0, row + 1)",
        "jnp.where(accepted, row + 1, 0)",
        "kernel/test_verdict.py -k proposals",
    ),
    Fault(
        "counts of the run before",
        "kernel/run_moments.py",
        "jnp.where(number <= 1, 0, self.counts)",
        "jnp.where(number < 1, 0, self.counts)",
        "kernel/test_verdict.py -k proposals",
    ),
    Fault(
        "lowest potential of the run before",
        "kernel/run_moments.py",
        "jnp.where(number <= 1, jnp.inf, self.lowest)",
        "jnp.where(number < 1, jnp.inf, self.lowest)",
        "kernel/test_verdict.py -k potentials",
    ),
    Fault(
        "undefined potentials hide the lowest",
        "kernel/run_moments.py",
        "jnp.fmin(before, seen)",
        "jnp.minimum(before, seen)",
        "kernel/test_verdict.py -k potentials",
    ),
    Fault(
        "quantile without the cube",
        "kernel/verdict.py",
        "NormalDist().inv_cdf(probability) * variance**0.5) ** 3",
        "NormalDist().inv_cdf(probability) * variance**0.5) ** 2",
        "kernel/test_verdict.py -k quantiles",
    ),
    Fault(
        "starts and steps share their keys",
        "solver/integrate.py",
        "steps = jax.random.split(key_steps, size)",
        "steps = starts",
        "solver/test_solver_frame.py -k keys",
    ),
    Fault(
        "draws of a posterior with the noise of its truth",
        "diagnostics/replicate.py",
        "truth, observation, sample_posterior(key_infer, observation)",
        "truth, observation, sample_posterior(key_simulate, observation)",
        "diagnostics/test_calibration.py -k own",
    ),
    Fault(
        "blocks of simulations are the same",
        "diagnostics/replicate.py",
        "block = run(keys[j * size : (j + 1) * size])",
        "block = run(keys[:size])",
        "diagnostics/test_calibration.py -k own",
    ),
    Fault(
        "negative precisions are turned round",
        "infer/amortized/composition.py",
        "jnp.maximum(values, 0.0)",
        "jnp.abs(values)",
        "infer/amortized/test_composition.py -k precisions",
    ),
    Fault(
        "precision is a covariance",
        "infer/amortized/composition.py",
        "jnp.linalg.inv(covariance + MIN_VARIANCE * jnp.eye(size))",
        "covariance + MIN_VARIANCE * jnp.eye(size)",
        "infer/amortized/test_composition.py -k precisions",
    ),
    Fault(
        "levels end at the highest time of the sites",
        "model/noise_levels.py",
        "lowest = min(_known_time",
        "lowest = max(_known_time",
        "model/test_site_time.py -k lowest",
    ),
    Fault(
        "moments of a second run go on from those of the first",
        "kernel/run_moments.py",
        "rows=jnp.where(k == 1, fresh.rows, moments.rows)",
        "rows=moments.rows",
        "kernel/test_verdict.py -k second_run",
    ),
    Fault(
        "power of the likelihood by the square of the share of levels",
        "kernel/annealed_smc.py",
        "limit = step.fraction**3",
        "limit = step.fraction**2",
        "kernel/test_annealed_langevin.py -k power_of_the_likelihood",
    ),
    Fault(
        "tables of betas that go down once are refused",
        "sde/discrete.py",
        "if all(after < before for before, after",
        "if any(after < before for before, after",
        "sde/test_sde.py -k go_down",
    ),
    Fault(
        "steps of moves grow where few are accepted",
        "infer/twisted/rejuvenation.py",
        "log_step + LOG_STEP_GAIN *",
        "log_step - LOG_STEP_GAIN *",
        "infer/twisted/test_twisted_sampler.py -k target_acceptance",
    ),
    Fault(
        "estimates of runs without the weight of their start",
        "infer/twisted/pilot_runs.py",
        "value = run.weights.log_evidence + run.initial_log_weight",
        "value = run.weights.log_evidence",
        "infer/twisted/test_twisted_sampler.py -k weight_of_their_start",
    ),
    Fault(
        "rows of equal draws that never end",
        "infer/twisted/independent_chains.py",
        "before = jnp.where(accepted, 0.0, self.length)",
        "before = self.length",
        "infer/twisted/test_particle_metropolis.py -k few_effective",
    ),
    Fault(
        "batches of the evidence of other data that go on from the first",
        "kernel/parallel_tempering.py",
        "t = jnp.max(state.stepping_stones.num_draws)",
        "t = state.i - state.plan.num_warmup",
        "kernel/test_parallel_tempering.py -k begins_anew",
    ),
    Fault(
        "runs of another length counted as the first",
        "run_verdict.py",
        "begins = (drawn > 0) & (is_over | (self.num_samples != run.num_samples))",
        "begins = (drawn > 0) & is_over",
        "kernel/test_verdict.py -k counted_in_their_run",
    ),
    Fault(
        "observations that are curved taken for linear ones",
        "infer/twisted/twist.py",
        "return not is_linear(places, self.learned_of(z))",
        "return is_linear(places, self.learned_of(z))",
        "infer/twisted/test_twisted_sampler.py -k need_no_probes",
    ),
    Fault(
        "curved locations are widened to first order",
        "infer/twisted/twist.py",
        "(bends[name].mean(0), (change**2 + bends[name] ** 2).mean(0))",
        "(0 * bends[name].mean(0), (change**2).mean(0))",
        "infer/twisted/test_twisted_sampler.py -k second_order",
    ),
    Fault(
        "residuals that are steeper on both sides are widened by their slope",
        "infer/twisted/twist.py",
        "jnp.concatenate([even, odd]) / jnp.sqrt(NUM_PROBES)",
        "jnp.concatenate([even, 0 * odd]) / jnp.sqrt(NUM_PROBES)",
        "infer/twisted/test_twisted_sampler.py -k cube",
    ),
    Fault(
        "generators of functions that a model calls are not seen",
        "model/host_randomness.py",
        "MAX_DEPTH = 3",
        "MAX_DEPTH = 0",
        "model/test_host_randomness.py -k another",
    ),
)

FAULTS = (
    *LEVEL_COVARIANCE,
    *LANGEVIN,
    *SMC,
    *SOLVERS,
    *DENSITIES,
    *CONDITIONING,
    *POTENTIALS,
    *LEVELS,
    *TWISTED,
    *LOSSES,
    *TRAINING,
    *AMORTIZED,
    *JOINT,
    *FILES,
    *NUMBERS,
)


def plant(text: str, fault: Fault) -> str:
    """Return a file's text with the fault, or raise unless its place is unique."""
    if text.count(fault.old) != 1:
        raise ValueError(f"'{fault.name}': {text.count(fault.old)} places to plant it")
    return text.replace(fault.old, fault.new)


def copy_package(folder: Path) -> None:
    """Copy what tests need into a folder."""
    ignore = shutil.ignore_patterns("__pycache__", "_build")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    # which tests are nearest does not depend on the seconds that they take
    (folder / "tests/tiers.txt").write_text("", encoding="utf-8")


def fails(folder: Path, tests: str, marks: str) -> bool:
    """Return whether a test fails, or never ends; raise if none can run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marks]
    command += ["--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"tests/{t}" if ".py" in t else t for t in shlex.split(tests)]
    # a copy is written more often than once a second: no compiled files of old lines
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{shlex.join(command)}\n{run.stdout[-2000:]}")
    return run.returncode == 1


def judge(folder: Path, fault: Fault, slow: bool) -> str:
    """Return what becomes of a fault: caught (fast or slow), survived, equivalent."""
    if fault.equivalent:
        return f"equivalent: {fault.equivalent}"
    path = folder / "numpyro_score" / fault.file
    sound = path.read_text("utf-8")
    path.write_text(plant(sound, fault), encoding="utf-8")
    try:
        if fails(folder, fault.tests, "not slow"):
            return "caught (fast)"
        if slow and fault.slow and fails(folder, fault.slow, "slow"):
            return "caught (slow)"
        return "survived"
    finally:
        path.write_text(sound, encoding="utf-8")


def main() -> int:
    """Run the faults that were asked for, print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--slow", action="store_true")
    asked = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not asked.words
        or any(w in f"{fault.file} {fault.name}" for w in asked.words)
    ]
    verdicts = []
    with tempfile.TemporaryDirectory() as name:
        copy_package(Path(name))
        for fault in chosen:
            start = time.monotonic()
            verdicts.append(judge(Path(name), fault, asked.slow))
            took = f"{time.monotonic() - start:4.0f} s"
            print(f"{verdicts[-1]:14} {took}  {fault.file}: {fault.name}", flush=True)
    for verdict in sorted({v.split(":")[0] for v in verdicts}):
        print(f"{sum(v.startswith(verdict) for v in verdicts)} {verdict}")
    return int("survived" in verdicts)


if __name__ == "__main__":
    sys.exit(main())

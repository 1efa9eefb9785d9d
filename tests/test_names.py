"""Names that were replaced by the field's terms do not come back.

Each module is listed with the names that it may not define, at its top level or, as
"Class.name", in a class: they were metaphors or words of this project alone.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "numpyro_score"

RENAMED = {
    "checkpoint": "key_numbers numbers revive",
    "consistency.distillation": "distill_by_steps train_consistency",
    "consistency.fitting": "skewed_index",
    "consistency.model": "new_model",
    "data.rows": "Rows Stack Stream Table check_rows open_data",
    "data.support": "SoftInterval",
    "diagnostics.c2st": "load_sklearn",
    "diagnostics.chain_bias": "_spread",
    "diagnostics.fisher": "LevelErrors _gain",
    "diagnostics.lc2st": "_compare _fresh _moments",
    "diagnostics.memorization": "TINY",
    "diagnostics.noised_data": "NoisedRows noised over_levels pair_means score_times",
    "diagnostics.replicate": "named",
    "diagnostics.rows": "Rows",
    "diagnostics.step_size_bias": "EulerLangevin Scheme",
    "diagnostics.tarp": "_shares _spread",
    "diagnostics.work_precision": (
        "QualityCurve QualityPoint plot_quality_cost quality_cost"
    ),
    "infer.amortized.composition": "ComposedDenoiser.parts Gauss Jac Parts",
    "infer.amortized.defaults": "repeated",
    "infer.amortized.discontinuity": (
        "JUMP LONGEST NUM_HALVINGS RELEVANT SHORTEST _any_jump has_jumps "
        "jumps_on_line left_over"
    ),
    "infer.amortized.fit_verdict": "BY_POINTS EQUAL JOINT NEAREST ROUGH",
    "infer.amortized.importance": "ALL_BUT_EQUAL weigh",
    "infer.amortized.layout": (
        "LatentLayout.describe Latents ObservationLayout._refuse_array "
        "ObservationLayout.describe Observed"
    ),
    "infer.amortized.model_sites": "Sites _refuse_others read_sites",
    "infer.amortized.npse": "NPSE.center NPSE.edge Problem",
    "infer.amortized.objective": "MAX_ERRORS passes_identities",
    "infer.amortized.one_step": "OneStepPosterior.student",
    "infer.amortized.prior_denoiser": (
        "LEAST NODE_WIDTH NUM_PROBES ProductDenoiser product_denoiser"
    ),
    "infer.amortized.sampling": "DRAWS_AT_ONCE",
    "infer.amortized.simulations": "drop_failures split",
    "infer.amortized.simulator": "_share simulated",
    "infer.amortized.storage": "STUDENT find layout_of",
    "infer.amortized.truncation": (
        "DENSITIES_AT_ONCE LEFT_OUT MARGIN MAX_CANDIDATES NUM_PROBES Region pool "
        "reject resample simulate_inside"
    ),
    "infer.amortized.weight_decay": "DECAYS SHARE decaying lowest run_with_decay",
    "infer.twisted.arguments": "Frame split_arguments",
    "infer.twisted.first_level": "draw_start find_starts longest_reach weigh_start",
    "infer.twisted.gaussian_likelihood": "Whitened whiten",
    "infer.twisted.health": "DOUBTFUL_ESS FEW_ANCESTORS HIDING LOW_START warn_if_poor",
    "infer.twisted.initial_distribution": "MAX_SHARE Start",
    "infer.twisted.linear_solve": (
        "Solution TINY Uncertainty krylov products solve_widened"
    ),
    "infer.twisted.random_walk": "GAIN WalkScale walk",
    "infer.twisted.rejuvenation": "GAIN MAX_DOUBT",
    "infer.twisted.replicates": "Effort descent pool_evidence",
    "infer.twisted.reverse_step": "Rung",
    "infer.twisted.run": "Plan",
    "infer.twisted.sampler": (
        "CloudResult NUM_PROBES Step Sweep _descend _doubt _look _propose "
        "guided_sweep sweep"
    ),
    "infer.twisted.twist": "Doubt Reading Sight",
    "io.arrays": "configuration",
    "io.config": "KNOWN build_object describe",
    "kernel.adaptation": "EnergyScale WarmupPlan finalize merge spread",
    "kernel.annealed_smc": (
        "GAIN LOW_ESS Rung _follow_acceptance advance_chain advance_cloud anneal"
    ),
    "kernel.annealing_path": "Path",
    "kernel.levels": "LevelPlan",
    "kernel.monitoring": "COARSE FAR LONG_ENOUGH STUCK _speak _speak_for_all watch",
    "kernel.resumable_run": "Planned Result _hand_over",
    "kernel.stepping_stone": "combine_evidence",
    "kernel.tempering_checks": "LONG_ENOUGH _speak _speak_for_all watch_tempering",
    "kernel.threefry": "ASIDE hash_counter open_key",
    "kernel.transition": "Frame flip in_one_piece",
    "kernel.verdict": "Chains.white",
    "kernel.whitening": "Coordinates Moments UNMIXED displace",
    "langevin": "Phase Place Target displacement_error",
    "loss.flow_matching": "Rows pair",
    "loss.implicit": "Rows",
    "loss.noise_levels": "LevelLaw OneLevel",
    "loss.target": "CleanTarget KnownScore Rows StableTarget Target",
    "loss.weighting": "FlowWeight SigmaSquared",
    "model.denoising": "Learned Sites asymmetry cover gain spread",
    "model.distribution": "ScoreDistribution.at innermost",
    "model.handlers": "_refuse_transforms",
    "model.initialization": "_refuse_infinite check_evaluation find_start",
    "model.learned_sites": "LearnedSlot LearnedSlots",
    "model.potential": "_refuse_delta",
    "nn.convolution": "by_patches",
    "nn.embedding": "modulate",
    "nn.unet": "_double _halve",
    "score.density": "log_prob_by",
    "score.flow": "denoise_and_trace log_density",
    "score.preconditioning": "Bounded Clean Flow Noise Score V",
    "score.prediction": "Clock LevelClock StepClock TimeClock",
    "sde.base": "DiffusionProcess",
    "sde.tweedie": "SCORE_LEVEL SIGMA_SCORE edm_weight precondition unit_weight",
    "smc.resampling": "select",
    "smc.rqmc": "EDGE Order STEPS Sites arrange draw_noise even_noise",
    "smc.tempering": "choose_power largest_step",
    "smc.weights": "Cloud clean",
    "solver.adams_bashforth": "LARGEST_STEP",
    "solver.adaptive": "Adaptive.joint joint_norm own_norm",
    "solver.base": "DRAWS advance start",
    "solver.control_variates": "Expectation stein_controls",
    "solver.integrate": (
        "Denoises Randomness advance_times begin carry finish path randomness run "
        "share to_physical"
    ),
    "solver.multistep": "lagrange push weights",
    "solver.pilot": "NUM_FINE",
    "solver.sample": "_check check_flow",
    "solver.unipc": "Corrected",
    "train.fit": "Plan Record _extend _judge_start fit_plan run_blocks run_plan",
    "train.linear_baseline": "LEAST_SCALE centered",
    "train.objective": "check_parts drop_some standardized",
    "train.optimizer": "Problem descend",
    "train.sharding": "over_rows place",
    "train.start": "fresh_state",
    "train.state": "ScoreMatchingState",
}


def defined(tree: ast.Module | ast.ClassDef) -> set[str]:
    """Return the names in the body of a module or class; "Class.name" for members."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for member in defined(node)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if hasattr(n, "id")}
    return names


@pytest.mark.parametrize(("module", "names"), RENAMED.items())
def test_replaced_names_stay_away(module: str, names: str):
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    if path.exists():  # merged into another file, perhaps
        assert not defined(ast.parse(path.read_text("utf-8"))) & set(names.split())


def test_every_file_is_free_of_metaphors():
    words = {"Rung", "Sight", "Doubt", "Reading", "Cloud", "Rows", "Sweep", "Effort"}
    for path in PACKAGE.rglob("*.py"):
        assert not defined(ast.parse(path.read_text("utf-8"))) & words, path


def test_a_definition_is_seen():
    source = "def a(): ...\nclass B:\n  g: int\nC = 1\nD, E = 1, 2\nf: int = 3\n"
    assert defined(ast.parse(source)) == {"a", "B", "B.g", "C", "D", "E", "f"}

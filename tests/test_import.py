"""What an import loads, and what lazy names do."""

import pickle
import pkgutil
import subprocess
import sys

import pytest

import numpyro_score
import numpyro_score.infer
import numpyro_score.solver
from numpyro_score.lazy_names import lazy_names

# libraries that take long to import and that few programs need
HEAVY = {
    "arviz",
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "diffrax",
    "equinox",
    "flax",
    "lineax",
    "matplotlib",
    "optax",
    "orbax",
    "pandas",
    "safetensors",
    "sklearn",
    "tensorstore",
    "xarray",
}
LAZY = [
    (numpyro_score, "ScoreLangevin"),
    (numpyro_score, "MLP"),
    (numpyro_score, "NPSE"),
    (numpyro_score, "ScoreMatching"),
    (numpyro_score, "UNet"),
    (numpyro_score, "to_datatree"),
    (numpyro_score.infer, "AmortizedPosterior"),
    (numpyro_score.infer, "distill_posterior"),
    (numpyro_score.solver, "Adaptive"),
    (numpyro_score.solver, "AdaptiveSDE"),
    (numpyro_score.infer, "ScoreSDEAdapter"),
]


def run_python(code: str) -> str:
    """Return what a new interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def modules_after(code: str) -> set[str]:
    """Return the modules that a new interpreter has after ``code``."""
    return set(run_python(f"{code}\nimport sys\nprint(*sys.modules)").split())


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter has after ``code``."""
    return {name.partition(".")[0] for name in modules_after(code)}


def test_import_loads_two_modules_more_than_numpyro():
    added = modules_after("import numpyro_score") - modules_after("import numpyro")
    assert added == {"numpyro_score", "numpyro_score.lazy_names"}


def test_modules_are_attributes_of_the_package():
    names = ["sde", "handlers", "io", "infer"]  # those that load more after the others
    lines = [f"print(numpyro_score.{name}.__name__)" for name in names]
    found = run_python("\n".join(["import numpyro_score", *lines])).split()
    assert [name.rpartition(".")[2] for name in found] == names


def test_every_package_is_an_attribute():
    names = {
        module.name
        for module in pkgutil.iter_modules(numpyro_score.__path__)
        if module.ispkg
    }
    assert names < set(dir(numpyro_score))


def test_import_leaves_heavy_libraries_alone():
    loaded = loaded_by("import numpyro_score, numpyro_score.infer")
    assert "numpyro_score" in loaded
    assert not loaded & HEAVY


def test_lazy_name_loads_its_library():
    loaded = loaded_by("from numpyro_score.solver import Adaptive")
    assert loaded & HEAVY >= {"diffrax", "lineax"}


@pytest.mark.parametrize(("package", "name"), LAZY)
def test_lazy_name_is_listed_and_defined_where_it_says(package, name):
    assert name in dir(package)
    assert name in package.__all__
    found = getattr(package, name)
    assert getattr(sys.modules[found.__module__], name) is found


def test_lazy_class_can_be_pickled():
    solver = numpyro_score.solver.AdaptiveSDE(rtol=1e-3)
    assert pickle.loads(pickle.dumps(solver)) == solver


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"numpyro_score.solver.*'Adaptiv'"):
        _ = numpyro_score.solver.Adaptiv


def test_lazy_name_becomes_an_attribute():
    find, listed = lazy_names(__name__, {"Heun": "numpyro_score.solver.runge_kutta"})
    assert "Heun" in listed()
    assert find("Heun") is globals().pop("Heun")


def test_import_leaves_the_number_of_devices_open():
    code = """
import numpyro, numpyro_score.infer
numpyro.set_host_device_count(2)
import jax
print(jax.device_count())
"""
    assert run_python(code) == "2\n"

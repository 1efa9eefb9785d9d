"""Warnings name the line of the user's code."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "numpyro_score"
# they warn in host callbacks, or are imported by all that could help them
OWN_LEVELS = {
    "kernel/annealed_smc.py",
    "kernel/monitoring.py",
    "kernel/tempering_checks.py",
    "renamed_arguments.py",
    "run_verdict.py",
}
# alone: the type checks of the tests are lines outside of the package
CALLS = """
import warnings
from numpyro import handlers
from numpyro_score.caller_warnings import warn_caller
with warnings.catch_warnings(record=True, action="always") as caught:
    warn_caller("from here")
    handlers.seed(warn_caller, 0)("through NumPyro")
print([(warning.filename, warning.lineno) for warning in caught])
"""


def test_the_place_is_that_of_the_call_of_the_user():
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "[('<string>', 6), ('<string>', 7)]"


def test_only_host_callbacks_count_levels_of_the_stack():
    counting = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bstacklevel=", path.read_text("utf-8"))
    }
    assert counting == OWN_LEVELS

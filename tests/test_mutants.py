"""Every fault of ``tests.mutants`` can be planted: its line exists, and once."""

import pytest

from tests.mutants import FAULTS, ROOT, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_one_place(fault):
    sound = (ROOT / "numpyro_score" / fault.file).read_text("utf-8")
    assert fault.equivalent or plant(sound, fault) != sound

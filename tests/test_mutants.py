"""The random programs catch every deliberate defect: that is how we know they test something."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, catch_quickly


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_random_programs_catch_the_defect(mutant: Mutant) -> None:
    # Each on one backend, in turn; by hand, ``python tests/mutants.py`` runs all programs on both.
    turn = ("asyncio", "trio")[MUTANTS.index(mutant) % 2]
    assert catch_quickly(mutant, turn if mutant.backend == "either" else mutant.backend)

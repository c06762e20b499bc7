"""The random programs catch every deliberate defect: that is how we know they test something."""

from __future__ import annotations

import os

import pytest
from mutants import MUTANTS, Mutant, catch

if "COVERAGE_PROCESS_CONFIG" in os.environ or "AGENTLOOP_FUZZ_PROGRAMS" in os.environ:
    # Defects are caught in other processes, from which there is nothing to measure.
    MUTANTS = MUTANTS[:1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_random_programs_catch_the_defect(mutant: Mutant) -> None:
    # Each on one backend, in turn; by hand, ``python tests/mutants.py`` runs them on both.
    turn = ("asyncio", "trio")[MUTANTS.index(mutant) % 2]
    assert catch(mutant, turn if mutant.backend == "either" else mutant.backend)

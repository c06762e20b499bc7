"""The random programs catch deliberate defects: that is how we know they test something."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, catch_quickly


# Some of them here: each takes a second or two.
@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS[::12], ids=lambda mutant: mutant.name)
def test_random_programs_catch_the_defect(mutant: Mutant) -> None:
    # Each on one backend, in turn; by hand, ``python tests/tools/mutants.py`` looks for all of them on both.
    backends = [*mutant.seeds]
    assert catch_quickly(mutant, backends[MUTANTS.index(mutant) // 12 % len(backends)])


def test_every_deliberate_defect_can_still_be_planted() -> None:
    lost = []
    for mutant in MUTANTS:
        try:
            module, text = mutant.plant()
        except LookupError as exc:
            lost.append(str(exc))
        else:
            compile(text, module, "exec")

    assert not lost, "\n".join(lost)

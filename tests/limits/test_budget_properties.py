"""Random programs on one budget, see ``budgets``."""

from random import Random
from typing import Literal

import pytest
from agents import backends
from budgets import make_program, run
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.long
@backends
@settings(max_examples=100)
@given(random=st.randoms())
def test_budget_is_never_overspent(backend: Literal["asyncio", "trio"], random: Random) -> None:
    run(make_program(random), backend)

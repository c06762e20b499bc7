"""
Tools for testing code that runs on agentloop, on asyncio and on trio alike.

In ``conftest.py``, to run tests by AnyIO's pytest plugin on both, on a clock that jumps instead of waiting::

    import pytest
    from agentloop.testing import virtual_clock

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(request):
        return virtual_clock(request.param)

and a test, marked with ``pytest.mark.anyio`` unless the plugin's mode is ``auto``, which takes no time::

    import anyio
    import pytest
    from agentloop import AgentLoop, InvocationTimeout, LoopConfig
    from agentloop.testing import Chunks, FakeAgent, FakeHTTPError, Reply, Stall

    @pytest.mark.anyio
    async def test_oracle_is_asked_again_when_it_has_too_much_to_do():
        oracle = FakeAgent(FakeHTTPError(429, retry_after=200), Stall(), Reply("Forty-two", after_seconds=5))
        loop = AgentLoop(LoopConfig(timeout_seconds=10))
        result = await loop.run_single("oracle", oracle, "Why?")

        assert result.output == "Forty-two"
        assert [type(failure) for failure in result.failures] == [FakeHTTPError, InvocationTimeout]
        assert [call.args for call in oracle.calls] == [("Why?",)] * 3
        assert anyio.current_time() - oracle.calls[0].started_at > 200
"""

from agentloop.testing._clock import virtual_clock
from agentloop.testing._deadlock import VirtualClockDeadlock
from agentloop.testing._fake_agent import Chunks, Fail, FakeAgent, FakeCall, FakeHTTPError, Reply, Stall

__all__ = [
    "Chunks",
    "Fail",
    "FakeAgent",
    "FakeCall",
    "FakeHTTPError",
    "Reply",
    "Stall",
    "VirtualClockDeadlock",
    "virtual_clock",
]


def _name_their_place() -> None:
    for name in __all__:
        globals()[name].__module__ = __name__


_name_their_place()

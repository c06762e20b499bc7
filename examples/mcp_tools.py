"""
Agents that call the tools of an MCP server at once, and what the server sees of their time-outs.

Install ``agentloop-anyio[clients]``; in a checkout, ``pip install -e ".[clients]"``. Then::

    python examples/mcp_tools.py [--backend trio]

starts this script once more as a server, ``--serve``, and talks to it over its stdin and stdout with the
``mcp`` SDK. All agents share one connection. Some weather stations hang: the loop's time-out cancels the
agent's call, the SDK tells the server, and there the tool is cancelled too. So nothing goes on working for
a caller that is gone.
"""

import json
import sys
from functools import partial

import anyio
from mcp import Client, StdioServerParameters
from mcp.server import MCPServer
from mcp.types import TextContent
from telling import Parser, status_of, tell_result, tell_retry

from agentloop import AgentLoop, Backoff, Invocation, LoopConfig

TEMPERATURES = {"Oslo": 4, "Lima": 19, "Cairo": 31, "Perth": 22, "Quito": 15, "Delhi": 28}
HANG_ONCE, HANG_ALWAYS, FAIL_ONCE = "Lima", "Quito", "Perth"
CONFIG = LoopConfig(
    max_concurrency=3, timeout_seconds=1, max_retries=1, backoff=Backoff(initial_seconds=0.05)
)


def serve() -> None:
    """The server: two tools, and a third that tells how calls of the first two ended."""
    server = MCPServer("weather", log_level="CRITICAL")
    calls = {"running": 0, "answered": 0, "failed": 0, "cancelled": 0}
    asked: set[str] = set()

    async def measure(city: str) -> int:
        first = city not in asked
        asked.add(city)
        if city == HANG_ALWAYS or (first and city == HANG_ONCE):
            await anyio.sleep_forever()

        await anyio.sleep(0.05)
        if first and city == FAIL_ONCE:
            raise RuntimeError(f"the station in {city} is starting up")

        return TEMPERATURES[city]

    @server.tool()
    async def temperature(city: str) -> int:
        """Measure the temperature in a city, in degrees Celsius."""
        calls["running"] += 1
        outcome = "cancelled"
        try:
            degrees = await measure(city)
            outcome = "answered"
            return degrees
        except Exception:
            outcome = "failed"
            raise
        finally:
            calls["running"] -= 1
            calls[outcome] += 1

    @server.tool()
    async def advise(degrees: int) -> str:
        """Say what to wear."""
        return "a coat" if degrees < 10 else "a shirt" if degrees < 25 else "a hat"

    @server.tool()
    async def statistics() -> str:
        """Count the calls of temperature."""
        return json.dumps(calls)

    server.run("stdio")


async def call(client: Client, tool: str, **arguments: object) -> str:
    result = await client.call_tool(tool, arguments)
    text = "".join(block.text for block in result.content if isinstance(block, TextContent))
    if result.is_error:
        raise RuntimeError(text)

    return text


async def dress_for(client: Client, city: str) -> str:
    """The agent: one tool's answer goes into the other."""
    degrees = int(await call(client, "temperature", city=city))
    return f"{degrees} degrees in {city}: wear {await call(client, 'advise', degrees=degrees)}"


async def run(backend: str) -> None:
    loop = AgentLoop(CONFIG, on_event=tell_retry)
    async with Client(StdioServerParameters(command=sys.executable, args=[__file__, "--serve"])) as client:
        tools = ", ".join(tool.name for tool in (await client.list_tools()).tools)
        print(f"{len(TEMPERATURES)} agents, at most 3 at once, on {backend}; tools: {tools}\n")
        results = await loop.run_all(Invocation.map(partial(dress_for, client), TEMPERATURES, str.lower))
        print("\nOne result for each agent")
        for result in results:
            tell_result(result, result.output or "")

        # A tool that is being cancelled may need a moment for it.
        while (calls := json.loads(await call(client, "statistics")))["running"]:
            await anyio.sleep(0.01)

        print("\nCalls of temperature, as the server saw them")
        del calls["running"]
        print("  " + ", ".join(f"{count} {outcome}" for outcome, count in calls.items()))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--serve", action="store_true", help="be that server")
    found = parser.read()
    if not found.serve:
        return status_of(run, found.backend, backend=found.backend)

    serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())

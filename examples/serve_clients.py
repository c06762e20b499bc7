"""The clients of serve.py, by which it shows itself."""

import httpx2

from agentloop import StreamEvent

SHOWN = ("agentloop_invocations_total", "agentloop_retries_total", "agentloop_limit")


async def visit(client: httpx2.AsyncClient, prompt: str) -> int:
    """A client: read the events to the end, and return how many there were."""
    async with client.sse("/", params={"prompt": prompt}) as events:
        events.response.raise_for_status()
        names = [event.event async for event in events]

    if names[-1] != StreamEvent.COMPLETE:
        raise ConnectionError(f"the last event is {names[-1]}")

    return len(names)


async def read_metrics(client: httpx2.AsyncClient) -> None:
    print("\n/metrics, among others")
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith(SHOWN) and not line.endswith(" 0.0"):
            print(f"  {line}")


async def knock(base_url: str) -> str:
    async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
        try:
            response = await client.get(base_url, params={"prompt": "Is anybody there?"})
        except httpx2.TransportError:
            return "refused"

    return "refused" if response.status_code == 503 else f"answered with {response.status_code}"

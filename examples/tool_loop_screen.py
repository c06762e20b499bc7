"""What tool_loop.py shows: the chunks of its agent and the retries of its loop, as they come."""

import json

import anyio
import httpx2

from agentloop import Event, RetryEvent, StreamChunk, StreamEvent


class Screen:
    """Shows what happens, as it comes."""

    def __init__(self) -> None:
        self.start = anyio.current_time()
        self.open: StreamEvent | None = None

    def line(self, label: str, text: str, end: str = "\n") -> None:
        self.close()
        print(f"  {anyio.current_time() - self.start:3.1f} s  {label:12} {text}", end=end, flush=True)

    def close(self) -> None:
        if self.open:
            print()
            self.open = None

    def chunk(self, chunk: StreamChunk) -> None:
        match chunk:
            case StreamChunk(StreamEvent.STEP_START, turn):
                self.close()
                print(f"\nTurn {turn}")
            case StreamChunk(StreamEvent.TOOL_CALL, {"name": name, "arguments": arguments}):
                self.line(chunk.event, f"{name}({', '.join(json.loads(arguments).values())})")
            case StreamChunk(StreamEvent.TOOL_RESULT, {"found": found}):
                self.line(chunk.event, found)
            case StreamChunk(StreamEvent.THINKING | StreamEvent.TEXT as event, text):
                if self.open != event:
                    self.line(event, "", end="")
                    self.open = event

                print(text, end="", flush=True)
            case StreamChunk(event, data):
                self.line(event, f"in {data} turns")

    def retry(self, event: Event) -> None:
        match event:
            case RetryEvent(invocation, _, error, _, delay_seconds):
                reason = str(error)
                if isinstance(error, httpx2.HTTPStatusError):
                    reason = f"HTTP {error.response.status_code}"

                self.line("(retry)", f"{invocation.agent_id} in {delay_seconds:.1f} s: {reason}")
            case _:
                pass

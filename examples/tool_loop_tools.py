"""The tools of tool_loop.py, which pin what they find to a board."""

from collections.abc import Awaitable, Callable

import anyio

from agentloop import ContextStore

ROOMS = {
    "kitchen": "Crumbs lead to the library, the garden and the cellar.",
    "library": "A fork lies in a book on otters. Pia was here.",
    "garden": "Paw prints, and Otto asleep in the sun.",
    "cellar": "",
}
PEOPLE = {
    "Pia": "Pia says: I only eat with a spoon.",
    "Otto": "Otto says: it was me. Delicious!",
}

Tool = Callable[[ContextStore, str], Awaitable[str]]


async def search(board: ContextStore, room: str) -> str:
    """Search a room of the house."""
    await anyio.sleep(0.2)
    if not ROOMS[room]:
        raise PermissionError(f"the {room} is locked")

    return await pin(board, room, ROOMS[room])


async def question(board: ContextStore, person: str) -> str:
    """Question a person."""
    await anyio.sleep(0.2)
    if await board.transform("rings", lambda rings: rings + 1) == 1:
        raise ConnectionError("nobody picks up the phone")

    return await pin(board, person, PEOPLE[person])


async def pin(board: ContextStore, source: str, clue: str) -> str:
    async with board.edit() as draft:
        draft["clues"][source] = clue

    return clue


TOOLS: dict[str, tuple[Tool, str, list[str]]] = {
    "search": (search, "room", [*ROOMS]),
    "question": (question, "person", [*PEOPLE]),
}


def describe(name: str) -> dict[str, object]:
    """Describe a tool as OpenAI's format wants it."""
    tool, parameter, choices = TOOLS[name]
    fields = {parameter: {"type": "string", "enum": choices}}
    schema = {"type": "object", "properties": fields, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": tool.__doc__, "parameters": schema}}

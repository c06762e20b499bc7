"""The file of a journal: who may use it, and what happens when it is damaged, full or of another version."""

import asyncio
import functools
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from agents import both_verbs, into, make_loop, raised_by
from asking import Asker, execute, integrity, night, replayed, rows, run

from agentloop import AgentLoop, Invocation, Status
from agentloop.journal import Entry, Journal, JournalError, JournalInUse, JournalMismatch


async def fill(path: Path, items: Any = "", **settings: Any) -> int:
    """Run a batch that succeeds, and return how many of its results were replayed."""
    results = await night(path, Asker().inputs(items), **settings)
    assert all(result.success for result in results)
    return len(replayed(results))


# --- who may use it


async def test_second_journal_on_a_file_is_refused_at_once(path: Path) -> None:
    async with Journal(path):
        # The first attempt has not given up the lock.
        for _ in range(2):
            with pytest.raises(JournalInUse, match=r"night\.db is in use by another run$"):
                await fill(path)

    await fill(path)


HOLD = """
import sys, anyio
from agentloop.journal import Journal

async def main():
    async with Journal(sys.argv[1]):
        print("open", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_second_process_is_refused_until_the_first_is_killed(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(JournalInUse):
            anyio.run(fill, path)

        child.send_signal(signal.SIGKILL)
        child.wait()

    anyio.run(fill, path)


async def test_only_one_connection_can_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that write or checkpoint at once can corrupt a file, with SQLite before 3.51.3."""
    connected: list[str] = []
    connect = sqlite3.connect

    def recording(address: str, **settings: Any) -> sqlite3.Connection:
        connected.append(address.rpartition("/")[2])
        return connect(address, **settings)

    monkeypatch.setattr(sqlite3, "connect", recording)
    await fill(path, "ab")
    async with Journal(path) as journal:
        await journal.metrics()
        assert len([entry async for entry in journal.entries()]) == 2

    written = [name for name in connected if not name.endswith("?mode=ro")]
    assert written == ["night.db-lock?mode=rw", "night.db?mode=rw"] * 2


async def test_files_are_for_their_owner_alone(path: Path) -> None:
    async with Journal(path):
        assert {name.name: oct(name.stat().st_mode & 0o777) for name in path.parent.iterdir()} == {
            f"night.db{suffix}": "0o600" for suffix in ("", "-lock", "-wal", "-shm")
        }


async def test_arguments_are_not_in_the_file(path: Path) -> None:
    async def login(secret: str) -> str:
        if secret == "hunter3":
            raise ValueError("no")

        return "welcome"

    inputs = Invocation.map(login, ["hunter2", "hunter3"], agent_id="login")
    async with Journal(path) as journal:
        await make_loop().run_all(inputs, journal=journal)
        data = b"".join(name.read_bytes() for name in path.parent.iterdir() if "-lock" not in name.name)

    assert b"welcome" in data
    assert b"hunter" not in data


async def test_journal_can_be_made_anywhere_and_opened_once(path: Path) -> None:
    journal = await anyio.to_thread.run_sync(Journal, path)
    assert repr(journal) == f"<Journal {str(path)!r} not open, 0 replayed, 0 written>"
    loop, inputs = AgentLoop(), Asker().inputs("a")
    with pytest.raises(RuntimeError, match=r"write `async with Journal\(\.\.\.\) as journal:`$"):
        await loop.run_all(inputs, journal=journal)

    async with journal:
        assert repr(journal) == f"<Journal {str(path)!r} open, 0 replayed, 0 written>"

    assert repr(journal) == f"<Journal {str(path)!r} closed, 0 replayed, 0 written>"
    with pytest.raises(RuntimeError, match=r"has been left$"):
        await loop.run_all(inputs, journal=journal)

    with pytest.raises(RuntimeError, match=r"make another Journal$"):
        async with journal:
            raise AssertionError


@both_verbs
async def test_what_is_no_open_journal_is_refused(verb: str, path: Path) -> None:
    with pytest.raises(TypeError, match=r"^write `async with Journal\(\.\.\.\) as journal:`$"):
        with Journal(path):
            raise AssertionError

    with pytest.raises(TypeError, match=r"^journal must be an agentloop\.journal\.Journal, got 'night\.db'$"):
        await run(verb, AgentLoop(), [], "night.db")


async def test_journal_of_another_event_loop_is_refused(path: Path) -> None:
    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match=r"^this journal is open in another event loop$"):
            await AgentLoop().run_all(Asker().inputs("a"), journal=journal)

    async with Journal(path) as journal:
        await anyio.to_thread.run_sync(anyio.run, elsewhere)


def test_journal_does_not_pickle(path: Path) -> None:
    with pytest.raises(TypeError, match=r"^a Journal cannot be pickled, since one process writes the file"):
        pickle.dumps(Journal(path))


FORK = """
import os, sys, anyio
from agentloop import AgentLoop, Invocation
from agentloop.journal import Journal

async def ask(x):
    return x

async def main():
    async with Journal(sys.argv[1]) as journal:
        loop = AgentLoop()
        await loop.run_all(Invocation.map(ask, [1]), journal=journal)
        child = os.fork()
        if not child:
            try:
                journal.begin(print)
            except RuntimeError as exc:
                print(exc, flush=True)
            os._exit(0)

        os.waitpid(child, 0)
        print(len(await loop.run_all(Invocation.map(ask, [2]), journal=journal)))

anyio.run(main)
"""


def test_journal_is_refused_after_a_fork(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "this journal was opened by another process: open one after the fork\n1\n"


async def test_journal_of_another_process_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Journal(path) as journal:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RuntimeError, match=r"^this journal was opened by another process"):
            await AgentLoop().run_all(Asker().inputs("a"), journal=journal)

        monkeypatch.undo()


# --- settings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"changed": "ignore"}, ValueError, "changed must be one of 'refuse', 'keep', 'rerun', got 'ignore'"),
        ({"keep": [Status.SKIPPED]}, ValueError, "keep must hold statuses that are recorded"),
        ({"keep": "success"}, ValueError, "keep must hold statuses that are recorded"),
        ({"keep": Status.SUCCESS}, ValueError, "keep must hold statuses that are recorded"),
        ({"keep": None}, ValueError, "keep must hold statuses that are recorded"),
        ({"encode": repr}, ValueError, "encode and decode must be given together"),
        ({"encode": repr, "decode": 5}, TypeError, "decode must be callable, got 5"),
        ({"encode": fill, "decode": repr}, TypeError, "encode must be a plain function, got an async one"),
        ({"version": {1, 2}}, TypeError, "version must be JSON, got {1, 2}: JSON has no set"),
        ({"version": float("nan")}, TypeError, "version must be JSON, got nan: JSON has no nan"),
        ({"durable": 1}, TypeError, "durable must be a bool, got 1"),
        ({"versoin": 1}, TypeError, "did you mean version?"),
    ],
)
def test_bad_setting_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Journal("night.db", **settings)

    assert message in str(caught.value)


# --- versions


async def test_other_version_is_refused_and_nothing_is_run(path: Path) -> None:
    await fill(path, "ab", version={"model": "small", "prompt": 7})
    with pytest.raises(JournalMismatch) as caught:
        await fill(path, "ab", version={"model": "large", "prompt": 7})

    assert (caught.value.found, caught.value.given) == (
        '{"model": "small", "prompt": 7}',
        '{"model": "large", "prompt": 7}',
    )
    assert str(path) in str(caught.value)
    # The order of keys is no difference.
    assert await fill(path, "ab", version={"prompt": 7, "model": "small"}) == 2


async def test_results_of_another_version_can_be_kept(path: Path) -> None:
    await fill(path, "ab", version=1)
    assert await fill(path, "ab", version=2, changed="keep") == 2
    assert await fill(path, "ab", version=2) == 2


async def test_interrupted_rerun_goes_on_where_it_was(path: Path) -> None:
    await fill(path, "abcd", version=1)
    asker = Asker(1)
    with anyio.move_on_after(2.5):
        await night(path, asker.inputs("abcd"), make_loop(max_concurrency=1), version=2, changed="rerun")

    assert asker.ended == ["a", "b"]
    assert await fill(path, "abcd", version=2) == 2
    assert len(rows(path)) == 4


async def test_kept_version_takes_back_a_rerun(path: Path) -> None:
    await fill(path, "ab", version=1)
    await fill(path, version=2, changed="rerun")
    assert await fill(path, "ab", version=1, changed="keep") == 2


async def test_newer_schema_is_refused(path: Path) -> None:
    await fill(path, "a")
    execute(path, "PRAGMA user_version = 99")
    with pytest.raises(JournalError, match=r"was written by a newer version of agentloop, of schema 99$"):
        await fill(path, "a")


@pytest.mark.parametrize("schema", [1])
async def test_file_of_each_schema_can_be_read_for_ever(schema: int, path: Path) -> None:
    """The dump is never changed: a new schema gets one of its own."""
    execute(path, Path(__file__).with_name(f"schema_{schema}.sql").read_text("utf-8"))

    async def greet(name: str) -> str:
        return f"hello {name}"

    greet.__module__, greet.__qualname__ = "greeter", "greet"
    inputs = [
        Invocation("greet-0", greet, ("Ada",)),
        Invocation("greet-1", greet, ("Bob",)),
        Invocation("c", greet, (None,), key=7),
    ]
    async with Journal(path, version={"model": "x"}) as journal:
        entries = [entry async for entry in journal.entries()]
        results = await AgentLoop().run_all(inputs, journal=journal)

    assert [result.output for result in results] == ["hello Ada", "hello Bob", ["hello", 7]]
    assert replayed(results) == [0, 2]
    ada, bob = "c0cad68d6ad3c453b9b629f4974f08be", "68e5f80a0d555d0372afae9ce55b68fa"
    ok, error, agent = Status.SUCCESS, Status.ERROR, "greeter.greet"
    assert entries == [
        Entry(agent, ada, 0, "greet-0", ok, "hello Ada", None, 0, 1.5, 0.5, 1e9, 1),
        Entry(agent, bob, 1, "greet-1", error, None, "ValueError: boom", 3, 2.5, 0.0, 1e9, 1),
        Entry(agent, 7, 2, "c", ok, ["hello", 7], None, 0, 0.5, 0.0, 1e9, 1),
    ]


# --- damage


def overwrite(path: Path, data: bytes, at: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def become_another_database(path: Path) -> None:
    for name in path.parent.iterdir():
        name.unlink()

    execute(path, "CREATE TABLE results (id)")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed"),
        (lambda path: overwrite(path, b"x" * 100), "file is not a database: this is not a journal"),
        (lambda path: path.write_text('{"a": 1}\n' * 100), "file is not a database: this is not a journal"),
        (become_another_database, r"night\.db is not a journal, but another database$"),
    ],
    ids=["half", "header", "JSON lines", "database"],
)
async def test_damaged_or_foreign_file_is_refused_and_left_as_it_is(
    damage: Callable[[Path], object], message: str, path: Path
) -> None:
    await fill(path, range(500))
    damage(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=message):
        await fill(path, range(500))

    assert path.read_bytes() == before
    if damage is become_another_database:
        assert [name.name for name in path.parent.iterdir()] == ["night.db"]


def put_garbage_into(path: Path) -> None:
    """Overwrite all pages but the first two and the last."""
    for at in range(8192, path.stat().st_size - 4096, 4096):
        overwrite(path, b"\xff" * 4096, at)


@both_verbs
async def test_garbage_in_the_middle_ends_the_batch_and_says_what_to_do(verb: str, path: Path) -> None:
    await fill(path, range(500), durable=False)
    put_garbage_into(path)
    asker = Asker()
    with pytest.raises(JournalError, match=r"python -m agentloop\.journal check .*\.recover"):
        await night(path, asker.inputs(range(500)), verb=verb)

    assert asker.calls == []


@both_verbs
async def test_damage_that_a_look_up_meets_ends_the_batch(verb: str, path: Path) -> None:
    await fill(path, range(500), durable=False)
    asker = Asker()
    async with Journal(path) as journal:
        put_garbage_into(path)
        with pytest.raises(JournalError, match=r"database disk image is malformed"):
            await run(verb, AgentLoop(), asker.inputs(range(500)), journal)

        with pytest.raises(JournalError, match=r"database disk image is malformed"):
            assert [entry async for entry in journal.entries()] == []

    assert len(asker.calls) <= 10


async def test_torn_wal_loses_the_last_commit_and_no_more(path: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.db"
    async with Journal(path) as journal:
        asker, loop = Asker(), make_loop(max_concurrency=50)
        await loop.run_all(asker.inputs(range(50)), journal=journal)
        await loop.run_all(asker.inputs(range(50, 100)), journal=journal)
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{torn}{suffix}")

    wal = Path(f"{torn}-wal")
    os.truncate(wal, wal.stat().st_size - 1000)
    assert await fill(torn, range(100)) == 50
    assert integrity(torn) == "ok"


async def test_file_copied_without_its_wal_is_still_a_journal(path: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.db"
    async with Journal(path) as journal:
        await AgentLoop().run_all(Asker().inputs("ab"), journal=journal)
        shutil.copy(path, copied)

    assert await fill(copied, "ab") == 0
    assert await fill(copied, "ab") == 2


async def test_empty_file_is_a_new_journal(path: Path) -> None:
    path.touch()
    await fill(path, "a")
    assert await fill(path, "a") == 1


async def test_missing_directory_and_a_lock_that_is_no_file_are_errors(path: Path) -> None:
    with pytest.raises(JournalError, match="No such file or directory"):
        await fill(path / "night.db", "a")

    Path(f"{path}-lock").mkdir()
    with pytest.raises(JournalError, match="unable to open database file"):
        await fill(path, "a")


async def test_lock_that_fails_is_not_one_in_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql == "BEGIN EXCLUSIVE":
                raise sqlite3.OperationalError("disk I/O error")

            return super().execute(sql, *parameters)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Broken))
    with pytest.raises(JournalError, match="disk I/O error") as caught:
        await fill(path, "a")

    assert type(caught.value) is JournalError


async def test_drive_without_shared_memory_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses WAL mode where it cannot share memory, as on some network drives."""

    class Remote(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("journal_mode = WAL", "journal_mode = DELETE"), *parameters)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Remote))
    with pytest.raises(JournalError, match=r"night\.db needs a local disk: SQLite cannot use WAL mode "):
        await fill(path, "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for this user")
async def test_read_only_directory_is_an_error(path: Path) -> None:
    path.parent.chmod(0o500)
    with pytest.raises(JournalError, match="Permission denied"):
        await fill(path, "a")


# --- a file that cannot be written


@contextmanager
def full_disk(size: int) -> Iterator[Callable[[], None]]:
    """No file can grow beyond a size, until the function that is yielded is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield make_room
    finally:
        make_room()


@both_verbs
async def test_full_disk_ends_the_batch_with_what_could_not_be_written(verb: str, path: Path) -> None:
    asker = Asker(0.1)
    inputs = [Invocation("a", asker.ask, ("x" * 1000 + str(index),)) for index in range(1000)]
    loop = make_loop(max_concurrency=10)
    delivered = 0
    with full_disk(200_000), pytest.raises(JournalError, match=r"night\.db: ") as caught:
        async with Journal(path) as journal:
            if verb == "run_all":
                await loop.run_all(inputs, journal=journal)
            else:
                async with loop.as_completed(inputs, journal=journal) as done:
                    async for result in done:
                        assert result.index in rows(path, "idx")
                        delivered += 1

    unwritten, written = caught.value.unwritten, len(rows(path))
    assert unwritten
    assert all(result.success for result in unwritten)
    # What ran has finished, and nothing was started after that.
    assert len(asker.calls) == len(asker.ended) == written + len(unwritten) < 500
    assert integrity(path) == "ok"
    if verb == "as_completed":
        assert delivered == written

    assert len(replayed(await night(path, inputs, loop))) == written


async def test_disk_that_is_still_full_is_an_error_at_opening(path: Path) -> None:
    asker = Asker()
    with full_disk(100), pytest.raises(JournalError):
        await night(path, asker.inputs("a"))

    assert asker.calls == []
    await fill(path, "a")


async def test_run_that_cannot_note_its_end_ends_all_the_same(path: Path) -> None:
    with full_disk(10_000_000), anyio.fail_after(100):
        async with Journal(path) as journal:
            await AgentLoop().run_all(Asker().inputs("ab"), journal=journal)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    assert await fill(path, "ab") == 2


async def test_output_that_cannot_be_encoded_and_a_full_disk_are_one_error(path: Path) -> None:
    async def odd() -> set[int]:
        await anyio.sleep(0.5)
        path.unlink()
        return {1, 2}

    inputs: list[Invocation[Any]] = [Invocation("odd", odd), Invocation("a", Asker(1).ask, ("a",))]
    with pytest.raises(JournalError, match="JSON has no set") as caught:
        await night(path, inputs)

    assert [result.output for result in caught.value.unwritten] == [{1, 2}, {"answer": "a"}]


@pytest.mark.parametrize("how", ["second try", "other batch"])
async def test_what_could_not_be_written_is_when_the_disk_has_room_again(how: str, path: Path) -> None:
    """By a second try, too late for the batch; its error has nothing then that is unwritten."""
    loop = make_loop(max_concurrency=2)
    room: list[Callable[[], None]] = []

    async def ask(x: int) -> str:
        if x == 1 and how == "second try" and room:
            # It ends long after the first try has failed.
            await anyio.sleep(10)
            room.pop()()

        return "x" * 100_000

    async with Journal(path) as journal:
        await loop.run_all(Asker().inputs("ab"), journal=journal)
        with full_disk(50_000) as make_room:
            room.append(make_room)
            with pytest.raises(JournalError) as caught:
                await loop.run_all(Invocation.map(ask, range(5)), journal=journal)

        assert (caught.value.unwritten == []) == (how == "second try")
        results = await loop.run_all(Invocation.map(ask, range(2)), journal=journal)

    assert [result.success for result in results] == [True, True]
    assert replayed(results) == ([0, 1] if how == "second try" else [])
    assert how == "second try" or len(rows(path)) == 4


async def test_commit_waits_for_somebody_else_who_writes(path: Path) -> None:
    released = threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            released.set()
            time.sleep(0.3)
            connection.execute("ROLLBACK")

    async with Journal(path) as journal:
        thread = threading.Thread(target=write)
        thread.start()
        await anyio.to_thread.run_sync(released.wait)
        results = await AgentLoop().run_all(Asker().inputs("ab"), journal=journal)
        thread.join()

    assert [result.success for result in results] == [True, True]


async def test_commit_that_fails_writes_none_of_its_rows(path: Path) -> None:
    """Somebody has put a row into the file meanwhile that has the place of another one."""

    async def ask(x: int) -> int:
        if x == 1:
            execute(
                path,
                "INSERT INTO results SELECT 1000, agent, 1, n, run, idx, agent_id, status, output, "
                "error, retries, latency_ms, queue_ms, at, written, stale FROM results",
            )

        return x

    loop = make_loop(max_concurrency=2)
    async with Journal(path) as journal:
        await loop.run_all([Invocation("a", ask, (0,), key=0)], journal=journal)
        inputs = [Invocation("a", ask, (x,), key=x) for x in (1, 2)]
        with pytest.raises(JournalError, match="UNIQUE constraint failed") as caught:
            await loop.run_all(inputs, journal=journal)

        assert [result.output for result in caught.value.unwritten] == [1, 2]
        assert len(rows(path)) == 2


async def test_file_that_others_lock_ends_the_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(path: str, mode: str = "ro", timeout: float = 0) -> sqlite3.Connection:
        address = f"{Path(path).as_uri()}?mode={mode}"
        settings: Any = {"uri": True, "isolation_level": None, "check_same_thread": False}
        return sqlite3.connect(address, timeout=0.05, **settings)

    monkeypatch.setattr("agentloop.journal._file.connect", connect)
    async with Journal(path) as journal:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="database is locked") as caught:
                await AgentLoop().run_all(Asker().inputs("ab"), journal=journal)

            connection.execute("ROLLBACK")

    assert len(caught.value.unwritten) == 2


@pytest.mark.parametrize("replace", [False, True])
async def test_file_that_is_deleted_while_it_is_used_ends_the_batch(replace: bool, path: Path) -> None:
    async with Journal(path) as journal:
        asker = Asker()
        await AgentLoop().run_all(asker.inputs("a"), journal=journal)
        path.unlink()
        if replace:
            path.touch()

        with pytest.raises(JournalError, match="replaced by another file" if replace else "No such file"):
            await AgentLoop().run_all(asker.inputs("b"), journal=journal)


async def test_cancelled_batch_does_not_wait_for_a_file_that_cannot_be_written(path: Path) -> None:
    async def ask(x: str) -> None:
        await anyio.sleep(1 if x == "a" else 100)
        path.unlink(missing_ok=True)

    async with Journal(path) as journal:
        with anyio.move_on_after(1.001) as scope:
            await AgentLoop().run_all(Invocation.map(ask, "ab"), journal=journal)

        assert scope.cancelled_caught
        assert anyio.current_time() - scope.deadline < 1


async def test_batch_that_outlives_the_block_ends_with_an_error(path: Path) -> None:
    errors: list[Any] = []
    async with anyio.create_task_group() as group:
        async with Journal(path) as journal:
            inputs, loop = Asker(5).inputs("ab"), make_loop(max_concurrency=1)
            group.start_soon(into, errors, raised_by, run, "run_all", loop, inputs, journal)
            await anyio.sleep(1)

    (error,) = errors
    assert isinstance(error, JournalError)
    assert "block of this journal has been left" in str(error)
    assert [result.output for result in error.unwritten] == [{"answer": "a"}]


# --- its end


async def test_block_that_is_cancelled_writes_what_had_ended_and_waits_no_longer(path: Path) -> None:
    with anyio.move_on_after(1.01) as scope:
        await night(path, Asker(1).inputs("abc"), make_loop(max_concurrency=2))

    assert scope.cancelled_caught
    assert anyio.current_time() - scope.deadline < 1
    assert len(rows(path)) == 2
    await fill(path)


def test_native_cancellation_of_all_tasks_closes_the_file(path: Path) -> None:
    asker = Asker(0.01)

    async def main() -> None:
        task = asyncio.ensure_future(night(path, asker.inputs(range(1000)), make_loop(max_concurrency=2)))
        while len(asker.ended) < 5:
            await asyncio.sleep(0.01)

        # As asyncio.run() does at its end.
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task

        await fill(path)

    asyncio.run(main())
    assert not Path(f"{path}-wal").exists()
    assert len(asker.ended) == len(rows(path)) > 0


async def test_opening_that_is_cancelled_leaves_the_file_closed(path: Path) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with Journal(path):
            await anyio.sleep_forever()

    await fill(path)


async def test_runs_are_in_the_file_with_their_outcome(path: Path) -> None:
    error = KeyError("mine")
    await fill(path, "a", version=7)
    with pytest.raises(KeyError) as caught:
        async with Journal(path, version=7):
            raise error

    assert caught.value is error
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT run, outcome, version, pid, ended >= began FROM runs").fetchall()

    assert found == [(1, "ended", "7", os.getpid(), 1), (2, "KeyError", "7", os.getpid(), 1)]


async def test_entries_are_read_in_pieces_and_by_status(path: Path) -> None:
    asker = Asker(fails=lambda x: ValueError("boom") if x % 2 else None)
    async with Journal(path) as journal:
        await make_loop().run_all(asker.inputs(range(1200)), journal=journal)
        entries = [entry async for entry in journal.entries()]
        failed = [entry async for entry in journal.entries(Status.ERROR)]

    assert sorted(entry.index for entry in entries) == [*range(1200)]
    assert len(failed) == 600
    assert {(entry.error, entry.output) for entry in failed} == {("ValueError: boom", None)}
    assert {entry.output["answer"] for entry in entries if entry.output} == {*range(0, 1200, 2)}


async def test_large_output_is_carried(path: Path) -> None:
    async def ask(x: int) -> str:
        return "x" * 10_000_000

    for _ in range(2):
        (result,) = await night(path, Invocation.map(ask, [1]))
        assert len(result.unwrap()) == 10_000_000

    assert result.replayed


async def test_journal_that_is_not_durable_survives_all_the_same(path: Path) -> None:
    await fill(path, "ab", durable=False)
    assert await fill(path, "ab", durable=False) == 2

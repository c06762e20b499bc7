"""What a limiter learns of a provider, against an account of its own: random calls, without an event loop."""

import math
import random

import attrs
from hypothesis import given
from hypothesis import strategies as st

from agentloop import Verdict, VerdictKind
from agentloop._provider.overload import AdaptiveLimit
from agentloop._provider.provider import Provider

PATIENCE = 40.0
# What happens to a call, most often.
ACTIONS = ["begin"] * 4 + ["pass"] * 4 + ["fail"] * 5 + ["succeed", "chunk", "cancel"]
KINDS = [VerdictKind.TRANSIENT] * 5 + [VerdictKind.OVERLOAD] * 3 + [VerdictKind.PERMANENT, VerdictKind.FATAL]
ERRORS = [ConnectionRefusedError(), ConnectionResetError(), ConnectionResetError(), ValueError()]
RETRY_AFTER = [None, None, None, 0.5, 10.0, 60.0]


class Call:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


@attrs.define
class Account:
    """What is known of the calls so far, and follows from that."""

    row: int = 0
    is_outage: bool = False
    # The calls that have begun since the first failure of the row.
    young: set[Call] = attrs.field(factory=set[Call])
    fruitless_since: float | None = None
    only_timeouts: bool = True
    # The cool-off: until when, the probes, and the calls that have begun since it did.
    until: float = -math.inf
    lifted: bool = True
    gap: float = 0.0
    probe_at: float = 0.0
    probe: Call | None = None
    begun: set[Call] = attrs.field(factory=set[Call])
    rejected_at: float = -math.inf

    def begin(self, call: Call, now: float) -> None:
        self.begun.add(call)
        self.young.add(call)
        if now < self.until:
            assert self.probe is None, "one at a time"
            assert now >= self.probe_at
            self.gap *= 2
            self.probe, self.probe_at = call, now + self.gap

    def take(self, call: Call, now: float) -> None:
        """The provider has taken a call."""
        self.fruitless_since = None
        if call in self.young:
            self.row, self.is_outage = 0, False

        self.rejected_at = -math.inf
        if call in self.begun and now < self.until:
            self.until, self.lifted = -math.inf, True

    def end(self, call: Call) -> None:
        if call is self.probe:
            self.probe = None

    def judge(self, verdict: Verdict, speaks: bool, timed_out: bool, limit: int, now: float) -> VerdictKind:
        kind = verdict.kind
        if kind is VerdictKind.TRANSIENT and speaks:
            if not self.row:
                self.young.clear()

            self.row += 1
            self.is_outage = self.is_outage or self.row >= max(8, limit)
            kind = VerdictKind.OVERLOAD if self.is_outage else kind

        if kind is VerdictKind.OVERLOAD:
            self.rejected_at = now
            if self.fruitless_since is None:
                self.fruitless_since, self.only_timeouts = now, True

            timed_out = timed_out and verdict.kind is VerdictKind.TRANSIENT
            self.only_timeouts = self.only_timeouts and timed_out

        return kind

    def hold(self, seconds: float, now: float) -> None:
        if now >= self.until:
            self.gap, self.probe, self.lifted = max(1.0, seconds / 20), None, False
            self.probe_at = now + self.gap
            self.begun.clear()

        self.until = max(self.until, now + seconds)

    def ready_at(self, now: float) -> tuple[float, float]:
        """Return when the next call may start, at the earliest and at the latest, as for the cool-off."""
        if now < self.until:
            at = self.until if self.probe is not None else max(now, min(self.probe_at, self.until))
            return at, at

        # Afterwards one by one, within a quarter of a minute at most.
        return now, now if self.lifted else max(now, self.until + 15)


# Steps drawn one by one would take longer than all else; fewer of them are tried if some fail.
@given(st.integers(1, 12), st.integers(1, 200), st.integers(0, 10**9))
def test_provider_says_when_calls_may_start_and_what_their_failures_are_as_the_account_does(
    ceiling: int, steps: int, seed: int
) -> None:
    rng = random.Random(seed)
    limit = AdaptiveLimit(ceiling)
    provider, account = Provider(limit), Account()
    calls: list[Call] = []
    now = 1000.0

    def end(call: Call) -> None:
        calls.remove(call)
        account.end(call)
        provider.cool_off.end(call)

    for _ in range(steps):
        what = rng.choice(ACTIONS)
        if what == "pass":
            now += rng.choice([0.3, 1.0, 3.0, 10.0, 30.0])
        elif what == "begin":
            for _ in range(rng.randint(1, 12)):
                if len(calls) < limit.limit and provider.ready_at(now) <= now:
                    calls.append(Call(limit.epoch))
                    account.begin(calls[-1], now)
                    provider.cool_off.start(calls[-1], now)
        elif what == "fail":
            for call in calls[: rng.randint(1, 12)]:
                verdict = Verdict(rng.choice(KINDS), rng.choice(RETRY_AFTER))
                error, timed_out = rng.choice(ERRORS), rng.random() < 0.5
                speaks = timed_out or isinstance(error, OSError)
                expected = account.judge(verdict, speaks, timed_out, limit.limit, now)
                assert provider.revise(verdict, error, timed_out, now) == Verdict(
                    expected, verdict.retry_after
                )
                if expected is VerdictKind.OVERLOAD:
                    provider.reject(call.epoch, len(calls) - 1, verdict.retry_after, now)
                    if verdict.retry_after is not None:
                        account.hold(verdict.retry_after, now)

                end(call)
        elif calls:
            call = rng.choice(calls)
            if what != "cancel":
                account.take(call, now)
                provider.answered(call.epoch, now)

            if what == "succeed":
                provider.limit.complete(call.epoch, len(calls) - 1)

            if what != "chunk":
                end(call)

        earliest, latest = account.ready_at(now)
        # At a limit of one the next call waits as well, half a minute at most, until one is taken.
        assert earliest <= provider.ready_at(now) <= max(latest, account.rejected_at + 30)
        assert provider.held_until(now) == (account.until if now < account.until else None)
        assert (provider.outage.since is not None) == account.is_outage
        since = account.fruitless_since
        assert provider.outage.lasts(PATIENCE, now) == (since is not None and now >= since + PATIENCE)
        assert since is None or provider.outage.timed_out == account.only_timeouts
        assert provider.listens or (not account.row and since is None and now >= account.until)

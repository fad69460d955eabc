"""A lease on a shared filesystem has one holder."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from pyarrow.fs import FileSystem

from revmux.utils.lease import Lease

pytestmark = pytest.mark.numeric


class Clock:
    """A clock that advances only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.wake: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.wake()

    def now(self) -> float:
        return self.seconds


def test_a_lease_has_one_holder_and_expires_when_the_holder_dies() -> None:
    filesystem, clock = FileSystem.from_uri("mock:///")[0], Clock()
    first, second, third = (
        Lease(filesystem, "lease", lifetime=100, sleep=clock.sleep, now=clock.now) for _ in range(3)
    )
    assert first.acquire()
    assert not second.acquire(wait=False)
    clock.seconds += 90
    first.renew()
    clock.seconds += 90
    assert not second.acquire(wait=False)  # renewed in time
    clock.seconds += 20
    assert second.acquire(wait=False)  # the first holder has died
    first.release()
    assert not third.acquire(wait=False)  # the first holder cannot release it any more
    second.release()
    assert third.acquire(wait=False)


def test_a_process_that_loses_a_lease_race_waits() -> None:
    filesystem, clock = FileSystem.from_uri("mock:///")[0], Clock()
    winner, loser = (Lease(filesystem, "lease", sleep=clock.sleep, now=clock.now) for _ in range(2))
    steps = iter([winner._write, winner.release])
    clock.wake = lambda: next(steps, lambda: None)()
    assert loser.acquire()
    assert next(steps, None) is None


def test_a_lease_is_renewed_while_its_holder_works() -> None:
    filesystem = FileSystem.from_uri("mock:///")[0]
    lease = Lease(filesystem, "lease", lifetime=0.2, settle=0.0)
    assert lease.acquire()
    with lease.kept():
        first = lease._read()
        assert first is not None
        until = time.monotonic() + 30
        while (now := lease._read()) is None or now["renewed"] == first["renewed"]:
            assert time.monotonic() < until
        assert now["holder"] == lease.holder
    assert lease._read() is None

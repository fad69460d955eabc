"""The queue alone, on a simulated clock: order, priorities, deadlines, fairness, and no lost requests."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revmux.serving import Draining, Expired, Limits, Overloaded
from revmux.serving.metrics import Metrics
from revmux.serving.queue import PullQueue, Ticket


class Name:
    """A stand-in for a task; the queue only uses its name."""

    def __init__(self, name: str) -> None:
        self.name = name


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


A, B = Name("a"), Name("b")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> PullQueue:
    return PullQueue(limit=100, metrics=Metrics(), priority_seconds=1.0, clock=clock)


def ticket(task: Name = A, priority: float = 0, deadline: float | None = None) -> Ticket:
    return Ticket(task, {"input_ids": [1, 2, 3]}, priority=priority, deadline=deadline)


def put(queue: PullQueue, *tickets: Ticket) -> None:
    for one in tickets:
        queue.put([one])


def run_next(queue: PullQueue, seconds: float = 1.0, most: int = 1) -> list[Ticket]:
    """Do what the model does: take the window and charge the time."""
    window = queue.window(most)
    assert window is not None
    claimed = queue.claim(window.tickets)
    queue.charge(window.tickets[0].task, seconds)
    return claimed


def test_one_point_of_priority_is_a_bounded_head_start(queue: PullQueue, clock: Clock) -> None:
    first = ticket()
    put(queue, first)
    clock.now = 0.9
    soon = ticket(priority=1)
    put(queue, soon)
    clock.now = 1.1
    late, low = ticket(priority=1), ticket(priority=-1)
    put(queue, late, low)
    clock.now = 2.0
    usual = ticket()
    put(queue, usual)
    window = queue.window(9)
    assert window is not None
    assert window.tickets == [soon, first, late, usual, low]
    assert window.waiting == 5


def test_a_task_that_floods_the_queue_does_not_delay_the_other_task(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(50)))
    assert run_next(queue)[0].task is A
    put(queue, *(ticket(B) for _ in range(3)))
    order = [run_next(queue)[0].task.name for _ in range(8)]
    assert order == ["b", "a", "b", "a", "b", "a", "a", "a"]


def test_tasks_share_device_time_rather_than_the_number_of_passes(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(20)), *(ticket(B) for _ in range(20)))
    spent = {"a": 0.0, "b": 0.0}
    for _ in range(16):
        window = queue.window(1)
        assert window is not None
        name = window.tickets[0].task.name
        queue.claim(window.tickets)
        seconds = 3.0 if name == "a" else 1.0  # an input of A costs three times as much
        queue.charge(window.tickets[0].task, seconds)
        spent[name] += seconds
    assert abs(spent["a"] - spent["b"]) <= 3.0


def test_an_idle_task_accumulates_no_credit(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(30)))
    for _ in range(20):
        run_next(queue)
    put(queue, *(ticket(B) for _ in range(20)))
    order = [run_next(queue)[0].task.name for _ in range(10)]
    assert order.count("a") == order.count("b") == 5


def test_priority_overrides_fairness_only_for_its_head_start(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(9)), *(ticket(B, priority=3) for _ in range(9)))
    order = "".join(run_next(queue)[0].task.name for _ in range(18))
    assert order == "bbbb" + "ab" * 5 + "aaaa"  # B may be three seconds of device time ahead, and no more


def test_expired_requests_fail_and_are_not_computed(queue: PullQueue, clock: Clock) -> None:
    tight, loose, patient = ticket(deadline=1.0), ticket(deadline=5.0), ticket()
    other = ticket(B, deadline=1.5)
    put(queue, tight, loose, patient, other)
    clock.now = 2.0
    window = queue.window(9)
    assert window is not None
    assert window.tickets == [loose, patient]
    with pytest.raises(Expired, match=r"after 2\.000 s"):
        tight.future.result(0)
    assert isinstance(other.future.exception(0), Expired)
    assert queue.metrics.snapshot()["expired"] == 2
    assert len(queue) == 2


def test_each_task_has_its_own_queue_limit(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(100)))
    with (
        pytest.raises(Overloaded, match="100 inputs are waiting and the limit is 100: no room for 1 more"),
        queue.room(A, 1),
    ):
        pass
    put(queue, ticket(B))
    assert queue.depths() == {"a": 100, "b": 1}
    counts = queue.metrics.snapshot()["tasks"]
    assert counts["a"]["rejected"] == 1
    assert "b" not in counts


def test_reserved_places_count_towards_the_queue_limit(queue: PullQueue) -> None:
    put(queue, *(ticket(A) for _ in range(90)))
    with queue.room(A, 10):
        with pytest.raises(Overloaded, match="100 inputs are waiting"), queue.room(A, 1):
            pass
        with queue.room(B, 100):
            pass
        queue.put([ticket(A)], ahead=True)  # a health check takes none of the reserved room
        queue.put([ticket(A) for _ in range(10)])
    assert run_next(queue)
    assert run_next(queue, most=100)
    with pytest.raises(ValueError, match="bad text"), queue.room(A, 100):
        raise ValueError("bad text")
    with queue.room(A, 100):
        pass


def test_requests_ahead_of_the_queue_come_before_every_task_and_priority(queue: PullQueue) -> None:
    put(queue, *(ticket(A, priority=10) for _ in range(100)), ticket(B, priority=10))
    probe = ticket(B)
    queue.put([probe], ahead=True)
    assert run_next(queue) == [probe]


def test_a_cancelled_ticket_of_a_window_is_not_claimed(queue: PullQueue) -> None:
    kept, gone = ticket(), ticket()
    put(queue, kept, gone)
    window = queue.window(9)
    assert window is not None
    assert gone.future.cancel()
    assert queue.claim(window.tickets) == [kept]
    assert not kept.future.cancel()
    assert queue.metrics.snapshot()["cancelled"] == 1


def test_tickets_cleared_in_the_meantime_are_not_claimed(queue: PullQueue) -> None:
    put(queue, ticket(), ticket())
    window = queue.window(1)
    assert window is not None
    queue.close()
    assert len(queue.clear()) == 2
    assert queue.claim(window.tickets) == []
    assert queue.window(1) is None
    with pytest.raises(Draining):
        queue.put([ticket()])


step = st.one_of(
    st.tuples(st.just("put"), st.sampled_from("ab"), st.integers(-10, 10), st.none() | st.floats(0.1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 60)),
    st.tuples(st.just("run"), st.integers(1, 4)),
    st.tuples(st.just("pass"), st.floats(0.1, 3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=60))
def test_every_ticket_runs_once_or_is_cancelled_or_expired(steps: list[tuple]) -> None:
    clock = Clock()
    queue = PullQueue(1000, Metrics(), Limits().priority_seconds, clock)
    tasks = {"a": A, "b": B}
    made: list[Ticket] = []
    ran: list[Ticket] = []
    cancelled: set[Ticket] = set()
    for name, *arguments in steps:
        if name == "put":
            task, priority, allowed = arguments
            made.append(ticket(tasks[task], priority, None if allowed is None else clock.now + allowed))
            queue.put([made[-1]])
        elif name == "cancel" and made:
            one = made[arguments[0] % len(made)]
            if one.future.cancel():
                cancelled.add(one)
        elif name == "run" and any(_can_run(one, clock.now) for one in made):
            ran += run_next(queue, most=arguments[0])
        elif name == "pass":
            clock.now += arguments[0]
    queue.close()
    while (window := queue.window(7)) is not None:
        assert len({one.task for one in window.tickets}) == 1
        assert all(one.deadline is None or one.deadline > clock.now for one in window.tickets)
        assert window.tickets == sorted(window.tickets, key=lambda one: one.order)
        ran += queue.claim(window.tickets)
    assert len(ran) == len(set(ran))
    expired = {one for one in made if one.future.done() and not one.future.cancelled()}
    assert all(isinstance(one.future.exception(0), Expired) for one in expired)
    assert set(ran) | expired | cancelled == set(made)
    assert len(ran) + len(expired) + len(cancelled) == len(made)


def _can_run(one: Ticket, now: float) -> bool:
    waits = not one.future.running() and not one.future.done()
    return waits and (one.deadline is None or one.deadline > now)

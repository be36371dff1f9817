"""Who may send next, when many streams have more to send than is let under way."""

from __future__ import annotations

import numpy as np
import pytest

from fp8scope_collector.messages import Source
from fp8scope_collector.turns import LEAST_SHARE, MEMORY_S, PROMISE_S, Allowance, Lane, Turns


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(rows=1000, window=4, clock=clock)


class Client:
    """A stream that sends batches of 100 rows whenever it may, and always has more."""

    def __init__(self, turns: Turns, *, more: bool = True) -> None:
        self.turns = turns
        self.lane = Lane(_source())
        self.more = more
        turns.join(self.lane, 100, more=more)

    def send(self) -> int:
        """Sends what it may; how many batches."""
        sent = 0
        while self.lane.received < self.lane.turns:
            self.lane.owed += 1
            self.turns.arrived(self.lane, 100, more=self.more)
            sent += 1
        return sent

    def commit(self, batches: int = 1) -> None:
        for _ in range(batches):
            self.lane.owed -= 1
            self.turns.settled([(self.lane, 100)])


def test_turns_go_round_and_no_more_is_under_way_than_is_allowed(turns: Turns) -> None:
    clients = [Client(turns) for _ in range(50)]
    queue = [client for client in clients for _ in range(client.send())]

    for _ in range(2000):
        queue.pop(0).commit()
        queue += [client for client in clients for _ in range(client.send())]
        assert len(queue) == 10

    received = [client.lane.received for client in clients]
    assert sum(received) == 2010
    assert max(received) - min(received) <= 4, "a window at most, of the first who came"


def test_streams_in_line_get_some_turns_at_once_as_far_as_there_is_room(turns: Turns) -> None:
    clients = [Client(turns) for _ in range(10)]
    assert [client.send() for client in clients] == [4, 4, 2, 0, 0, 0, 0, 0, 0, 0]

    turns.settled([(clients[0].lane, 100)] * 4 + [(clients[1].lane, 100)] * 3)

    assert [client.lane.turns - client.lane.received for client in clients] == [0, 0, 2, 2, 2, 1, 0, 0, 0, 0]


def test_a_stream_gets_no_more_turns_than_its_window_has_room_for(clock: Clock) -> None:
    assert Client(Turns(rows=1000, window=3, clock=clock)).lane.turns == 3


def test_a_few_streams_fill_their_windows(turns: Turns) -> None:
    clients = [Client(turns), Client(turns)]

    for _ in range(5):
        for client in clients:
            client.send()

    assert [client.lane.owed for client in clients] == [4, 4]


def test_a_stream_that_keeps_up_needs_no_turn_and_takes_none_away(turns: Turns) -> None:
    busy, slow = [Client(turns) for _ in range(20)], Client(turns, more=False)
    for client in busy:
        client.send()

    assert slow.send() == 1, "nor for its first"
    slow.commit()

    assert slow.lane.turns == 2, "its next batch may come at once, however long the line is"
    assert not turns.waits(slow.lane)
    assert turns.waits(busy[-1].lane)


def test_a_turn_that_is_not_used_is_given_to_others_and_stays_valid(turns: Turns, clock: Clock) -> None:
    hung, client = [Client(turns) for _ in range(10)], Client(turns)
    for each in hung:
        each.send()
    for each in hung:
        each.commit(each.lane.owed)  # all that is allowed is promised to those who will not send
    client.send()
    client.commit()
    assert client.send() == 0

    clock.now += PROMISE_S

    turns.waits(client.lane)
    assert client.send() > 0
    assert all(each.send() > 0 for each in hung)


def test_a_stream_that_leaves_frees_what_it_was_promised(turns: Turns) -> None:
    gone, client = [Client(turns) for _ in range(10)], Client(turns)
    for each in gone:
        each.send()
    for each in gone:
        each.commit(each.lane.owed)
    client.send()
    client.commit()
    assert client.send() == 0

    for each in gone:
        turns.leave(each.lane)

    assert client.send() > 0
    assert not any(turns.waits(each.lane) for each in gone)


def test_rows_of_a_stream_that_left_count_until_they_are_committed(turns: Turns) -> None:
    client = Client(turns)
    client.lane.turns = 10
    client.send()
    turns.leave(client.lane)

    other = Client(turns)
    assert other.send() == 0
    client.commit(10)

    assert other.send() > 0


def test_less_may_be_under_way_when_the_database_grows_slow_and_more_at_once_when_it_is_fast(turns: Turns) -> None:
    clients = [Client(turns) for _ in range(50)]
    queue = [client for client in clients for _ in range(client.send())]

    turns.allow(300)
    for _ in range(8):
        queue.pop(0).commit()
        queue += [client for client in clients for _ in range(client.send())]
    slow = len(queue)
    turns.allow(600)
    queue += [client for client in clients for _ in range(client.send())]

    assert (slow, len(queue)) == (3, 6)


@pytest.mark.parametrize(
    ("rows_per_s", "expected"), [(1_000_000, 100_000), (250_000, 100_000), (200_000, 80_000), (1000, 25_000)]
)
@pytest.mark.parametrize("group", [3000, 60_000])
def test_what_may_be_under_way_is_what_the_database_takes_in_a_set_time(
    rows_per_s: int, expected: int, group: int
) -> None:
    allowance = Allowance(most=100_000, wait_s=0.4)

    for _ in range(10 * rows_per_s // group + 10):
        rows = allowance.after(group, group / rows_per_s)

    assert rows == pytest.approx(expected, rel=0.01)


def test_one_slow_write_changes_little_and_a_standstill_is_forgotten_after_seconds_of_work() -> None:
    allowance = Allowance(most=100_000, wait_s=0.4)

    after_half_a_second = allowance.after(50_000, 0.5)
    after_a_minute = allowance.after(50_000, 60.0)
    work_s = 0.0
    while allowance.after(20_000, 0.08) < 80_000:
        work_s += 0.08

    assert 80_000 < after_half_a_second < 100_000
    assert after_a_minute == 100_000 // LEAST_SHARE
    assert MEMORY_S < work_s < 2 * MEMORY_S


def _source() -> Source:
    none = np.empty(0)
    return Source(1, 1, "run", 0, 1, 0, False, none.astype(np.int64), none.astype(np.int8), none)

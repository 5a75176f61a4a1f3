"""Tests of who is connected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from tests.unit.hub.fake_member import FakeMember


def test_a_connection_is_found_by_its_id_and_its_client() -> None:
    """Both ids lead to a registered connection."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    ann, bob = FakeMember("ann"), FakeMember("bob")
    registry.add(ann)
    registry.add(bob)
    assert registry.get(ann.connection_id) is ann
    assert registry.of_client("bob") == [bob]
    assert registry.client_ids() == ["ann", "bob"]
    assert len(registry) == 2


def test_what_is_not_there_is_nothing() -> None:
    """Looking for somebody who is not connected is no error."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    assert registry.get("nobody") is None
    assert registry.of_client("nobody") == []
    assert list(registry) == []


def test_the_end_of_an_old_connection_does_not_touch_a_newer_one() -> None:
    """Connections are removed by their own id, so a newer one of the same client stays."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    old, new = FakeMember("ann"), FakeMember("ann")
    registry.add(old)
    registry.add(new)
    registry.remove(old)
    registry.remove(old)
    assert registry.of_client("ann") == [new]
    assert registry.get(new.connection_id) is new


def test_removing_a_connection_that_was_never_added_changes_nothing() -> None:
    """A connection that was refused can be removed like any other."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    registry.add(kept := FakeMember("ann"))
    registry.remove(FakeMember("ann"))
    assert list(registry) == [kept]


def test_connections_may_leave_while_they_are_read() -> None:
    """Reading all connections sees those of the moment at which it began."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    members = [FakeMember() for _ in range(3)]
    for member in members:
        registry.add(member)
    seen = []
    for member in registry:
        seen.append(member)
        registry.remove(member)
    assert seen == members
    assert len(registry) == 0


def test_the_connections_of_a_client_come_oldest_first() -> None:
    """The order of a client's connections is that of their coming."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    members = [FakeMember("ann") for _ in range(4)]
    for member in members:
        registry.add(member)
    registry.remove(members[1])
    assert registry.of_client("ann") == [members[0], members[2], members[3]]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_both_indexes_always_agree(steps: list[tuple[bool, int]]) -> None:
    """Whatever comes and goes, both indexes hold the same connections and no empty entry stays."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry()
    members = [FakeMember(f"client-{number % 3}") for number in range(10)]
    there: list[FakeMember] = []
    for comes, number in steps:
        member = members[number]
        if comes and member not in there:
            registry.add(member)
            there.append(member)
        elif not comes:
            registry.remove(member)
            there = [other for other in there if other is not member]
    assert list(registry) == there
    assert set(registry.client_ids()) == {member.client_id for member in there}
    for client_id in registry.client_ids():
        assert registry.of_client(client_id) == [member for member in there if member.client_id == client_id]


@pytest.mark.parametrize("num_shards", [1, 4, 32])
def test_connections_are_divided_into_equal_parts(num_shards: int) -> None:
    """There are num_shards parts, and new connections go to them in turn."""
    registry: ConnectionRegistry[FakeMember] = ConnectionRegistry(num_shards)
    for _ in range(2 * num_shards):
        registry.add(FakeMember(shard=registry.next_shard()))
    assert [len(part) for part in registry.outboxes()] == [2] * num_shards

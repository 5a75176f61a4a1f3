"""Tests of the registry of connections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from tests.support.fake_recipient import FakeRecipient


def test_connection_is_found_by_connection_and_client_id() -> None:
    """Both ids lead to a registered connection."""
    registry = ConnectionRegistry()
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    registry.add(ann)
    registry.add(bob)
    assert registry.get(ann.connection_id) is ann
    assert registry.of_client("bob") == [bob]
    assert registry.client_ids() == ["ann", "bob"]
    assert len(registry) == 2


def test_lookup_of_unknown_id_returns_nothing() -> None:
    """Looking up an unknown id is not an error."""
    registry = ConnectionRegistry()
    assert registry.get("unknown") is None
    assert registry.of_client("unknown") == []
    assert list(registry) == []


def test_removing_old_connection_leaves_newer_one() -> None:
    """Connections are removed by their own id, so a newer one of the same client stays."""
    registry = ConnectionRegistry()
    old, new = FakeRecipient("ann"), FakeRecipient("ann")
    registry.add(old)
    registry.add(new)
    registry.remove(old)
    registry.remove(old)
    assert registry.of_client("ann") == [new]
    assert registry.get(new.connection_id) is new


def test_removing_unknown_connection_changes_nothing() -> None:
    """Removing an unknown connection is not an error."""
    registry = ConnectionRegistry()
    registry.add(ann := FakeRecipient("ann"))
    registry.remove(FakeRecipient("ann"))
    assert list(registry) == [ann]


def test_registry_iteration_allows_removal() -> None:
    """An iteration yields the connections at its start."""
    registry = ConnectionRegistry()
    members = [FakeRecipient() for _ in range(3)]
    for recipient in members:
        registry.add(recipient)
    seen = []
    for recipient in registry:
        seen.append(recipient)
        registry.remove(recipient)
    assert seen == members
    assert len(registry) == 0


def test_client_connections_are_listed_oldest_first() -> None:
    """The connections of a client are in the order in which they were added."""
    registry = ConnectionRegistry()
    members = [FakeRecipient("ann") for _ in range(4)]
    for recipient in members:
        registry.add(recipient)
    registry.remove(members[1])
    assert registry.of_client("ann") == [members[0], members[2], members[3]]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_registry_indexes_always_agree(steps: list[tuple[bool, int]]) -> None:
    """Both indexes hold the same connections after any operations, and no empty entry stays."""
    registry = ConnectionRegistry()
    members = [FakeRecipient(f"client-{number % 3}") for number in range(10)]
    there: list[FakeRecipient] = []
    for comes, number in steps:
        recipient = members[number]
        if comes and recipient not in there:
            registry.add(recipient)
            there.append(recipient)
        elif not comes:
            registry.remove(recipient)
            there = [other for other in there if other is not recipient]
    assert list(registry) == there
    assert set(registry.client_ids()) == {recipient.client_id for recipient in there}
    for client_id in registry.client_ids():
        assert registry.of_client(client_id) == [recipient for recipient in there if recipient.client_id == client_id]


@pytest.mark.parametrize("num_shards", [1, 4, 32])
def test_connections_are_distributed_evenly_over_shards(num_shards: int) -> None:
    """New connections are assigned to the num_shards shards in turn."""
    registry = ConnectionRegistry(num_shards)
    for _ in range(2 * num_shards):
        registry.add(FakeRecipient(shard=registry.next_shard()))
    assert [len(part) for part in registry.outboxes_by_shard()] == [2] * num_shards

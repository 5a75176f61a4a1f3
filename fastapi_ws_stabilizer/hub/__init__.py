"""Connections of one manager: registry, rooms, presence, broadcast, heartbeat and lifetimes."""

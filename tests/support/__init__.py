"""Servers, clients, networks and clocks for tests: real ones to run, and fakes that record."""

"""Servers, clients, networks and clocks of the tests: real ones to run, and fakes that record."""

"""What the app and the tests of computing endpoints agree on."""

STEPS = 4

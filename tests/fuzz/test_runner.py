"""Tests of the runner of the fuzzers, with fake fuzzers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as runner


@pytest.mark.parametrize(("program", "found"), [("true", 0), ("false", 2)])
def test_failed_fuzzer_is_reported_with_its_input(
    program: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fuzzer that fails is counted and named with the location of its input; one that succeeds is not."""
    monkeypatch.setattr(sys, "executable", shutil.which(program))
    monkeypatch.setattr(runner, "WORK", tmp_path)
    assert runner.fuzz_all(["frames", "tokens"], 1, 2) == found
    output = capsys.readouterr().out
    assert output.count("FOUND SOMETHING") == found
    assert (f"found something: frames, tokens; the inputs are in {tmp_path}" in output) == bool(found)

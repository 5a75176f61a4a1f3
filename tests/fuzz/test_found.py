"""Replay of every input of the corpus: the initial ones and those that fuzzers have found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.table import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def test_each_target_has_corpus() -> None:
    """Every folder of the corpus has a target and every target a folder, so that each input is replayed."""
    assert {path.parent.name for path in FILES} == set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_corpus_inputs_do_not_fail_again(path: Path) -> None:
    """No input of the corpus breaks its target."""
    TARGETS[path.parent.name](path.read_bytes())

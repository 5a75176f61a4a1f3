"""Every input that a fuzzer begins with or has stumbled on, once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.table import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def test_each_target_has_corpus() -> None:
    """A folder without a target, or a target without a folder, would be replayed by nobody."""
    assert {path.parent.name for path in FILES} == set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_corpus_inputs_do_not_fail_again(path: Path) -> None:
    """No input of the corpus breaks its target."""
    TARGETS[path.parent.name](path.read_bytes())

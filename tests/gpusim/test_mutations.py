"""Every planted bug is seen."""
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mutations import MUTATIONS, ROOT, survives


def test_there_is_a_bug_for_every_kind_of_check():
    assert len(MUTATIONS) > 60 and len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_still_has_its_place(mutation):
    assert mutation.old in Path(ROOT, mutation.file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_seen(mutation):
    assert not survives(mutation)

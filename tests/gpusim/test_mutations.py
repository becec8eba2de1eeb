"""Every planted bug is seen."""
import pytest

pytest.importorskip("triton")

from mutations import MUTATIONS, survives


def test_there_is_a_bug_for_every_kind_of_check():
    assert len(MUTATIONS) > 20 and len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_seen(mutation):
    assert not survives(mutation)

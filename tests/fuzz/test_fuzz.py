"""A few seconds of fuzzing for each target; `scripts/fuzz 60` goes on for an hour."""

import random

import pytest

from tests.fuzz.harness import CORPUS, Run
from tests.fuzz.targets import TARGETS

SECONDS = 1.5

pytestmark = pytest.mark.fuzz


@pytest.fixture
def running(request, target):
    url = request.getfixturevalue("database") if target.needs_database else None
    with target.opened(url) as check:
        yield Run(target, check)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_hostile_input_is_answered_in_time_and_breaks_no_promise(target, running):
    if running.replay():
        pytest.fail("\n".join(str(one) for one in running.findings), pytrace=False)
    found = running.explore(SECONDS, random.SystemRandom().randrange(2**32))
    if found is not None:
        pytest.fail(f"{found}\n  scripts/fuzz 1 --only {target.name} --seed {found.seed}", pytrace=False)
    assert running.examples > 10


def test_every_directory_of_the_corpus_is_of_a_target():
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)

import pytest

from outbox.doctor.finding import Grade
from outbox.doctor.run import judge_limits


@pytest.mark.parametrize("files, grade", [(None, Grade.OK), (80, Grade.OK), (79, Grade.PROBLEM)])
def test_open_files_must_suffice_for_the_connections(files, grade):
    assert judge_limits(files, 16).grade is grade

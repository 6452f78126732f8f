import pytest

from outbox.doctor.finding import Grade
from outbox.doctor.reports import judge_link


@pytest.mark.parametrize(
    "link, grade",
    [
        ("https://reports.example.com/r/{token}", Grade.OK),
        ("http://reports.example.com/r/{token}", Grade.NOTE),
        ("reports.example.com/r/{token}", Grade.PROBLEM),
        ("https:///r/{token}", Grade.PROBLEM),
    ],
)
def test_a_link_must_be_one_that_opens_and_should_hide_its_token(link, grade):
    assert judge_link("progress", link).grade is grade

from outbox.doctor.finding import problem_of
from outbox.errors import SchemaError


def test_a_sentence_of_ours_is_parted_before_its_fix():
    found = problem_of("x", SchemaError("x: it says a; b (c); correct it there."))
    assert (found.found, found.fix) == ("it says a; b (c)", "correct it there")
    assert found.sentence == "it says a; b (c); correct it there."

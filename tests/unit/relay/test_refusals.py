"""What a refusal is about that may be the route's: decided by what the server does with other mail."""

import pytest

from outbox.relay.refusals import EVIDENCE_S, REPEATED_MIN, RefusalJudge, Ruling
from outbox.smtp.refusal import About, Refusal
from outbox.smtp.reply_class import classify

NOW = 1000.0
ME, OTHER = "reports@example.com", "alerts@example.com"


def said(stage: str, reply: str) -> Refusal:
    code, text = int(reply[:3]), reply[4:]
    return Refusal(classify(stage, code, text), stage, code, text)


RELAYING = said("RCPT", "554 5.7.1 <p@example.org>: Relay access denied")
UNCLEAR = said("RCPT", "554 5.7.1 Access denied")
LIMIT = said("MAIL", "550 5.4.5 Daily user sending limit exceeded")
SEQUENCE = said("RCPT", "503 5.5.1 Bad sequence of commands")


def rule(judge: RefusalJudge, refusal: Refusal, number: int = 1, *, sender: str = ME, now: float = NOW) -> Ruling:
    return judge.rule(refusal, sender, f"p{number}@example.com", now)


@pytest.mark.parametrize("refusal", [RELAYING, LIMIT, SEQUENCE], ids=lambda refusal: refusal.reply)
def test_where_nothing_was_taken_a_refusal_that_names_the_sender_or_host_is_the_routes(refusal):
    assert rule(RefusalJudge(), refusal) is Ruling.ROUTE


def test_relaying_denied_for_one_is_about_that_recipient_where_others_are_taken():
    judge = RefusalJudge()
    judge.accepted(ME, NOW - 1)
    assert rule(judge, RELAYING) is Ruling.EMAIL


def test_an_acceptance_of_long_ago_shows_nothing():
    judge = RefusalJudge()
    judge.accepted(ME, NOW - EVIDENCE_S - 1)
    assert rule(judge, RELAYING) is Ruling.ROUTE


@pytest.mark.parametrize("refusal", [RELAYING, LIMIT], ids=lambda refusal: refusal.reply)
def test_where_only_other_senders_are_taken_the_mail_of_this_one_waits(refusal):
    judge = RefusalJudge()
    judge.accepted(OTHER, NOW - 1)
    assert rule(judge, refusal) is Ruling.SENDER


def test_a_sending_limit_is_the_routes_although_mail_was_taken_just_before():
    judge = RefusalJudge()
    judge.accepted(ME, NOW)
    assert rule(judge, LIMIT) is Ruling.ROUTE


def test_an_email_that_the_server_does_not_understand_waits_where_it_understands_others():
    judge = RefusalJudge()
    judge.accepted(ME, NOW)
    assert rule(judge, SEQUENCE) is Ruling.SPARE


@pytest.mark.parametrize("refusal", [UNCLEAR, RELAYING, SEQUENCE], ids=lambda refusal: refusal.reply)
def test_the_same_reply_to_several_recipients_in_a_row_is_the_routes(refusal):
    judge = RefusalJudge()
    judge.accepted(ME, NOW)
    rulings = [rule(judge, refusal, number) for number in range(1, REPEATED_MIN + 1)]
    assert Ruling.ROUTE not in rulings[:-1]
    assert rulings[-1] is Ruling.ROUTE


def test_addresses_and_numbers_make_no_difference_between_replies():
    judge = RefusalJudge()
    replies = [f"550 5.7.1 <p{n}@example.com>: denied (id A{n}-77, 192.0.2.{n})" for n in range(REPEATED_MIN)]
    assert {said("RCPT", reply).about for reply in replies} == {About.UNCLEAR}
    rulings = [rule(judge, said("RCPT", reply), n) for n, reply in enumerate(replies)]
    assert rulings == [Ruling.EMAIL] * (REPEATED_MIN - 1) + [Ruling.ROUTE]


def test_the_same_recipient_again_is_no_repetition():
    judge = RefusalJudge()
    assert {rule(judge, UNCLEAR) for _ in range(10)} == {Ruling.EMAIL}


@pytest.mark.parametrize("between", ["an acceptance", "another verdict", "another reply"])
def test_what_comes_between_shows_that_the_server_distinguishes(between):
    judge = RefusalJudge()
    for number in range(10):
        assert rule(judge, UNCLEAR, number) is Ruling.EMAIL
        if between == "an acceptance":
            judge.accepted(ME, NOW)
        elif between == "another verdict":
            judge.judged_otherwise()
        else:
            rule(judge, said("RCPT", "550 go away"), number)


def test_dead_letters_of_the_same_reply_are_given_back_once_and_only_recent_ones():
    judge = RefusalJudge()
    judge.note_dead(UNCLEAR, 1, "old", 1, NOW - EVIDENCE_S - 1)
    judge.note_dead(UNCLEAR, 2, "mine", 1, NOW - 1)
    judge.note_dead(said("RCPT", "550 go away"), 3, "other", 1, NOW - 1)
    assert [(one.email, one.attempt) for one in judge.dead_of_route(UNCLEAR, NOW)] == [(2, 1)]
    assert judge.dead_of_route(UNCLEAR, NOW) == []
    judge.note_dead(UNCLEAR, 2, "mine", 2, NOW)
    assert judge.dead_of_route(UNCLEAR, NOW) == [], "a server at odds with itself does not keep an email for ever"


def test_a_route_that_another_relay_found_refused_gives_back_what_died_of_the_same_reply():
    judge = RefusalJudge()
    judge.note_dead(said("RCPT", "550 5.7.1 <p1@example.com>: no entry"), 1, "mine", 1, NOW)
    judge.note_dead(said("RCPT", "550 go away"), 2, "other", 1, NOW)
    found = judge.dead_of_pause("550 5.7.1 <p9@example.com>: no entry (to RCPT)", NOW)
    assert [one.email for one in found] == [1]


def test_what_is_remembered_is_bounded():
    judge = RefusalJudge()
    for number in range(5000):
        judge.accepted(f"s{number}@example.com", NOW)
        judge.note_dead(UNCLEAR, number, f"mail{number}", 1, NOW)
    assert len(judge._accepted_at) <= 1000
    assert len(judge.dead_of_route(UNCLEAR, NOW)) <= 1000

import pytest

from outbox.smtp.connection_history import DEFERRALS_MAX, ConnectionHistory
from outbox.smtp.refusal import About, Refusal, Stage
from outbox.smtp.reply_class import classify


def refusal(stage: Stage, reply: str) -> Refusal:
    code, text = int(reply[:3]), reply[4:]
    return Refusal(classify(stage, code, text), stage, code, text)


@pytest.mark.parametrize(
    ("reply", "at_first", "after_others"),
    [
        ("550 no", About.ROUTE, About.SESSION),
        ("450 enough", About.RATE, About.SESSION),
        ("421", About.CLOSING, About.SESSION),
    ],
)
def test_a_refused_mail_command_means_another_thing_after_other_mail(reply, at_first, after_others):
    said = refusal(Stage.MAIL, reply)
    assert ConnectionHistory().note_refusal(said) is at_first
    assert ConnectionHistory(accepted=5).note_refusal(said) is after_others


@pytest.mark.parametrize(("reply", "limit"), [("452 4.5.3 Too many messages sent", 5), ("550 no more", None)])
def test_only_the_first_refusal_that_speaks_of_the_session_shows_a_limit(reply, limit):
    history, said = ConnectionHistory(accepted=5), refusal(Stage.MAIL, reply)
    history.note_refusal(said)
    assert history.limit_shown_by(said) == limit
    history.note_refusal(said)
    assert history.limit_shown_by(said) is None


def test_a_connection_that_took_messages_and_then_defers_is_exhausted():
    history, later = ConnectionHistory(), refusal(Stage.RCPT, "450 later")
    for _ in range(DEFERRALS_MAX):
        history.note_refusal(later)
    assert not history.is_exhausted, "it took nothing"
    history.note_accepted()
    for _ in range(DEFERRALS_MAX):
        assert not history.is_exhausted
        history.note_refusal(later)
    assert history.is_exhausted

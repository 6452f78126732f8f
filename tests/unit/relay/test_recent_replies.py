from outbox.relay.recent_replies import LEARNED_S, STRIKES_MAX, RecentReplies, sentence_of


def test_a_sentence_is_the_same_for_all_recipients_and_moments():
    one = "450 4.2.0 <p1@example.com>: Recipient address rejected: try again in 299 seconds (id 4XyZ12)"
    other = "450 4.2.0 <p22@example.org>: Recipient address rejected: try again in 12 seconds (id 9AbC34)"
    assert sentence_of(one) == sentence_of(other)
    assert sentence_of(one) != sentence_of("452 4.2.0 <p1@example.com>: Recipient address rejected: mailbox busy")


BUSY = "451 4.3.0 <{}>: try again later"


def defer(replies, email, now, *, reply=BUSY, tries=1, **how):
    who = f"p{email}@example.com"
    replies.note_deferred(who, reply.format(who), now, tries=tries)
    return replies.judge(email, who, reply.format(who), now, tries=tries, **how)


DAY_S = 86_400.0


def test_while_a_server_takes_nothing_its_sentence_uses_up_no_try_however_rare_the_tries_are():
    replies = RecentReplies()
    replies.note_accepted("before@example.com", 0.0)
    for email in range(10):
        defer(replies, email, 20.0 + email / 10)
    judged = [defer(replies, email, 20.0 + email * DAY_S, tries=tries) for email, tries in ((3, 1), (4, 1), (0, 2))]
    assert not any(judgement.is_own for judgement in judged)
    other = "452 4.3.1 insufficient storage"
    assert defer(replies, 5, 6 * DAY_S, reply=other).is_own, "it says something else to one"
    replies.note_accepted("after@example.com", 7 * DAY_S)
    assert defer(replies, 6, 7 * DAY_S + 700).is_own, "it takes others since"


def test_full_mailboxes_use_up_their_tries_although_nothing_else_is_sent():
    replies = RecentReplies()
    for email in range(10):
        defer(replies, email, 1.0, names_recipient=True)
    assert defer(replies, 3, DAY_S, names_recipient=True).is_own


def test_a_relay_that_has_just_started_knows_the_sentence_from_the_fleet():
    known = BUSY.format("p99@example.com")
    assert not defer(RecentReplies(), 1, 1.0, known=known).is_own
    assert defer(RecentReplies(), 1, 1.0, known="450 4.7.1 too much mail").is_own
    replies = RecentReplies()
    replies.note_accepted("p2@example.com", 0.5)
    assert defer(replies, 1, 1.0, known=known).is_own, "it has sent something itself"


def test_a_deferral_amid_acceptances_is_the_recipients_own():
    replies = RecentReplies()
    for email in range(20):
        replies.note_accepted(f"p{email}@example.com", 1.0)
    for email in (50, 51, 52):
        assert defer(replies, email, 1.1).is_own


def test_a_deferral_that_most_others_get_is_not_counted_as_a_try():
    replies = RecentReplies()
    judged = [defer(replies, email, 1.0) for email in range(10)]
    assert [judgement.is_own for judgement in judged] == 2 * [True] + 8 * [False]
    assert all(judgement.is_of_the_rate for judgement in judged[2:])


def test_a_recipient_that_is_tried_often_is_no_witness_of_a_fault_of_the_server():
    replies = RecentReplies()
    for _ in range(10):
        assert defer(replies, 1, 1.0).is_own


def test_the_last_full_mailboxes_of_a_campaign_use_up_their_tries():
    replies = RecentReplies()
    for email in range(100):
        replies.note_accepted(f"p{email}@example.com", 1.0)
    judged = [defer(replies, email, 20.0 + n / 10) for n, email in enumerate((200, 201))]
    assert all(judgement.is_own for judgement in judged), "two prove nothing"
    for tries in range(2, 13):
        judged = [defer(replies, email, 30.0 * tries, tries=tries) for email in range(200, 220)]
        assert all(judgement.is_own for judgement in judged), "what was counted before is no witness"


def test_an_email_that_is_deferred_while_others_are_accepted_again_has_a_try_of_its_own():
    replies = RecentReplies()
    for email in range(10):
        defer(replies, email, 1.0)
    own = []
    for turn in range(STRIKES_MAX + 2):
        for other in range(40):
            replies.note_accepted(f"q{turn}.{other}@example.com", 5.0 + turn)
        own.append(defer(replies, 9, 5.5 + turn).is_own)
    assert own[0] is False, "the sentence is known to be the server's, for a while"
    assert own[-1] is True


def test_a_sentence_that_was_the_servers_is_forgotten():
    replies = RecentReplies()
    for email in range(10):
        defer(replies, email, 1.0)
    for email in range(40):
        replies.note_accepted(f"q{email}@example.com", 1.0 + LEARNED_S)
    assert defer(replies, 50, 1.1 + LEARNED_S).is_own


def test_greylisting_by_its_name_is_always_the_recipients_own():
    replies = RecentReplies()
    reply = "450 4.2.0 <{}>: Recipient address rejected: Greylisted, see http://example.com/"
    judged = [defer(replies, email, 1.0, reply=reply) for email in range(20)]
    assert all(judgement.is_own and not judgement.is_of_the_rate for judgement in judged)


def test_an_email_that_meets_a_limit_while_others_are_taken_has_a_limit_of_its_own():
    replies = RecentReplies()
    assert not any(replies.is_own_limit(1) for _ in range(20)), "nobody else is taken"
    seen = []
    for now in range(4):
        replies.note_accepted("other@example.com", float(now))
        seen.append(replies.is_own_limit(1))
    assert seen == [False, False, True, True]
    assert not replies.is_own_limit(2)

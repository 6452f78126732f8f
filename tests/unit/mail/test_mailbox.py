import pytest

from outbox.mail.mailbox import Mailbox, check_address, is_plain, parse_mailbox


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ann@example.com", "ann@example.com"),
        (" ann.smith+tag@Mail.Example.COM  ", "ann.smith+tag@mail.example.com"),
        ("Ann@example.test", "Ann@example.test"),
        ("user@localhost", "user@localhost"),
        ("user@mail.localhost", "user@mail.localhost"),
        ("user@mail.local", "user@mail.local"),
        ("o'brien@example.com", "o'brien@example.com"),
        ("ann@bücher.example", "ann@xn--bcher-kva.example"),
        ("ann@BÜCHER.example", "ann@xn--bcher-kva.example"),
        ("ann@xn--bcher-kva.example", "ann@xn--bcher-kva.example"),
        ("ann@münchen", "ann@xn--mnchen-3ya"),
    ],
)
def test_a_deliverable_address_is_brought_into_one_form(text, address):
    assert check_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "ann", "@example.com", "ann@", "a@b@c.example", "ann@example..com", ".ann@example.com",
        "an n@example.com",
        "ann@example.com\n", "ann@example.com\r\nRCPT TO:<x@y>",
        "ann\x00@example.com", "ann@-example.com",
        "ann@[127.0.0.1]", "ann@127.0.0.1",
        '"ann smith"@example.com', "ann@example.invalid", "ann@xn--\u00fc.example",
        f"{'a' * 65}@example.com", f"ann@{'a' * 64}.example", f"ann@{'a.' * 130}example",
        "Ann <ann@example.com>",
        "ann,bob@example.com", "ann@ab--cd.example", "ann@exa_mple.com",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_one_sentence(text):
    with pytest.raises(ValueError, match=r"^'.*' .*\.$"):
        check_address(text)


@pytest.mark.parametrize(
    "text", ["jürgen@bücher.example", "ju\u0308rgen@BÜCHER.example", " jürgen@xn--bcher-kva.example"]
)
def test_a_local_part_in_any_letters_has_one_spelling_and_its_domain_is_ascii(text):
    assert check_address(text) == "jürgen@xn--bcher-kva.example"


def test_a_local_part_is_measured_in_bytes():
    assert check_address(f"{'ü' * 32}@example.com")
    with pytest.raises(ValueError, match="64 bytes"):
        check_address(f"{'ü' * 33}@example.com")


@pytest.mark.parametrize(
    ("text", "mailbox"),
    [
        ("Progress reports <reports@example.com>", Mailbox("Progress reports", "reports@example.com")),
        ("reports@example.com", Mailbox("", "reports@example.com")),
        ("<reports@example.com>", Mailbox("", "reports@example.com")),
        ('"Reports, \\"Inc.\\"" <r@EXAMPLE.com>', Mailbox('Reports, "Inc."', "r@example.com")),
        (
            "Müller & Co. (Reports)<r@bücher.example>",
            Mailbox("Müller & Co. (Reports)", "r@xn--bcher-kva.example"),
        ),
    ],
)
def test_a_sender_is_read_as_a_person_would_write_it(text, mailbox):
    assert parse_mailbox(text) == mailbox


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Reports",
        "Reports <reports>",
        "A <a@x.example>, B <b@x.example>",
        "A <a@x.example",
        "a@x.example>",
        "A\n<a@x.example>",
    ],
)
def test_what_is_no_sender_is_refused_with_one_sentence(text):
    with pytest.raises(ValueError, match=r"\.$"):
        parse_mailbox(text)


@pytest.mark.parametrize(
    "text",
    [
        "a@example.com",
        "Reports <a@example.com>",
        '"Reports, Inc" <a@example.com>',
        "Jörg <ü@example.com>",
        "A. B.<a@b>",
    ],
)
def test_a_mailbox_is_plain_with_its_punctuation_in_quotes_and_its_domain_in_ascii(text):
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    ["A, B <a@example.com>", "a@example.com, b@example.com", "b@example.com <a@example.com>", "A <a@bücher.example>"],
)
def test_a_text_that_may_be_meant_as_two_addresses_is_not_plain(text):
    assert not is_plain(text)

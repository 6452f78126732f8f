import pytest

from outbox.mail.body_encoding import boundary, text_part


def body(text: str) -> bytes:
    return text_part("plain", text).partition(b"\r\n\r\n")[2]


def test_mostly_latin_text_is_quoted_and_the_rest_is_base64():
    assert b"Content-Transfer-Encoding: quoted-printable\r\n" in text_part("plain", "Größe und vieles andere mehr\n")
    assert b"Content-Transfer-Encoding: base64\r\n" in text_part("plain", "進捗報告\n" * 9)


def test_an_empty_body_still_has_the_line_end_that_belongs_to_the_boundary():
    assert text_part("plain", "").endswith(b"quoted-printable\r\n\r\n\r\n")


@pytest.mark.parametrize("line", ["y" * length + blank for length in (73, 74, 75, 76) for blank in " \t"])
def test_a_blank_at_the_end_of_a_full_line_makes_no_line_too_long(line):
    assert max(map(len, body(f"{line}\n{line}").split(b"\r\n"))) <= 76


def test_no_line_of_a_body_is_a_lone_dot():
    assert b"\r\n.\r\n" not in text_part("plain", ".\n.\n" + "word " * 60 + ".")


def test_no_line_of_a_body_begins_like_a_mailbox_separator():
    part = text_part("plain", "From a\nFrom From b\n" + "plain words " * 9)
    assert b"\r\nFrom " not in part
    assert part.count(b"=46rom =\r\n") == 3


@pytest.mark.parametrize("text", ["=_", "--=_" * 40, "=" * 80])
def test_no_body_holds_the_beginning_of_a_boundary(text):
    assert boundary("7f3a@example.com").startswith("=_")
    assert b"=_" not in body(text)

from email import message_from_bytes
from email.policy import default

import pytest

from outbox.mail.attachment import Attachment, attachment_part, file_name


@pytest.mark.parametrize(
    "name",
    ["report.pdf", 'a "quoted" \\ name.csv', "Bericht für März.csv", "Rechnung " + "Müller " * 20 + ".pdf", "進捗.txt"],
)
def test_the_standard_library_reads_the_name_and_the_content_of_a_part(name):
    content = bytes(range(256)) * 3
    part = attachment_part(Attachment(name, content, "text/csv; charset=utf-8"))
    read = message_from_bytes(part, policy=default)
    assert read.get_filename() == file_name(name)
    assert read.get_payload(decode=True) == content
    assert read.get_content_type() == "text/csv"
    assert max(map(len, part.split(b"\r\n"))) <= 78


def test_a_type_with_a_name_of_its_own_gets_no_second_one():
    part = attachment_part(Attachment("a.pdf", b"", "application/pdf; name=b.pdf"))
    assert part.count(b" name=") == 1


@pytest.mark.parametrize("name", ["", ".", "..", " . ", "\u202e", "x" * 256])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="needs a name"):
        Attachment(name, b"")


@pytest.mark.parametrize("kind", ["pdf", "multipart/mixed", "message/rfc822", "a/b\r\nBcc: x", "text/" + "x" * 200])
def test_a_type_that_is_no_files_is_refused(kind):
    with pytest.raises(ValueError, match="type"):
        Attachment("a", b"", kind)

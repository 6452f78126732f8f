"""Extensions that a server offers, and parameters because of them."""

from outbox.smtp.extensions import Offers, original_recipient


def test_an_original_recipient_beyond_ascii_has_an_address_type_of_its_own():
    assert original_recipient("jü+r@b.example") == r"utf-8;j\x{FC}\x{2B}r@b.example"


def test_an_extension_is_known_by_the_reply_to_ehlo():
    offers = Offers.of({"pipelining": "", "size": " 500 ", "8bitmime": "", "smtputf8": "", "dsn": ""})
    assert offers == Offers(pipelining=True, size=True, size_max=500, eight_bit=True, utf8=True, dsn=True)
    assert Offers.of({"size": "", "smtputf8": ""}) == Offers(size=True)
    assert Offers.of({"size": "²"}) == Offers(size=True)

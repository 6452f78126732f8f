from outbox.mail.header_fields import one_line


def test_one_line_keeps_no_break_and_wide_spaces():
    assert one_line(" a\t\r\n\x85 b\u2028c\u00a0:\u3000d ") == "a b c\u00a0:\u3000d"

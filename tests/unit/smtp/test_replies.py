import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.smtp.replies import LINE_BYTES_MAX, REPLY_BYTES_MAX, GarbageError, Reply, ReplyReader


def read(*pieces: bytes) -> list[Reply]:
    reader = ReplyReader()
    return [reply for piece in pieces for reply in reader.feed(piece)]


def read_until_garbage(*pieces: bytes) -> tuple[list[Reply], bool]:
    """The replies in the order in which they came to be known, and whether garbage ended them."""
    reader, replies = ReplyReader(), []
    try:
        for piece in pieces:
            for reply in reader.feed(piece):
                replies.append(reply)  # noqa: PERF402 - what came before the garbage is kept
    except GarbageError:
        return replies, True
    return replies, False


@st.composite
def replies_and_bytes(draw):
    """Replies as a server may say them, and their bytes on the wire."""
    codes = st.integers(200, 599)
    words = st.text("aZ5 -.\té€😀", max_size=20)
    replies, wire = [], b""
    for _ in range(draw(st.integers(0, 6))):
        code, lines = draw(codes), draw(st.lists(words, min_size=1, max_size=4))
        end = draw(st.sampled_from([b"\r\n", b"\n"]))
        for line in lines[:-1]:
            wire += f"{code}-{line}".encode() + end
        wire += f"{code} {lines[-1]}".encode() + end
        replies.append(Reply(code, " ".join(lines)))
    return replies, wire


@given(replies_and_bytes(), st.data())
def test_any_split_of_a_stream_gives_the_same_replies(said, data):
    replies, wire = said
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    pieces = [wire[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert read(*pieces) == replies


@given(replies_and_bytes())
def test_a_stream_may_come_byte_by_byte(said):
    replies, wire = said
    assert read(*(wire[n : n + 1] for n in range(len(wire)))) == replies


words = st.sampled_from([b"250 ok", b"250-more", b"354", b"hello", b"\r\n", b"\n", b"5", b"-", b" "])


@given(st.lists(words), st.data())
def test_any_split_finds_the_same_replies_before_the_same_garbage(words, data):
    wire = b"".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=4)))
    pieces = [wire[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    byte_by_byte = [wire[n : n + 1] for n in range(len(wire))]
    assert read_until_garbage(*pieces) == read_until_garbage(*byte_by_byte)


def test_garbage_takes_back_no_reply_that_came_before_it():
    assert read_until_garbage(b"250 queued\r\nwhat is this\r\n") == ([Reply(250, "queued")], True)


def test_an_unfinished_line_is_no_reply_yet():
    assert read(b"250 o") == []
    assert read(b"250-one\r\n") == []


@pytest.mark.parametrize(
    ("wire", "reply"),
    [
        (b"250 ok\r\n", Reply(250, "ok")),
        (b"250 \r\n", Reply(250, "")),
        (b"250\r\n", Reply(250, "")),
        (b"250\n", Reply(250, "")),
        (b"250 ok\n", Reply(250, "ok")),
        (b"250-one\r\n250-two\r\n250 three\r\n", Reply(250, "one two three")),
        (b"550-\r\n550 \r\n", Reply(550, " ")),
        (b"250 \xff\xfe\r\n", Reply(250, "��")),
        ("250 größer\r\n".encode(), Reply(250, "größer")),
    ],
)
def test_a_reply_is_read_as_it_is_meant(wire, reply):
    assert read(wire) == [reply]


@pytest.mark.parametrize("control", ["\0", "\x1b", "\r", "\b", "\x7f", "\x9b"])
def test_a_reply_cannot_command_the_terminal_that_shows_it(control):
    assert read(f"550 a{control}[2Jb\r\n".encode()) == [Reply(550, "a�[2Jb")]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"25",
        b"25x ok",
        b"150 wait",
        b"650 what",
        b"050 no",
        b"250_ok",
        b"2500 ok",
        b"\xff\xff\xff",
        b" 250",
    ],
)
def test_what_is_no_reply_is_garbage(line):
    with pytest.raises(GarbageError):
        read(line + b"\r\n")


def test_garbage_that_is_quoted_is_cut_short():
    with pytest.raises(GarbageError) as caught:
        read(b"x" * 4000 + b"\r\n")
    assert len(str(caught.value)) < 200


def line_of(size: int) -> bytes:
    return b"250 " + b"x" * (size - 4)


def test_a_line_as_long_as_its_bound_is_read_and_one_byte_more_is_garbage():
    assert len(read(line_of(LINE_BYTES_MAX) + b"\n")) == 1
    with pytest.raises(GarbageError):
        read(line_of(LINE_BYTES_MAX + 1) + b"\n")


def test_a_line_without_an_end_is_not_kept_for_ever():
    reader = ReplyReader()
    assert list(reader.feed(line_of(LINE_BYTES_MAX))) == []
    with pytest.raises(GarbageError):
        list(reader.feed(b"x"))


def test_a_reply_without_an_end_is_not_kept_for_ever():
    line = b"250-" + b"x" * 996 + b"\n"
    with pytest.raises(GarbageError):
        read(*[line] * (REPLY_BYTES_MAX // 1000 + 1))


def test_the_bound_is_of_one_reply_not_of_the_connection():
    reply = (b"250-" + b"x" * 996 + b"\n") * (REPLY_BYTES_MAX // 1000) + b"250 end\n"
    assert len(read(*[reply] * 3)) == 3

"""AUTH dialogue of the sink: the mechanisms PLAIN (RFC 4616) and LOGIN, which is older than its standards."""

import binascii
from base64 import b64decode
from typing import Final

_PROMPTS: Final = {
    b"PLAIN": [b"334 \r\n"],
    b"LOGIN": [b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n"],  # "Username:", "Password:" in base64
}
MECHANISMS: Final = tuple(_PROMPTS)


class LoginDialogue:
    """One AUTH command and the client's answers to its prompts."""

    def __init__(self, mechanism: bytes, initial: list[bytes]) -> None:
        self._mechanism = mechanism
        self._answers = initial
        """Base64, as the client sent it."""

    def answer(self, line: bytes) -> None:
        """Take the client's answer to the last prompt."""
        self._answers.append(line)

    def prompt(self) -> bytes | None:
        """Return the next prompt, None when the credentials are complete."""
        prompts = _PROMPTS[self._mechanism]
        return prompts[len(self._answers)] if len(self._answers) < len(prompts) else None

    def credentials(self) -> tuple[str, ...]:
        """Return user and password as the client gave them, () if they cannot be read."""
        try:
            decoded = [b64decode(answer, validate=True).decode() for answer in self._answers]
        except (binascii.Error, UnicodeDecodeError):
            return ()
        return tuple(decoded[0].split("\0")[1:] if self._mechanism == b"PLAIN" else decoded)

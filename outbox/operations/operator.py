"""Name of the person who runs a command, as it is kept with each operation."""

import getpass
import os
import socket


def whoami() -> str:
    """Return the user and host of this program as `user@host`; a user without a name, as in containers, by number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"

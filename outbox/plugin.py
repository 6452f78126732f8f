"""The user's own code by its name, `module:attribute`; modules beside the settings are found too."""

import importlib
import sys
from pathlib import Path
from typing import Any


def load(reference: str, directory: Path) -> Any:
    """What the reference names. Raises whatever the import raises: the caller knows which setting it was."""
    module_name, _, attribute = reference.partition(":")
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    return getattr(importlib.import_module(module_name), attribute)


def said(error: BaseException) -> str:
    """What an error of the user's code says, on one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]

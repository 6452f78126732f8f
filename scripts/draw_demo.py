"""Play `outbox demo` and draw its output: docs/demo.svg. Started by scripts/story."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import MONOKAI

from outbox.sandbox.demo import tell

PICTURE: Final = Path("docs/demo.svg")


def main() -> int:
    """Draw the picture and return the exit code of the demo."""
    with tempfile.TemporaryDirectory(prefix="outbox-") as keep:
        console = Console(record=True, width=100, force_terminal=True, highlight=False)
        code = tell(people=40, servers=4, keep=Path(keep), console=console)
        svg = console.export_svg(title="scripts/demo", theme=MONOKAI)
    without_fonts = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would be loaded from elsewhere
    PICTURE.write_text(without_fonts.replace(keep, "/tmp/outbox-demo"))  # noqa: S108 - a directory to show, not to use
    return code


if __name__ == "__main__":
    sys.exit(main())

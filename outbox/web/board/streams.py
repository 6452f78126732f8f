"""Live streams of the board's viewers: how many there may be, and which one ends when one more is opened."""

from collections import Counter
from dataclasses import dataclass
from typing import Final

STREAMS_MAX: Final = 50


@dataclass(slots=True, eq=False)
class Stream:
    """Live updates of one page."""

    viewer: str
    is_ended: bool = False


class Streams:
    """Open streams of this process, the oldest first."""

    def __init__(self) -> None:
        self._open: list[Stream] = []

    def has_room(self, viewer: str) -> bool:
        """Return True if the viewer may open one more stream."""
        return len(self._open) < STREAMS_MAX or self._greediest(viewer) is not None

    def enter(self, viewer: str) -> Stream | None:
        """Return a stream for a viewer, in place of one of a viewer with more if needed; None if all are taken."""
        if len(self._open) >= STREAMS_MAX:
            victim = self._greediest(viewer)
            if victim is None:
                return None
            victim.is_ended = True
            self._open.remove(victim)
        stream = Stream(viewer)
        self._open.append(stream)
        return stream

    def leave(self, stream: Stream) -> None:
        """Remove a stream that has ended, if another did not take its place."""
        if stream in self._open:
            self._open.remove(stream)

    def _greediest(self, viewer: str) -> Stream | None:
        """Return the oldest stream of the viewer who has most, and at least two more than this one."""
        counts = Counter(stream.viewer for stream in self._open)
        greediest, most = counts.most_common(1)[0]
        if most < counts[viewer] + 2:
            return None
        return next(stream for stream in self._open if stream.viewer == greediest)

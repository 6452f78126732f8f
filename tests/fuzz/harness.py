"""Common parts of the fuzz targets: making inputs, judging them, keeping them as files, and the time limit.

A target is a name, a strategy and a check that raises for a finding. Its corpus is tests/fuzz/corpus/<name>: one file
for each input that once failed, or is known to be slow; they are run first, every time.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
CPU_MAX_S = 2.0  # for one input; what is slower can be used to stop a process
ROUND = 25  # examples of one run of hypothesis, after which the clock is looked at
SHOWN_MAX = 1_000

Check = Callable[[Any], None]


class OverTimeError(BaseException):
    """One input took more than CPU_MAX_S. Not an Exception: code that catches whatever happens must not catch this."""


@dataclass(frozen=True)
class Target:
    """Something to fuzz. `opened` gives the check, and keeps what it needs open: a process, a connection.

    `kind` says how an input is a file: bytes as they are, text in UTF-8, anything else as JSON.
    """

    name: str
    examples: st.SearchStrategy[Any]
    kind: type
    opened: Callable[[str | None], AbstractContextManager[Check]]
    needs_database: bool = False

    @property
    def corpus(self) -> list[Path]:
        """Files of inputs that are always run."""
        return sorted((CORPUS / self.name).glob("*"))

    def read(self, path: Path) -> Any:
        """Read an input. A file *.times.json holds pieces, each with how often it is repeated: [["a;", 40000]]."""
        if path.name.endswith(".times.json"):
            whole = "".join(piece * times for piece, times in json.loads(path.read_text()))
            return whole.encode("latin-1") if self.kind is bytes else whole
        raw = path.read_bytes()
        if self.kind is bytes:
            return raw
        if self.kind is str:
            return raw.decode("utf-8", "surrogatepass")
        return json.loads(raw)

    def keep(self, example: Any) -> Path:
        """Write an input into the corpus, under a name that is the digest of its content."""
        raw = example if isinstance(example, bytes) else example.encode("utf-8", "surrogatepass") if isinstance(
            example, str
        ) else json.dumps(example).encode()  # fmt: skip
        suffix = {bytes: "bin", str: "txt"}.get(self.kind, "json")
        path = CORPUS / self.name / f"{blake2b(raw, digest_size=6).hexdigest()}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return path


TARGETS: dict[str, Target] = {}


def fuzzed(name: str, examples: st.SearchStrategy[Any], kind: type) -> Callable[[Check], Check]:
    """Register a check that needs nothing but its input."""

    def register(check: Check) -> Check:
        TARGETS[name] = Target(name, examples, kind, lambda _: nullcontext(check))
        return check

    return register


@contextmanager
def bounded() -> Iterator[None]:
    """Raise AssertionError if the block takes more than CPU_MAX_S of this process's CPU; stop it there if possible.

    A timer interrupts Python code. Code in C, such as one regular expression, is judged when it returns.
    """

    def stop(*_: object) -> None:
        raise OverTimeError

    in_main = threading.current_thread() is threading.main_thread()
    begun = time.process_time()
    former = signal.signal(signal.SIGPROF, stop) if in_main else None
    try:
        if in_main:
            signal.setitimer(signal.ITIMER_PROF, CPU_MAX_S)
        yield
    except OverTimeError:
        raise AssertionError(f"took more than {CPU_MAX_S:g} s of CPU time and was stopped") from None
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, former)
    spent = time.process_time() - begun
    assert spent < CPU_MAX_S, f"took {spent:.1f} s of CPU time"


@dataclass
class Finding:
    """An input on which a check failed."""

    target: str
    example: Any
    error: BaseException
    seed: int | None = None
    path: Path | None = None

    def __str__(self) -> str:
        shown = repr(self.example)
        if len(shown) > SHOWN_MAX:
            shown = f"{shown[: SHOWN_MAX // 2]} … {len(shown):,} characters … {shown[-SHOWN_MAX // 2 :]}"
        where = f"\n  kept as {self.path.relative_to(CORPUS.parents[2])}" if self.path is not None else ""
        return f"{self.target}: {type(self.error).__name__}: {str(self.error)[:SHOWN_MAX]}\n  input: {shown}{where}"


@dataclass
class Run:
    """One target while it is fuzzed."""

    target: Target
    check: Check
    examples: int = 0
    findings: list[Finding] = field(default_factory=list)

    def judge(self, example: Any) -> None:
        """Run the check within its time; raise for a finding."""
        self.examples += 1
        with bounded():
            self.check(example)

    def replay(self) -> list[Finding]:
        """Run the corpus."""
        for path in self.target.corpus:
            example = self.target.read(path)
            try:
                self.judge(example)
            except Exception as error:
                self.findings.append(Finding(self.target.name, example, error, path=path))
        return self.findings

    def explore(self, seconds: float, seed: int) -> Finding | None:
        """Try new inputs for that long, to the first finding, which hypothesis makes as small as it can."""
        ends = time.monotonic() + seconds
        while True:
            if (found := self._round(seed)) is not None:
                self.findings.append(found)
                return found
            seed += 1
            if time.monotonic() >= ends:
                return None

    def _round(self, seed: int) -> Finding | None:
        last: Any = None

        @hypothesis.seed(seed)
        @settings(
            max_examples=ROUND, database=None, deadline=None, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink], print_blob=False,
        )  # fmt: skip
        @given(self.target.examples)
        def look(example: Any) -> None:
            nonlocal last
            last = example
            self.judge(example)

        try:
            look()
        except Exception as error:
            # The smallest input is the one that hypothesis runs last, right before it raises. Where that one did not
            # fail again, the failure itself is inside.
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            return Finding(self.target.name, last, error, seed, self.target.keep(last))
        return None


# How often a token is repeated: seldom so often that what is quadratic shows, since such inputs take long to make.
_FEW = st.integers(0, 5)
_TIMES = st.one_of(_FEW, _FEW, _FEW, _FEW, st.integers(0, 500), st.integers(0, 40_000))


def pieces(*tokens: bytes, seeds: tuple[bytes, ...] = (), size_max: int = 300_000) -> st.SearchStrategy[bytes]:
    """Bytes that look like a format: tokens of it, runs of one token, noise, and samples with parts of them changed."""
    token = st.sampled_from(tokens)
    run = st.builds(lambda one, n: (one * n)[:size_max], token, _TIMES)
    noise = st.binary(max_size=24)
    made = st.lists(st.one_of(token, token, noise, run), max_size=14).map(lambda found: b"".join(found)[:size_max])
    if not seeds:
        return made
    cut = st.tuples(st.floats(0, 1), st.integers(0, 60), st.one_of(token, noise, run))
    changed = st.builds(_changed, st.sampled_from(seeds), st.lists(cut, min_size=1, max_size=5))
    return st.one_of(made, changed).map(lambda whole: whole[:size_max])


def _changed(seed: bytes, cuts: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, put in cuts:
        at = int(where * len(seed))
        seed = seed[:at] + put + seed[at + gone :]
    return seed


def words(*tokens: str, seeds: tuple[str, ...] = (), size_max: int = 100_000) -> st.SearchStrategy[str]:
    """Text that looks like a format, as `pieces` makes bytes of one. Lone surrogates are in it, too."""
    token = st.sampled_from(tokens)
    run = st.builds(lambda one, n: (one * n)[:size_max], token, _TIMES)
    made = st.lists(st.one_of(token, token, st.text(max_size=20), run), max_size=12).map("".join)
    sources = [made, st.text(max_size=200)]
    if seeds:
        cut = st.tuples(st.floats(0, 1), st.integers(0, 20), st.one_of(token, st.text(max_size=10), run))
        sources.append(st.builds(_edited, st.sampled_from(seeds), st.lists(cut, min_size=1, max_size=4)))
    return st.one_of(sources).map(lambda whole: whole[:size_max])


def _edited(seed: str, cuts: list[tuple[float, int, str]]) -> str:
    for where, gone, put in cuts:
        at = int(where * len(seed))
        seed = seed[:at] + put + seed[at + gone :]
    return seed

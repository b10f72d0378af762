"""Runs a target for long: `python tests/fuzz/fuzz.py TARGET --seconds 600`. See the README beside it."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import os
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTRUMENTED = ["numba_dequant.gguf", "numba_dequant.loading", "numba_dequant.model", "numba_dequant.cli"]
INSTRUMENTED += ["numba_dequant.api", "numba_dequant.arguments", "numba_dequant.backends.matmul"]
LONGEST = 120.0 if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0") else 1.0
"""Seconds that an execution may take. The simulator has a Python thread for each thread of a GPU."""

MOST_FAULTS = 20


class Session:
    """Executions of one target, their outcomes and their faults."""

    def __init__(self, target: Callable[[bytes], str], seconds: float, out: Path) -> None:
        self.target, self.out = target, out
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.count = 0
        self.slowest = 0.0

    def is_over(self) -> bool:
        return time.monotonic() > self.end or len(self.faults) >= MOST_FAULTS

    def execute(self, data: bytes) -> None:
        """Run the target once. The first input of each fault is kept in a file."""
        took = self.timed(data)
        if took > LONGEST and (took := self.timed(data)) > LONGEST:  # the first time, something may be compiled
            self.report(data, TimeoutError(f"{took:.1f} s"))
        self.slowest = max(self.slowest, took)
        self.count += 1

    def timed(self, data: bytes) -> float:
        start = time.process_time()
        try:
            self.outcomes[self.target(data)] += 1
        except Exception as error:  # any exception is a fault
            self.report(data, error)
        return time.process_time() - start

    def report(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "time"
        kind = f"{type(error).__name__} at {place}"
        self.faults[kind] += 1
        if self.faults[kind] == 1:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"fault-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            print(f"FAULT {kind}: {str(error)[:500]!r}; its input is {path}", flush=True)
            traceback.print_exception(error)

    def summary(self) -> str:
        seconds = time.monotonic() - self.start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        faults = dict(self.faults) or "none"
        return (
            f"{self.count:,} executions, {seconds:.0f} s, outcomes {dict(self.outcomes)}, faults {faults}, "
            f"slowest {self.slowest:.2f} s, at most {memory} MiB of memory"
        )


def mutated(seeds: list[bytes], chance: random.Random) -> bytes:
    """Without atheris: a seed with some bytes changed, or new bytes."""
    if not seeds or chance.random() < 0.3:
        return chance.randbytes(chance.randrange(8, 200))
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + 1] = chance.randbytes(1)
        elif kind == 1:
            del data[at : at + chance.randrange(1, 20)]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 20))
        else:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(data)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder to start from and, with atheris, to write to")
    parser.add_argument("--out", type=Path, default=Path("faults"), help="a folder for the inputs of faults")
    parser.add_argument("--plain", action="store_true", help="without atheris, which is used if it is installed")
    parser.add_argument("--all-formats", action="store_true", help="compute with all formats instead of ten")
    parser.add_argument("--replay", nargs="+", type=Path, help="run these inputs, or folders of inputs, once")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    atheris = None
    if not options.plain and not options.replay:
        try:
            import atheris
        except ImportError:
            print("atheris is not installed; inputs are random")
    if atheris is not None:
        with atheris.instrument_imports(include=INSTRUMENTED):
            import targets
    else:
        import targets
    if options.all_formats:
        targets.Scope.formats = targets.FORMATS
    warnings.simplefilter("error")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a run has one core
    session = Session(targets.TARGETS[options.target], options.seconds, options.out)
    corpus = options.corpus or HERE / "corpus" / options.target
    # Ctrl-C ends a run early, and the summary is printed then, too.
    with contextlib.suppress(KeyboardInterrupt):
        execute(atheris, session, corpus, options)
    print(f"{options.target}: {session.summary()}", flush=True)
    return 1 if session.faults else 0


def execute(atheris: object, session: Session, corpus: Path, options: argparse.Namespace) -> None:
    """Run the inputs of a corpus once, or new inputs until the time is over."""
    if options.replay:
        for path in options.replay:
            for each in sorted(path.iterdir()) if path.is_dir() else [path]:
                session.execute(each.read_bytes())
    elif atheris is None:
        seeds = [path.read_bytes() for path in sorted(corpus.glob("*"))] if corpus.is_dir() else []
        chance = random.Random(options.seed)
        while not session.is_over():
            session.execute(mutated(seeds, chance))
    else:
        guided(atheris, session, corpus, options)


def guided(atheris: object, session: Session, corpus: Path, options: argparse.Namespace) -> None:
    """Run under atheris, whose loop ends the process: the summary is printed before that."""

    def once(data: bytes) -> None:
        session.execute(data)
        if session.is_over():
            print(f"{options.target}: {session.summary()}", flush=True)
            atexit._run_exitfuncs()
            os._exit(1 if session.faults else 0)

    arguments = [sys.argv[0], f"-seed={options.seed + 1}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=6000"]
    if corpus.is_dir():
        arguments.append(str(corpus))
    atheris.Setup(arguments, once)  # type: ignore[attr-defined]
    atheris.Fuzz()  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())

"""Does the fast suite see deliberate faults? Plants each in a copy of the checkout and runs the tests that should.

    python tests/faults/plant.py                 # all
    python tests/faults/plant.py router sampler  # those whose name or file holds one of these words

Prints a table; the exit status is 1 where a fault was not seen, or where tests fail without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from catalogue import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # a fault may let a test wait for ever
FAST = ["-m", "not slow and not gpu", "-q", "-x", "-p", "no:cacheprovider", "--no-header"]


def copy_checkout(target: Path) -> None:
    """Copy what git knows of or does not ignore, changes included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, (part.decode() for part in listed)):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(copy: Path, tests: str, seconds: float | None = SECONDS) -> tuple[int, str]:
    """Return the exit status of a fault's tests, and the last line but one that says something."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *FAST, *tests.split()],
            cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no end within {seconds} s"
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, said[0].split(" - ")[0] if said else (done.stdout.splitlines() or [done.stderr[-200:]])[-1]


def try_fault(copy: Path, fault: Fault) -> tuple[bool, str]:
    """Plant a fault, and return whether tests failed, and which; the file is whole again afterwards."""
    file = copy / fault.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(fault.before) != 1:
        return False, f"stands {whole.count(fault.before)} times in {fault.file}: {fault.before.strip()!r}"
    file.write_text(whole.replace(fault.before, fault.after), encoding="utf-8")
    try:
        status, said = run_tests(copy, fault.tests)
    finally:
        file.write_text(whole, encoding="utf-8")
    return status in (1, 2), said  # 2: the copy could not even be imported


def main() -> int:
    """Try the faults that the arguments name."""
    words = [word.lower() for word in sys.argv[1:]]
    chosen = [f for f in FAULTS if not words or any(word in f"{f.name} {f.file}".lower() for word in words)]
    if not chosen:
        sys.exit(f"No fault's name or file holds {' or '.join(sys.argv[1:])}.")
    unseen = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_checkout(copy)
        files = sorted({name for fault in chosen for name in fault.tests.split()})
        status, said = run_tests(copy, " ".join(files), seconds=None)
        if status != 0:
            sys.exit(f"The tests fail without a fault: {said}")
        for fault in chosen:
            began = time.monotonic()
            seen, said = try_fault(copy, fault)
            unseen += [] if seen else [fault]
            took = time.monotonic() - began
            print(f"{'seen' if seen else 'NOT SEEN':8} {took:4.0f} s  {fault.name} ({fault.file})\n{'':16}{said}")
            sys.stdout.flush()
    print(f"\n{len(chosen) - len(unseen)} of {len(chosen)} faults were seen.")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())

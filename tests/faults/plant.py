"""Does the fast suite see deliberate faults? Plants each in a copy of the checkout and runs the tests that should.

    python tests/faults/plant.py                 # all
    python tests/faults/plant.py router sampler  # those whose name or file holds one of these words
    python tests/faults/plant.py --list          # their names and files

Prints a table; the exit status is 1 where a fault was not seen, or where tests fail without one. Tests run in
processes that are forked from one which has imported PyTorch and transformers already: that takes seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from catalogue import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # a fault may let a test wait for ever
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


def be_pytest(copy: str, tests: list[str], said: str) -> None:
    """Become, in a process of its own, a run of some tests of the copy whose output goes to a file."""
    os.setsid()  # what the tests start ends with them
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(copy)
    sys.path.insert(0, copy)
    os.environ["PYTHONPATH"] = copy
    import pytest

    status = pytest.main([*FAST, *tests])
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(copy: Path, tests: list[str], seconds: float | None = SECONDS) -> tuple[int, str]:
    """Return the exit status of a fault's tests, and the first failure's line or the last line."""
    with tempfile.NamedTemporaryFile("r", suffix=".txt", encoding="utf-8", errors="replace") as said:
        process = multiprocessing.get_context("forkserver").Process(
            target=be_pytest, args=(str(copy), tests, said.name)
        )
        process.start()
        process.join(seconds)
        ended = process.exitcode is not None
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        lines = said.read().splitlines()
    if not ended:
        return 1, f"no end within {seconds} s"
    failed = [line for line in lines if line.startswith(("FAILED tests", "ERROR tests"))]
    return process.exitcode or 0, failed[0].split(" - ")[0] if failed else (lines or [""])[-1]


def try_fault(copy: Path, fault: Fault) -> tuple[bool, str]:
    """Plant a fault, and return whether tests failed, and which; the file is whole again afterwards."""
    file = copy / fault.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(fault.before) != 1:
        return False, f"stands {whole.count(fault.before)} times in {fault.file}: {fault.before.strip()!r}"
    file.write_text(whole.replace(fault.before, fault.after), encoding="utf-8")
    try:
        status, said = run_tests(copy, fault.tests.split())
    finally:
        file.write_text(whole, encoding="utf-8")
    return status in (1, 2), said  # 2: the copy could not even be imported


def plant(copy: Path, faults: list[Fault]) -> list[Fault]:
    """Try faults one after another, print what came of each, and return those that were not seen."""
    unseen = []
    for fault in faults:
        began = time.monotonic()
        seen, said = try_fault(copy, fault)
        unseen += [] if seen else [fault]
        took = time.monotonic() - began
        print(
            f"{'seen' if seen else 'NOT SEEN':8} {took:4.0f} s  {fault.name} ({fault.file})\n{'':16}{said}", flush=True
        )
    return unseen


def main() -> int:
    """Try the faults that the arguments name."""
    words = [word.lower() for word in sys.argv[1:] if word != "--list"]
    chosen = [f for f in FAULTS if not words or any(word in f"{f.name} {f.file}".lower() for word in words)]
    if not chosen:
        sys.exit(f"No fault's name or file holds {' or '.join(words)}.")
    if "--list" in sys.argv[1:]:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in chosen))
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tests/conftest.py
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_checkout(copy)
        status, said = run_tests(copy, sorted({name for fault in chosen for name in fault.tests.split()}), None)
        if status != 0:
            sys.exit(f"The tests fail without a fault: {said}")
        print(f"{'passed':8} {time.monotonic() - began:4.0f} s  all their tests without a fault", flush=True)
        unseen = plant(copy, chosen)
    print(f"\n{len(chosen) - len(unseen)} of {len(chosen)} faults were seen, in {time.monotonic() - began:.0f} s.")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())

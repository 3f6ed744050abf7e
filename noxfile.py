"""The fast suite on each Python, and the types that users see: `nox`, or `nox -s "tests-3.12"`."""

from __future__ import annotations

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = ["tests", "typing"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests that take seconds; arguments behind `--` replace the folders."""
    session.install("-e", ".[tests]")
    folders = session.posargs or ["tests/unit", "tests/golden", "tests/parity", "tests/invariance"]
    session.run("pytest", "-q", "-n", "auto", "-m", "not slow and not gpu", *folders)


@nox.session(python="3.12")
def typing(session: nox.Session) -> None:
    """Check users' code in tests/typing with pyright, against an editable install."""
    session.install("-e", ".[tests]", "pyright")
    session.run("pyright", "-p", "tests/typing")

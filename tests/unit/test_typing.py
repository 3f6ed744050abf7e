"""The types that users' editors and checkers see."""

from __future__ import annotations

import configparser
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_users_code_has_types() -> None:
    command = [sys.executable, "-m", "pyright", "-p", str(ROOT / "tests" / "typing"), "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "deepseek_vl2" / "py.typed").is_file()


def test_an_editable_install_is_a_path_that_checkers_follow() -> None:
    """By default setuptools writes an import hook there, which pyright and editors cannot follow."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["editable_wheel"]["mode"] == "compat"

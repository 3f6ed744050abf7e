"""Build the sdist and the wheel as a release would, and try the wheel as a stranger has it.

    python .ci/distribution.py

Works on a copy of the checkout's files, so that neither old builds nor untracked caches get in. Installs nothing into
the running environment: the wheel goes to a folder of its own, whose dependencies are those installed already.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deepseek_vl2"
NAME_OF_EXTRA = "serve"  # the one that the documentation installs from a wheel
QUESTION = "<|grounding|>Describe the image."


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; what it said goes along when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked_files() -> list[str]:
    """Return the checkout's files, new ones that git does not ignore included."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_checkout(to: Path) -> list[str]:
    """Copy what a release is built from, and return the package's files that must be in the wheel."""
    names = [name for name in tracked_files() if not name.startswith(("tests/", "benchmarks/", "images/", "docs/"))]
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
    # nano's card is shown by the package; the rooms' pages are for readers of the repository
    card = f"{PACKAGE}/assets/nano/README.md"
    return [n for n in names if n.startswith(f"{PACKAGE}/") and (n == card or not n.endswith("README.md"))]


def build(source: Path, to: Path, *what: str) -> Path:
    """Build what is asked for and return the wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", to, *what, source, cwd=source)
    (wheel,) = to.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by their names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_same(first: Path, second: Path) -> None:
    """Refuse two wheels whose files differ in name or content."""
    one, other = contents(first), contents(second)
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if different:
        raise SystemExit(f"The sdist builds another wheel than the checkout: {', '.join(different)}")


def check_files(wheel: Path, sdist: Path, needed: list[str]) -> None:
    """Refuse a wheel or an sdist that lacks a file of the package, or a wheel with anything foreign."""
    found = set(contents(wheel))
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for kind, names in (("wheel", found), ("sdist", packed)):
        missing = sorted(set(needed) - names)
        if missing:
            raise SystemExit(f"Not in the {kind}: {', '.join(missing)}")
    foreign = sorted(name for name in found - set(needed) if ".dist-info/" not in name)
    if foreign:
        raise SystemExit(f"In the wheel, and no file of the package: {', '.join(foreign)}")


def metadata(wheel: Path) -> Message:
    """Return a wheel's METADATA."""
    (text,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(text.decode())


def check_metadata(wheel: Path) -> str:
    """Compare a wheel's metadata with pyproject.toml, and return its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = metadata(wheel)
    declared = {str(Requirement(line)) for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        declared |= {str(Requirement(f'{line}; extra == "{extra}"')) for line in lines}
    written = {str(Requirement(line)) for line in found.get_all("Requires-Dist", [])}
    if declared != written:
        raise SystemExit(f"Requirements differ: {sorted(declared ^ written)}")
    if set(found.get_all("Provides-Extra", [])) != set(project["optional-dependencies"]):
        raise SystemExit("The wheel's extras are not those of pyproject.toml")
    (entries,) = (data for name, data in contents(wheel).items() if name.endswith("/entry_points.txt"))
    scripts = configparser.ConfigParser()
    scripts.read_string(entries.decode())
    if dict(scripts["console_scripts"]) != project["scripts"]:
        raise SystemExit("The wheel's commands are not those of pyproject.toml")
    return str(found["Version"])


def check_installed(wheel: Path, version: str, folder: Path) -> None:
    """Install the wheel into a folder and use it from another one: version, extra, sizes, an answer, the server."""
    target, elsewhere = folder / "installed", folder / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--target", target, wheel, cwd=folder)
    # every requirement of the extra is one that the environment of CI has, or pip says which is not
    run(*pip, "--dry-run", f"{wheel}[{NAME_OF_EXTRA}]", cwd=folder)

    def command(*words: str | Path) -> str:
        return run(target / "bin" / "deepseek-vl2", *words, cwd=elsewhere, PYTHONPATH=str(target))

    place = f"import {PACKAGE}; print({PACKAGE}.__file__, {PACKAGE}.__version__)"
    home, said = run(sys.executable, "-c", place, cwd=elsewhere, PYTHONPATH=str(target)).split()
    if Path(home).parent != target / PACKAGE or said != version:
        raise SystemExit(f"{home} {said} was imported instead of the wheel's {version}")
    if command("--version").split() != ["deepseek-vl2", version]:
        raise SystemExit(f"--version does not say {version}")
    if "nano" not in command("info", "nano"):
        raise SystemExit("info nano does not describe nano")
    answer = command("ask", QUESTION, "--image", ROOT / "images" / "shapes.png", "--device", "cpu")
    if "green ring" not in answer:
        raise SystemExit(f"nano's answer from the wheel is {answer!r}")
    command("serve", "--help")


def main() -> None:
    """Build, compare, install, ask."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, direct = folder / "source", folder / "direct"
        needed = copy_checkout(source)
        wheel = build(source, folder / "release")  # the sdist, and the wheel made from it
        (sdist,) = (folder / "release").glob("*.tar.gz")
        check_same(wheel, build(source, direct, "--wheel"))
        check_files(wheel, sdist, needed)
        version = check_metadata(wheel)
        check_installed(wheel, version, folder)
        size = wheel.stat().st_size / 1e6
        sys.stdout.write(f"{wheel.name}: {size:.1f} MB, {len(needed)} files, the same from the sdist\n")


if __name__ == "__main__":
    main()

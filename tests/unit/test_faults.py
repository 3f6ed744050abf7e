"""The list of deliberate faults still fits the code; `tests/faults/plant.py` plants them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from catalogue import FAULTS  # noqa: E402


def test_each_fault_can_be_planted() -> None:
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        found = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.before)
        assert found == 1, f"{fault.name}: its line stands {found} times in {fault.file}"
        assert fault.before != fault.after
        for file, _, test in (name.partition("::") for name in fault.tests.split()):
            assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), f"{fault.name}: {file} has no {test}"

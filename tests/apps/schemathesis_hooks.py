"""Hooks of the schemathesis command, which make what it holds to be valid answerable; CONTRIBUTING.md has the command.

The name of the served model is read of the environment: ``DEEPSEEK_VL2_SERVED``, by default nano's.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from answerable import answerable

MODEL = os.environ.get("DEEPSEEK_VL2_SERVED", "nano")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Put right what JSON Schema cannot say, where a case is to be accepted."""
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        case.body = answerable(case.operation.path, case.body, MODEL)
    return case

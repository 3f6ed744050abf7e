"""How things are computed fast: tensors in, tensors out, each beside the plain form that defines it.

Nothing of the package outside of this folder is imported here, and no compiler with this module itself.
"""

from __future__ import annotations

import os

SWITCH = "DEEPSEEK_VL2_KERNELS"


def turned_off() -> bool:
    """Whether the environment turns the kernels off."""
    return os.environ.get(SWITCH, "1").lower() in ("0", "false", "off", "no")

"""``python -m deepseek_vl2.cli``, for launchers that start modules."""

import sys

from deepseek_vl2.cli.main import main

sys.exit(main())

"""Run the server: ``python -m deepseek_vl2.serve.api MODEL``."""

from __future__ import annotations

import sys

from deepseek_vl2.cli.main import build_command_parser, run_program

from .command import DESCRIPTION, EXAMPLES, add_arguments, run

if __name__ == "__main__":
    program = "python -m deepseek_vl2.serve.api"
    sys.exit(run_program(build_command_parser(add_arguments, program, DESCRIPTION, EXAMPLES), None, run))

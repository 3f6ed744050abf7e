"""Run the server: ``python -m deepseek_vl2.serve.api MODEL``."""

from __future__ import annotations

import argparse
import sys

from deepseek_vl2.cli.main import as_declared

from .command import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m deepseek_vl2.serve.api")
    add_arguments(parser)
    sys.exit(main(parser.parse_args(as_declared(sys.argv[1:], parser._option_string_actions))))

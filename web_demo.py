"""Chat with DeepSeek-VL2 about images, in a browser.

Examples:
    python web_demo.py
    python web_demo.py --model_path deepseek-ai/deepseek-vl2-tiny --port 8080
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from deepseek_vl2.serve.web.command import add_arguments, main

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

"""Chat with DeepSeek-VL2 about pictures, in a browser: the same as ``deepseek-vl2 demo``.

Examples:
    python web_demo.py
    python web_demo.py --model deepseek-ai/deepseek-vl2-tiny --port 8080
    python web_demo.py --help
"""

from __future__ import annotations

import sys

from deepseek_vl2.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

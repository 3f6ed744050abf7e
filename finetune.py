"""Fine-tune DeepSeek-VL2; `python finetune.py --help` lists the options and gives examples."""

import sys

from deepseek_vl2.training.finetune import main

if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune DeepSeek-VL2 on conversations, from the command line.

Examples:
    python -m deepseek_vl2.training.finetune --model deepseek-ai/deepseek-vl2-tiny --data train.jsonl --output tuned
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --eval_data held_out.jsonl \\
        --output tuned --lora_rank 32 --epochs 3 --max_length 4096 --tensorboard
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --output tuned --resume
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --output tuned --method full \\
        --freeze vision --batch_size 8 --packing --gradient_checkpointing
    accelerate launch --num_processes 8 -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl \\
        --output tuned --method full --stage 1

A line of the data is one conversation, in the form that inference takes:
    [{"role": "<|User|>", "content": "<image>\\nWhat is this?", "images": ["photos/cat.jpg"]},
     {"role": "<|Assistant|>", "content": "A cat."}]
docs/training.md tells the rest.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace

from deepseek_vl2.cli.main import build_command_parser, fetch_model, run_program
from deepseek_vl2.utils.progress import Progress

from .options import add_arguments, check_options

PROGRAM = "finetune.py"


def build_parser(prog: str | None = None) -> ArgumentParser:
    """Return the command's parser."""
    return build_command_parser(add_arguments, prog or PROGRAM, __doc__)


def run(args: Namespace) -> int:
    """Train. Interrupted, it says how to go on.

    Raises:
        UsageError: options do not go together.
        ValueError, OSError, ImportError: data, model or an extra is not there, or not as it must be.
    """
    check_options(args)
    with Progress(f"Loading {args.model}", terminal_only=True):
        from transformers.utils import logging

        from .finetune_run import run as train
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the libraries plan is not the user's concern
    logging.disable_progress_bar()  # those of loading and saving; the training's own stays
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes already
    try:
        fetch_model(args.model)
        train(args)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; --resume goes on from the last checkpoint.\n")
        return 130
    except (ValueError, OSError) as error:
        words = worker_words(error)
        if words is None:
            raise
        raise ValueError(words) from error
    return 0


def worker_words(error: BaseException) -> str | None:
    """Return the own words of an error of a worker process, which come behind that process's stack trace."""
    text = str(error).strip()
    if not (text.startswith("Caught ") and "\n" in text):
        return None
    return text.splitlines()[-1].partition(": ")[2]


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; a user's mistake ends with one line that says what is wrong.

    Args:
        argv: the options, by default the process's.
        prog: the command's name in messages, where it is part of another one.

    Returns:
        0; 1 when something went wrong, 2 when options do not go together, 130 when interrupted.
    """
    return run_program(build_parser(prog), argv, run)


if __name__ == "__main__":
    sys.exit(main())

"""What every run of tests imports first; `plant.py` has a process import it once, and forks the runs from that."""

import importlib
import os

import torch

# As tests/conftest.py, which comes too late here: PyTorch and Triton read them when they are imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
for _name in ("torchvision", "transformers.generation", "timm", "pytest", "hypothesis"):
    importlib.import_module(_name)

"""DeepSeek-VL2 on today's PyTorch and transformers."""

__version__ = "0.1.0"

"""The architectures that the family has; without imports, for what names them before PyTorch is needed."""

KINDS = ("tiny", "small", "base")

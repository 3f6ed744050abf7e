"""Synthetic pictures with questions and answers: what the packaged small model is trained on and judged by."""

"""Every kernel compiles for sm_90 without a GPU, and keeps its numbers in registers."""

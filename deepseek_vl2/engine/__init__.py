"""What runs the model fast: support checks, weights, caches, CUDA graphs, prefill and decoding."""

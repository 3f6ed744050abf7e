"""Compiled C for x86 CPUs, and what calls it."""

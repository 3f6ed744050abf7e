"""Compiled C for CPUs."""

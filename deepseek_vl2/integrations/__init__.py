"""Plugins for engines that other projects make; each imports its engine only when that engine asks for it."""

"""The console command ``deepseek-vl2``."""

"""Benchmarks import each other as `bench.<module>`, as `python -m bench.<module>` does."""

import sys
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).parents[1]))
datasets.disable_progress_bars()

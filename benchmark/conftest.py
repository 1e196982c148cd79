"""Lets the tests import the benchmark's modules by the names that bench.py imports them by."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

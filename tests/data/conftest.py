"""The helpers of the data tests are imported by name; the suite's import mode adds no folder to the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

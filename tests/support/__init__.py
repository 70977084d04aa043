"""What tests of several rooms need."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

"""Tests run from the project's root: the shipped checkpoint is named by its path from there."""

import os
from pathlib import Path

os.chdir(Path(__file__).resolve().parents[1])

"""The command line in a process of its own, judged by little: python little_main.py COMMAND ARGUMENTS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from little import leave_out

from secateur.cli import main

leave_out()
main()

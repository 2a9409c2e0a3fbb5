"""`python -m pykvm`. Layer: cli."""

from pykvm.cli.main import entry

entry()

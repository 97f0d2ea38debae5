"""`python -m flexpert.train CONFIG`, the command `flexpert train`: for torchrun, which takes a module."""

from __future__ import annotations

import sys

from flexpert.cli import main

sys.exit(main(["train", *sys.argv[1:]]))

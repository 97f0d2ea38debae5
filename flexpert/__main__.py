"""`python -m flexpert`."""

from __future__ import annotations

import sys

from flexpert.cli import main

sys.exit(main())

"""`python -m harness` is `flashtune`."""

import sys

from harness.cli import main

sys.exit(main())

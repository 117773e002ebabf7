"""`python -m futurefill_rs.cli`."""

import sys

from futurefill_rs.cli import main

sys.exit(main())

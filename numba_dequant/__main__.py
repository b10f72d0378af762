"""`python -m numba_dequant` is the command `numba-dequant`."""

import sys

from numba_dequant.cli import main

sys.exit(main())

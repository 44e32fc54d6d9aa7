"""`python -m codeformer`."""

import sys

from codeformer.cli import main

sys.exit(main())

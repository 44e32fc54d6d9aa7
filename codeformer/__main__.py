"""`python -m codeformer`."""

import sys

from codeformer.cli.main import main

sys.exit(main())

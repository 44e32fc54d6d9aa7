"""The fastest configuration for one picture: the same as `python -m benchmarks single_image`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this folder, which a script's imports would come from.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.runner import run

    sys.exit(run("single_image", sys.argv[1:], "python benchmarks/bench_single_image.py"))

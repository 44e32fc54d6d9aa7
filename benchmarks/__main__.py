"""Runs the program that is named: python -m benchmarks NAME [options]."""

import sys

from benchmarks.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

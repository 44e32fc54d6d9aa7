"""What a server logs, and which of it a client may read.

Cog returns the lines that a request writes to standard error with its answer, as `logs`, and sends them to
webhooks. Lines that quote a file, or name paths of the server, are for the operator alone and go past that.
"""

import logging
import sys
from typing import Final

# Shown like any other line by the command line and in a program of one's own.
operator_logger: Final = logging.getLogger("codeformer.operator")

# Python's warnings begin with the path of the module that gave them.
_OPERATOR_ONLY: Final = (operator_logger.name, "py.warnings")
_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"


def configure_server_log() -> None:
    """Logs from INFO on; what is for the operator alone goes to the process's own standard error.

    Cog puts an object of its own in the place of `sys.stderr`, which sorts lines by request.
    """
    logging.captureWarnings(capture=True)
    shared, private = logging.StreamHandler(), logging.StreamHandler(sys.__stderr__)
    shared.addFilter(lambda record: record.name not in _OPERATOR_ONLY)
    private.addFilter(lambda record: record.name in _OPERATOR_ONLY)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[shared, private])

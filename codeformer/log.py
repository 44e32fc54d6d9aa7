"""The log of a server, and which of its lines a client may read.

Cog captures the lines that a request writes to `sys.stderr`, returns them in the answer as `logs` and sends
them to webhooks. Lines that quote a file or name paths of the server are for the operator only. They are
written to a stream that Cog does not capture.
"""

import logging
import sys
from typing import Final

# In the command line and in other programs, this logger is like any other.
operator_logger: Final = logging.getLogger("codeformer.operator")

# Python's warnings contain the path of the module that issued them.
_OPERATOR_ONLY: Final = (operator_logger.name, "py.warnings")
_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"


def configure_server_log() -> None:
    """Logs level INFO and above; operator-only lines go to the original standard error of the process.

    Cog replaces `sys.stderr` by an object that assigns lines to requests.
    """
    logging.captureWarnings(capture=True)
    shared, private = logging.StreamHandler(), logging.StreamHandler(sys.__stderr__)
    shared.addFilter(lambda record: record.name not in _OPERATOR_ONLY)
    private.addFilter(lambda record: record.name in _OPERATOR_ONLY)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[shared, private])

"""`codeformer demo`: a page on this machine to try and to compare."""

import argparse
import contextlib
import os
import socket

from codeformer.cli.arguments import add_command, add_networks, load_pipeline
from codeformer.environment import RESTORERS_VARIABLE, without_version
from codeformer.errors import InputError
from codeformer.extras import check_installed
from codeformer.weights.manifest import WeightSet, load_weight_set

_HOST = "127.0.0.1"
_DEFAULT_PORT = 8080
# Somebody who waits for a result when the page is ended does not get it.
_PATIENCE_S = 2


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "demo",
        "serve a page to this machine alone, to try photos and to compare restorers",
        "codeformer demo --port 8080",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=_DEFAULT_PORT,
        help=f"port of the page; default: {_DEFAULT_PORT}; 0 for any free one",
    )
    add_networks(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    check_installed("demo", "jinja2", "starlette", "uvicorn")
    import uvicorn

    from codeformer.demo.app import Demo
    from codeformer.demo.views import Setup
    from codeformer.limits import Limits

    with _listening(options.port) as listener:
        limits = Limits.from_environment()
        weight_set = load_weight_set(options.weights)
        pipeline = load_pipeline(options, _restorers(weight_set))
        setup = Setup.of(weight_set, pipeline.device)
        demo = Demo(pipeline, setup, limits)
        demo.warm_up()
        config = uvicorn.Config(
            demo.application(),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_PATIENCE_S,
        )
        port = listener.getsockname()[1]
        print(f"The page is at http://{_HOST}:{port} (Ctrl-C ends it).", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        demo.close()
    return 0


def _restorers(weight_set: WeightSet) -> list[str] | None:
    """What CODEFORMER_RESTORERS says, if anything; else CodeFormer, and what is there of other restorers."""
    if os.environ.get(RESTORERS_VARIABLE, "").strip():
        return None
    found: dict[str, str] = {}
    for role, file in weight_set.optional.items():
        if file.path.exists():
            found.setdefault(without_version(role), role)
    return ["codeformer", *found.values()]


def _listening(port: int) -> socket.socket:
    """A socket on the loopback interface; taken before the networks are loaded, which takes longer."""
    try:
        return socket.create_server((_HOST, port))
    except (OSError, OverflowError) as cause:
        reason = os.strerror(cause.errno or 0) if isinstance(cause, OSError) else "it is no port"
        raise InputError(
            f"--port: expected a free port, got {port} ({reason}); choose another one."
        ) from cause

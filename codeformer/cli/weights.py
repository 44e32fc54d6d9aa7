"""`codeformer weights`: lists, fetches and verifies the files of weight sets."""

import argparse
import sys
from typing import Final

from codeformer.cli.arguments import add_command, is_progress_shown, set_help
from codeformer.errors import WeightsError
from codeformer.weights.manifest import OPTIONAL_ROLES, WeightFile, available_sets, load_weight_set

VERIFIED: Final = "verified"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command and its actions."""
    weights = add_command(
        commands,
        "weights",
        "list, fetch or verify the files of weight sets",
        "codeformer weights fetch official",
    )
    actions = weights.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (
        ("list", _list, "show the sets, their files, licences and state"),
        ("fetch", _fetch, "download files that are missing or wrong"),
        ("verify", _verify, "check every file's size and hash"),
    ):
        action = add_command(actions, name, text, f"codeformer weights {name} official")
        action.add_argument("set", nargs="?", metavar="SET", help=set_help())
        action.set_defaults(command=command)
        if command is _fetch:
            action.add_argument(
                "--with",
                dest="optional",
                action="append",
                choices=OPTIONAL_ROLES,
                default=[],
                help="also files that are fetched on request only; may be repeated",
            )


def state_of(role: str, file: WeightFile) -> str:
    """Whether a file is there and verified, by its hash; `VERIFIED` if so."""
    from codeformer.weights.download import is_verified

    if not file.path.exists():
        return "not fetched" if role in OPTIONAL_ROLES else "missing"
    return VERIFIED if is_verified(file) else "wrong size or hash"


def _list(options: argparse.Namespace) -> int:
    chosen = load_weight_set(options.set)
    others = [load_weight_set(name) for name in available_sets()]
    for weight_set in [chosen] + [other for other in others if other != chosen and not options.set]:
        print(f"{weight_set.name}{' (in use)' * (weight_set == chosen)}: {weight_set.description}")
        for role, file in (*weight_set.files(), *weight_set.optional.items()):
            state = state_of(role, file)
            megabytes = file.size_bytes / 1e6
            print(f"  {role:10} {file.path.name:28} {megabytes:7.1f} MB  {state:18}  {file.licence}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from codeformer.weights.download import fetch_set

    weight_set = load_weight_set(options.set)
    fetch_set(weight_set, ("codeformer", *options.optional), replace=True, progress=is_progress_shown())
    print(f"{weight_set.name}: all files are present and verified.")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from codeformer.weights.checkpoints import read_verified

    failures = 0
    weight_set = load_weight_set(options.set)
    for role, file in (*weight_set.files(), *weight_set.optional.items()):
        if role in OPTIONAL_ROLES and not file.path.exists():
            print(f"{role}: {file.path.name} not fetched (weights fetch --with {role})")
            continue
        try:
            read_verified(file)
        except WeightsError as failure:
            failures += 1
            print(f"{role}: {failure}", file=sys.stderr)
        else:
            print(f"{role}: {file.path.name} verified")
    return int(failures > 0)

"""What the environment says of the networks, checked without torch: which restorers, and the second look."""

import os
from collections.abc import Mapping, Sequence
from typing import Final

from codeformer.errors import OptionError
from codeformer.options import RESTORERS
from codeformer.weights.manifest import OPTIONAL_ROLES

DEFAULT_RESTORERS: Final = ("codeformer",)
RESTORERS_VARIABLE: Final = "CODEFORMER_RESTORERS"
SECOND_LOOK_VARIABLE: Final = "CODEFORMER_SECOND_LOOK"


def is_second_look_on(environment: Mapping[str, str] = os.environ) -> bool:
    """What CODEFORMER_SECOND_LOOK says; on by default.

    Raises:
        OptionError: neither "on" nor "off".
    """
    text = environment.get(SECOND_LOOK_VARIABLE, "").strip().lower() or "on"
    if text not in ("on", "off"):
        raise OptionError(SECOND_LOOK_VARIABLE, text, "on or off")
    return text == "on"


def restorers_to_load(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What CODEFORMER_RESTORERS says, names joined by commas; CodeFormer where it says nothing.

    Raises:
        OptionError: it says something else.
    """
    value = environment.get(RESTORERS_VARIABLE, "").strip()
    if not value:
        return DEFAULT_RESTORERS
    choices = tuple(choice.strip() for choice in value.split(","))
    check_restorers(RESTORERS_VARIABLE, choices)
    return choices


def restorers_for(recipe: Sequence[str]) -> tuple[str, ...]:
    """What to load for the restorers of a recipe, each in the version that CODEFORMER_RESTORERS names."""
    chosen = {without_version(choice): choice for choice in restorers_to_load()}
    return tuple(chosen.get(name, name) for name in recipe)


def check_restorers(option: str, choices: Sequence[str]) -> None:
    """Checks which restorers are to be loaded.

    Args:
        option: where they are named, for the message.
        choices: names of restorers, or of other versions, as in `manifest.OPTIONAL_ROLES`.

    Raises:
        OptionError: there is none, one is not known, or two are versions of one.
    """
    known = dict.fromkeys((*RESTORERS, *OPTIONAL_ROLES))
    names = [without_version(choice) for choice in choices]
    if not choices or not set(choices) <= set(known) or len(set(names)) < len(names):
        expected = f"names out of {', '.join(known)}, each restorer once"
        raise OptionError(option, ",".join(choices), expected)


def without_version(choice: str) -> str:
    """The restorer's own name, without a version."""
    return choice.partition("-")[0]

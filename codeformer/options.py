"""The options of a request: their choices, their defaults and what is refused.

Without torch, so that the command line's help does not wait for it. `engine.plan` says what they mean on a
device.
"""

from numbers import Real
from typing import Any, Final, Literal, get_args

from codeformer.errors import OptionError

RuntimeProfile = Literal["baseline", "fast", "max_speed"]
StabilityMode = Literal["safe", "optimized"]
CompileBackend = Literal["none", "eager", "aot_eager", "inductor"]

RUNTIME_PROFILES: Final[tuple[str, ...]] = get_args(RuntimeProfile)
STABILITY_MODES: Final[tuple[str, ...]] = get_args(StabilityMode)
COMPILE_BACKENDS: Final[tuple[str, ...]] = get_args(CompileBackend)

DEFAULT_FIDELITY: Final = 0.5

# Where inductor keeps what it has compiled; the name is torch's.
COMPILE_CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"


def check_fidelity(value: object) -> float:
    """Returns the fidelity as a float.

    Raises:
        OptionError: not a number from 0 to 1.
    """
    number: Any = value
    # Comparing first: NaN fails it, and a huge integer could not become a float.
    if not isinstance(value, bool) and isinstance(number, Real) and 0 <= number <= 1:  # type: ignore[operator]
        return float(number)
    raise OptionError("codeformer_fidelity", value, "a number from 0 (quality) to 1 (fidelity)")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises OptionError when a value is not one of an option's choices."""
    if value not in choices:
        raise OptionError(option, value, f"one of {', '.join(choices)}")

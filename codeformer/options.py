"""The options of a request: choices, defaults and validation.

This module does not import torch, so that the help of the command line appears at once. `engine.plan` turns
the options into a plan for a device.
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

# The folder for inductor's compiled kernels; torch defines the name.
COMPILE_CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"


def check_fidelity(value: object) -> float:
    """Returns the fidelity as a float.

    Raises:
        OptionError: it is not a number from 0 to 1.
    """
    number: Any = value
    # Compare before converting: NaN fails the comparison, and a huge integer cannot become a float.
    if not isinstance(value, bool) and isinstance(number, Real) and 0 <= number <= 1:  # type: ignore[operator]
        return float(number)
    raise OptionError("codeformer_fidelity", value, "a number from 0 (quality) to 1 (fidelity)")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises OptionError when a value is not one of an option's choices."""
    if value not in choices:
        raise OptionError(option, value, f"one of {', '.join(choices)}")

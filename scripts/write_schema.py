"""Writes the predictor's input schema to the files named on the command line.

`tests/input_schema.json` pins the interface: a test compares it with predict.py. Cog's server validates
requests with `.cog/openapi_schema.json`. `cog build` writes that file for an image; without Docker,
`make serve` and the tests write it with this script.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
PINNED_SCHEMA: Final = ROOT / "tests" / "input_schema.json"
SERVER_SCHEMA: Final = ROOT / ".cog" / "openapi_schema.json"
_BOUNDS: Final = {"minimum": "ge", "maximum": "le"}


def build_schema() -> dict[str, Any]:
    """The OpenAPI 3.0 components that Cog derives from the signature of `Predictor.run`."""
    sys.path.insert(0, str(ROOT))
    import cog  # noqa: PLC0415
    from cog._inspector import create_predictor  # noqa: PLC0415 (needs the project on the path)

    import predict  # noqa: PLC0415

    # What Cog's own parser reads in the file; when it runs, the annotation asks for strings.
    served = predict.Predictor.run.__annotations__["images"]
    predict.Predictor.run.__annotations__["images"] = list[cog.Path]
    predictor = create_predictor("predict", "Predictor")
    predict.Predictor.run.__annotations__["images"] = served
    properties: dict[str, Any] = {}
    enumerations: dict[str, Any] = {}
    for name, field in predictor.inputs.items():
        entry: dict[str, Any] = {"x-order": field.order, "description": field.description}
        if field.choices:
            enumerations[name] = {
                "title": name,
                "description": "An enumeration.",
                "enum": field.choices,
                "type": "string",
            }
            entry["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            entry |= {"title": name.replace("_", " ").title()} | field.type.json_type()
        if field.default is not None:
            entry["default"] = field.default
        for keyword, attribute in _BOUNDS.items():
            if (bound := getattr(field, attribute)) is not None:
                entry[keyword] = bound
        properties[name] = entry
    required = [name for name, field in predictor.inputs.items() if field.default is None]
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {
            "schemas": {
                "Input": {"title": "Input", "type": "object", "required": required, "properties": properties},
                "Output": predictor.output.json_type(),
                **enumerations,
            }
        },
    }


def write_schema(path: Path) -> None:
    """Writes the schema to a file and creates its folder if necessary."""
    path.parent.mkdir(exist_ok=True)
    # Written as a whole, because another server may be starting at the same time.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    partial.write_text(json.dumps(build_schema(), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_schema(Path(name))
        print(f"wrote {name}")

"""JSON schemas of the reports; a test holds every committed report against them."""

from typing import Any, Final

Schema = dict[str, Any]

_NUMBER: Final[Schema] = {"type": "number"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_TEXT: Final[Schema] = {"type": "string"}
_TIME: Final[Schema] = {"type": "number", "minimum": 0}


def _object(properties: Schema, *, optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _map_of(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _list_of(items: Schema, *, at_least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": at_least}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


SUMMARY: Final = _object(
    {
        "count": {"type": "integer", "minimum": 1},
        **dict.fromkeys(("avg", "p25", "p50", "p75", "p95", "p99", "min", "max"), _NUMBER),
    }
)
_LATENCY: Final = _object({"ms": SUMMARY, "throughput_per_s": _TIME})
_MACHINE: Final = _object(
    {
        "time": _TEXT,
        "commit": _TEXT,
        "device": _object(
            {
                "name": _TEXT,
                "type": {"enum": ["cpu", "cuda"]},
                "memory_gib": _NUMBER,
                "capability": _TEXT,
                "driver": _TEXT,
                "cuda": _TEXT,
            },
            optional=("memory_gib", "capability", "driver", "cuda"),
        ),
        "cpu": _TEXT,
        "cores": _COUNT,
        "threads": _COUNT,
        "load_average": _list_of(_TIME),
        "platform": _TEXT,
        "python": _TEXT,
        "versions": _map_of(_TEXT),
    }
)
_WEIGHTS: Final = _object({"name": _TEXT, "sha256": _map_of(_TEXT)})
_CONFIGURATION: Final = _object(
    {
        "runtime_profile": {"enum": ["baseline", "fast", "max_speed"]},
        "stability_mode": {"enum": ["safe", "optimized"]},
        "compile_backend": {"enum": ["none", "eager", "aot_eager", "inductor"]},
        "codeformer_fidelity": {"type": "number", "minimum": 0, "maximum": 1},
    }
)
_FAILURE: Final = _object({"images": _list_of(_TEXT, at_least=1), "error": _TEXT, "count": _COUNT})
_RATIOS: Final = _map_of(SUMMARY)


def _report(kind: str, properties: Schema) -> Schema:
    schema = _object(
        {"kind": {"const": kind}, "machine": _MACHINE, "weights": _or_null(_WEIGHTS), **properties}
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_REQUESTS: Final = _report(
    "requests",
    {
        "command": _TEXT,
        "server": {"enum": ["cog", "direct"]},
        "batch_size": {"type": "integer", "minimum": 1, "maximum": 4},
        "warmup": _COUNT,
        "repeats": {"type": "integer", "minimum": 1},
        "images": _list_of(_object({"name": _TEXT, "width": _COUNT, "height": _COUNT}), at_least=1),
        "setup_s": _TIME,
        "profiles": _map_of(
            _object(
                {
                    "configuration": _CONFIGURATION,
                    "failures": _list_of(_FAILURE),
                    "failed_requests": _COUNT,
                    # Absent where every request failed.
                    "round_totals": _LATENCY,
                    "per_request": _LATENCY,
                    "per_image": _LATENCY,
                    "stages_ms": _map_of(SUMMARY),
                    "faces": _COUNT,
                },
                optional=("round_totals", "per_request", "per_image", "stages_ms"),
            )
        ),
        "ratios_to_first": _RATIOS,
    },
)

_SINGLE_CASE: Final = _object(
    {
        "configuration": _CONFIGURATION,
        "errors": _list_of(_TEXT),
        # Absent where every start failed.
        "setup_s": SUMMARY,
        "cold_ms": SUMMARY,
        "warm_ms": SUMMARY,
        "stages_ms": _map_of(SUMMARY),
        "peak_memory_mib": _or_null(_TIME),
        "peak_memory_of": {"enum": ["server processes", "GPU", None]},
    },
    optional=("setup_s", "cold_ms", "warm_ms", "stages_ms"),
)
_SINGLE_IMAGE: Final = _report(
    "single_image",
    {
        "command": _TEXT,
        "server": {"enum": ["cog", "direct"]},
        "image": _object({"name": _TEXT, "width": _COUNT, "height": _COUNT}),
        "starts": {"type": "integer", "minimum": 1},
        "warmup": _COUNT,
        "repeats": {"type": "integer", "minimum": 1},
        "cases": _map_of(_SINGLE_CASE),
        "best_warm": _or_null(_TEXT),
        "best_cold": _or_null(_TEXT),
    },
)

_STAGE: Final = _object(
    {
        "ms": SUMMARY,
        "gflop": _or_null(_TIME),
        "mbytes": _or_null(_TIME),
        "limit_ms": _or_null(_TIME),
        "times_limit": _or_null(_TIME),
    }
)
_STAGES: Final = _report(
    "stages",
    {
        "command": _TEXT,
        "official_size": {"type": "boolean"},
        "warmup": _COUNT,
        "repeats": {"type": "integer", "minimum": 1},
        "ceilings": _object(
            {"gflops": _map_of(_TIME), "host_copy_gbytes_per_s": _TIME},
        ),
        "cases": _list_of(
            _object(
                {
                    "picture": _TEXT,
                    "faces": _COUNT,
                    "width": _COUNT,
                    "height": _COUNT,
                    "batch_size": _COUNT,
                    "failures": _map_of(_TEXT),
                    "configurations": _map_of(
                        _object(
                            {
                                "configuration": _CONFIGURATION,
                                "total_ms": SUMMARY,
                                "stages": _map_of(_STAGE),
                                "peak_memory_mib": _or_null(_TIME),
                            }
                        )
                    ),
                    "ratios_to_first": _RATIOS,
                }
            ),
            at_least=1,
        ),
    },
)

_SCORES: Final = _object(
    {
        "psnr_db": SUMMARY,
        "ssim": SUMMARY,
        # Absent where no picture has a face, or none is large enough for NIQE.
        "face_psnr_db": SUMMARY,
        "face_ssim": SUMMARY,
        "niqe": SUMMARY,
    },
    optional=("face_psnr_db", "face_ssim", "niqe"),
)
_QUALITY: Final = _report(
    "quality",
    {
        "command": _TEXT,
        "seed": _COUNT,
        "degradation": {"enum": ["mild", "moderate", "heavy"]},
        "official_size": {"type": "boolean"},
        "precision": {"enum": ["float32", "bfloat16", "float16", None]},
        "images": _list_of(_TEXT, at_least=1),
        "clean_niqe": _or_null(SUMMARY),
        "degraded": _SCORES,
        "restored": _list_of(
            _object(
                {
                    "configuration": _CONFIGURATION,
                    "scores": _SCORES,
                    "faces": _COUNT,
                }
            )
        ),
        "deviations": _list_of(
            _object(
                {
                    "configuration": _CONFIGURATION,
                    "against": _CONFIGURATION,
                    "max_levels": _NUMBER,
                    "mean_levels": _NUMBER,
                    "psnr_db": _NUMBER,
                    "equal_codes": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
                }
            )
        ),
    },
)

_PARTS: Final = _report(
    "parts",
    {
        "command": _TEXT,
        "warmup": _COUNT,
        "repeats": {"type": "integer", "minimum": 1},
        "parts_ms": _map_of(SUMMARY),
        "full_frame_to_region": SUMMARY,
    },
)

_NETWORKS: Final = _report(
    "networks",
    {
        "command": _TEXT,
        "warmup": _COUNT,
        "repeats": {"type": "integer", "minimum": 1},
        "networks": _list_of(
            _object(
                {
                    "network": {"enum": ["restorer", "parser", "detector"]},
                    # null where it is not the host's memory.
                    "keeps_memory": _or_null({"type": "boolean"}),
                    "forms_ms": _map_of(SUMMARY),
                    "ratios_to_first": _RATIOS,
                }
            ),
            at_least=1,
        ),
    },
)

_SOAK: Final = _report(
    "soak",
    {
        "command": _TEXT,
        "requests": _map_of({"type": "integer", "minimum": 1}),
        # What became of the cancelled ones, in Cog's words.
        "cancelled": _map_of({"type": "integer", "minimum": 1}),
        "faults": _list_of(_TEXT),
        "times_ms": _map_of(SUMMARY),
        # Number of requests served, MiB; from the first on that counts.
        "resident_mib": _list_of(
            {
                "type": "array",
                "prefixItems": [_COUNT, _TIME],
                "items": False,
                "minItems": 2,
            },
            at_least=2,
        ),
        "growth": _NUMBER,
        "most_files": _COUNT,
        "files_left": _list_of(_TEXT),
    },
)

SCHEMAS: Final[dict[str, Schema]] = {
    "soak": _SOAK,
    "networks": _NETWORKS,
    "parts": _PARTS,
    "requests": _REQUESTS,
    "single_image": _SINGLE_IMAGE,
    "stages": _STAGES,
    "quality": _QUALITY,
}

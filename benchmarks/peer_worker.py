"""One way of running one network, behind standard input and output; started with a peer's own Python.

`python -m benchmarks.peer_worker FORM FILES THREADS` loads a network from the files that `programs.peers`
wrote, and prints a line of JSON: {"version": ...}. Then each line {"save": PATH or null} runs it once, saves
the outputs to PATH as .npz if there is one, and is answered by {"ms": ...}. Whatever cannot be done is
answered by {"error": ...}, and ends the process.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from benchmarks.worker import answers

# Takes the input (1, 3, H, W) float32; gives the outputs by name.
Run = Callable[[Any], Mapping[str, Any]]
Form = Callable[[Path, int], Run]
FIDELITY: Final = 0.5
# Of CodeFormer: its picture, and what codes are chosen by.
CODEFORMER_OUTPUTS: Final = ("output", "logits")


def outputs_of(network: Any, half_dtype: Any = None) -> Run:
    """A network of ours; what the profiles run in half precision runs in it, if there is one."""
    import torch  # noqa: PLC0415

    def full(output: Any) -> Any:
        return output if half_dtype is None else output.float()

    def run(x: Any) -> Mapping[str, Any]:
        half = torch.autocast("cpu", dtype=half_dtype, enabled=half_dtype is not None)
        if not hasattr(network, "predict"):
            with half:
                answer = network(x)
            return {"output": full(answer if isinstance(answer, torch.Tensor) else answer[0])}
        logits, lq_feat, features = network.predict(x)
        with half:
            face = network.generate(logits, lq_feat, features, FIDELITY, adain=True)
        return {"output": full(face), "logits": logits}

    return run


def _torch(make: Callable[[Any, Path], Run], *, double: bool = False) -> Form:
    """A form that runs in torch, made of torch and the folder of files."""

    def form(files: Path, threads: int) -> Run:
        import torch  # noqa: PLC0415

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        run = make(torch, files)
        dtype = torch.float64 if double else torch.float32
        return lambda x: run(torch.from_numpy(x).to(dtype))

    return form


def _network(torch: Any, files: Path) -> Any:
    """Ours, in a process that is set up as a server's."""
    from codeformer.process import tune_process  # noqa: PLC0415

    tune_process(torch.device("cpu"))
    build, state = torch.load(files / "network.pt", weights_only=False)
    network = build()
    network.load_state_dict(state)
    return network.eval()


def _rewritten(torch: Any, files: Path, half_dtype: Any = None) -> Run:
    from codeformer.networks.inference import for_inference  # noqa: PLC0415

    run = outputs_of(for_inference(_network(torch, files)), half_dtype)
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def _state(files: Path) -> Any:
    return importlib.import_module("safetensors.torch").load_file(files / "network.safetensors")


def _spandrel(_: Any, files: Path) -> Run:
    importlib.import_module("spandrel_extra_arches").install()
    loaded = importlib.import_module("spandrel").ModelLoader().load_from_state_dict(_state(files))
    network = loaded.model.eval()
    if loaded.architecture.id == "CodeFormer":
        return lambda x: dict(zip(CODEFORMER_OUTPUTS, network(x, weight=FIDELITY), strict=True))
    return lambda x: {"output": network(x, return_rgb=False, randomize_noise=False)[0]}


def _gfpgan(_: Any, files: Path) -> Run:
    # It imports a module that newer versions of torchvision no longer have.
    importlib.import_module("codeformer.evaluation.basicsr_compat").import_basicsr("utils")
    network = importlib.import_module("gfpgan.archs.gfpganv1_clean_arch").GFPGANv1Clean(
        512, channel_multiplier=2, fix_decoder=False, input_is_latent=True, different_w=True, sft_half=True
    )
    network.load_state_dict(_state(files), strict=True)
    network.eval()
    return lambda x: {"output": network(x, return_rgb=False, randomize_noise=False)[0]}


def _onnxruntime(files: Path, threads: int) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(files / "network.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, {"x": x}), strict=True))


def _openvino(files: Path, threads: int, precision: str = "f32") -> Run:
    core = importlib.import_module("openvino").Core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    model = core.compile_model(files / "network.onnx", "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda x: {output.get_any_name(): value for output, value in model({"x": x}).items()}


def _export(torch: Any, files: Path) -> Run:
    """Writes network.onnx as it loads."""
    network = _network(torch, files)
    names = CODEFORMER_OUTPUTS if hasattr(network, "predict") else CODEFORMER_OUTPUTS[:1]

    class Outputs(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any) -> tuple[Any, ...]:
            return tuple(outputs_of(self.network)(x).values())

    x = torch.from_numpy(np.load(files / "input.npy"))
    torch.onnx.export(
        Outputs().eval(),
        (x,),
        files / "network.onnx",
        input_names=["x"],
        output_names=list(names),
        dynamo=True,
        external_data=False,
    )
    return outputs_of(network)


# Each with the package whose version it tells.
FORMS: Final[Mapping[str, tuple[str, Form]]] = {
    "float64": (
        "torch",
        _torch(lambda torch, files: outputs_of(_network(torch, files).double()), double=True),
    ),
    "published": ("torch", _torch(lambda torch, files: outputs_of(_network(torch, files)))),
    "rewritten": ("torch", _torch(_rewritten)),
    "rewritten bfloat16": (
        "torch",
        _torch(lambda torch, files: _rewritten(torch, files, torch.bfloat16)),
    ),
    "spandrel": ("spandrel", _torch(_spandrel)),
    "gfpgan": ("gfpgan", _torch(_gfpgan)),
    "onnxruntime": ("onnxruntime", _onnxruntime),
    "openvino": ("openvino", _openvino),
    "openvino bfloat16": ("openvino", lambda files, threads: _openvino(files, threads, "bf16")),
    "export": ("onnx", _torch(_export)),
}


def main(form: str, files: Path, threads: int, answers: IO[str]) -> None:
    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        package, load = FORMS[form]
        run = load(files, threads)
        x = np.load(files / "input.npy")
        answer(version=f"{package} {importlib.metadata.version(package)}")
        for line in sys.stdin:
            started = time.perf_counter()
            outputs = run(x)
            elapsed_ms = (time.perf_counter() - started) * 1e3
            if path := json.loads(line)["save"]:
                arrays: Any = {name: np.asarray(value) for name, value in outputs.items()}
                np.savez(path, **arrays)
            answer(ms=elapsed_ms)
    except Exception as failure:  # noqa: BLE001  (another package's code: anything)
        answer(error=f"{type(failure).__name__}: {failure}"[:2000])
        sys.exit(1)


if __name__ == "__main__":
    with answers() as own:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), own)

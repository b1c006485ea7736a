"""Serve model folders in vLLM on the CPU, one after the other, and write down what came out.

Run by the engine's own Python (see `install.sh`), never by the package's:

    serve.py REQUESTS.json OUTPUT_FOLDER

`REQUESTS.json` holds `prompts`, a list of lists of token ids; `max_tokens`; and `folders`, by a name each. What comes
of a folder is written to ``NAME.json``. The decoding is greedy and does not stop at an end token, so every answer holds
exactly `max_tokens` tokens. For a folder that vLLM cannot serve, vLLM's own reason is written as `refused`.

Two things are looked up inside the engine and written to ``NAME.safetensors``. Of each layer with quantized inputs:
what it was given in its first call and what it made of that, ``LAYER.input`` and ``LAYER.output``. Of each other
quantized layer: the weight that its kernel multiplies with, ``LAYER.weight``; the prompts are then answered once more
by the engine's plain GEMM on those weights (`readback` in the answer).
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One process: the model stays reachable, and an error keeps its own traceback and exit status.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The sampler compiles one helper even in eager mode, which takes seconds and a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    # Where AMX is on, vLLM would by default quantize the activations of int4 layers to 8 bits as well.
    "VLLM_CPU_INT4_W4A8": "0",
}

import torch

# Some virtual machines list AMX and then refuse it with an illegal instruction. Without AMX the same kernels also run
# on every machine. vLLM asks at import time and later, so this must come before it is imported.
torch.cpu._is_amx_tile_supported = lambda: False
# Fills new memory with NaN: a weight that the folder lacks then cannot pass for one that was loaded.
torch.use_deterministic_algorithms(True)


def kernel_counts(model: torch.nn.Module) -> dict[str, int]:
    """Count the kernel classes behind a model's linear layers; a layer without one counts as its scheme or method."""
    from vllm.model_executor.layers.linear import LinearBase

    def name(layer: LinearBase) -> str:
        owner = getattr(layer, "scheme", None) or layer.quant_method
        names = [type(value).__name__ for value in vars(owner).values()]
        return next((name for name in names if name.endswith("Kernel")), type(owner).__name__)

    return dict(Counter(name(module) for module in model.modules() if isinstance(module, LinearBase)))


def quantizes_inputs(layer: Any) -> bool:
    """Whether the kernel behind a linear layer quantizes what it is given."""
    return getattr(layer, "scheme", None) is not None and "W8A8" in type(layer.scheme).__name__


def record(model: torch.nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    """Keep what each layer with quantized inputs is given first, and what it makes of that; call the result to end."""
    from vllm.model_executor.layers.linear import LinearBase

    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if f"{name}.input" not in seen:
                seen[f"{name}.input"] = inputs[0].clone()
                seen[f"{name}.output"] = (output[0] if isinstance(output, tuple) else output).clone()

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, LinearBase) and quantizes_inputs(module)
    ]

    def finish() -> dict[str, torch.Tensor]:
        for handle in handles:
            handle.remove()
        return seen

    return finish


def cache_scales(model: torch.nn.Module) -> dict[str, list[float]]:
    """What keys and values are divided by on their way to the cache, by the attention's name."""
    return {
        name: [module._k_scale.item(), module._v_scale.item()]
        for name, module in model.named_modules()
        if hasattr(module, "_k_scale")
    }


@torch.no_grad()
def read_back(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read each weight that is quantized alone through its own kernel, and put the engine's plain GEMM in its place.

    An identity matrix as input leaves one product in each output, so no order of additions can hide or fake a bit.
    Returns the weights ``[N, K]`` under the engine's (fused) names, and the layers whose kernel does not multiply with
    exactly these, but with something that it keeps wider than their dtype.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    weights, wider = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase) or isinstance(layer.quant_method, UnquantizedLinearMethod):
            continue
        if quantizes_inputs(layer):
            continue
        identity = torch.eye(layer.input_size, dtype=layer.params_dtype)
        weight = layer.quant_method.apply(layer, identity).T.contiguous()
        # With every mantissa bit set, a weight that is kept wider gives many products that round to another number.
        factor = 2 - torch.finfo(layer.params_dtype).eps
        if not torch.equal(layer.quant_method.apply(layer, identity * factor).T, weight * factor):
            wider.append(name)
        weights[f"{name}.weight"] = weight
        for parameter in [*layer._parameters]:
            if parameter != "bias":
                delattr(layer, parameter)  # nothing is left to serve but what was read
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        layer.quant_method, layer.scheme = UnquantizedLinearMethod(), None
        layer.quant_method.process_weights_after_loading(layer)
    return weights, wider


def load(folder: str, max_model_len: int) -> Any:
    """The engine with `folder` in it."""
    import vllm

    return vllm.LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=max_model_len,
        generation_config="vllm",  # no sampling defaults from the folder
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,  # the default takes a large share of the machine's memory
        # Of a quantized folder, vLLM would by default serve a missing tensor as whatever memory held.
        model_loader_extra_config={"enable_weights_track": True},
        use_tqdm_on_load=False,
        distributed_executor_backend="uni",
    )


def answer(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Continue each prompt greedily: the kernels that did it, the tokens, their log-probabilities and margins."""
    import vllm

    [kernels] = llm.apply_model(kernel_counts)
    # Two log-probabilities for each new token, for its margin; of the prompt's tokens just their own.
    params = vllm.SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]

    def own(tokens: list[int], logprobs: list[dict[int, Any]]) -> list[float]:
        values = [entry[token].logprob for token, entry in zip(tokens, logprobs, strict=True)]
        if not all(map(math.isfinite, values)):
            raise ValueError("a log-probability is not finite: the folder lacks a weight, or one is broken")
        return values

    def margin(entry: dict[int, Any]) -> float:
        best, second, *_ = sorted((value.logprob for value in entry.values()), reverse=True)
        return best - second

    return {
        "kernel": kernels,
        "tokens": [list(answer.token_ids) for answer in answers],
        "token_logprobs": [own(answer.token_ids, answer.logprobs) for answer in answers],
        "token_margins": [[margin(entry) for entry in answer.logprobs] for answer in answers],
        "prompt_logprobs": [own(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs],
    }


def serve(folder: str, prompts: list[list[int]], max_tokens: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the engine answers with `folder`, and what was looked up inside it."""
    import vllm

    llm = load(folder, max(map(len, prompts)) + max_tokens)
    result: dict[str, Any] = {"engine": {"vllm": vllm.__version__, "torch": torch.__version__}}
    [result["cache_scales"]] = llm.apply_model(cache_scales)
    [finish] = llm.apply_model(record)
    result |= answer(llm, prompts, max_tokens)
    tensors = finish()
    [(weights, wider)] = llm.apply_model(read_back)
    if weights:
        result["readback"] = {"wider_than_read": wider} | answer(llm, prompts, max_tokens)
    return result, tensors | weights


def main() -> None:
    """Serve each folder of the request, and write its answer in one step."""
    from safetensors.torch import save_file
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    request, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, folder in request["folders"].items():
        try:
            result, tensors = serve(folder, request["prompts"], request["max_tokens"])
        except Exception as refusal:
            result, tensors = {"refused": f"{type(refusal).__name__}: {refusal}"}, {}
        if tensors:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors")
        partial = out / f"{name}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(result) + "\n")
        os.replace(partial, out / f"{name}.json")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()

"""What was trained, in the real engine: vLLM on the CPU, in an environment of its own (``make test-engine``).

Weights that are quantized alone. Two questions are asked apart. Does the engine hold the trained weights? Each one is
read back through the engine's own INT4 kernel, a product at a time, and must have the trained bits; the engine's plain
GEMM on what was read must answer as it does on a folder of dequantized bf16 weights, to the last digit. Does the INT4
kernel compute what the trainer computes? It may add the same products in another order than the bf16 GEMM, so here the
difference is measured, bounded and printed.

Quantized inputs. No plain GEMM computes that, so each layer is asked by itself: on the inputs that the engine gave it,
does our forward make what the engine made of them? The engine's CPU build quantizes inputs by another formula than its
CUDA build, whose arithmetic we train (``x * (1 / s)``, not ``x / s`` or ``x * (127 / amax)``), which moves one code in
some thousands by one; so the GEMM is compared on the engine's codes, and the whole forward with that difference in it.
The classic fake quant, ``F.linear`` of dequantized tensors, is printed beside both.

What the engine refuses, it must refuse with its own reason.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lockstep
from lockstep import Rule, Scheme, activations, grid
from lockstep.align.metrics import token_logprobs
from lockstep.export.checkpoint import bitwise_equal
from lockstep.grid import Quantized
from lockstep.kernels import reference, scaled_mm
from lockstep.qat import QATLinear, kv_cache, observers
from lockstep.qat.linear import compute_dtype
from lockstep.qat.prepare import quantized_modules
from lockstep.recipes.text import TextData
from lockstep.scheme import ActivationSpec

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
SERVE = Path(__file__).with_name("serve.py")
DOCS = Path(__file__).parents[2] / "docs" / "engines.md"

LAYERS, STEPS, NEW_TOKENS = 2, 80, 16
# Trained once each, with the first scheme; the other schemes quantize the same masters.
MODELS = {
    "llama": ({"tie_word_embeddings": False}, Scheme.preset("W4A16", group_size=128)),
    "qwen3": ({"tie_word_embeddings": True}, Scheme.preset("W4A16", group_size=32)),
}


class Case(NamedTuple):
    """A folder to serve."""

    model: str
    scheme: Any
    format: str | None
    kv_cache: str | None = None


def case(preset: str, format: str, model: str = "llama", **fields: Any) -> Case:
    return Case(model, Scheme.preset(preset, **fields), format)


WEIGHT_ONLY = {
    "W4A16": case("W4A16", "pack-quantized"),
    "W4A16-gptq": case("W4A16", "gptq"),
    "W4A16_ASYM": case("W4A16_ASYM", "pack-quantized"),
    "W4A16_ASYM-channel": case("W4A16_ASYM", "pack-quantized", strategy="channel"),
    "W4A16-g32": case("W4A16", "pack-quantized", "qwen3", group_size=32),
    "W4A16-channel": case("W4A16", "pack-quantized", "qwen3", strategy="channel"),
}
FP8_CACHE = WEIGHT_ONLY["W4A16"]._replace(kv_cache="fp8")
QUANTIZED_INPUTS = {
    "W8A8": case("W8A8", "int-quantized"),
    "W8A8-static": case("W8A8", "int-quantized", activations={"strategy": "tensor", "dynamic": False}),
    "FP8_DYNAMIC": case("FP8_DYNAMIC", "float-quantized"),
    "mixed": Case("llama", [Rule(["re:.*down_proj"], "W8A8"), Rule(["Linear"], "W4A16")], None),
}
REFUSED = {
    "W8A16": (case("W8A16", "pack-quantized"), "Quant type (uint8b128) not supported by CPUWNA16"),
    "W8A16-channel": (
        case("W8A16", "pack-quantized", strategy="channel"),
        "Quant type (uint8b128) not supported by CPUWNA16",
    ),
    "W8A16-gptq": (case("W8A16", "gptq"), "Marlin does not support weight_bits = uint8b128"),
    "W4A16_ASYM-gptq": (case("W4A16_ASYM", "gptq"), "Unsupported quantization config: bits=4, sym=False"),
    "W4A16-marlin": (case("W4A16", "marlin"), "Unknown quantization method: marlin"),
    "W4AFP8": (case("W4AFP8", "pack-quantized"), "No compressed-tensors compatible scheme was found"),
    "FP8": (case("FP8", "float-quantized"), "static_scaled_fp8_quant() expected at most 0 argument(s)"),
    "FP8-native": (case("FP8", "fp8"), "static_scaled_fp8_quant() expected at most 0 argument(s)"),
    "FP8_DYNAMIC-tensor": (
        case("FP8_DYNAMIC", "float-quantized", strategy="tensor"),
        "static_scaled_fp8_quant() expected at most 0 argument(s)",
    ),
    "FP8_BLOCK": (case("FP8_BLOCK", "float-quantized"), "CPUFp8BlockScaledMMKernel requires AMX tile support"),
    "FP8_BLOCK-native": (case("FP8_BLOCK", "fp8"), "CPUFp8BlockScaledMMKernel requires AMX tile support"),
    "NVFP4A16": (case("NVFP4A16", "nvfp4-pack-quantized"), "MarlinNvFp4LinearKernel is not supported"),
    "NVFP4": (case("NVFP4", "nvfp4-pack-quantized"), "no kernel"),
    "MXFP4A16": (case("MXFP4A16", "mxfp4-pack-quantized"), "no kernel"),
    "MXFP4": (case("MXFP4", "mxfp4-pack-quantized"), "no kernel"),
    "MXFP8A16": (case("MXFP8A16", "mxfp8-quantized"), "no kernel"),
    "MXFP8": (case("MXFP8", "mxfp8-quantized"), "no kernel"),
}
NO_KERNEL = "Failed to find a kernel that can implement the {} linear layer"

FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
FUSED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
# The engine runs four linear layers a block: qkv, o, gate_up, down.
ALL_INT4 = {"CPUWNA16LinearKernel": 4 * LAYERS}
ALL_BF16 = {"UnquantizedLinearMethod": 4 * LAYERS}
INT8, FP8 = "CPUInt8ScaledMMLinearKernel", "ChannelWiseTorchFP8ScaledMMLinearKernel"
KERNELS = {
    "W8A8": {INT8: 4 * LAYERS},
    "W8A8-static": {INT8: 4 * LAYERS},
    "FP8_DYNAMIC": {FP8: 4 * LAYERS},
    "mixed": {"CPUWNA16LinearKernel": 3 * LAYERS, INT8: LAYERS},
}

# Mean |log-probability difference| that another order of additions may cause. Measured on these models: up to 1.3e-4
# between the engine's two GEMMs, 1.6e-3 to 2.8e-3 between engine and trainer, which share no kernel at all. What must
# not pass: activations rounded to 8 bits give 4.3e-3 to 6.4e-3, weights that were never quantized 1.2e-2 to 2.8e-2.
GEMM_FLOOR, TRAINER_FLOOR = 5e-4, 4e-3
# Two best tokens this near are a tie, that another order may break otherwise: two spacings of bf16 logits in [4, 8).
TIE = 2 * 2**-5

Run = dict[str, Any]
Served = tuple[Run, dict[str, Tensor]]
Say = Callable[[str], None]


@pytest.fixture(scope="session")
def text() -> TextData:
    # Of much less text, no module at all might be held out for the prompts.
    data = TextData(vocab_size=1024, block_size=128, batch_size=8, max_bytes=2_000_000)
    data.setup()
    return data


@pytest.fixture(scope="session")
def prompts(text: TextData) -> list[list[int]]:
    """Held-out text, in lengths from 16 to 100 tokens."""
    blocks = next(iter(text.val_dataloader()))["input_ids"].tolist()
    return [block[: 16 + 12 * number] for number, block in enumerate(blocks)]


@pytest.fixture(scope="session")
def serve(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Served]]:
    """Serves folders one after the other in one process; returns each one's answers and what was read in the engine."""
    if not PYTHON.exists():
        pytest.fail(f"the engine's environment {PYTHON.parents[1]} is missing: run `make test-engine`.")

    def serve(folders: Mapping[str, Path]) -> dict[str, Served]:
        out = tmp_path_factory.mktemp("served")
        request = {"prompts": prompts, "max_tokens": NEW_TOKENS, "folders": {k: str(v) for k, v in folders.items()}}
        (out / "requests.json").write_text(json.dumps(request))
        # More threads than free cores make these small products many times slower.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        process = subprocess.run(
            [PYTHON, SERVE, out / "requests.json", out], env=environment, capture_output=True, text=True, timeout=600
        )
        if process.returncode:
            pytest.fail(f"serve.py ended with {process.returncode}:\n{process.stderr[-4000:]}")
        tensors = {path.stem: load_file(path) for path in out.glob("*.safetensors")}
        return {name: (json.loads((out / f"{name}.json").read_text()), tensors.get(name, {})) for name in folders}

    return serve


@pytest.fixture(scope="session")
def masters(text: TextData) -> Callable[[str], nn.Module]:
    """The model of that name in `MODELS`, after a short training with QAT; masters are fp32."""

    @cache
    def masters(name: str) -> nn.Module:
        options, scheme = MODELS[name]
        config = AutoConfig.for_model(
            name,
            vocab_size=len(text.tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=256,
            bos_token_id=text.tokenizer.bos_token_id,
            eos_token_id=text.tokenizer.eos_token_id,
            **options,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lockstep.prepare(model, scheme)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in islice(chain.from_iterable(repeat(text.train_dataloader())), STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lockstep.unprepare(model)
        return model.eval()

    return masters


@pytest.fixture(scope="session")
def trained(masters: Callable[[str], nn.Module], prompts: list[list[int]]) -> Callable[[Case], nn.Module]:
    """A case's model, prepared, with its ranges measured on the prompts where they are static."""

    def trained(one: Case) -> nn.Module:
        model = copy.deepcopy(masters(one.model))
        lockstep.prepare(model, one.scheme)
        if one.kv_cache:
            kv_cache.prepare_kv_cache(model, one.kv_cache)
        measure(model, prompts)
        return model

    return trained


@pytest.fixture(scope="session")
def export(
    trained: Callable[[Case], nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Mapping[str, Case]], dict[str, Path]]:
    """Exports cases."""

    def export(cases: Mapping[str, Case]) -> dict[str, Path]:
        out = tmp_path_factory.mktemp("export")
        return {
            name: lockstep.export.save_pretrained(trained(one), out / name, *filter(None, [one.format]))
            for name, one in cases.items()
        }

    return export


@pytest.fixture(scope="session")
def weight_only(trained, export, serve, tmp_path_factory) -> dict[str, Served]:  # type: ignore[no-untyped-def]
    """Every case of `WEIGHT_ONLY`; with ``plain-`` before its name the same model as an ordinary bf16 folder, its
    weights dequantized; ``flipped``, which is ``W4A16`` with one bit changed; and ``W4A8`` and ``fp8-cache``."""
    others = {"flipped": WEIGHT_ONLY["W4A16"], "W4A8": case("W4A8", "pack-quantized"), "fp8-cache": FP8_CACHE}
    folders = export(WEIGHT_ONLY | others)
    path = folders["flipped"] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 5] ^= 8
    save_file(tensors, path, metadata={"format": "pt"})
    for name, one in WEIGHT_ONLY.items():
        model = trained(one)
        for _, layer in quantized_modules(model):
            layer.weight.data = grid.dequantize(layer.quantize(), layer.scheme.weights)
        lockstep.unprepare(model)
        folders[f"plain-{name}"] = tmp_path_factory.mktemp("plain")
        model.to(torch.bfloat16).save_pretrained(folders[f"plain-{name}"])
    return serve(folders)


@pytest.fixture(scope="session")
def quantized_inputs(export, serve) -> dict[str, Served]:  # type: ignore[no-untyped-def]
    """Every case of `QUANTIZED_INPUTS`."""
    return serve(export(QUANTIZED_INPUTS))


@pytest.fixture(scope="session")
def refused(export, serve) -> dict[str, Served]:  # type: ignore[no-untyped-def]
    """Every case of `REFUSED`, and after them one that is served: a refusal leaves the engine in order."""
    cases = {name: one for name, (one, _) in REFUSED.items()}
    return serve(export(cases | {"served": WEIGHT_ONLY["W4A16"]}))


# Weights quantized alone -----------------------------------------------------------------------------------------

weight_only_cases = pytest.mark.parametrize("name", WEIGHT_ONLY)


@weight_only_cases
def test_engine_runs_its_int4_kernel_on_every_quantized_layer(name: str, weight_only: dict[str, Served]) -> None:
    """Else somebody measures an INT4 model that the engine has quietly widened, and the tests below compare nothing."""
    run, _ = weight_only[name]
    plain, _ = weight_only[f"plain-{name}"]
    assert run["kernel"] == ALL_INT4
    assert run["readback"]["kernel"] == plain["kernel"] == ALL_BF16


@weight_only_cases
def test_trained_bits_are_served_bits(
    name: str, weight_only: dict[str, Served], trained: Callable[[Case], nn.Module]
) -> None:
    """Else the model that answers is not the one whose loss was watched."""
    run, weights = weight_only[name]
    assert differing(trained(WEIGHT_ONLY[name]), weights) == []
    assert run["readback"]["wider_than_read"] == []


@weight_only_cases
def test_weights_read_back_answer_as_dequantized_weights(name: str, weight_only: dict[str, Served]) -> None:
    """Else something beside the quantized weights is served otherwise: a norm, an embedding, a fused order."""
    run, _ = weight_only[name]
    plain, _ = weight_only[f"plain-{name}"]
    assert answers(run["readback"]) == answers(plain)


@weight_only_cases
def test_int4_kernel_answers_as_dequantized_weights(name: str, weight_only: dict[str, Served], say: Say) -> None:
    """Else serving in INT4 costs more than the rounding that was trained for."""
    run, _ = weight_only[name]
    plain, _ = weight_only[f"plain-{name}"]
    if answers(run) == answers(plain):
        say("INT4 and bf16 GEMM: identical tokens and log-probabilities, to the last digit")
        return
    gaps = differences(run["prompt_logprobs"], plain["prompt_logprobs"])
    forks = list(first_forks(run, plain))
    say(
        f"INT4 and bf16 GEMM: another order of additions; {gaps.count(0) / len(gaps):.0%} of the prompt "
        f"log-probabilities are identical, |difference| {describe(gaps)}; {len(forks)} answers part at a tie"
    )
    assert mean(gaps) < GEMM_FLOOR
    assert all(margin <= TIE for margin in forks), forks


@weight_only_cases
def test_engine_stays_near_the_trainer(
    name: str,
    weight_only: dict[str, Served],
    trained: Callable[[Case], nn.Module],
    prompts: list[list[int]],
    say: Say,
) -> None:
    """Else a policy is trained on other log-probabilities than it is sampled with. What is left are the kernels."""
    run, _ = weight_only[name]
    model = trained(WEIGHT_ONLY[name])
    gaps = differences(run["prompt_logprobs"], trainer_logprobs(in_bfloat16(model), prompts))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = differences(run["prompt_logprobs"], trainer_logprobs(model, prompts))
    say(
        "kernel floor, |log-probability difference| of engine and trainer: "
        f"{describe(gaps)} with the trainer in bf16; {describe(autocast)} under autocast, as it trained"
    )
    assert mean(gaps) < TRAINER_FLOOR


def test_one_flipped_code_is_seen(weight_only: dict[str, Served], trained: Callable[[Case], nn.Module]) -> None:
    """Else the tests above would pass on anything."""
    run, weights = weight_only["flipped"]
    assert differing(trained(WEIGHT_ONLY["W4A16"]), weights) == ["model.layers.1.mlp.up_proj"]
    assert answers(run["readback"]) != answers(weight_only["plain-W4A16"][0])


def test_w4a8_is_served_with_inputs_as_they_are(weight_only: dict[str, Served]) -> None:
    """The engine's CPU build quantizes the inputs of INT4 layers on CPUs with AMX alone: docs/engines.md says so."""
    run, _ = weight_only["W4A8"]
    assert run["kernel"] == ALL_INT4
    assert answers(run) == answers(weight_only["W4A16"][0])


def test_fp8_cache_is_served_with_its_scales(
    weight_only: dict[str, Served], trained: Callable[[Case], nn.Module], say: Say
) -> None:
    """Else keys and values are quantized by scales of 1, or not at all.

    Its CPU build cuts codes off where the GPU's kernel, which we train, rounds them: no log-probability says more.
    """
    run, _ = weight_only["fp8-cache"]
    scales = {
        f"{name}.attn": [module.k_scale.item(), module.v_scale.item()]
        for name, module in trained(FP8_CACHE).named_modules()
        if "kv_cache" in vars(module)
    }
    assert run["cache_scales"] == scales
    gaps = differences(run["prompt_logprobs"], weight_only["W4A16"][0]["prompt_logprobs"])
    say(f"|log-probability difference| of the engine with and without an fp8 cache: {describe(gaps)}")
    assert 2e-3 < mean(gaps) < 5e-2


# Quantized inputs ------------------------------------------------------------------------------------------------

quantized_input_cases = pytest.mark.parametrize("name", QUANTIZED_INPUTS)


@quantized_input_cases
def test_engine_quantizes_the_inputs(name: str, quantized_inputs: dict[str, Served]) -> None:
    """Else the engine serves these layers in another precision, and the tests below compare nothing."""
    run, tensors = quantized_inputs[name]
    assert run["kernel"] == KERNELS[name]
    layers = sum(count for kernel, count in KERNELS[name].items() if kernel in (INT8, FP8))
    assert sum(key.endswith(".input") for key in tensors) == layers


@quantized_input_cases
def test_layers_compute_what_the_engine_computes(
    name: str, quantized_inputs: dict[str, Served], trained: Callable[[Case], nn.Module], say: Say
) -> None:
    """Else a layer trains on other outputs than it is served with, as it does with the classic fake quant."""
    _, tensors = quantized_inputs[name]
    shares = {"ours on the engine's codes": [], "ours": [], "classic fake quant": []}
    for layer, x, served in layers_in_engine(trained(QUANTIZED_INPUTS[name]), tensors):
        codes = codes_of_the_cpu_engine(x, layer.scheme.activations, layer.stored_scale())
        own = reference.linear(x, layer.quantize(), layer.scheme, None, layer.stored_scale())
        on_codes = scaled_mm.linear(codes, layer.quantize(), layer.scheme, None, x.dtype)
        for share, y in zip(shares.values(), (on_codes, own, classic_forward(layer, x)), strict=True):
            share.append((y == served).double().mean().item())
    say("bit-equal outputs, least of all layers: " + ", ".join(f"{what} {min(s):.2%}" for what, s in shares.items()))
    on_codes, own, classic = shares.values()
    assert min(on_codes) > 0.999
    assert min(own) > 0.9
    assert max(classic) < 0.9


@quantized_input_cases
def test_engine_stays_near_the_kernel_order_forward(
    name: str,
    quantized_inputs: dict[str, Served],
    trained: Callable[[Case], nn.Module],
    prompts: list[list[int]],
    say: Say,
) -> None:
    """Else a policy is trained on other log-probabilities than it is sampled with."""
    run, _ = quantized_inputs[name]
    model = in_bfloat16(trained(QUANTIZED_INPUTS[name]))
    gaps = differences(run["prompt_logprobs"], trainer_logprobs(model, prompts))
    for _, layer in quantized_modules(model):
        layer.forward = lambda x, layer=layer: classic_forward(layer, x)
    classic = differences(run["prompt_logprobs"], trainer_logprobs(model, prompts))
    unquantized = copy.deepcopy(model)
    lockstep.unprepare(unquantized)
    for module in unquantized.modules():
        vars(module).pop("forward", None)
    plain = differences(run["prompt_logprobs"], trainer_logprobs(in_bfloat16(unquantized), prompts))
    say(
        "|log-probability difference| of engine and trainer: "
        f"{describe(gaps)}; with the classic fake quant {describe(classic)}; not quantized {describe(plain)}"
    )
    assert mean(gaps) < TRAINER_FLOOR


# What it cannot serve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_serve_it_refuses(name: str, refused: dict[str, Served]) -> None:
    """With its own reason, which docs/engines.md quotes; a folder that it serves after all belongs in another list."""
    run, _ = refused[name]
    reason = NO_KERNEL.format(name.removesuffix("A16")) if REFUSED[name][1] == "no kernel" else REFUSED[name][1]
    assert reason in run.get("refused", "it was served")
    assert reason in DOCS.read_text()


def test_a_refusal_leaves_the_engine_in_order(refused: dict[str, Served]) -> None:
    """Else the refusals above are one refusal."""
    assert refused["served"][0]["kernel"] == ALL_INT4


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a line past pytest's capture, after the name of the case."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name.partition('[')[2].rstrip(']') or request.node.name}: {line}")

    return say


def in_fused_rows(model: nn.Module) -> Iterator[tuple[str, QATLinear, str, slice]]:
    """Each quantized layer with the name of the engine's layer that holds it, and its rows in there."""
    rows = Counter[str]()
    for name, layer in quantized_modules(model):
        parent, _, leaf = name.rpartition(".")
        fused = f"{parent}.{FUSED.get(leaf, leaf)}"
        start, rows[fused] = rows[fused], rows[fused] + layer.out_features
        yield name, layer, fused, slice(start, rows[fused])


def differing(model: nn.Module, served: Mapping[str, Tensor]) -> list[str]:
    """The layers of `model` whose trained weight has another bit than the rows that the engine holds of it."""
    names, rows = [], Counter[str]()
    for name, layer, fused, part in in_fused_rows(model):
        rows[f"{fused}.weight"] = part.stop
        trained = grid.dequantize(layer.quantize(), layer.scheme.weights)
        if not bitwise_equal(served[f"{fused}.weight"][part], trained):
            names.append(name)
    assert rows == {name: len(weight) for name, weight in served.items()}
    return names


def layers_in_engine(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[QATLinear, Tensor, Tensor]]:
    """Each layer with quantized inputs, what the engine gave it, and what the engine made of that."""
    for _, layer, fused, part in in_fused_rows(model):
        if layer.scheme.activations is not None:
            yield layer, tensors[f"{fused}.input"], tensors[f"{fused}.output"][:, part]


def codes_of_the_cpu_engine(x: Tensor, spec: ActivationSpec, stored: Tensor | None) -> Quantized:
    """What vLLM's CPU build makes of an input: ``csrc/cpu/dnnl_kernels.cpp`` and ``QuantFP8.forward_native``."""
    amax = x.float().abs().amax(-1, keepdim=True)
    if spec.format == "int8":
        scale = amax / 127 if stored is None else stored
        return Quantized((x.float() * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale)
    scale = (amax / 448).clamp(min=1 / (448 * 512))
    return Quantized((x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale)


def classic_forward(layer: QATLinear, x: Tensor) -> Tensor:
    """Fake quant as it usually is: ``F.linear`` of dequantized tensors."""
    x = x.to(compute_dtype(x))
    if layer.scheme.activations is not None:
        codes = activations.quantize(x, layer.scheme.activations, layer.stored_scale())
        x = activations.dequantize(codes, x.dtype)
    return F.linear(x, grid.dequantize(layer.quantize(), layer.scheme.weights))


def measure(model: nn.Module, prompts: Sequence[list[int]]) -> None:
    """Give everything with a stored scale the range that it has on `prompts`."""
    measuring = [*kv_cache.observe(model), *(observers.observe(model) if observers.storing_layers(model) else [])]
    if not measuring:
        return
    with torch.autocast("cpu", torch.bfloat16):
        trainer_logprobs(model, prompts)
    kv_cache.freeze(model)
    if observers.storing_layers(model):
        observers.freeze(model)


def answers(run: Run) -> Run:
    """What two runs of the same numbers have in common."""
    return {key: run[key] for key in ("tokens", "token_logprobs", "token_margins", "prompt_logprobs")}


def differences(run: list[list[float]], other: list[list[float]]) -> list[float]:
    pairs = zip(chain.from_iterable(run), chain.from_iterable(other), strict=True)
    return [abs(one - two) for one, two in pairs]


def describe(gaps: list[float]) -> str:
    return f"mean {mean(gaps):.1e}, max {max(gaps):.1e}"


def first_forks(run: Run, other: Run) -> Iterator[float]:
    """Of each pair of answers that part: by how much the next token was the best one where they do."""
    for own, others, margins in zip(run["tokens"], other["tokens"], other["token_margins"], strict=True):
        yield from islice((margin for one, two, margin in zip(own, others, margins, strict=True) if one != two), 1)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The same model computing in bf16 throughout, as an engine does; quantized layers keep their masters."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, QATLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


@torch.no_grad()
def trainer_logprobs(model: nn.Module, prompts: Sequence[list[int]]) -> list[list[float]]:
    """Log-probabilities of each prompt's tokens but the first, by the trainer's own forward."""
    return [
        token_logprobs(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:]).tolist()
        for tokens in map(torch.tensor, prompts)
    ]

"""A frozen INT4 base and its adapter, in the real engine: vLLM on the CPU with ``enable_lora``.

The folder of the base is the exported one, untouched; the adapter is what peft saved. Two questions, as for weights
alone. Does the engine compute the adapter's branch as the trainer does? Each layer's output in the engine is made again
by `FrozenLora`'s arithmetic from what the engine gave the layer and what its base made of it. Does the whole model
answer as the trainer does? The base's INT4 kernel adds in another order, so that difference is measured and bounded.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import tiny_llama
from peft import LoraConfig
from safetensors.torch import load_file

import lockstep
from lockstep.align.metrics import token_logprobs
from lockstep.export import adapter
from lockstep.qat import lora

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
PROMPTS = [list(range(1, 33)), [7 * n % 500 for n in range(1, 25)]]
# Mean |log-probability difference|: measured 1.0e-3 to 2.9e-3 with such weights; without the adapter 0.06 to 0.6.
FLOOR = 4e-3
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

SERVE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import serve  # sets what vLLM reads when it is imported
import torch, vllm
from safetensors.torch import save_file
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest

out, prompts = Path(sys.argv[2]), json.loads(sys.argv[3])
llm = vllm.LLM(
    model=str(out / "base"), dtype="bfloat16", skip_tokenizer_init=True, seed=0, max_model_len=64,
    generation_config="vllm", enable_prefix_caching=False, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
    distributed_executor_backend="uni", use_tqdm_on_load=False, enable_lora=True, max_loras=1, max_lora_rank=8,
    model_loader_extra_config={"enable_weights_track": True},
)
seen = {}

def record(model):
    for name, layer in model.named_modules():
        if isinstance(layer, BaseLinearLayerWithLoRA):
            def keep(x, bias=None, *, layer=layer, name=name, apply=layer.apply):
                y = apply(x, bias)
                if f"{name}.x" not in seen:
                    base = layer._get_quant_method().apply(layer.base_layer, x, bias)
                    seen.update({f"{name}.x": x.clone(), f"{name}.base": base.clone(), f"{name}.y": y.clone()})
                return y
            layer.apply = keep

def ask(request):
    # Of the prompts' own tokens this vLLM computes no log-probabilities with an adapter on the CPU.
    params = vllm.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params, lora_request=request, use_tqdm=False)
    answers = [one.outputs[0] for one in outputs]
    return [
        (list(one.token_ids), [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs)])
        for one in answers
    ]

[kernels] = llm.apply_model(serve.kernel_counts)
llm.apply_model(record)
adapted = ask(LoRARequest("trained", 1, str(out / "adapter")))
save_file({key: value.contiguous() for key, value in seen.items()}, out / "seen.safetensors")
(out / "answer.json").write_text(json.dumps({"kernels": kernels, "adapted": adapted, "base": ask(None)}))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The trainer's model, what the engine answered, and what its layers were given and made of it."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is not there: make test-engine installs it.")
    out = tmp_path_factory.mktemp("lora")
    model = tiny_llama(attention_bias=True)
    lockstep.prepare(model, "W4A16")
    lockstep.export.save_pretrained(model, out / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=20, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")
    trained = lora.get_peft_model(adapter.load_frozen(out / "base"), config, "frozen-grid")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    trained.save_pretrained(out / "adapter")
    folder = str(Path(__file__).parent)
    process = subprocess.run(
        [PYTHON, "-c", SERVE, folder, str(out), json.dumps(PROMPTS)],
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if process.returncode:
        pytest.fail(f"the engine ended with {process.returncode}:\n{process.stderr[-4000:]}")
    return trained.eval(), json.loads((out / "answer.json").read_text()), load_file(out / "seen.safetensors")


def test_the_base_is_served_packed(served):
    """By the engine's INT4 kernel, within its LoRA layers."""
    _, answer, _ = served
    assert answer["kernels"] == {"CPUWNA16LinearKernel": 8}


@torch.no_grad()
def test_the_branch_of_each_adapter_is_the_engines(served):
    """On the engine's inputs and base outputs, bit for bit but where the order of a sum of bf16 products moves it."""
    trained, _, seen = served
    layers = dict(trained.get_base_model().named_modules())
    shares = []
    for key in (key for key in seen if key.endswith(".y")):
        name = key.removesuffix(".y")
        parent, _, leaf = name.rpartition(".")
        x, base, y = (seen[f"{name}.{what}"] for what in ("x", "base", "y"))
        parts = [layers[f"{parent}.{part}"] for part in FUSED.get(leaf, (leaf,))]
        own, branches, classic = list(base.split([layer.out_features for layer in parts], -1)), [], []
        for layer in parts:
            branches.append(layer.add_branch(own.pop(0), x))
            a, b = (one.default.weight.to(x.dtype) for one in (layer.lora_A, layer.lora_B))
            classic.append(F.linear(F.linear(x, a), b) * layer.scaling["default"])
        ours = torch.cat(branches, -1)
        shares.append((name, (ours == y).float().mean().item(), (base + torch.cat(classic, -1) == y).float().mean()))
        assert (base != y).any()
    assert len(shares) == 8
    for name, share, peft_share in shares:
        print(f"{name}: {share:.2%} of the outputs bit-equal, in peft's own order {peft_share:.2%}")
        assert share > 0.99
        assert share > peft_share


@torch.no_grad()
def test_the_engine_answers_as_the_trainer_does(served):
    """With the adapter; without it the answer is another one."""
    trained, answer, _ = served

    def gap(prompt, tokens, logprobs):
        rows = torch.tensor([prompt + tokens])
        ours = token_logprobs(trained(input_ids=rows).logits[0, :-1], rows[0, 1:])[len(prompt) - 1 :]
        return (torch.tensor(logprobs) - ours).abs().mean().item()

    for prompt, adapted, base in zip(PROMPTS, answer["adapted"], answer["base"], strict=True):
        print(f"mean |log-probability difference| {gap(prompt, *adapted):.2e}, of the base {gap(prompt, *base):.2e}")
        assert gap(prompt, *adapted) < FLOOR
        assert gap(prompt, *base) > 10 * gap(prompt, *adapted)

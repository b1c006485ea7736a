"""Models small enough to build in every test, what goes into them, and ways to damage what was exported of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lockstep
from lockstep import Scheme

HIDDEN, VOCAB = 256, 512


def tiny_llama(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A Llama with every kind of layer that a large one has, in eval mode, made as ``from_pretrained`` makes one.

    Not ``LlamaForCausalLM(config).to(dtype)``: that rounds the rotary frequencies, which engines keep in fp32.
    """
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes | config), dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would survive any rounding
                nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
    return model.eval()


_EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "num_experts": 4},
    "deepseek_v3": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "gpt_oss": {"num_local_experts": 4, "max_position_embeddings": 131072},
    "llama4_text": {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    # Attention and experts: its layers of state space need none of what is tested here.
    "nemotron_h": {
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 96,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_moe(kind: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any) -> Any:
    """A mixture of 4 experts in each of 2 layers, of the transformers model type `kind`, in eval mode.

    ``nemotron_h``'s second layer has the experts, and so has ``deepseek_v3``'s; its first is dense.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **sizes | _EXPERTS[kind] | config), dtype=dtype
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
            elif "experts." in name or "router" in name or "gate.weight" in name:
                nn.init.normal_(parameter, std=0.1)  # outputs and router weights that tell experts apart
    return model.eval()


class TinyMlp(nn.Module):
    """No transformers model: two layers with a bias, a norm that stays as it is, and buffers of every sort."""

    def __init__(self, width: int = 128, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(width, 2 * width)
            self.norm = nn.LayerNorm(2 * width)
            self.second = nn.Linear(2 * width, width)
            self.to(dtype)
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
            self.register_buffer("temperature", torch.rand(3))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def prepared(model: nn.Module, scheme: str | Scheme = "W4A16", **selection: Any) -> Any:
    """`model` itself, prepared."""
    lockstep.prepare(model, scheme, **selection)
    return model


def token_ids(batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Random tokens ``[batch, length]``."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def channel(**fields: Any) -> Scheme:
    """W4A16 with one scale for each output."""
    return Scheme.preset("W4A16", strategy="channel", **fields)


def grouped(group_size: int = 128, **fields: Any) -> Scheme:
    """W4A16 in groups."""
    return Scheme.preset("W4A16", group_size=group_size, **fields)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` change the object that a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_quantization(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` change the ``quantization_config`` of an export."""
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` change the tensors of an export in one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

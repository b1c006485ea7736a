"""The model card of an export: a ``README.md`` that says what stands in the folder, with the front matter that the hub
reads (https://huggingface.co/docs/hub/model-cards).

Every export writes one. It is read from the folder itself; what an exporter cannot know is marked for the user to fill
in. The last line of a card is a checksum of the rest: a card that somebody has edited is theirs and is not replaced.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.export import compressed_tensors, formats
from lockstep.export.checkpoint import Checkpoint
from lockstep.export.directory import CARD, ExportError, is_sealed, sealed
from lockstep.export.masters import Stored, stored_tensors
from lockstep.export.parallel import without_numbers
from lockstep.scheme import Scheme, dtype_name

MIB = 2**20
# Who loads a format from a folder, as docs/formats.md has it; what a scheme takes from that is in `engines`.
ENGINES = {
    "pack-quantized": ("vLLM", "SGLang", "transformers"),
    "int-quantized": ("vLLM", "SGLang", "transformers"),
    "float-quantized": ("vLLM", "SGLang", "transformers"),
    "nvfp4-pack-quantized": ("vLLM", "transformers"),
    "mxfp4-pack-quantized": ("vLLM", "transformers"),
    "mxfp8-quantized": ("vLLM", "transformers"),
    "gptq": ("vLLM", "SGLang", "transformers"),
    "marlin": (),
    "fp8": ("vLLM", "SGLang", "transformers"),
}
_TEMPLATE = Path(__file__).with_name("card.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)


class Sizes(NamedTuple):
    """What a checkpoint's tensors take: bytes, but for `weights`, how many weights are quantized."""

    weights: int
    codes: int
    scales: int
    plain: int

    @property
    def bits_per_weight(self) -> float:
        """Of a quantized weight, with its share of the scales, zero points and shapes."""
        return 8 * (self.codes + self.scales) / self.weights

    @property
    def before(self) -> int:
        """The quantized layers in 16 bits."""
        return 2 * self.weights

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.plain


def write(
    directory: str | Path,
    *,
    name: str | None = None,
    base_model: str = "",
    trained: str = "",
    reasons: Mapping[str, str] | None = None,
    evaluation: Mapping[str, float] | None = None,
    dataset: str = "",
) -> Path:
    """Write the card of the export in `directory`, in the place of an earlier one that nobody has edited.

    Args:
        directory: an export, see `lockstep.export.save_pretrained`.
        name: what the folder is called in the card; default: the directory's own name.
        base_model: the model's name on the hub, such as ``"Qwen/Qwen3-0.6B"``; anything else is left out.
        trained: sentences on how it was trained.
        reasons: for modules that are not quantized, by name, why.
        evaluation: what was measured, by the names of the hub's metrics, such as ``{"perplexity": 7.46}``.
        dataset: what it was measured on, in words.

    Raises:
        ExportError: the README.md there was written or edited by somebody.
        CheckpointError, ValueError: this is no export that can be read; `evaluation` without its `dataset`.
    """
    path = Path(directory) / CARD
    if path.exists() and not is_sealed(path):
        raise ExportError(f"{path} is no card of an export, or was edited since: it is yours. Move it away first.")
    if evaluation and not dataset:
        raise ValueError("evaluation says what was measured; dataset must say on what.")
    checkpoint, stored = Checkpoint(directory), stored_tensors(Path(directory))
    called = " ".join((name or Path(directory).absolute().name).split())
    base = base_model if _HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else ""
    found = sizes(checkpoint, stored)
    served = dtype_name(checkpoint.scheme_of(checkpoint.layers[0]).weights.served_dtype)
    metrics = ", ".join(f"{metric} {value:.6g}" for metric, value in (evaluation or {}).items())
    text = _TEMPLATE.read_text(encoding="utf-8").format(
        front=_front_matter(checkpoint, called, base, evaluation or {}, dataset),
        title=called,
        summary=_summary(checkpoint, base),
        quantized="\n".join(_quantized(checkpoint)),
        left="\n".join(_left(checkpoint, stored, reasons or {})) or "| nothing | | | |",
        served=served,
        before=found.before / MIB,
        codes=found.codes / MIB,
        scales=found.scales / MIB,
        quantized_size=(found.codes + found.scales) / MIB,
        plain=found.plain / MIB,
        after=found.total / MIB,
        bits=found.bits_per_weight,
        share=found.total / (found.before + found.plain),
        serving=_serving(checkpoint, called),
        trained=trained or "_How the weights were trained was not told to the exporter: method, steps, learning rate._",
        count=len(checkpoint.layers),
        config=json.dumps(_shortened(checkpoint.config["quantization_config"]), indent=2),
        evaluation=f"{metrics}, on {dataset}." if metrics else "_what was measured, on what, beside the base model._",
    )
    path.write_text(sealed(text), encoding="utf-8")
    return path


def sizes(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> Sizes:
    """What the tensors of `checkpoint` take, by their headers `stored`."""
    weights = codes = 0
    for name in checkpoint.layers:
        spec = checkpoint.scheme_of(name).weights
        size = stored[f"{name}.{formats.codes_of(checkpoint.format_of(name), spec)}"].bytes
        codes += size
        weights += size * 8 // spec.bits
    plain = sum(stored[name].bytes for name in checkpoint.plain_tensors())
    return Sizes(weights, codes, sum(one.bytes for one in stored.values()) - codes - plain, plain)


def engines(format: str, scheme: Scheme) -> tuple[str, ...]:
    """Who loads layers of `scheme` that are stored as `format` from a folder, see docs/formats.md."""
    inputs, weights = scheme.activations, scheme.weights
    if format == "gptq" and not weights.symmetric:
        return ("transformers",)
    if format == "fp8" and weights.strategy == "tensor":  # transformers drops their scales
        return ("vLLM", "SGLang")
    if format == "pack-quantized" and inputs is not None:
        return ("vLLM", "transformers")
    return ENGINES[format]


def _front_matter(checkpoint: Checkpoint, name: str, base: str, evaluation: Mapping[str, float], dataset: str) -> str:
    """YAML, whose values are written as JSON, which YAML includes."""
    architectures = checkpoint.config.get("architectures") or [""]
    schemes = [checkpoint.scheme_of(name) for name in checkpoint.layers]
    method = checkpoint.config["quantization_config"]["quant_method"]
    bits = [f"{bits}-bit" for bits in dict.fromkeys(scheme.weights.bits for scheme in schemes)]
    loaded_by = [engine.lower() for engine in _engines(checkpoint) if engine != "transformers"]
    entries: dict[str, Any] = {}
    if base:
        entries |= {"base_model": base, "base_model_relation": "quantized"}
    if "model_type" in checkpoint.config:
        entries["library_name"] = "transformers"
    if architectures[0].endswith("ForCausalLM"):
        entries["pipeline_tag"] = "text-generation"
    entries["tags"] = list(dict.fromkeys(["lockstep", "quantized", method, *bits, *loaded_by]))
    if evaluation:
        task = {"type": entries.get("pipeline_tag", "other")}
        metrics = [{"type": metric, "value": value} for metric, value in evaluation.items()]
        result = {"task": task, "dataset": {"name": dataset, "type": "other"}, "metrics": metrics}
        entries["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join([*lines, "# license: yours to say; that of the base model holds for this one too"])


def _summary(checkpoint: Checkpoint, base: str) -> str:
    counts: dict[Scheme, int] = {}
    for name in checkpoint.layers:
        counts[checkpoint.scheme_of(name)] = counts.get(checkpoint.scheme_of(name), 0) + 1
    schemes = "; ".join(f"{in_words(scheme)} ({count} layers)" for scheme, count in counts.items())
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    cache = f" Keys and values are cached as {checkpoint.kv_cache}." if checkpoint.kv_cache else ""
    return f"A quantized checkpoint{of}, written by Lockstep: {schemes}.{cache}"


def in_words(scheme: Scheme) -> str:
    """A scheme as somebody would say it who does not know our names."""
    weights, inputs = scheme.weights, scheme.activations
    kinds = {"int4": "INT4", "int8": "INT8", "fp8_e4m3": "FP8 (E4M3)", "fp4_e2m1": "FP4 (E2M1)"}
    per = {
        "group": f"a scale for each {weights.group_size} weights",
        "channel": "a scale for each output channel",
        "tensor": "one scale for the tensor",
        "block": "a scale for each block of 128 x 128",
    }[weights.strategy]
    zeros = "" if weights.symmetric else " and a zero point"
    served = dtype_name(weights.served_dtype)
    said = f"{kinds[weights.format]} weights with {per}{zeros}"
    if inputs is None:
        return f"{said}, inputs in {served}"
    how = "with scales computed as they come" if inputs.dynamic else "with scales measured beforehand"
    return f"{said}, inputs in {kinds.get(inputs.format, inputs.format)} {how}"


def _quantized(checkpoint: Checkpoint) -> Iterable[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for name in checkpoint.layers:
        key = (without_numbers(name), str(checkpoint.scheme_of(name)), checkpoint.format_of(name))
        counts[key] = counts.get(key, 0) + 1
    for (pattern, scheme, format), count in counts.items():
        yield f"| `{pattern}` | {count} | {scheme} | `{format}` |"


def _left(checkpoint: Checkpoint, stored: Mapping[str, Stored], reasons: Mapping[str, str]) -> Iterable[str]:
    """A row for all tensors that are stored as they are for one reason and are called alike."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in checkpoint.plain_tensors():
        one, module = stored[name], name.rpartition(".")[0]
        matrix = len(one.shape) > 1
        embedding = "embed" in module or module.endswith("wte")
        unknown = "looked up, not multiplied with" if embedding else "named in ignore, or by no target"
        why = reasons.get(module, unknown) if matrix else "norms, biases, scales of the cache: small"
        found.setdefault((without_numbers(name) if matrix else "vectors", why), []).append(one.bytes)
    for (pattern, why), each in found.items():
        called = f"`{pattern}`" if pattern != "vectors" else pattern
        yield f"| {called} | {len(each)} | {sum(each) / MIB:,.1f} | {why.replace('|', '/')} |"


def _engines(checkpoint: Checkpoint) -> list[str]:
    """Who loads every layer of `checkpoint`."""
    pairs = dict.fromkeys((checkpoint.format_of(name), checkpoint.scheme_of(name)) for name in checkpoint.layers)
    loads = [engines(*pair) for pair in pairs]
    return [engine for engine in ("vLLM", "SGLang", "transformers") if all(engine in one for one in loads)]


def _serving(checkpoint: Checkpoint, name: str) -> str:
    if "model_type" not in checkpoint.config:
        return "This is no transformers model: `lockstep.export.Checkpoint` reads its layers."
    loaded_by = _engines(checkpoint)
    if not loaded_by:
        return f"No engine loads `{checkpoint.format}` from a folder: export in another format to serve it."
    folder = shlex.quote(f"./{name}")
    schemes = [checkpoint.scheme_of(layer) for layer in checkpoint.layers]
    inputs = {(one.weights.format, one.activations.format) for one in schemes if one.activations is not None}
    fp8 = any(of_inputs == "fp8_e4m3" for _, of_inputs in inputs)
    cache = " --kv-cache-dtype fp8" if checkpoint.kv_cache else ""
    parts = []
    if "vLLM" in loaded_by:
        parts.append(f"vLLM:\n\n```bash\nvllm serve {folder}{cache}{' --enforce-eager' * fp8}\n```\n\n")
        if fp8:
            parts.append(
                "Without `--enforce-eager` vLLM generates a quantizer of its own for the inputs, whose last bits "
                "differ from those that were trained.\n\n"
            )
        if ("int4", "int8") in inputs:
            parts.append(
                "vLLM 0.22 computes INT4 with INT8 inputs otherwise than it was trained: with FP8 inputs on Hopper, "
                "with inputs as they are on CPUs. Later versions do as trained with `--linear-backend humming`.\n\n"
            )
    if "SGLang" in loaded_by:
        option = cache.replace("fp8", "fp8_e4m3")
        parts.append(f"SGLang:\n\n```bash\npython -m sglang.launch_server --model-path {folder}{option}\n```\n\n")
    if "transformers" in loaded_by:
        quoted = json.dumps(f"./{name}", ensure_ascii=False)
        method = checkpoint.config["quantization_config"]["quant_method"]
        needs = {compressed_tensors.METHOD: "`compressed-tensors`", "gptq": "`optimum` and `gptqmodel`"}.get(method, "")
        exact = (
            ""
            if all(one.activations is None for one in schemes)
            else (" It quantizes the inputs in an arithmetic of its own, which is no engine's.")
        )
        parts.append(
            f"transformers{f', with {needs} installed' if needs else ''}:{exact}\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n```\n\n"
        )
    if missing := [engine for engine in ("vLLM", "SGLang", "transformers") if engine not in loaded_by]:
        parts.append(f"Not loaded by: {', '.join(missing)}. ")
    return (
        "".join(parts)
        + 'What each engine computes on which GPU is in Lockstep\'s documentation, "Engines and hardware".'
    )


def _shortened(value: Any) -> Any:
    """A config without the long lists of layers that mixed schemes have."""
    if isinstance(value, Mapping):
        return {key: _shortened(entry) for key, entry in value.items()}
    if isinstance(value, list) and len(value) > 8:
        return [*value[:4], f"... and {len(value) - 4} more"]
    return value

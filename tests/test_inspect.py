"""What is said of a folder, and whether a model can be cut over GPUs before it is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_json, edit_quantization, edit_tensors, prepared, tiny_llama, token_ids
from safetensors.torch import load_file
from transformers import DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.cli import main
from lockstep.export import save_pretrained
from lockstep.export.parallel import NAMES, PLAN, Weight, how_cut, shards
from lockstep.inspect import inspect

LLAMA = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 2}
G128 = Scheme.of("W4A16")


def described(folder: Path, config: Any) -> Path:
    """A folder with a config alone, as before training."""
    config.save_pretrained(folder)
    return folder


def exported(folder: Path, scheme: Any = "W4A16", format: str | None = None, **selection: Any) -> Path:
    model = prepared(tiny_llama(), scheme, **selection)
    if any(
        row.scheme.activations and row.scheme.activations.stores_scale
        for row in lockstep.prepare(model, scheme, **selection).quantized
    ):
        lockstep.calibrate(model, {"input_ids": token_ids()}, progress=False)
    save_pretrained(model, folder, format)
    (folder / "tokenizer.json").write_text("{}")
    return folder


# Cut over GPUs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
@pytest.mark.parametrize("k", [512, 1408, 5632, 11008])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16", Scheme.preset("W4A16", strategy="channel")], ids=str)
def test_a_row_parallel_shard_fits_where_its_scales_are_those_of_the_whole(scheme, k, tp):
    """The oracle is the grid: a shard has groups of its own only if its scales are a slice of the whole weight's."""
    scheme = Scheme.of(scheme)
    spec = scheme.weights
    weight = torch.randn(64, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, amax = grid.quantize(weight, spec), grid.largest(weight)
    per_row = spec.strategy == "channel"  # each GPU keeps the scale of the whole row
    fits = k % tp == 0
    for shard, codes in zip(weight.chunk(tp, 1), whole.codes.chunk(tp, 1), strict=True) if fits and not per_row else ():
        try:
            mine = grid.quantize(shard, spec, amax)
        except ValueError:
            fits = False
            break
        assert torch.equal(mine.codes.float(), codes.float())
    format = "nvfp4-pack-quantized" if scheme == Scheme.of("NVFP4A16") else "pack-quantized"
    (found,) = shards({"model.layers.0.mlp.down_proj": Weight(64, k, scheme, format)}, tp)
    assert (found.cut, found.k) == ("row", k // tp)
    cut_by_the_group = "do not divide" in found.problem
    assert cut_by_the_group != fits
    if not found.problem:
        assert found.k % 32 == 0


def test_what_would_fit_is_named_and_does_fit():
    weight = Weight(2048, 5632, G128, "pack-quantized")
    (found,) = shards({"mlp.down_proj": weight}, tp=8)
    assert found.problem == (
        "mlp.down_proj (2048 x 5632, tp=8, ep=1), int4 g128 amax/7 bfloat16: 704 inputs on each of 8 GPUs do not "
        "divide into groups of 128: group_size=32 or group_size=64 or strategy='channel' or tp=4 would fit."
    )
    for other in (Scheme.preset("W4A16", group_size=64), Scheme.preset("W4A16", strategy="channel")):
        assert not shards({"mlp.down_proj": weight._replace(scheme=other)}, tp=8)[0].problem
    assert not shards({"mlp.down_proj": weight}, tp=4)[0].problem


def test_blocks_are_cut_whole_in_both_directions():
    blocks = Scheme.of("FP8_BLOCK")
    weights = {
        "mlp.gate_proj": Weight(5632, 2048, blocks, "float-quantized"),
        "mlp.up_proj": Weight(5632, 2048, blocks, "float-quantized"),
        "mlp.down_proj": Weight(2048, 5632, blocks, "float-quantized"),
    }
    assert not any(one.problem for one in shards(weights, tp=4))
    problems = [one.problem for one in shards(weights, tp=8)]
    assert [re.findall("704 (inputs|outputs)", one) for one in problems] == [["outputs"], ["outputs"], ["inputs"]]
    assert all("tp=4" in one for one in problems)


def test_keys_and_values_are_repeated_where_there_are_fewer_heads_than_gpus():
    weights = {
        f"attn.{one}_proj": Weight(n, 2048, G128, "pack-quantized")
        for one, n in zip("qkv", (2048, 256, 256), strict=True)
    }
    q, k, v = shards(weights, tp=8, kv_heads=4)
    assert (q.n, k.n, v.n) == (256, 64, 64)  # 4 heads of 64 over 8 GPUs: one head each, twice
    assert not any(one.problem or one.warning for one in (q, k, v))


def test_shapes_that_marlin_does_not_take_are_a_warning():
    """vLLM fills such a shard up; SGLang and older ones refuse it."""
    (found,) = shards({"mlp.down_proj": Weight(96, 512, G128, "pack-quantized")}, tp=2)
    assert not found.problem
    assert "Marlin needs N % 64 == 0" in found.warning


def test_experts_are_cut_or_dealt_out():
    def down(count: int) -> dict[str, Weight]:
        return {f"mlp.experts.{one}.down_proj": Weight(2048, 768, G128, "pack-quantized") for one in range(count)}

    cut = shards(down(2), tp=4)
    assert "192 inputs on each of 4 GPUs do not divide into groups of 128" in cut[0].problem
    assert cut[0].problem.endswith("or ep=2 would fit.")
    assert not any(one.problem for one in shards(down(2), tp=4, ep=2))
    assert [one.problem for one in shards(down(6), tp=4, ep=4) if one.problem] == [
        "mlp.experts: 6 experts do not divide over ep=4."
    ]
    with pytest.raises(ValueError, match="tp=4, ep=3"):
        shards(down(2), tp=4, ep=3)


def test_who_says_how_a_layer_is_cut():
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise", "model.layers.*.odd": "rowwise"}
    assert how_cut("model.layers.3.mlp.experts.5.up_proj", plan) == ("column", PLAN)
    assert how_cut("model.layers.3.odd", plan) == ("row", PLAN)
    assert how_cut("model.layers.3.self_attn.o_proj", plan) == ("row", NAMES)
    assert how_cut("model.layers.3.strange", plan)[0] is None
    (found,) = shards({"model.layers.3.strange": Weight(128, 128, G128, "pack-quantized")}, 2, plan=plan)
    assert "neither the model's tp_plan nor its name" in found.problem


def remedies(problem: str) -> list[tuple[str, int | str]]:
    """What a problem proposes: ``("group_size", 64)``, ``("tp", 4)``."""
    found = re.findall(r"(group_size|strategy|tp|ep)=('?\w+'?) ?(?=or|would|$)", problem.rpartition(": ")[2])
    return [(name, int(value) if value.isdigit() else value.strip("'")) for name, value in found]


@pytest.mark.parametrize("tp", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("format", ["pack-quantized", "gptq"])
@pytest.mark.parametrize("n", [48, 96, 256, 512, 544])
@pytest.mark.parametrize("k", [256, 512, 1408, 2816])
def test_every_proposal_is_legal(n, k, format, tp):
    """Each is tried: the layers that run as one cut so, in the same format."""
    layers = {f"attn.{one}_proj": Weight(n, k, G128, format) for one in "qkv"}
    layers["mlp.down_proj"] = Weight(k, n * 8, G128, format)
    for one in shards(layers, tp, heads=8):
        siblings = layers if one.name.startswith("attn.") else {"mlp.down_proj": layers["mlp.down_proj"]}
        siblings = {name: layer for name, layer in siblings.items() if name.rpartition(".")[0] in one.name}
        for name, value in remedies(one.problem) if one.n else ():
            how: dict[str, Any] = {"group_size": None, "strategy": value} if name == "strategy" else {name: value}
            scheme = G128 if name == "tp" else Scheme.preset("W4A16", **how)
            changed = {name: layer._replace(scheme=scheme) for name, layer in siblings.items()}
            degree = int(value) if name == "tp" else tp
            assert not [other.problem for other in shards(changed, degree, heads=8 * (name == "tp")) if other.problem]


def test_layers_that_run_as_one_are_one_message(tmp_path):
    """Of q, k and v each GPU has the sum, and that is what a kernel is given."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=16
    )
    found = inspect(described(tmp_path / "model", config), Scheme.preset("W4A16", group_size=32), tp=4)
    said = [one for one in found.problems if "layers.0.self_attn.q_proj" in one]
    assert len(said) == 1
    assert not [one for one in found.problems if "layers.0.self_attn.k_proj (" in one]
    assert "q_proj, k_proj and v_proj as one, tp=4, ep=1, int4 g32" in said[0]
    assert "each GPU gets 16 + 16 + 16 = 48 rows: N=48, K=256" in said[0]
    assert remedies(said[0]) == [("tp", 2)]
    assert str(found).count("16 + 16 + 16 = 48 rows") == 1


def test_heads_that_do_not_divide_are_said(tmp_path):
    """Each GPU gets whole heads, even where the rows of the weights would divide."""
    config = LlamaConfig(**{**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 8192})
    folder = described(tmp_path / "model", config)
    (problem,) = inspect(folder, Scheme.preset("W4A16", group_size=32), tp=16).problems
    assert problem == (
        "8 attention heads and 2 of keys and values do not divide over tp=16: tp=1 or 2 or 4 or 8 would fit."
    )
    for tp in (1, 2, 4, 8):
        assert not inspect(folder, Scheme.preset("W4A16", group_size=32), tp=tp).problems


# Masters -------------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_found_before_training(tmp_path, capsys):
    """The command line's answer, with exit code 1; with a degree or a group size that fits it is 0."""
    folder = str(described(tmp_path / "model", LlamaConfig(intermediate_size=5632, **LLAMA)))
    assert main(["inspect", folder, "--scheme", "W4A16", "--tp", "8"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "model.layers.0.mlp.down_proj (2048 x 5632, tp=8, ep=1)" in printed
    assert "group_size=64" in printed
    assert "of the parameters would stay as they are" in printed
    assert main(["inspect", folder, "--scheme", "W4A16", "--tp", "4"]) == 0
    assert main(["inspect", folder, "--scheme", "{weights: {group_size: 64}}", "--tp", "8"]) == 0


def test_mixtures_and_latent_attention(tmp_path):
    """transformers' plan has words for the experts, engines' names for DeepSeek's attention."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 2048}
    mixture = described(
        tmp_path / "qwen", Qwen3MoeConfig(num_experts=4, num_attention_heads=32, num_key_value_heads=4, **sizes)
    )
    assert len([one for one in inspect(mixture, "W4A16", tp=4).problems if "down_proj" in one]) == 4
    assert not inspect(mixture, "W4A16", tp=4, ep=4).problems
    latent = described(
        tmp_path / "deepseek",
        DeepseekV3Config(n_routed_experts=4, first_k_dense_replace=1, num_attention_heads=32, **sizes),
    )
    found = {
        one.name.rpartition(".")[2]: (one.cut, one.source)
        for one in inspect(latent, "W4A16", ignore=["lm_head", "re:.*kv_a_proj.*"], tp=2).shards
    }
    assert found["q_b_proj"] == ("column", NAMES)
    assert found["q_a_proj"] == ("whole", NAMES)
    assert found["down_proj"] == ("row", PLAN)


def test_masters_without_a_scheme_show_their_sizes(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.sizes == {"bfloat16": sum(one.nbytes for one in load_file(tmp_path / "model.safetensors").values())}
    assert [one for one in found.warnings if "no tokenizer" in one]
    with pytest.raises(ValueError, match="depends on the scheme"):
        inspect(tmp_path, tp=2)


# Quantized folders ---------------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[Any, str | None]] = {
    "W4A16": ("W4A16", None),
    "gptq": ("W4A16", "gptq"),
    "marlin": ("W8A16", "marlin"),
    "fp8": ("FP8_BLOCK", "fp8"),
    "nvfp4": ("NVFP4", None),
    "mxfp8": ("MXFP8", None),
    "mixed": ([Rule(["re:.*down_proj"], "W8A8"), Rule(["Linear"], "W4A16")], None),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("ours", [True, False])
def test_schemes_shapes_and_sizes_of_any_format(kind, ours, tmp_path):
    """With our entry in the config, and as another tool would have written it."""
    scheme, format = FOLDERS[kind]
    folder = exported(tmp_path / "out", scheme, format)
    if not ours:
        edit_quantization(folder, lambda config: config.pop("lockstep"))
    tp = 1 if kind == "fp8" else 2  # 64 keys on each GPU are no whole block
    found = inspect(folder, tp=tp)
    assert found.problems == found.warnings == ()
    assert bool(inspect(folder, tp=2).problems) == (kind == "fp8")
    assert sum(len(names) for names in found.schemes.values()) == 14
    assert len(found.schemes) == (2 if kind == "mixed" else 1)
    files = load_file(folder / "model.safetensors")
    assert sum(found.sizes.values()) == sum(one.nbytes for one in files.values())
    bits = {"W4A16": 4, "gptq": 4, "nvfp4": 4}.get(kind, 8)
    weights = sum(module.weight.numel() for name, module in tiny_llama().named_modules() if name.endswith("_proj"))
    if kind != "mixed":
        assert found.sizes["codes"] == weights * bits // 8
    shapes = {one.name.rpartition(".")[2]: (one.n, one.k) for one in found.shards}
    cut = [shapes[f"{name}_proj"] for name in ("down", "gate", "k")]
    assert cut == [(256, 512 // tp), (512 // tp, 256), (128 // tp, 256)]
    assert ("not written by Lockstep" in found.kind) != ours
    printed = dict(re.findall(r"(\w+)_proj  x2 +│ (outputs|inputs) ", str(found)))
    assert printed == {"q": "outputs", "k": "outputs", "v": "outputs", "o": "inputs"} | {
        "gate": "outputs",
        "up": "outputs",
        "down": "inputs",
    }


def test_a_folder_of_compressed_tensors_own_tools(tmp_path):
    """Quantized and compressed by compressed-tensors itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model: Any = tiny_llama()
    preset = preset_name_to_scheme("W4A16", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": preset}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(-1, (-1, 128))
            module.weight_scale.data.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), preset.weights)[0])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    found = inspect(tmp_path, tp=2)
    ((format, scheme),) = found.schemes
    assert (format, scheme) == ("pack-quantized", "int4 g128 amax/7.5 bfloat16")
    assert len(found.shards) == 14
    assert not found.problems


def test_a_method_that_nobody_here_reads_shows_its_sizes(tmp_path):
    folder = exported(tmp_path / "out")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "hqq"}))
    found = inspect(folder)
    assert "quant_method hqq, which this version does not read" in found.kind
    assert set(found.sizes) == {"bfloat16", "int32", "int64"}
    assert main(["inspect", str(folder)]) == 0


def odd_folder(change: str, folder: Path) -> Path:
    exported(folder)
    name = "model.layers.0.self_attn.k_proj"
    match change:
        case "a sibling that is not quantized":

            def plain(tensors: dict[str, torch.Tensor]) -> None:
                for leaf in ("weight_packed", "weight_scale", "weight_shape"):
                    tensors.pop(f"{name}.{leaf}")
                tensors[f"{name}.weight"] = torch.zeros(128, 256).bfloat16()

            edit_tensors(folder, plain)
        case "ignored though it is quantized":
            edit_quantization(folder, lambda config: config["ignore"].append(name))
        case "ignore that matches nothing":
            edit_quantization(folder, lambda config: config["ignore"].append("re:.*vision.*"))
        case "ignore that is part of other names":
            edit_quantization(folder, lambda config: config["ignore"].append("layers.1"))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "a wrong total":
            files = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
            index = {
                "metadata": {"total_size": 5},
                "weight_map": dict.fromkeys(files, "model-00001-of-00001.safetensors"),
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "a sibling that is not quantized",
            r"engines run these as one layer, .* k_proj not quantized|k_proj not quantized",
        ),
        ("ignored though it is quantized", r"'model.layers.0.self_attn.k_proj', but .* is stored quantized"),
        ("ignore that matches nothing", r"'re:.\*vision.\*', which matches no linear layer"),
        (
            "ignore that is part of other names",
            r"'layers.1', which is no layer's name but part .* model.layers.1\S+ and 6 more: .* not quantized",
        ),
        ("no tokenizer", "has no tokenizer"),
        ("a wrong total", r"index.json says 5 bytes, the files hold [\d,]+"),
    ],
)
def test_what_is_odd_about_a_folder_is_said(change, message, tmp_path):
    found = inspect(odd_folder(change, tmp_path / "out"))
    said = [*found.problems, *found.warnings]
    assert len(said) == 1
    assert re.search(message, said[0])
    assert bool(found.problems) == (change == "a sibling that is not quantized")


def test_a_quantized_head_and_a_truncated_file(tmp_path):
    folder = exported(tmp_path / "out", ignore=())
    assert [one for one in inspect(folder).warnings if one.startswith("lm_head is quantized")]
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert re.search("truncated", inspect(folder).problems[0])
    assert main(["inspect", str(folder)]) == 1


def corrupt(change: str, declared: dict[str, Any]) -> None:
    match change:
        case "no groups":
            declared["config_groups"] = []
        case "another strategy":
            declared["config_groups"]["group_0"]["weights"]["strategy"] = "zzz"
        case "no format":
            declared.pop("format")
        case "ignore that is no name":
            declared["ignore"].append(7)
        case "ignore that is no regex":
            declared["ignore"].append("re:(")
        case "ignore that is no list":
            declared["ignore"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no groups", "config_groups has 0 groups"),
        ("another strategy", "strategy='zzz'"),
        ("no format", "format=None"),
        ("ignore that is no name", "ignore holds 7, which is no name"),
        ("ignore that is no regex", r"ignore holds 're:\(', which is no regex: missing \)"),
        ("ignore that is no list", "ignore"),
    ],
)
def test_a_corrupt_config_of_ours_is_a_problem(change, message, tmp_path, capsys):
    folder = exported(tmp_path / "out")
    edit_quantization(folder, lambda declared: corrupt(change, declared))
    (problem,) = inspect(folder).problems
    assert re.search(rf"out/config.json, quantization_config: .*{message}", problem)
    assert main(["inspect", str(folder)]) == 1


def test_a_config_that_declares_no_object(tmp_path, capsys):
    folder = exported(tmp_path / "out")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config="x"))
    assert main(["inspect", str(folder)]) == 2
    assert "config.json: quantization_config is 'x', and no JSON object" in capsys.readouterr().err


def test_problems_come_first_and_kernels_that_do_not_run_are_counted(tmp_path):
    folder = exported(tmp_path / "out", ignore=())
    (folder / "tokenizer.json").unlink()
    found = inspect(folder)
    before = str(found).partition("┏")[0]
    assert len(found.warnings) == 2
    assert before.count("warning: ") == 2
    names = {name for _, name, _, here in found.kernels if here == "yes"}
    table = str(found).partition("Kernels that run here")[2]
    assert names
    assert all(name in table for name in names)
    others = [name for _, name, _, here in found.kernels if here != "yes"]
    assert not [name for name in others if re.search(rf"│ {re.escape(name)} +│", table)]
    if others:
        assert f"do not run here: {len(others)};" in table


def test_what_is_no_folder_of_a_model(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is quantized already"):
        inspect(exported(tmp_path / "out"), "W4A16")

"""The model card of an export: what the hub reads of it, what it says, and whose it is once somebody has edited it."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from models import TinyMlp, tiny_llama
from safetensors.torch import load_file

import lockstep
from lockstep import Scheme
from lockstep.export import Checkpoint, ExportError, card, save_pretrained
from lockstep.export.convert import convert
from lockstep.export.directory import is_sealed, sealed

DOCS = Path(lockstep.__file__).parents[1] / "docs"


def exported(out: Path, scheme="W4A16", format=None, base="some-org/some-model", **options) -> str:
    model = tiny_llama()
    model.name_or_path = base
    lockstep.prepare(model, scheme)
    save_pretrained(model, out, format, **options)
    return (out / "README.md").read_text()


def test_the_hub_reads_the_front_matter(tmp_path):
    """huggingface_hub's own parsers, offline."""
    exported(tmp_path / "out")
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "base_model": "some-org/some-model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lockstep", "quantized", "compressed-tensors", "4-bit", "vllm", "sglang"],
    }
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    assert loaded.data.license is None  # the user's to say
    assert loaded.text.lstrip().startswith("# out\n")
    assert str(loaded).count("\n---\n") == 1


def test_it_says_what_is_quantized_what_is_not_and_what_it_takes(tmp_path):
    text = exported(tmp_path / "out", trained="1,500 steps of QAT at 1e-5.")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    plain = sum(one.nbytes for name, one in tensors.items() if "proj" not in name)
    total = sum(one.nbytes for one in tensors.values())
    weights = sum(one.weight.numel() for name, one in tiny_llama().named_modules() if name.endswith("_proj"))
    assert "| `model.layers.*.mlp.up_proj` | 2 | int4 g128 amax/7 bfloat16 | `pack-quantized` |" in text
    assert "| `lm_head.weight` | 1 | 0.2 | named in ignore, or by no target |" in text
    assert "INT4 weights with a scale for each 128 weights, inputs in bfloat16 (14 layers)" in text
    assert f"| this checkpoint | {total / 2**20:,.1f} |" in text
    assert f"{8 * (total - plain) / weights:.2f} bits for each quantized weight" in text
    assert f"the whole is {total / (2 * weights + plain):.0%} of the same model" in text
    assert "1,500 steps of QAT at 1e-5." in text
    assert "Every one of the 14 quantized layers was read back" in text
    (config,) = re.findall(r"```json\n(.*?)```", text, re.S)
    assert json.loads(config) == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_sizes_are_those_of_the_layers(tmp_path):
    exported(tmp_path / "out", "W8A8")
    checkpoint = Checkpoint(tmp_path / "out")
    found = card.sizes(checkpoint, card.stored_tensors(tmp_path / "out"))
    codes = [checkpoint.layer(name) for name in checkpoint.layers]
    assert found.weights == found.codes == sum(one.codes.numel() for one in codes)
    assert found.scales == sum(4 * one.scale.numel() for one in codes)
    assert found.total == sum(one.nbytes for one in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("scheme", "format", "served_by"),
    [
        ("W4A16", None, ("vLLM", "SGLang", "transformers")),
        ("W4A16", "gptq", ("vLLM", "SGLang", "transformers")),
        ("W4A16_ASYM", "gptq", ("transformers",)),
        ("W4A16", "marlin", ()),
        ("W8A8", None, ("vLLM", "SGLang", "transformers")),
        ("FP8_DYNAMIC", None, ("vLLM", "SGLang", "transformers")),
        ("NVFP4A16", None, ("vLLM", "transformers")),
        ("MXFP8A16", None, ("vLLM", "transformers")),
        ("W4A8", None, ("vLLM", "transformers")),
    ],
)
def test_commands_are_those_of_engines_that_load_it(tmp_path, scheme, format, served_by):
    text = exported(tmp_path / "out", scheme, format)
    commands = {
        "vLLM": "vllm serve ./out",
        "SGLang": "python -m sglang.launch_server --model-path ./out\n",
        "transformers": 'AutoModelForCausalLM.from_pretrained("./out", dtype="auto")',
    }
    assert tuple(name for name, command in commands.items() if command in text) == served_by
    assert ("No engine loads" in text) == (not served_by)
    assert ("--enforce-eager" in text) == (scheme == "FP8_DYNAMIC")
    assert ("--linear-backend humming" in text) == (scheme == "W4A8")
    assert set(metadata_load(tmp_path / "out" / "README.md")["tags"]) & {"vllm", "sglang"} == {
        name.lower() for name in served_by if name != "transformers"
    }


def test_a_model_of_several_schemes_is_served_by_those_that_load_all(tmp_path):
    rules = [lockstep.Rule(["re:.*mlp.*_proj"], "NVFP4A16"), lockstep.Rule(["Linear"], "W4A16")]
    text = exported(tmp_path / "out", rules)
    assert "Not loaded by: SGLang." in text
    assert "FP4 (E2M1) weights with a scale for each 16 weights" in text
    assert "INT4 weights with a scale for each 128 weights" in text


def test_who_loads_what_is_what_the_docs_say():
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ([^|]+) \|$", (DOCS / "formats.md").read_text(), re.M)
    loaded_by = {name: tuple(one for one in ("vLLM", "SGLang", "transformers") if one in who) for name, who in rows}
    said = {name: loaded_by[name] for name in lockstep.export.formats.FORMATS}
    assert said == card.ENGINES


@pytest.mark.parametrize(
    "name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8A16", "W4AFP8"]
)
def test_every_scheme_has_words(name):
    said = card.in_words(Scheme.of(name))
    assert " weights with " in said
    assert ("inputs in bfloat16" in said) == (Scheme.of(name).activations is None)


# Whose it is ---------------------------------------------------------------------------------------------------------


def test_an_export_replaces_its_own_card(tmp_path):
    before = exported(tmp_path / "out")
    after = exported(tmp_path / "out", "W8A8", overwrite=True)
    assert before != after
    assert "int8 channel" in after
    assert is_sealed(tmp_path / "out" / "README.md")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# Mine\n",
        lambda text: text.replace("# license: yours to say", "license: mit #"),
        lambda text: text.replace("_what it was trained on", "Twelve books"),
        lambda text: text + "More.\n",
        lambda text: text.rsplit("\n<!--", 1)[0],
        lambda text: "",
    ],
    ids=["another", "license", "data", "appended", "without its last line", "empty"],
)
def test_a_card_that_somebody_wrote_or_edited_is_never_replaced(tmp_path, edit):
    text = exported(tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    path.write_text(edit(text))
    before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    with pytest.raises(ExportError, match=r"holds a README.md that no export wrote, or that was edited since"):
        exported(tmp_path / "out", "W8A8", overwrite=True)
    with pytest.raises(ExportError, match="it is yours"):
        card.write(tmp_path / "out")
    assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == before


def test_a_folder_called_readme_is_refused(tmp_path):
    exported(tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "README.md").mkdir()
    with pytest.raises(ExportError, match=r"README.md"):
        exported(tmp_path / "out", overwrite=True)


def test_a_seal_is_of_the_text_before_it(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(sealed("one ä\n"), encoding="utf-8")
    assert is_sealed(path)
    path.write_text(sealed("one\n").replace("one", "two"))
    assert not is_sealed(path)
    path.write_bytes(b"\xff" + sealed("one\n").encode())
    assert not is_sealed(path)
    assert not is_sealed(tmp_path / "none")


@pytest.mark.parametrize("name", ["INT4 g128 QAD", "it's", "$(touch x); `y`", '"quoted"', "日本", "two\nlines"])
def test_commands_take_the_name_of_the_folder_as_it_is(tmp_path, name):
    exported(tmp_path / "out")
    text = card.write(tmp_path / "out", name=name).read_text(encoding="utf-8")
    folder = "./" + " ".join(name.split())
    (command,) = re.findall(r"^vllm serve .*", text, re.MULTILINE)
    assert shlex.split(command) == ["vllm", "serve", folder]
    (argument,) = re.findall(r"AutoTokenizer\.from_pretrained\((.*)\)", text)
    assert ast.literal_eval(argument) == folder
    assert f"\n# {folder[2:]}\n" in text


# What it is told -----------------------------------------------------------------------------------------------------


def test_a_folder_on_this_machine_is_no_base_model(tmp_path, monkeypatch):
    (tmp_path / "runs" / "masters").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("runs/masters", str(tmp_path / "runs" / "gone"), ""):
        exported(tmp_path / "out", base=base, overwrite=True)
        assert "base_model" not in metadata_load(tmp_path / "out" / "README.md")


def test_an_evaluation_becomes_a_model_index(tmp_path):
    exported(tmp_path / "out")
    with pytest.raises(ValueError, match="dataset must say on what"):
        card.write(tmp_path / "out", evaluation={"perplexity": 7.4572})
    card.write(tmp_path / "out", evaluation={"perplexity": 7.4572}, dataset='held-out "packages"')
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "perplexity",
        7.4572,
        'held-out "packages"',
    )
    assert loaded.data.model_name == "out"
    assert 'perplexity 7.4572, on held-out "packages".' in loaded.text


def test_a_conversion_tells_why_layers_are_left_and_where_the_masters_come_from(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "masters")
    (tmp_path / "masters" / "trainer_state.json").write_text(json.dumps({"global_step": 1234}))
    (tmp_path / "masters" / "README.md").write_text("---\nlicense: mit\n---\nOf the masters.")
    done = convert(
        tmp_path / "masters", tmp_path / "out", ignore=["lm_head", "re:.*k_proj", "re:.*[qv]_proj"], workers=1
    )
    text = (tmp_path / "out" / "README.md").read_text()
    (reason,) = {row.reason for row in done.report.skipped if row.name.endswith("k_proj")}
    assert f"| `model.layers.*.self_attn.k_proj.weight` | 2 | 0.1 | {reason} |" in text
    assert "The masters are those of step 1234 of a Hugging Face Trainer." in text
    assert "Of the masters" not in text
    assert is_sealed(tmp_path / "out" / "README.md")


def test_a_state_that_cannot_be_read_is_an_error_before_the_work(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "masters")
    (tmp_path / "masters" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state.json"):
        convert(tmp_path / "masters", tmp_path / "out", workers=1)
    assert [one.name for one in tmp_path.iterdir()] == ["masters"]


def test_a_module_that_is_no_transformers_model_has_a_card_too(tmp_path):
    model = TinyMlp()
    lockstep.prepare(model, "W8A16")
    save_pretrained(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "This is no transformers model" in text
    assert "vllm serve" not in text
    assert "library_name" not in metadata_load(tmp_path / "out" / "README.md")

"""`prepare`: what it switches, what it refuses, and that it leaves everything else as it was."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lockstep
from lockstep import Rule, Scheme
from lockstep.qat import QATLinear
from lockstep.scheme import PRESETS


class Block(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.down_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.q_proj(self.norm(x)))


class Tiny(nn.Module):
    """A language model in outline: an embedding, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 128)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(128, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


PROJECTIONS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "down_proj")]


def trains_quantized(model: nn.Module) -> list[str]:
    """Names of the switched modules, by their class and not by any report."""
    return [name for name, module in model.named_modules() if type(module) is QATLinear]


def classes(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


# What it switches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, PROJECTIONS),
        ({"targets": "Linear", "ignore": ()}, [*PROJECTIONS, "lm_head"]),
        ({"targets": ["layers.1.q_proj"]}, ["layers.1.q_proj"]),
        ({"targets": r"re:.*q_proj$"}, ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"targets": ["re:.*q_proj", "layers.0.down_proj"]}, [name for name in PROJECTIONS if name != PROJECTIONS[3]]),
        ({"ignore": ["lm_head", "re:.*down_proj", "layers.0.q_proj"]}, ["layers.1.q_proj"]),
        ({"ignore": ["lm_head", "re:layers\\.0"]}, PROJECTIONS[2:]),
    ],
    ids=["default", "head", "name", "regex", "both", "ignored", "ignored-block"],
)
def test_targets_and_ignore_mean_what_they_mean_in_compressed_tensors(selection, expected):
    model = Tiny()
    report = lockstep.prepare(model, "W4A16", **selection)
    assert trains_quantized(model) == expected
    assert [row.name for row in report.quantized] == expected


def test_the_model_stays_the_one_that_others_hold_references_to():
    """Optimizers, checkpoints, FSDP and hooks know parameters and modules by identity and by name."""
    model, calls = Tiny(), []
    layer = model.layers[0].q_proj
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    lockstep.prepare(model, "W4A16")

    assert model.layers[0].q_proj is layer
    assert isinstance(layer, nn.Linear)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert calls == ["forward", "backward"]
    assert not torch.equal(layer.weight, state["layers.0.q_proj.weight"])
    Tiny().load_state_dict(model.state_dict())


def test_report_accounts_for_every_parameter():
    """What was left in full precision, and why, is never a surprise at serving time."""
    model = Tiny()
    report = lockstep.prepare(model, "W4A16", ignore=["lm_head", "layers.1.down_proj"])
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {row.name for row in report.rows} == owners
    assert sum(row.parameters for row in report.rows) == sum(parameter.numel() for parameter in model.parameters())
    assert {row.name: row.scheme for row in report.quantized} == dict.fromkeys(PROJECTIONS[:3], Scheme())
    assert {row.name: (row.kind, row.reason) for row in report.skipped} == {
        "embed": ("Embedding", "not a target (Linear)"),
        "layers.0.norm": ("LayerNorm", "not a target (Linear)"),
        "layers.1.norm": ("LayerNorm", "not a target (Linear)"),
        "layers.1.down_proj": ("Linear", "ignored by 'layers.1.down_proj'"),
        "lm_head": ("Linear", "ignored by 'lm_head'"),
    }
    quantized = 2 * (128 * 128 + 128) + 128 * 128
    assert report.quantized_share == quantized / sum(parameter.numel() for parameter in model.parameters())


def test_printed_report_folds_layers_that_are_alike():
    """Fifty blocks fit on a screen."""
    table = str(lockstep.prepare(Tiny(), "W4A16", ignore=["lm_head", "layers.1.down_proj"]))
    lines = [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in table.splitlines()]
    assert lines[0].startswith("3 modules train quantized, ")
    assert "module type parameters trains as why not quantized" in lines
    assert "layers.*.q_proj x2 Linear 33,024 int4 g128 amax/7 bfloat16" in lines
    assert "layers.0.down_proj Linear 16,384 int4 g128 amax/7 bfloat16" in lines
    assert "layers.*.norm x2 LayerNorm 512 - not a target (Linear)" in lines
    assert "lm_head Linear 2,048 - ignored by 'lm_head'" in lines


def test_preparing_twice_changes_nothing():
    """A callback and a script may both call it."""
    model = Tiny()
    first = lockstep.prepare(model, "W4A16")
    before = classes(model)
    assert lockstep.prepare(model, Scheme()).quantized == first.quantized
    assert classes(model) == before


def test_unprepare_gives_plain_layers_with_trained_weights_back():
    model = Tiny()
    before = classes(model)
    lockstep.prepare(model, "W4A16")
    with torch.no_grad():
        model.layers[0].q_proj.weight.zero_()
    lockstep.unprepare(model)
    assert classes(model) == before
    assert not model.layers[0].q_proj.weight.any()
    lockstep.prepare(model, "W4A16", targets="re:.*q_proj")
    assert trains_quantized(model) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_model_on_meta_is_prepared_by_shape():
    """Large models are built on ``meta`` and loaded, or sharded, after they are prepared."""
    with torch.device("meta"):
        model = Tiny()
        lockstep.prepare(model, "W4A16")
        assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 16)
    model.to_empty(device="cpu").load_state_dict(Tiny().state_dict())
    assert trains_quantized(model) == PROJECTIONS
    assert model(torch.zeros(2, 3, dtype=torch.long)).isfinite().all()


# What it refuses ---------------------------------------------------------------------------------------------------


def attention() -> nn.Module:
    """Its ``out_proj`` is a subclass of ``nn.Linear``, whose weight the fast path reads past any forward."""
    return nn.ModuleDict({"attention": nn.MultiheadAttention(128, 4)})


def encoder() -> nn.Module:
    """In evaluation its fast path hands ``linear1.weight`` to a fused operator: the master, not the served weight."""
    return nn.Sequential(nn.TransformerEncoderLayer(128, 4, batch_first=True))


def hooked() -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Tiny()
    hooks.add_hook_to_module(model.layers[1].q_proj, hooks.ModelHook())
    return model


def normalised() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(128, 128)))


def odd() -> nn.Module:
    """The module that does not fit comes last, when all others have been seen."""
    return nn.ModuleDict({"tiny": Tiny(), "odd": nn.Linear(192, 64)})


def prepared() -> nn.Module:
    model = Tiny()
    lockstep.prepare(model, "W4A16")
    return model


REFUSALS = {
    "class": (Tiny, {"targets": ["Linear", "Linera"]}, ValueError, "'Linera' matches no module: near ones are Linear"),
    "name": (Tiny, {"targets": "k_proj"}, ValueError, "'k_proj' matches no module: near ones are .*q_proj"),
    "regex": (Tiny, {"targets": "re:expert"}, ValueError, "leaf modules are Embedding, LayerNorm, Linear"),
    "ignored": (Tiny, {"ignore": "Linear"}, ValueError, r"nothing to quantize: ignore=\['Linear'\] covers all"),
    "preset": (Tiny, {"scheme": "W4A61"}, ValueError, "near ones are W4A16"),
    "embedding": (
        Tiny,
        {"targets": ["Linear", "Embedding"]},
        TypeError,
        "embed is a torch.nn.modules.sparse.Embedding",
    ),
    "subclass": (
        attention,
        {},
        TypeError,
        "attention.out_proj is a .*NonDynamicallyQuantizableLinear.*Name it in ignore",
    ),
    "fast-path": (encoder, {"ignore": "re:.*out_proj"}, TypeError, "linear1 .*torch.backends.mha.set_fastpath_enabled"),
    "parametrized": (normalised, {}, TypeError, "0 is a .*ParametrizedLinear"),
    "hook": (hooked, {}, TypeError, "layers.1.q_proj has a forward of its own .*accelerate.*Remove the hook"),
    "shape": (
        odd,
        {"ignore": "re:.*head"},
        ValueError,
        r"odd, weight of shape \(64, 192\).*group_size 32 or 64 would fit",
    ),
    "second": (prepared, {"scheme": Scheme.preset("W4A16", group_size=32)}, ValueError, "prepared with .*unprepare"),
}


@pytest.mark.parametrize(("build", "arguments", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_says_why_and_changes_nothing(build, arguments, error, message):
    """A half-prepared model would train on two arithmetics."""
    model = build()
    before = classes(model)
    with pytest.raises(error, match=message):
        lockstep.prepare(model, **{"scheme": "W4A16"} | arguments)
    assert classes(model) == before


def test_ignore_that_matches_nothing_warns_but_for_the_default():
    """A misspelt ignore quantizes what its author wanted to keep; models without ``lm_head`` are common."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lockstep.prepare(Block(), "W4A16")
    with pytest.warns(UserWarning, match="ignore='re:.*router' matches no module of Block"):
        lockstep.prepare(Block(), "W4A16", ignore=["lm_head", "re:.*router"])


# Recipes -------------------------------------------------------------------------------------------------------------


def schemes(model: nn.Module) -> dict[str, Scheme]:
    """What trains as what, by the modules themselves."""
    return {name: module.scheme for name, module in model.named_modules() if type(module) is QATLinear}


def test_the_first_rule_that_matches_a_layer_wins():
    model = Tiny()
    recipe = [Rule("layers.0.q_proj", "W8A16"), Rule(["re:.*q_proj"], "W8A8"), Rule(["Linear"], "W4A16")]
    report = lockstep.prepare(model, recipe)
    expected = {
        "layers.0.q_proj": Scheme.preset("W8A16"),
        "layers.0.down_proj": Scheme.preset("W4A16"),
        "layers.1.q_proj": Scheme.preset("W8A8"),
        "layers.1.down_proj": Scheme.preset("W4A16"),
    }
    assert schemes(model) == {row.name: row.scheme for row in report.quantized} == expected
    assert model(torch.arange(4)).isfinite().all()


def test_a_rule_without_a_scheme_leaves_its_layers_as_they_are():
    model = Tiny()
    report = lockstep.prepare(model, [Rule("re:layers.0", None), Rule("Linear", "W4A16")])
    assert list(schemes(model)) == PROJECTIONS[2:]
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons["layers.0.q_proj"] == "left as it is by the rule for re:layers.0"
    assert reasons["lm_head"] == "ignored by 'lm_head'"
    # A later rule without a scheme takes nothing from an earlier one.
    model = Tiny()
    lockstep.prepare(model, [Rule("Linear", "W4A16"), Rule("re:layers.0", None)])
    assert list(schemes(model)) == PROJECTIONS


def test_ignore_beats_every_rule():
    model = Tiny()
    lockstep.prepare(model, [Rule("layers.0.q_proj", "W8A8"), Rule("Linear", "W4A16")], ignore=["re:.*q_proj"])
    assert list(schemes(model)) == ["layers.0.down_proj", "layers.1.down_proj", "lm_head"]


def test_a_recipe_takes_the_place_of_targets():
    model = Tiny()
    lockstep.prepare(model, [Rule("re:.*down_proj", "W4A16")], targets="re:.*q_proj")
    assert list(schemes(model)) == ["layers.0.down_proj", "layers.1.down_proj"]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(128, 128) for _ in range(3))
        self.gate_proj, self.up_proj = (nn.Linear(128, 128) for _ in range(2))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("k_proj", "k_proj is to train as .*int8.* and q_proj as int4|q_proj is to train as int4.* and k_proj as int8"),
        ("up_proj", "gate_proj is to train as int4.* and up_proj as int8|up_proj is to train as int8"),
    ],
)
def test_layers_that_engines_fuse_are_quantized_alike_or_refused(odd, message):
    """An engine takes the first one's scheme for all of them, in silence."""
    model = Fused()
    before = classes(model)
    with pytest.raises(ValueError, match=rf"({message}).*engines run them as one layer"):
        lockstep.prepare(model, [Rule(odd, "W8A16"), Rule("Linear", "W4A16")])
    assert classes(model) == before
    # Another engine, or rule, of the same format is another scheme too.
    with pytest.raises(ValueError, match="engines run them as one layer"):
        lockstep.prepare(model, [Rule(odd, Scheme.preset("W4A16", scale_rule="amax/7.5")), Rule("Linear", "W4A16")])
    assert classes(model) == before


def test_rules_that_serve_in_different_dtypes_are_refused():
    half = Scheme.preset("W4A16", served_dtype=torch.float16, scale_dtype=torch.float16)
    model = Tiny()
    with pytest.raises(ValueError, match="the rules serve in bfloat16 and float16: an engine serves a model in one"):
        lockstep.prepare(model, [Rule("re:.*q_proj", half), Rule("Linear", "W4A16")])
    assert not schemes(model)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ([], TypeError, "a preset's name, a Scheme or a list of lockstep.Rule, found"),
        (["W4A16"], TypeError, "a list of lockstep.Rule"),
        ([Rule("re:.*nothing", "W8A8"), Rule("Linear", "W4A16")], ValueError, "'re:.*nothing' matches no module"),
        ([Rule("Linear", None)], ValueError, "nothing to quantize"),
        ([Rule("Linear", "W4A61")], ValueError, "near ones are W4A16"),
    ],
    ids=["empty", "names", "no-match", "all-left", "preset"],
)
def test_a_recipe_that_cannot_be_followed_is_refused(recipe, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        lockstep.prepare(model, recipe)
    assert not schemes(model)


def test_preparing_twice_with_another_recipe_is_refused():
    model = Tiny()
    recipe = [Rule("re:.*q_proj", "W8A8"), Rule("Linear", "W4A16")]
    lockstep.prepare(model, recipe)
    lockstep.prepare(model, list(recipe))
    with pytest.raises(ValueError, match=r"q_proj is prepared with int8.*unprepare"):
        lockstep.prepare(model, "W4A16")


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_unprepare_removes_the_buffers_of_measured_scales(name):
    model = Tiny()
    before, keys = classes(model), list(model.state_dict())
    lockstep.prepare(model, name)
    added = [key for key in model.state_dict() if key not in keys]
    assert added == [f"{layer}.{Scheme.preset(name).activations.scale_name}" for layer in PROJECTIONS]
    for key in added:
        buffer = model.get_buffer(key)
        assert (buffer.shape, buffer.dtype) == ((1,), torch.float32)
        assert buffer.isnan().all()
        buffer.fill_(1.0)
    lockstep.prepare(model, name)  # keeps what is measured
    assert all(model.get_buffer(key).item() == 1 for key in added)
    model(torch.arange(4))
    lockstep.unprepare(model)
    assert classes(model) == before
    assert list(model.state_dict()) == keys
    assert model(torch.arange(4)).isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_prepared_and_run_on_meta(name):
    with torch.device("meta"):
        model = Tiny()
        lockstep.prepare(model, name)
        assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 16)


@pytest.mark.parametrize(
    ("scheme", "features", "message"),
    [
        ("FP8_BLOCK", 192, "weight of shape .* 192 input features do not divide into activation groups of 128"),
        ("NVFP4", 120, "weight of shape .* 120 input features do not divide into groups of 16: no"),
        ("MXFP8", 48, "48 input features do not divide into groups of 32"),
        ("FP8_DYNAMIC", 0, "no input features to quantize"),
    ],
)
def test_layers_whose_inputs_do_not_divide_are_refused_by_name(scheme, features, message):
    model = nn.ModuleDict({"odd": nn.Linear(features, 64)}) if features else nn.ModuleDict({"odd": empty_linear()})
    with pytest.raises(ValueError, match=f"odd, {message}" if features != 48 and features else f"odd, .*{message}"):
        lockstep.prepare(model, scheme)


def empty_linear() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Linear(0, 64)


@pytest.mark.parametrize("name", ["W8A8", "W4A16_ASYM", "FP8", "MXFP4A16"])
def test_reuse_is_refused_where_nothing_is_kept(name):
    with pytest.raises(ValueError, match="keeps symmetric INT4 weights with inputs as they are"):
        lockstep.prepare(Tiny(), name, reuse="weight")


# Import ------------------------------------------------------------------------------------------------------------


def test_importing_lockstep_imports_no_trainer_and_no_hub_library():
    """``import lockstep`` in a worker or a script costs what torch costs."""
    heavy = {"lightning", "transformers", "compressed_tensors", "matplotlib", "rich", "datasets", "accelerate"}
    script = (
        f"import sys, torch; before = set(sys.modules); import lockstep; print(*{heavy} & (set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_tied_parameters_are_counted_once():
    """Else the share of the model that trains quantized is understated by a vocabulary."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 128)
            self.up = nn.Linear(128, 128, bias=False)
            self.lm_head = nn.Linear(128, 100, bias=False)
            self.lm_head.weight = self.embed.weight

    report = lockstep.prepare(Tied(), "W4A16")
    assert report.quantized_share == 128 / (100 + 128)
    assert [row.reason for row in report.skipped if row.name == "lm_head"] == ["ignored by 'lm_head', tied to embed"]


def test_weights_that_the_grid_cannot_read_are_refused():
    """fp64 masters, and pruned layers whose weight is computed: the export would lack or bend them."""
    pruned = nn.Sequential(nn.Linear(128, 8))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    for model in (nn.Sequential(nn.Linear(128, 8).double()), pruned):
        with pytest.raises(TypeError, match=r"^0 needs a weight of its own in bfloat16, float16, float32, found"):
            lockstep.prepare(model, "W4A16")

"""Sensitivity: the costs against hand-made models, the assignment against every other one, and that nothing is left."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

import lockstep
from lockstep.qat.prepare import quantized_experts, quantized_modules
from lockstep.sensitivity import Cost, SensitivityReport, sensitivity
from tests.models import VOCAB, TinyMlp, tiny_llama, tiny_moe


def batches(count: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCAB, (2, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def test_costs_are_those_of_each_unit_alone_and_the_model_is_left_as_it_was():
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches()
    report = sensitivity(model, data, ["W4A16", "W8A8"])
    units = {cost.unit: cost.layers for cost in report.costs}
    assert "model.layers.0.self_attn.q_proj + k_proj + v_proj" in units  # engines run them as one
    assert len(units) == 2 * 4
    assert len(report.costs) == 2 * 4 * 3

    model.eval()
    for cost in report.costs[:6]:
        if cost.scheme == "-":
            assert cost.increase == 0
            continue
        lockstep.prepare(model, cost.scheme, list(cost.layers), ())
        with torch.no_grad():
            expected = sum(model(**batch).loss.double().item() for batch in data) / len(data) - report.loss
        lockstep.unprepare(model)
        assert cost.increase == pytest.approx(expected, abs=1e-12)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_with_an_outlier_is_found_and_kept_wider():
    """Groups of one huge weight each: INT4 loses all the others, INT8 does not."""
    torch.manual_seed(0)
    model = TinyMlp(dtype=torch.float32)
    with torch.no_grad():
        model.second.weight[:, ::32] = 20 * model.second.weight.abs().max()
    x = torch.randn(64, 128)
    with torch.no_grad():
        wanted = model(x)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(batch), wanted)

    report = sensitivity(model, [x], ["W4A16", "W8A16"], loss=loss)
    narrow = {cost.unit: cost for cost in report.costs if cost.scheme == "W4A16"}
    wide = {cost.unit: cost for cost in report.costs if cost.scheme == "W8A16"}
    assert narrow["second"].increase > 3 * narrow["first"].increase
    recipe = report.assign(narrow["first"].bytes + wide["second"].bytes + 64)
    assert {rule.scheme: rule.targets for rule in recipe} == {"W4A16": ["first"], "W8A16": ["second"]}
    lockstep.prepare(model, recipe)
    assert model.second.scheme.weights.format == "int8"


def test_bytes_are_those_that_are_stored(tmp_path):
    model = tiny_llama()
    report = sensitivity(model, batches(1), ["W4A16"])
    lockstep.prepare(model, "W4A16")
    stored = dict(lockstep.export.stream(model))
    for cost in report.costs:
        if cost.scheme == "W4A16":
            words = [stored[f"{layer}.{part}"] for layer in cost.layers for part in ("weight_packed", "weight_scale")]
            assert cost.bytes == sum(tensor.numel() * tensor.element_size() for tensor in words)


@pytest.mark.filterwarnings("error")
def test_all_experts_of_a_module_are_one_unit():
    """Measured together, in the bytes that they are stored in, and assigned by the module's name."""
    model, data = tiny_moe("mixtral"), batches(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = sensitivity(model, data, ["MXFP4A16", "W8A8"])
    units = {cost.unit: cost for cost in report.costs if cost.scheme == "MXFP4A16"}
    modules = [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    assert {unit for unit in units if "experts" in unit} == {*modules}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    for name in modules:
        lockstep.prepare(model, "MXFP4A16", [name], ["re:.*(proj|gate|lm_head|embed_tokens)$", *({*modules} - {name})])
        with torch.no_grad():
            expected = model(**data[0]).loss.double().item() - report.loss
        own = model.get_submodule(name)
        words = {key: tensor for key, tensor in lockstep.export.stream(model) if ".experts." in key}
        stored = [tensor.nbytes for key, tensor in words.items() if key.endswith(("_packed", "_scale"))]
        lockstep.unprepare(model)
        assert units[name].increase == pytest.approx(expected, abs=1e-12)
        assert len(stored) == 4 * 3 * 2
        assert units[name].bytes == sum(stored)
        (plain,) = [cost for cost in report.costs if (cost.unit, cost.scheme) == (name, "-")]
        assert plain.bytes == 2 * sum(parameter.numel() for parameter in own.parameters())

    recipe = report.assign(sum(cost.bytes for cost in units.values()))
    lockstep.prepare(model, recipe)
    assert [name for name, _ in quantized_experts(model)] == modules
    with pytest.raises(ValueError, match="unprepare"):
        sensitivity(model, data, ["MXFP4A16"])


costs = st.lists(
    st.lists(st.tuples(st.floats(-0.1, 2), st.integers(1, 60)), min_size=1, max_size=3), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(costs, st.integers(1, 250))
def test_the_assignment_is_the_best_that_fits(units, budget):
    rows = [
        Cost(f"u{number}", (f"u{number}",), f"s{choice}", increase, size)
        for number, choices in enumerate(units)
        for choice, (increase, size) in enumerate(choices)
    ]
    report = SensitivityReport(1.0, tuple(rows))
    fitting = [pick for pick in itertools.product(*units) if sum(size for _, size in pick) <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="no assignment takes"):
            report.assign(budget)
        return
    picked = {layer: rule.scheme for rule in report.assign(budget) for layer in rule.targets}
    chosen = [row for row in rows if picked[row.unit] == row.scheme]
    assert len(chosen) == len(units)
    assert sum(row.bytes for row in chosen) <= budget
    assert sum(row.increase for row in chosen) == pytest.approx(min(sum(i for i, _ in pick) for pick in fitting))


def test_what_stays_wide_is_left_as_it_is():
    rows = (Cost("a", ("a",), "-", 0.0, 100), Cost("a", ("a",), "W4A16", 1.0, 30))
    (rule,) = SensitivityReport(1.0, rows).assign(100)
    assert rule.scheme is None


def test_saved_as_numbers_and_as_a_picture(tmp_path):
    report = sensitivity(tiny_llama(), batches(1), ["W4A16", "W8A8"])
    content = json.loads(report.save(tmp_path / "s.json").read_text())
    assert content["loss"] == report.loss
    assert len(content["costs"]) == len(report.costs)
    figure = report.plot()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert "nats" in axes.get_xlabel()
    assert len(axes.patches) == 2 * 8  # a bar for each unit and scheme
    assert report.save(tmp_path / "s.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="json"):
        report.save(tmp_path / "s.txt")


def test_refusals_name_what_is_wrong_and_leave_the_model_alone():
    model = tiny_llama()
    with pytest.raises(ValueError, match="no batches"):
        sensitivity(model, [])
    with pytest.raises(ValueError, match="measured input ranges"):
        sensitivity(model, batches(), ["FP8"])
    with pytest.raises(ValueError, match="labels"):
        sensitivity(model, [{"input_ids": batches()[0]["input_ids"]}])
    with pytest.raises(ValueError, match="finite"):
        sensitivity(model, batches(), loss=lambda model, batch: torch.tensor(float("nan")))
    assert not list(quantized_modules(model))
    lockstep.prepare(model, "W4A16")
    with pytest.raises(ValueError, match="unprepare"):
        sensitivity(model, batches())

"""Sharded models, in two real processes: the forward, the gradients and the export are those of one process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from models import prepared
from safetensors.torch import load_file
from strategies import bits
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

import lockstep
from lockstep import Scheme
from lockstep.export import ExportError, save_pretrained, stream

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 64}
SCHEMES = ("W4A16", "W8A8", "FP8_BLOCK", "NVFP4A16")
OF_EXPERTS = (Scheme.preset("W4A16", group_size=32), "W8A8")  # in transformers' implementation, and expert by expert


def llama(dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    return models.tiny_llama(dtype, **SIZES | sizes).train()


def mixture() -> Any:
    return models.tiny_moe("qwen3_moe", torch.float32, moe_intermediate_size=64).train()


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Of a batch that all ranks see."""
    ids = models.token_ids(2, seed=seed) % SIZES["vocab_size"]
    return model(ids, labels=ids).loss


def fsdp2(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp1(model: Any, **options: Any) -> FullyShardedDataParallel:
    wrap = torch.distributed.fsdp.wrap.ModuleWrapPolicy({LlamaDecoderLayer, Qwen3MoeDecoderLayer})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=True, device_id=cpu, **options)


def checkpointed(model: Any) -> Any:
    """With activation checkpointing around every block, as torchtitan and Lightning do it."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


def rank_script(function: str, **arguments: Any) -> str:
    return f"""
import torch, torch.distributed as dist
import test_distributed as tests
torch.set_num_threads(1)
dist.init_process_group("gloo")
tests.{function}(**{arguments!r})
dist.barrier()
print("done")
"""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, their order, dtypes and bits."""
    assert [*found] == [*expected]
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits_of(found[name]), bits_of(tensor)), name


def bits_of(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() > 4 else bits(tensor)


def folder(path: Path) -> dict[str, Tensor]:
    """All tensors of an export, by name."""
    return dict(sorted((name, t) for file in path.glob("*.safetensors") for name, t in load_file(file).items()))


# Forward, backward and export ----------------------------------------------------------------------------------------


def same_as_alone(how: str, out: str) -> None:
    """In a rank: two steps of a sharded model are those of a whole one, and so is what is exported of it."""
    make, schemes = (mixture, OF_EXPERTS) if how.startswith("experts") else (llama, SCHEMES)
    for number, scheme in enumerate(schemes):
        alone, model = prepared(make(), scheme), make()
        match how.removeprefix("experts, "):
            case "fsdp2, prepared first":
                model = fsdp2(prepared(model, scheme))
            case "fsdp2, sharded first":
                model = prepared(fsdp2(model), scheme)
            case "fsdp2 around checkpointing, sharded first":
                model = prepared(fsdp2(checkpointed(model)), scheme)
            case "fsdp1, prepared first":
                model = fsdp1(prepared(model, scheme))
            case "fsdp1, wrapped first":
                model = prepared(fsdp1(model), scheme)
            case "fsdp1 around checkpointing":
                model = fsdp1(checkpointed(prepared(model, scheme)))
        optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2, foreach=False) for one in (model, alone)]
        for step in range(2):
            losses = [loss_of(one, step) for one in (model, alone)]
            assert torch.equal(*losses), (scheme, step)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        expected = dict(stream(alone))
        before = [(name, type(one), one.shape) for name, one in model.named_parameters()]
        assert_same(dict(stream(model)), expected)
        save_pretrained(model, f"{out}/{number}", max_shard_size=("5GB", "100KB")[number % 2])
        if dist.get_rank() == 0:
            assert_same(folder(Path(out) / str(number)), dict(sorted(expected.items())))
            save_pretrained(alone, f"{out}/alone")
            configs = [json.loads(Path(out, name, "config.json").read_text()) for name in (str(number), "alone")]
            assert configs[0] == configs[1]
            lockstep.export.Checkpoint(f"{out}/{number}")
            for file in Path(out, "alone").iterdir():
                file.unlink()
        dist.barrier()
        # The export leaves the model sharded, and able to train.
        assert [(name, type(one), one.shape) for name, one in model.named_parameters()] == before
        assert torch.equal(loss_of(model, 2), loss_of(alone, 2))


@pytest.mark.parametrize(
    "how",
    [
        "fsdp2, prepared first",
        "fsdp2, sharded first",
        "fsdp2 around checkpointing, sharded first",
        "fsdp1, prepared first",
        "fsdp1, wrapped first",
        "fsdp1 around checkpointing",
        "experts, fsdp2, prepared first",
        "experts, fsdp2 around checkpointing, sharded first",
        "experts, fsdp1, prepared first",
    ],
)
def test_sharded_training_and_export_are_those_of_one_process(tmp_path, how):
    """Losses, and every exported bit: same data on both ranks, so that averaging changes nothing."""
    script = rank_script("same_as_alone", how=how, out=str(tmp_path))
    assert [output.split()[-1] for output in ranks.run(script, tmp_path / "ranks")] == ["done"] * 2


def learned_scales_as_alone(out: str) -> None:
    """In a rank: scales are parameters, sharded like the rest."""
    alone, model = (prepared(llama(), learned_scales=True) for _ in range(2))
    model = fsdp2(model)
    for one in (model, alone):
        loss_of(one, 0).backward()
        torch.optim.SGD(one.parameters(), lr=1e-4).step()
    assert_same(dict(stream(model)), dict(stream(alone)))
    scale = model.model.layers[0].mlp.up_proj.weight_scale
    with torch.no_grad():
        scale.to_local().mul_(-1 if dist.get_rank() else 1)
    with pytest.raises(ExportError, match=r"0\.mlp\.up_proj\.weight_scale holds scales that are negative"):
        save_pretrained(model, out)


def test_learned_scales_are_sharded_and_checked_as_a_whole(tmp_path):
    """Scales that are bad on one rank alone are refused on both: nobody hangs."""
    ranks.run(rank_script("learned_scales_as_alone", out=str(tmp_path / "out")), tmp_path / "ranks")
    assert not (tmp_path / "out").exists()


def cast_for_the_forward(out: str) -> None:
    """In a rank: FSDP keeps fp32 masters and casts them; the forward quantizes what was cast, and so must."""
    alone, bf16 = prepared(llama(torch.bfloat16)), torch.bfloat16
    expected, plain = dict(stream(alone)), dict(stream(prepared(masters())))
    assert any(not torch.equal(expected[name], plain[name]) for name in plain), "the cast changes nothing"
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=bf16)
    assert_same(dict(stream(fsdp2(prepared(masters()), mp_policy=policy))), expected)
    part = prepared(masters())
    parent = fully_shard(nn.Sequential(part), mp_policy=policy)
    assert_same(dict(stream(parent[0])), expected)
    mixed = torch.distributed.fsdp.MixedPrecision(param_dtype=bf16)
    assert_same(dict(stream(fsdp1(prepared(masters()), mixed_precision=mixed))), expected)


def masters() -> Any:
    """Fp32 weights that are those of ``llama(torch.bfloat16)`` when they are rounded."""
    model, rounded = llama(), llama(torch.bfloat16)
    with torch.no_grad():
        for one, other in zip(model.parameters(), rounded.parameters(), strict=True):
            one.copy_(other).mul_(1 + 2**-10)
            assert torch.equal(one.bfloat16(), other)
    return model


def test_what_is_exported_is_what_fsdp_cast_for_the_forward(tmp_path):
    """The scale of a bf16 weight is another than that of its fp32 master."""
    ranks.run(rank_script("cast_for_the_forward", out=str(tmp_path)), tmp_path / "ranks")


# How much of it, and by whom -----------------------------------------------------------------------------------------


def prepared_apart(out: str) -> None:
    """In a rank: each has another scheme, or leaves another layer out."""
    other = dist.get_rank() == 1
    apart = [
        fsdp2(prepared(llama(), Scheme.preset("W4A16", group_size=64 if other else 128))),
        fsdp2(prepared(llama(), ignore=["lm_head", *(["model.layers.0.mlp.down_proj"] if other else [])])),
    ]
    for model in apart:
        for export in (lambda model: save_pretrained(model, out), lambda model: dict(stream(model))):
            with pytest.raises(ExportError, match=r"rank 1 has prepared its model otherwise than rank 0"):
                export(model)


def test_ranks_that_prepared_otherwise_are_told_so(tmp_path):
    """Each rank writes its own layers: the folder would hold both schemes, and declare one."""
    ranks.run(rank_script("prepared_apart", out=str(tmp_path / "out")), tmp_path / "ranks")
    assert not (tmp_path / "out").exists()


def peak_of_export(out: str) -> None:
    """In a rank: how many gathered elements are alive at once, and who writes what."""
    import weakref

    from lockstep.export import gather

    model = fsdp2(prepared(llama(num_hidden_layers=3)))
    alive: dict[int, int] = {}
    peak = 0
    whole = gather.whole

    def watched(tensor: Tensor) -> Tensor:
        nonlocal peak
        found = whole(tensor)
        if isinstance(tensor, DTensor):
            memory = found.untyped_storage()
            alive[memory.data_ptr()] = memory.nbytes()
            weakref.finalize(memory, alive.pop, memory.data_ptr(), None)
            peak = max(peak, sum(alive.values()))
        return found

    gather.whole = watched
    for _ in stream(model):
        pass
    largest = max(one.numel() * one.element_size() for one in model.parameters())
    assert largest <= peak <= 2 * largest, (peak, largest)
    gather.whole = whole
    save_pretrained(model, out)


def test_layers_are_gathered_one_at_a_time_and_written_by_both_ranks(tmp_path):
    """One whole model on one rank would not fit there."""
    ranks.run(rank_script("peak_of_export", out=str(tmp_path / "out")), tmp_path / "ranks")
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)


# What goes wrong on one rank -----------------------------------------------------------------------------------------


def fails_on_one(where: str, out: str) -> None:
    """In a rank: what one rank meets, both raise, and both can go on."""
    from lockstep.export import files

    rank = dist.get_rank()
    model = fsdp2(prepared(llama()))
    expected = "No space left"
    match where:
        case "disk" if rank == 1:
            files.save_file = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        case "tokenizer":
            expected = "no vocabulary"
        case "NaN":
            expected = "up_proj.weight: 2 of 32768 values are NaN or infinite in float32"
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.to_local()[0, 0] = torch.nan
        case "destination":
            expected = "is not empty"
            Path(out).mkdir(exist_ok=True)
            Path(out, "notes").write_text("mine")
            dist.barrier()

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            raise ValueError("no vocabulary")

    with pytest.raises((ExportError, OSError, ValueError), match=expected) as caught:
        save_pretrained(model, out, tokenizer=Tokenizer() if where == "tokenizer" else None)
    print(caught.type.__name__, str(caught.value).startswith("rank "))
    loss_of(model, 0).backward()  # the ranks are still together


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        ("disk", "ExportError True", "OSError False"),
        ("NaN", None, None),
        ("tokenizer", "ValueError False", "ExportError True"),
        ("destination", "ExportError False", "ExportError True"),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path, where, first, second):
    """The other rank waits in a collective: it must be told, and the folder must not appear."""
    outputs = ranks.run(rank_script("fails_on_one", where=where, out=str(tmp_path / "out")), tmp_path / "ranks")
    lines = [output.splitlines()[-2] for output in outputs]
    if first is None:
        assert sorted(lines) == ["ExportError False", "ExportError True"]
    else:
        assert lines == [first, second]
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == (["out", "ranks"] if where == "destination" else ["ranks"])


def exports_until_killed(out: str) -> None:
    """In a rank: rank KILLED stops dead in the middle of the second export."""
    from lockstep.export import entries

    model = fsdp2(prepared(llama()))
    save_pretrained(model, out)
    stored, layers = entries.checked_master, []

    def slow(*arguments: Any) -> dict[str, Tensor]:
        layers.append(arguments)
        if len(layers) == 3 and dist.get_rank() == int(os.environ["KILLED"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return stored(*arguments)

    entries.checked_master = slow
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(2)
    save_pretrained(model, out, overwrite=True)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_leaves_the_old_folder(tmp_path, killed):
    """Whichever: the survivor raises instead of waiting, and the next export clears away what lies beside."""
    script = rank_script("exports_until_killed", out=str(tmp_path / "out"))
    processes = ranks.start(script, tmp_path / "ranks", KILLED=str(killed))
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert processes[killed].returncode == -signal.SIGKILL
    assert processes[1 - killed].returncode == 1
    assert "RuntimeError" in errors[1 - killed]
    model = prepared(llama())
    expected = dict(stream(model))
    assert_same(folder(tmp_path / "out"), dict(sorted(expected.items())))
    save_pretrained(model, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ranks"]


def one_rank_sees_nothing(out: str) -> None:
    """In a rank: as on another machine, without the disk of the first."""
    from lockstep.export import files

    model = fsdp2(prepared(llama()))
    if dist.get_rank() == 1:
        exists = Path.exists
        Path.exists = lambda path, **options: ".incomplete" not in str(path) and exists(path, **options)
        files.save_file = None
    save_pretrained(model, out)


def test_ranks_that_do_not_see_the_directory_leave_the_writing_to_those_that_do(tmp_path):
    """Local disks of two machines: the folder is whole where rank zero runs."""
    ranks.run(rank_script("one_rank_sees_nothing", out=str(tmp_path / "out")), tmp_path / "ranks")
    assert_same(folder(tmp_path / "out"), dict(sorted(stream(prepared(llama())))))


# Tensor parallelism --------------------------------------------------------------------------------------------------


def tensor_parallel(out: str) -> None:
    """In a rank: a layer cut along its outputs, and one cut along its inputs, in the middle of a group."""
    for style in (ColwiseParallel(), RowwiseParallel()):
        model = nn.Sequential(nn.Linear(128, 128))
        with torch.no_grad():
            for one in model.parameters():
                dist.broadcast(one, 0)
        expected = dict(stream(prepared(model)))
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": style})
        assert_same(dict(stream(model)), expected)
        with pytest.raises(
            ValueError, match=r"0: its weight \[128, 128\] is sharded in the forward, \[(64, 128|128, 64)\]"
        ):
            model(torch.ones(1, 128))


def test_tensor_parallel_weights_are_exported_whole_and_do_not_train(tmp_path):
    """Half a group on each rank would have a scale of its own there: nothing is computed with it."""
    ranks.run(rank_script("tensor_parallel", out=str(tmp_path)), tmp_path / "ranks")

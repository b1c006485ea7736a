"""DeepSpeed ZeRO in two real processes, driven by itself: Lightning refuses it without CUDA; and accelerate."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from models import TinyMlp, prepared
from test_distributed import OF_EXPERTS, assert_same, folder, llama, loss_of, mixture
from torch import nn

import lockstep
from lockstep import Scheme
from lockstep.export import save_pretrained, stream

pytest.importorskip("deepspeed")

# Of the largest gradient: ZeRO-3 reduces with this noise on the CPU, of plain nn.Linear layers as of ours.
NOISE = 2e-6


def start(model: nn.Module, stage: int, **config: Any) -> Any:
    """A DeepSpeed engine that partitions everything that it can."""
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings | config)[0]


def step(engine: Any, seed: int) -> float:
    loss = loss_of(engine, seed)
    engine.backward(loss)
    engine.step()
    return loss.item()


def copy_of(engine: Any, scheme: str | Scheme, make: Callable[[], Any] = llama) -> Any:
    """A whole model in this process, with the weights that the engine has partitioned over the ranks."""
    import deepspeed

    model = make()
    for (_, mine), (_, theirs) in zip(model.named_parameters(), engine.module.named_parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([theirs]), torch.no_grad():
            mine.copy_(theirs)
    return prepared(model, scheme)


def rank_script(function: str, **arguments: Any) -> str:
    return f"""
import logging
import deepspeed, torch, torch.distributed as dist
import test_deepspeed as tests
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ here; gloo alone does it
deepspeed.init_distributed("gloo", verbose=False)
tests.{function}(**{arguments!r})
dist.barrier()
print("done")
"""


def run(directory: Path, function: str, world: int = 2, **arguments: Any) -> list[str]:
    outputs = ranks.run(rank_script(function, **arguments), directory, world, DS_ACCELERATOR="cpu")
    assert [output.split()[-1] for output in outputs] == ["done"] * world
    return outputs


def same_as_alone(stage: int, out: str) -> None:
    """In a rank: the first loss and gradients, the masters' export, and that training goes on after it."""
    import deepspeed

    of_layers, of_experts = (
        itertools.product([llama], ("W4A16", "W8A8", "NVFP4A16")),
        [(mixture, OF_EXPERTS[stage % 2])],
    )
    for number, (make, scheme) in enumerate((*of_layers, *of_experts)):
        alone = prepared(make(), scheme)
        # Each rank has a batch of its own; one process sees both.
        losses = [loss_of(alone, rank) for rank in range(2)]
        (sum(losses) / 2).backward()
        engine = start(prepared(make(), scheme), stage)
        mlp = engine.module.model.layers[0].mlp
        weight = mlp.up_proj.weight if make is llama else mlp.experts.gate_up_proj
        assert (weight.numel() == 0) == (stage == 3), "nothing is partitioned"
        loss = loss_of(engine, dist.get_rank())
        assert torch.equal(loss, losses[dist.get_rank()]), scheme
        engine.backward(loss)
        for (name, mine), theirs in zip(alone.named_parameters(), engine.module.parameters(), strict=True):
            found = deepspeed.utils.safe_get_full_grad(theirs)
            error = (found - mine.grad).abs().max() / mine.grad.abs().max()
            assert error <= (NOISE if stage == 3 else 0), (scheme, name, error)
        engine.step()
        step(engine, 7)
        expected = dict(stream(copy_of(engine, scheme, make)))
        assert_same(dict(stream(engine)), expected)
        if stage == 3:
            save_pretrained(engine, f"{out}/{number}")
            assert weight.numel() == 0, "the export left a weight gathered"
        elif dist.get_rank() == 0:
            save_pretrained(engine, f"{out}/{number}")
        dist.barrier()
        if dist.get_rank() == 0:
            assert_same(folder(Path(out) / str(number)), dict(sorted(expected.items())))
        step(engine, 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_and_exports_as_one_process(tmp_path, stage):
    """The weight that a layer saves for its backward is partitioned away after the forward, its siblings' are before:
    gradients through a stale or an empty one would show here."""
    run(tmp_path / "ranks", "same_as_alone", stage=stage, out=str(tmp_path))


def built_in_parts(out: str) -> None:
    """In a rank: a model that never was whole, prepared when it is partitioned already."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = llama()
    report = lockstep.prepare(model, "W4A16")
    assert len(report.quantized) == 14
    engine = start(model, 3)
    first = step(engine, 0)
    whole = copy_of(engine, "W4A16")
    assert_same(dict(stream(engine)), dict(stream(whole)))
    assert loss_of(engine, 0).item() == loss_of(whole, 0).item() < first
    engine.save_checkpoint(out)
    if dist.get_rank() == 0:
        save_pretrained(whole, f"{out}/whole")
    dist.barrier()


def test_a_model_of_zero_init_is_prepared_and_its_checkpoint_exports_the_same_bits(tmp_path):
    """The consolidated checkpoint, in one process without DeepSpeed's engine."""
    run(tmp_path / "ranks", "built_in_parts", out=str(tmp_path / "out"))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = llama()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out")))
    save_pretrained(prepared(model), tmp_path / "consolidated")
    assert_same(folder(tmp_path / "consolidated"), folder(tmp_path / "out" / "whole"))


# Killed and resumed --------------------------------------------------------------------------------------------------


def trains(stage: int, checkpoint: str, out: str, resume: bool, killed_at: int = -1) -> None:
    """In a rank: six steps, a checkpoint after three, and an export."""
    engine = start(prepared(llama()), stage)
    if resume:
        engine.load_checkpoint(checkpoint)
    for number in range(engine.global_steps, 6):
        if number == killed_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(engine, 10 * number + dist.get_rank())
        if engine.global_steps == 3:
            engine.save_checkpoint(checkpoint)
    if stage == 3 or dist.get_rank() == 0:
        save_pretrained(engine, out)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_lost_a_rank_is_resumed_and_ends_as_an_unbroken_one(tmp_path, stage):
    """Bit for bit. The rank that is left exports nothing."""
    unbroken, out = str(tmp_path / "unbroken"), str(tmp_path / "out")
    run(tmp_path / "a", "trains", stage=stage, checkpoint=f"{tmp_path}/one", out=unbroken, resume=False)
    script = rank_script("trains", stage=stage, checkpoint=f"{tmp_path}/two", out=out, resume=False, killed_at=4)
    processes = ranks.start(script, tmp_path / "b", DS_ACCELERATOR="cpu")
    assert processes[1].wait(100) == -signal.SIGKILL
    assert processes[0].wait(100) != 0
    for process in processes:
        process.communicate()
    assert not Path(out).exists()
    run(tmp_path / "c", "trains", stage=stage, checkpoint=f"{tmp_path}/two", out=out, resume=True)
    assert_same(folder(Path(out)), folder(Path(unbroken)))


# accelerate, which chooses DDP on CPUs whatever its DeepSpeedPlugin says ----------------------------------------------


def through_accelerate(out: str) -> None:
    """In a rank: the lines of docs/distributed.md."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = llama()
    lockstep.prepare(model, "W4A16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    alone = prepared(llama())
    loss = loss_of(model, 0)
    assert torch.equal(loss, loss_of(alone, 0))
    accelerator.backward(loss)
    optimizer.step()
    if accelerator.is_main_process:
        save_pretrained(model, out)
        assert_same(folder(Path(out)), dict(sorted(stream(accelerator.unwrap_model(model)))))


def test_accelerate_by_hand(tmp_path):
    """Prepared before accelerator.prepare, exported from its wrapper."""
    run(tmp_path / "ranks", "through_accelerate", out=str(tmp_path / "out"))


# What is refused -----------------------------------------------------------------------------------------------------


def kept_between_passes() -> None:
    """In a rank."""
    model = nn.Sequential(TinyMlp(dtype=torch.float32))
    lockstep.prepare(model, "W4A16", reuse="codes")
    engine = start(model, 3)
    with pytest.raises(ValueError, match="reuse cannot be proved safe under DeepSpeed ZeRO-3"):
        engine(torch.zeros(1, 128))


def test_reuse_is_refused_under_zero_3(tmp_path):
    """DeepSpeed gathers weights in a way that PyTorch does not see: a stale one would train on."""
    run(tmp_path / "ranks", "kept_between_passes")

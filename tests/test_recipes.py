"""The recipes: text that is split without leaks, a language model that is what was asked for, and the demo's table."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

import lockstep
from lockstep.callbacks import QATCallback
from lockstep.recipes import CausalLM, TextData, demo
from lockstep.recipes.causal_lm import load_model
from lockstep.recipes.text import standard_library

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*smaller than the logging interval.*")

NAME = re.compile(r"<(\w+)>")
SMALL = {"vocab_size": 300, "block_size": 16, "batch_size": 4}


# Text --------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def story(name: str, lines: int = 12) -> str:
    """A text that can be told from all others by any few words of it."""
    return f"<{name}> was here\n" * lines


def library(directory: Path, files: int = 60) -> Path:
    for number in range(files):
        write(directory / f"{number % 3}" / f"{number}.txt", story(f"{number:03d}"))
    return directory


def prepared(**options: Any) -> TextData:
    data = TextData(**SMALL | options)
    data.setup("fit")
    return data


def splits(data: TextData) -> dict[str, list[str]]:
    """The blocks of training and validation, as text."""
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader()}
    return {
        split: [data.tokenizer.decode(block, skip_special_tokens=True) for block in tokens(loader)]
        for split, loader in loaders.items()
    }


def tokens(loader: DataLoader) -> Tensor:
    """All that the loader's dataset holds, in the dataset's order."""
    return torch.stack([sample["input_ids"] for sample in loader.dataset])


def stories(data: TextData) -> tuple[set[str], set[str]]:
    """Names of the stories in training and in validation, those that no block's end cuts."""
    train, validation = ({name for block in blocks for name in NAME.findall(block)} for blocks in splits(data).values())
    return train, validation


def test_batches_are_blocks_of_tokens_with_themselves_as_labels(tmp_path):
    """transformers shifts the labels itself; a second shift here would train on the token after the next."""
    data = prepared(files=[str(library(tmp_path))])
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert {len(batch["input_ids"]) for batch in data.train_dataloader()} == {4}
    held_out = list(data.val_dataloader())
    assert sum(len(batch["input_ids"]) for batch in held_out) == len(data.val_dataloader().dataset)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(held_out, data.val_dataloader(), strict=True)
    )


def test_without_files_it_reads_this_pythons_own_modules():
    """The recipe runs on a machine without a network."""
    data = prepared(max_bytes=400_000)
    assert len(data.tokenizer) == 300
    assert all("import" in "".join(blocks) for blocks in splits(data).values())


def test_standard_library_is_read_by_package_without_tests_and_installed_code(tmp_path, monkeypatch):
    """A module's neighbours and its tests would give held-out text away."""
    for package in range(30):
        for module in range(4):
            write(tmp_path / f"package{package}" / f"{module}.py", story(f"p{package}_{module}", 4))
    for place in ("site-packages/torch", "package1/tests", "test", "encodings"):
        write(tmp_path / place / "module.py", story("leak"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert {unit for unit, _ in standard_library()} == {f"package{number}" for number in range(30)}
    train, validation = ({name.partition("_")[0] for name in names} for names in stories(prepared()))
    assert train
    assert validation
    assert not train & validation
    assert "leak" not in train | validation


@pytest.mark.parametrize("copies", [1, 3])
def test_no_text_is_in_both_splits_under_whatever_name(tmp_path, copies):
    """Perplexity on text that was trained on means nothing. Each distinct text is there once, in one split."""
    for number in range(60):
        for copy in range(copies):
            write(tmp_path / f"{number}-{copy}.txt", story(f"{number:03d}"))
    data = prepared(files=[str(tmp_path)])
    train, validation = stories(data)
    assert train
    assert validation
    assert not train & validation
    assert len(train | validation) == 60
    lines = sum(block.count("<") for blocks in splits(data).values() for block in blocks)
    assert 60 * 12 - 4 <= lines <= 60 * 12  # the ends of the two splits fill no block


def test_of_a_few_files_the_end_of_each_is_held_out(tmp_path):
    """One's own notes in a single file are enough to start with."""
    for name in "ab":
        write(tmp_path / f"{name}.txt", "".join(f"<{name}{line:03d}> was here\n" for line in range(300)))
    train, validation = stories(prepared(files=[str(tmp_path)]))
    assert not train & validation
    for name in "ab":
        lines = [sorted(line for line in split if line.startswith(name)) for split in (train, validation)]
        assert lines[0][-1] < lines[1][0]
        assert 10 < len(lines[1]) <= 30


def test_files_and_directories_are_read_and_other_suffixes_only_by_name(tmp_path):
    """A directory's images and caches are no text; a file that is named is."""
    library(tmp_path / "texts")
    for suffix in ("py", "md", "bin"):
        write(tmp_path / "texts" / f"a.{suffix}", story(suffix))
    write(tmp_path / "notes.log", story("log"))
    train, validation = stories(prepared(files=[str(tmp_path / "texts"), str(tmp_path / "notes.log")]))
    assert train | validation == {*(f"{number:03d}" for number in range(60)), "py", "md", "log"}


def test_two_setups_give_the_same_tokens(tmp_path):
    """Runs and ranks that are compared must see the same data; so must one that names its files in another order."""
    library(tmp_path)
    folders = [str(tmp_path / name) for name in "012"]
    one, other, again = prepared(files=folders), prepared(files=folders[::-1]), prepared(files=folders)
    again.setup("validate")
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert splits(one) == splits(other)
    for split in ("train_dataloader", "val_dataloader"):
        first, *others = (tokens(getattr(data, split)()) for data in (one, other, again))
        assert all(torch.equal(first, blocks) for blocks in others)


def test_order_of_training_follows_torchs_seed(tmp_path):
    data = prepared(files=[str(library(tmp_path))])

    def order(seed: int) -> list[Tensor]:
        seed_everything(seed, verbose=False)
        return [batch["input_ids"] for batch in data.train_dataloader()]

    assert torch.equal(torch.stack(order(0)), torch.stack(order(0)))
    assert not torch.equal(torch.stack(order(0)), torch.stack(order(1)))


@pytest.mark.parametrize("letter", ["e", "ж", "語"])
def test_no_more_than_max_bytes_are_read(tmp_path, letter):
    """Bytes, as the name says, in any script."""
    for number in range(100):
        write(tmp_path / f"{number}.txt", " ".join(f"{number}{letter * 3}{word}" for word in range(40)))
    data = prepared(files=[str(tmp_path)], max_bytes=20_000)
    read = sum(len("".join(blocks).encode()) for blocks in splits(data).values())
    assert 15_000 < read <= 20_000


def test_text_comes_back_from_the_tokens(tmp_path):
    """The tokenizer made here loses nothing: bytes of any script, tabs and line ends."""
    text = "def f(x):\n\treturn 'naïve — 日本語'  # 🙂\r\n"
    library(tmp_path)
    tokenizer = prepared(files=[str(tmp_path)]).tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_texts_end_with_the_end_token(tmp_path):
    """A model that never sees it never stops."""
    data = prepared(files=[str(library(tmp_path))])
    ids = tokens(data.train_dataloader()).flatten()
    assert data.tokenizer.eos_token_id == data.tokenizer.convert_tokens_to_ids("<|end|>")
    ends = int((ids == data.tokenizer.eos_token_id).sum())
    assert len(stories(data)[0]) - 1 <= ends <= len(stories(data)[0])


def test_tokenizer_is_taken_from_a_folder(tmp_path):
    library(tmp_path / "texts")
    first = prepared(files=[str(tmp_path / "texts")], vocab_size=290)
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    second = prepared(files=[str(tmp_path / "texts")], tokenizer=str(tmp_path / "tokenizer"), vocab_size=400)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert torch.equal(tokens(second.train_dataloader()), tokens(first.train_dataloader()))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra 'datasets'")
def test_dataset_is_read_by_its_text_column(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = "\n".join(json.dumps({"text": story(f"{number:03d}"), "id": number}) for number in range(60))
    write(tmp_path / "corpus" / "train.jsonl", rows)
    train, validation = stories(prepared(dataset=str(tmp_path / "corpus")))
    assert len(train) > len(validation) > 0
    assert not train & validation
    assert len(train | validation) == 60


def few(directory: Path) -> dict[str, Any]:
    write(directory / "one.txt", story("one"))
    return {"files": [str(directory)]}


def endless(directory: Path) -> dict[str, Any]:
    """A tokenizer without an end token, as encoders have."""
    data = prepared(files=[str(library(directory / "texts"))])
    data.tokenizer.eos_token = None
    data.tokenizer.save_pretrained(directory / "tokenizer")
    return {"files": data.files, "tokenizer": str(directory / "tokenizer")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (few, r"(train|validation) text has \d+ tokens, less than one block of 16"),
        (lambda directory: {"files": [str(directory / "typo.txt")]}, r"files: .*typo.txt does not exist"),
        (lambda directory: {"files": [str(directory)]}, "no text found"),
        (lambda directory: {"files": [str(library(directory))], "max_bytes": 10}, "text has 0 tokens|max_bytes"),
        (endless, "(?i)end"),
    ],
    ids=["few", "typo", "empty", "max_bytes", "no-end-token"],
)
def test_data_that_cannot_be_trained_on_is_refused_with_its_reason(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(**options(tmp_path))


# The language model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TextData:
    return prepared(files=[str(library(tmp_path_factory.mktemp("texts")))])


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder


class Rates(Callback):
    """The learning rate of each step, and what it is at the end."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(module: CausalLM, data: TextData, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
    defaults = {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(callbacks=list(callbacks), **defaults | quiet | options)
    trainer.fit(module, data)
    return trainer


def test_without_a_model_it_is_a_llama_for_the_datas_tokenizer():
    """Embeddings of another size would index out of range, or waste parameters."""
    data = prepared(max_bytes=400_000)
    model = load_model(None, data.tokenizer)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(data.tokenizer)
    assert model.config.eos_token_id == data.tokenizer.eos_token_id
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="datamodule with a tokenizer"):
        load_model(None, None)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_config_alone_gives_random_weights_of_its_shape(config_folder, kind):
    seed_everything(0, verbose=False)
    name = str(config_folder if kind == "folder" else config_folder / "config.json")
    one, other = load_model(name), load_model(name)
    assert one.config.hidden_size == 128
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_with_weights_is_loaded_into_fp32_masters(config_folder, tmp_path, dtype):
    """bf16 masters would lose most updates of a small learning rate."""
    saved = load_model(str(config_folder)).to(dtype)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for parameter, expected in zip(loaded.parameters(), saved.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected.float())


def test_a_folder_with_weights_in_another_format_never_starts_from_random_ones(config_folder, tmp_path):
    """``pytorch_model.bin`` is loaded or refused; a fresh model in its place would be found out a training later."""
    saved = load_model(str(config_folder))
    saved.config.save_pretrained(tmp_path)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    try:
        loaded = load_model(str(tmp_path))
    except (ValueError, OSError):
        return
    assert torch.equal(loaded.model.embed_tokens.weight, saved.model.embed_tokens.weight)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_in_words(config_folder, tmp_path):
    """A pretrained model with the default tokenizer, say; "index out of range in self" helps nobody."""
    data = prepared(files=[str(library(tmp_path))], vocab_size=400)
    data.tokenizer.add_tokens([f"extra{number}" for number in range(200)])
    with pytest.raises(ValueError, match=r"(?i)(vocab|tokenizer).*300"):
        fit(CausalLM(str(config_folder)), data)


@pytest.mark.parametrize(("steps", "warmup"), [(12, 4), (6, 0), (5, 50)], ids=["usual", "no-warmup", "all-warmup"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine(config_folder, data, steps, warmup, accumulate):
    """Per optimizer step, from the peak over `warmup_steps` up to the peak, then down to `final_share` of it."""
    peak, final = 1e-3, 0.2e-3

    def expected(step: int) -> float:
        if step < warmup:
            return peak * (1 / warmup + (1 - 1 / warmup) * step / warmup)
        return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    rates, module = Rates(), CausalLM(str(config_folder), peak, warmup_steps=warmup, final_share=0.2)
    fit(module, data, rates, steps=steps, accumulate_grad_batches=accumulate)
    assert rates.values[:-1:accumulate] == pytest.approx([expected(step) for step in range(steps)])
    assert rates.values[-1] == pytest.approx(expected(steps))
    if warmup < steps:
        assert rates.values[-1] == pytest.approx(final)


def test_weight_decay_is_for_matrices_alone(config_folder, data):
    """Decayed norms pull the activations towards zero."""
    module = CausalLM(str(config_folder), weight_decay=0.3)
    groups = fit(module, data, steps=1).optimizers[0].param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name: decay[id(parameter)] for name, parameter in module.named_parameters()} == {
        name: 0.0 if "norm" in name else 0.3 for name, _ in module.named_parameters()
    }


def test_learned_scales_do_not_decay(config_folder, data):
    """They are matrices as well, and a scale that decays makes its weights' range smaller at each step."""
    module = CausalLM(str(config_folder), weight_decay=0.3)
    callback = QATCallback("W8A16", targets=["re:.*_proj$"], learned_scales=True)
    groups = fit(module, data, callback, steps=1).optimizers[0].param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    learned = {name: one for name, one in module.named_parameters() if name.endswith(".weight_scale")}
    assert learned
    assert {decay[id(one)] for one in learned.values()} == {0.0}
    assert {one.ndim for one in learned.values()} == {2}


def test_training_lowers_the_loss_and_perplexity_is_its_exponential(config_folder, data):
    curve = demo.Curve()
    module = CausalLM(str(config_folder), 1e-2, warmup_steps=2)
    options = {"limit_val_batches": 4, "val_check_interval": 10, "check_val_every_n_epoch": None}
    trainer = fit(module, data, curve, steps=30, **options)
    metrics = trainer.callback_metrics
    assert metrics["val/perplexity"].item() == pytest.approx(math.exp(metrics["val/loss"].item()), rel=1e-5)
    assert [step for step, _ in curve.points] == [10, 20, 30]
    assert curve.points[-1][1] == metrics["val/perplexity"].item() < curve.points[0][1]


@pytest.mark.parametrize("quantized", [False, True])
def test_saved_masters_are_an_ordinary_folder(config_folder, data, tmp_path, quantized):
    """Anything that reads transformers folders goes on from them; QAT leaves no mark, not in the config either."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = CausalLM(str(config_folder), save_dir=str(tmp_path / "masters"))
    fit(module, data, *[QATCallback(export_dir=str(tmp_path / "out"))] * quantized)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masters")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.model.parameters(), strict=True))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "masters" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "masters").get_vocab() == data.tokenizer.get_vocab()
    if quantized:
        batch = next(iter(data.val_dataloader()))
        lockstep.prepare(loaded, "W4A16")
        assert lockstep.align.compare(loaded, tmp_path / "out", {"input_ids": batch["input_ids"]}).aligned
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == data.tokenizer.get_vocab()


def test_checkpoints_load_without_a_trainer(config_folder, data, tmp_path):
    """``load_from_checkpoint`` is how a script gets at the trained model."""
    module = CausalLM(str(config_folder))
    fit(module, data, QATCallback()).save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))


# The demo's figures ------------------------------------------------------------------------------------------------

RESULT = demo.Result(
    seed=0,
    bf16=10.0,
    rounded=12.0,
    qat=10.5,
    served=10.51,
    bf16_bytes=4_096_000,
    int4_bytes=1_126_400,
    aligned=True,
    mean_logprob_difference=1e-3,
    seconds=60.0,
)
OTHER = replace(RESULT, seed=1, bf16=11.0, rounded=13.0, qat=12.0, served=12.0, mean_logprob_difference=3e-3)


def printed(results: list[demo.Result]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(demo.table(results))
    return " ".join(re.sub(r"[│┃]", " ", capture.get()).split())


def test_won_back_is_the_share_of_what_rounding_loses():
    assert RESULT.won_back == 0.75
    assert replace(RESULT, qat=10.0).won_back == 1
    assert replace(RESULT, qat=12.0).won_back == 0
    assert replace(RESULT, qat=13.0).won_back == -0.5
    assert replace(RESULT, qat=9.0).won_back == 1.5


def test_table_of_one_seed():
    table = printed([RESULT])
    assert "held-out Python modules, seed 0" in table
    assert "bf16, same tokens 10.000 4,000 KiB" in table
    assert "INT4, rounded to nearest 12.000 +20.00 % 0 % 1,100 KiB" in table
    assert "INT4 QAT 10.500 +5.00 % 75 % 1,100 KiB" in table
    assert "exported, in transformers 10.510 +5.10 % 1,100 KiB" in table
    assert "The export is aligned" in table
    assert "1.0e-03" in table
    assert "±" not in table


def test_table_of_several_seeds_has_mean_and_spread():
    """One seed is an anecdote. Means of ratios, not ratios of means; of the alignments the worst."""
    table = printed([RESULT, OTHER])
    assert "seeds 0, 1" in table
    assert "bf16, same tokens 10.500 ± 0.707" in table
    assert "INT4 QAT 11.250 ± 1.061 +7.05 ± 2.89 % 62 ± 18 %" in table
    assert "3.0e-03" in table


@pytest.mark.parametrize("results", [[replace(RESULT, aligned=False)], [RESULT, replace(OTHER, aligned=False)]])
def test_table_says_so_when_any_export_is_not_aligned(results):
    table = printed(results)
    assert "NOT ALIGNED: see alignment.html" in table
    assert "bit for bit" not in table


@pytest.mark.parametrize("points", [1, 6])
def test_plot_is_written_without_a_display(tmp_path, points):
    curves = {name: [(step, 12.0 - step / 10) for step in range(points)] for name in ("bf16", "INT4 QAT")}
    demo.plot([RESULT, OTHER], curves, tmp_path / "perplexity.png")
    content = (tmp_path / "perplexity.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000

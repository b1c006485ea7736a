"""The measures of the accuracy study mean what they say."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lockstep.recipes.evaluate import completions_that_parse, evaluate, line_ends_of, line_prompts, parses

WORDS = ["<end>", "a", "b", "\n", "\n  ", "x\n", " ", "x"]
END_CLASSES = torch.tensor([0, 1, 2, -1, -1, -2, 6, 7])


@pytest.fixture
def tokenizer():
    """Eight tokens, three of which end a line."""
    bpe = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<end>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


class Fixed(nn.Module):
    """A model whose most likely next token after position i of any block is ``best[i]``."""

    def __init__(self, best, confidence=4.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.best, self.confidence = torch.tensor(best), confidence

    def forward(self, input_ids, use_cache):
        logits = nn.functional.one_hot(self.best, len(WORDS)).float() * self.confidence
        return SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1))


def test_tokens_that_end_a_line_are_alike_up_to_its_end(tokenizer):
    assert line_ends_of(tokenizer).tolist() == END_CLASSES.tolist()


def test_perplexity_and_kl_are_torchs_own():
    model, reference = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    blocks = torch.randint(0, model.config.vocab_size, (3, 16))
    found = evaluate(model, blocks, torch.arange(model.config.vocab_size), reference, batch_size=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, expected = (one.eval()(input_ids=blocks).logits[:, :-1].float() for one in (model, reference))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    kl = nn.functional.kl_div(
        logits.log_softmax(-1).flatten(0, 1), expected.log_softmax(-1).flatten(0, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.agreement == pytest.approx((logits.argmax(-1) == expected.argmax(-1)).float().mean().item())
    assert found.accuracy == pytest.approx((logits.argmax(-1) == blocks[:, 1:]).float().mean().item())
    assert found.tokens == 45


def test_a_reference_of_another_precision_changes_nothing_else():
    model, blocks = tiny_llama(), torch.randint(0, 512, (3, 16))
    ends = torch.arange(model.config.vocab_size)
    alone, beside = (evaluate(model, blocks, ends, other) for other in (None, tiny_llama(torch.float32, seed=1)))
    assert (alone.perplexity, alone.accuracy) == (beside.perplexity, beside.accuracy)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_blocks_without_a_next_token_are_refused(shape):
    with pytest.raises(ValueError, match="no next token to predict"):
        evaluate(tiny_llama(), torch.zeros(shape, dtype=torch.long), torch.arange(512))


def test_a_model_is_its_own_reference():
    model = tiny_llama()
    blocks = torch.randint(0, model.config.vocab_size, (2, 8))
    found = evaluate(model, blocks, torch.arange(model.config.vocab_size), model)
    assert (found.agreement, found.kl) == (1.0, pytest.approx(0, abs=1e-6))


@given(st.lists(st.integers(0, 7), min_size=4, max_size=24), st.data())
def test_exact_lines_are_those_of_a_plain_loop(block, data):
    best = data.draw(st.lists(st.sampled_from(block), min_size=len(block), max_size=len(block)))
    found = evaluate(Fixed(best), torch.tensor([block]), END_CLASSES)
    lines, line = [], []
    for place, token in enumerate(block):
        line.append(place)
        if END_CLASSES[token] < 0:
            lines.append(line)
            line = []
    asked = [line for line in lines if line[0] >= max(1, len(block) // 2) and len(line) > 1]
    right = [line for line in asked if all(END_CLASSES[best[i - 1]] == END_CLASSES[block[i]] for i in line)]
    assert found.lines == len(asked)
    assert found.exact_line == pytest.approx(len(right) / max(1, len(asked)))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    found = evaluate(Fixed([1] * 8, confidence=0.0), torch.randint(0, 8, (2, 8)), END_CLASSES)
    assert found.perplexity == pytest.approx(8)


@pytest.mark.parametrize(
    "line",
    ["x = 1", "if x:", "elif x:", "else:", "except ValueError:", "finally: f()", "@property", "return 3", "yield x",
     "break", "case 1:", "async def f():", "await f()", "for a in b: print(a)"],
)  # fmt: skip
def test_lines_of_python_parse(line):
    assert parses(f"    {line}")


@pytest.mark.parametrize("line", ["x = (", "if x", "def f(", "1 +", "return return", "else", "x y"])
def test_what_is_no_line_of_python_does_not(line):
    assert not parses(line)


class Writer(nn.Module):
    """Continues every prompt with the same tokens."""

    def __init__(self, answer):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.zeros(1)), torch.tensor(answer)

    def generate(self, batch, max_new_tokens, **_):
        return torch.cat([batch, self.answer[:max_new_tokens].expand(len(batch), -1)], 1)


def test_only_finished_lines_that_parse_count(tokenizer):
    prompts = torch.tensor([[1, 3], [2, 3]])
    assert completions_that_parse(Writer([1, 3, 2]), tokenizer, prompts) == 1
    assert completions_that_parse(Writer([1, 6, 2, 3]), tokenizer, prompts) == 0  # "a b" is no Python
    assert completions_that_parse(Writer([1, 2, 1]), tokenizer, prompts) == 0  # no end


def test_prompts_end_where_a_line_that_parses_begins(tokenizer):
    blocks = torch.tensor([[1, 3, 1, 6, 2, 3, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
    prompts = line_prompts(blocks, tokenizer, END_CLASSES, 2, 5)
    assert prompts.tolist() == [[2, 3]]  # after "a b", since "b" parses and "a b" does not
    with pytest.raises(ValueError, match="no line that parses follows 8 tokens"):
        line_prompts(blocks, tokenizer, END_CLASSES, 8, 5)

"""Models that recite rows after the tokens that their tokenizer puts in front."""

import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lightning_curvature.cli.parser import main
from lightning_curvature.text.sequences import PromptedSequence

BOS, INNER = 39, 38
CASES = {
    "gemma3": ("<s> $A", (BOS,)),
    "llama": ("<s> $A <end>", (BOS,)),
    "mistral": ("<s> <i> $A", (BOS, INNER)),
    "olmo2": ("$A", ()),
}

PREFIX, SUFFIX = 6, 5


def texts(rows, length, seed=0):
    """Random words."""
    return torch.randint(1, 38, (rows, length), generator=torch.Generator().manual_seed(seed))


class Fronted(SimpleNamespace):
    """A saved model that recites rows after the tokens in front alone, its tokenizer, and files."""


def prompted(row, front=(), marked=0):
    return PromptedSequence((*front, *row[:PREFIX]), tuple(row[PREFIX:]), num_leading=marked)


def cut(fronted, length):
    """Windows of the plain text by hand: the tokens in front, and then the text."""
    num_words = length - len(fronted.front)
    ids = fronted.rows.flatten().tolist()
    return torch.tensor(
        [[*fronted.front, *ids[i : i + num_words]] for i in range(0, len(ids) - num_words + 1, num_words)]
    )


def scored(fronted, net, windows):
    """Logits and targets of the text's own tokens, the first one behind a token in front among them."""
    first = max(len(fronted.front), 1)
    with torch.no_grad():
        return net(input_ids=windows).logits[:, first - 1 : -1], windows[:, first:]


def perplexity(fronted, net, windows):
    logits, target = scored(fronted, net, windows)
    return float(F.cross_entropy(logits.flatten(0, 1).double(), target.flatten()).exp())


def greedy(net, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def recites(fronted, net):
    """Tell for each row whether a model recites its suffix after the tokens in front and its prefix."""
    rows = fronted.rows.tolist()
    return [greedy(net, [*fronted.front, *row[:PREFIX]], SUFFIX) == row[PREFIX:] for row in rows]


def run(capsys, *args):
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)

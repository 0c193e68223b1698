"""Decoding one token at a time, as a slow reference."""

import torch

from lightning_curvature.text import decoding
from lightning_curvature.text.sequences import PromptedSequence


def prompted(rows, prefix):
    return [PromptedSequence(tuple(row[:prefix]), tuple(row[prefix:])) for row in rows.tolist()]


def slow_greedy(net, prompt, length, penalty=1.0):
    """One token at a time, without a cache; stops after the end-of-text token."""
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            break
    said = ids[len(prompt) :]
    return said + [decoding.NO_TOKEN] * (length - len(said))

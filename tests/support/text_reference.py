"""Slow text metrics in plain Python: lists in, numbers out. Nothing of the package is imported."""

import math
import re
import unicodedata


def edit_distance(a, b):
    """Textbook dynamic programming over the whole table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return table[-1][-1]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def strict_memorization(preds, target):
    return mean(float(p == t) for p, t in zip(preds, target, strict=True))


def loose_memorization(preds, target, percent=75):
    """The comparison is made in integers: (L - d) / L >= percent / 100."""
    return mean(
        float(100 * (len(t) - edit_distance(p, t)) >= percent * len(t)) for p, t in zip(preds, target, strict=True)
    )


def normalized_edit_distance(preds, target):
    return mean(edit_distance(p, t) / len(t) for p, t in zip(preds, target, strict=True))


def extraction_strength(preds, target):
    strengths = []
    for p, t in zip(preds, target, strict=True):
        k = 0
        while p[k:] != t[k:]:
            k += 1
        strengths.append((len(t) - k) / len(t))
    return mean(strengths)


def longest_exact_prefix(preds, target):
    lengths = []
    for p, t in zip(preds, target, strict=True):
        length = 0
        while length < len(t) and p[length] == t[length]:
            length += 1
        lengths.append(length)
    return lengths


def log_prob(row, token):
    top = max(row)
    return row[token] - top - math.log(sum(math.exp(value - top) for value in row))


def min_k_scores(logits, target, percent, ignore_index):
    """One value for each sequence, None where no position counts."""
    scores = []
    for rows, tokens in zip(logits, target, strict=True):
        values = [log_prob(row, token) for row, token in zip(rows, tokens, strict=True) if token != ignore_index]
        taken = max(1, -(-percent * len(values) // 100))
        scores.append(mean(sorted(values)[:taken]) if values else None)
    return scores


def perplexity(rows, tokens, ignore_index):
    return math.exp(
        -mean(log_prob(row, token) for row, token in zip(rows, tokens, strict=True) if token != ignore_index)
    )


def ranking(row):
    return sorted(range(len(row)), key=lambda token: -row[token])


def ranking_overlap(rows, baseline, k):
    scores = []
    for row, base in zip(rows, baseline, strict=True):
        relevance = {token: k - rank for rank, token in enumerate(ranking(base)[:k])}
        gain = sum(relevance.get(token, 0) / math.log2(i + 1) for i, token in enumerate(ranking(row)[:k], start=1))
        best = sum((k + 1 - i) / math.log2(i + 1) for i in range(1, k + 1))
        scores.append(gain / best)
    return mean(scores)


def normalize_answer(text):
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[^\w\s]|_", "", text)  # letters, digits and spaces stay: enough for the inputs of the tests
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def recall_accuracy(preds, answers):
    return mean(
        float(any(normalize_answer(pred) == normalize_answer(answer) for answer in accepted))
        for pred, accepted in zip(preds, answers, strict=True)
    )

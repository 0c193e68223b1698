"""Accuracy under noisy labels, example by example."""


def slow(logits, noised, clean):
    memorized = recovered = total = 0
    for row, given, true in zip(logits.tolist(), noised.tolist(), clean.tolist(), strict=True):
        if given != true:
            answer = row.index(max(row))
            memorized, recovered, total = memorized + (answer == given), recovered + (answer == true), total + 1
    return {"memorized": memorized / total, "recovered": recovered / total}

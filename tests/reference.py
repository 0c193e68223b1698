"""Slow, independent references. Imports nothing of the package."""

import heapq
import itertools

import torch
import torch.nn.functional as F


def layer_io(model, layer, inputs):
    """Run a model on one example; return logits, the layer's input and its output (with graph)."""
    seen = {}
    handle = layer.register_forward_hook(lambda _m, args, out: seen.update(x=args[0].detach(), y=out))
    logits = model(inputs)
    handle.remove()
    return logits, seen["x"], seen["y"]


def rows_of(layer, x, y_grad):
    """Rows of inputs and output gradients of one call on a batch of one; convolutions by explicit patch loops."""
    if isinstance(layer, torch.nn.Conv2d):
        kh, kw = layer.kernel_size
        (sh, sw), (dh, dw) = layer.stride, layer.dilation
        if layer.padding == "same":
            th, tw = dh * (kh - 1), dw * (kw - 1)
            pad = [tw // 2, tw - tw // 2, th // 2, th - th // 2]
        else:
            ph, pw = (0, 0) if layer.padding == "valid" else layer.padding
            pad = [pw, pw, ph, ph]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, pad, mode=mode)
        patches, grads = [], []
        for i, j in itertools.product(range(y_grad.shape[2]), range(y_grad.shape[3])):
            window = x[0, :, i * sh : i * sh + dh * (kh - 1) + 1 : dh, j * sw : j * sw + dw * (kw - 1) + 1 : dw]
            patches.append(window.reshape(-1))
            grads.append(y_grad[0, :, i, j])
        return torch.stack(patches), torch.stack(grads)
    return x.reshape(-1, x.shape[-1]), y_grad.reshape(-1, y_grad.shape[-1])


def factors(model, layer, examples, vectors, positions="all"):
    """Second moments from one backward pass per example and per vector.

    ``vectors(logits, index)`` yields the vectors to backpropagate from the logits of example ``index``.
    """
    a_rows, g_sum, count = [], 0.0, 0
    for index, inputs in enumerate(examples):
        logits, x, y = layer_io(model, layer, inputs[None])
        contributing, sums = False, 0.0
        for v in vectors(logits, index):
            (grad,) = torch.autograd.grad(logits, y, v, retain_graph=True, allow_unused=True)
            a, g = rows_of(layer, x, torch.zeros_like(y) if grad is None else grad)
            sums = sums + g.T @ g
            contributing = contributing | (g != 0).any(1)
        keep = contributing if positions == "contributing" else torch.ones_like(contributing)
        a_rows.append(a[keep])
        g_sum = g_sum + sums
        count += int(keep.sum())
    rows = torch.cat(a_rows)
    return rows.T @ rows / count, g_sum / count, count


def exact_vectors(logits, _index):
    """All classes at every loss position: sqrt(p_c) (p - onehot(c))."""
    p = logits.detach().softmax(-1)
    classes = p.shape[-1]
    for position in range(p[..., 0].numel()):
        for c in range(classes):
            v = torch.zeros_like(p).view(-1, classes)
            row = p.view(-1, classes)[position]
            v[position] = row[c].sqrt() * (row - F.one_hot(torch.tensor(c), classes))
            yield v.view_as(p)


def label_vectors(labels):
    """The data's labels: p - onehot(y)."""

    def vectors(logits, index):
        p = logits.detach().softmax(-1)
        yield p - F.one_hot(labels[index], p.shape[-1]).view_as(p)

    return vectors


def select(lam, mu, energy):
    """Brute force: pop pairs off a heap, then add those tied with the last; a set of (i, j)."""
    mass = {(i, j): float(lam[i] * mu[j]) for i in range(len(lam)) for j in range(len(mu))}
    if energy == 1.0:
        return set(mass)
    total = float(lam.sum() * mu.sum())
    heap = [(-m, pair) for pair, m in mass.items() if m > 0]
    heapq.heapify(heap)
    kept, reached, last = set(), 0.0, 0.0
    while heap and reached < energy * total * (1 - 1e-12):
        negative, pair = heapq.heappop(heap)
        kept.add(pair)
        reached, last = reached - negative, -negative
    return kept | {pair for pair, m in mass.items() if m > 0 and m >= last * (1 - 1e-9)}


def edit(weight, A, G, energy):
    """Project by a loop over the selected pairs."""
    lam, U_G = torch.linalg.eigh(G)
    mu, U_A = torch.linalg.eigh(A)
    lam, U_G, mu, U_A = lam.flip(0).clamp(min=0), U_G.flip(1), mu.flip(0).clamp(min=0), U_A.flip(1)
    result = torch.zeros_like(weight)
    for i, j in select(lam, mu, energy):
        u, v = U_G[:, i], U_A[:, j]
        result += (u @ weight @ v) * torch.outer(u, v)
    return result

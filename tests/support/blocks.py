"""Blocks of networks by their parts, and what is chosen of them."""

import re

from torch import nn

from lightning_curvature.layers.selection import choose_layers


class Parts(nn.Module):
    """Modules by attribute, which run one after the other."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def named(title, **parts):
    """Make a module of a class of one's own."""
    return type(title, (Parts,), {})(**parts)


def lin(d_in=8, d_out=8):
    return nn.Linear(d_in, d_out)


def stack(*blocks):
    return nn.Sequential(nn.ModuleList(blocks), lin(8, 3))


def both(title="Block", **parts):
    """Two blocks with attention of torch's own and something beside it."""
    return stack(*(named(title, attn=nn.MultiheadAttention(8, 2), **{k: v() for k, v in parts.items()}) for _ in "ab"))


def mlp_in_out():
    return nn.ModuleDict({"in_proj": lin(8, 16), "mid": lin(16, 16), "out_proj": lin(16, 8)})


class Attention(Parts):
    def __init__(self):
        super().__init__(to_q=lin(), to_kv=lin(8, 16), to_out=nn.Sequential(lin(), nn.Dropout(0.1)))


def experts():
    return named("MoE", gate=lin(8, 2), experts=nn.ModuleList(named("Expert", w1=lin(), w2=lin()) for _ in "ab"))


def spelled(pattern, prefix):
    names = [pattern] if pattern else []
    while any(set("|#") & set(name) for name in names):
        split = []
        for name in names:
            group = re.search(r"\(([^()]*)\)|#", name)
            options = "01" if group[0] == "#" else group[1].split("|")
            split += [name[: group.start()] + option + name[group.end() :] for option in options]
        names = split
    return {prefix + name for name in names}


def resolve_all(net, layers, heads, dead=(), silent=(), read=()):
    """What is chosen if all candidates run, in the order in which they are written, but for some."""
    choice = choose_layers(net, layers)
    ran = [name for name in choice.modules if name not in silent]
    return choice.resolve(ran, set(heads), [name for name in dead if name in choice.modules], read)

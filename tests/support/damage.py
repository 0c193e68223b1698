"""Random damage of files, the same in every run."""

import io
import itertools
import json
import math
import zipfile

import torch

HUGE, DEEP = "@huge@", "@deep@"  # replaced in the text: what json.dumps does not write
MARKS = {HUGE: "9" * 5000, DEEP: "[" * 20_000 + "]" * 20_000}
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    0.5,
    -2.5,
    1e300,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    "fc.A",
    "I32",
    "\ud800",
    "\0",
    "../x",
    "/",
    ".",
    "tensor:",
    "tensor:x",
    "n" * 300,
    "{}",
    "{",
    "null",
    [],
    {},
    [1],
    [-1, 2],
    [None],
    ["x"],
    {"a": 1},
    {"": {}},
    HUGE,
    DEEP,
)

KINDS = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "U64",
    "F64",
    "C64",
)

BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"{",
    b"}",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0\0\0\0\0\0\0\x7f",
    b"\xff" * 8,
    b"9" * 30,
)


def damaged_bytes(rng, data):
    """Flip, cut off, take out, repeat or replace."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 40, 400)))
        match rng.randrange(6):
            case 0:
                for place in rng.choices(range(len(data)), k=rng.choice((1, 1, 2, 8))) if data else ():
                    data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:]
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = data[start:end] * rng.choice((1, 3))
            case 4:
                data[start:end] = rng.randbytes(end - start)
            case 5:
                data[start:end] = rng.choice(BYTES)
    return bytes(data)


def damaged_tree(rng, tree, values=VALUES):
    """Change one thing: a value, a key, an entry more or less; JSON inside of strings, too."""
    if isinstance(tree, str) and tree.startswith('{"') and rng.random() < 0.95:
        return json.dumps(damaged_tree(rng, json.loads(tree)), separators=(",", ":"))
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(values)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        middle = rng.choice(([], [tree[place]] * 2, [damaged_tree(rng, tree[place], values)]))
        return [*tree[:place], *middle, *tree[place + 1 :]]
    key = rng.choice(list(tree))
    match rng.randrange(8):
        case 0:
            return {name: value for name, value in tree.items() if name != key}
        case 1:
            name = rng.choice(("", "x", f"{key}.A", key[:-1], "\ud800", "__metadata__", *tree))
            return {name if old == key else old: value for old, value in tree.items()}
        case 2:
            return {**tree, key: tree[rng.choice(list(tree))]}
        case 3:
            return {**tree, rng.choice(("A", "extra", "", *tree)): rng.choice(values)}
    return {**tree, key: damaged_tree(rng, tree[key], values)}


def dumped(tree):
    text = json.dumps(tree, separators=(",", ":"))
    for quote, (mark, content) in itertools.product(('\\\\"', '"'), MARKS.items()):  # also in JSON inside of a string
        text = text.replace(f"{quote}{mark}{quote}", content)
    return text


def damaged_json(rng, data):
    """One of its values is another one."""
    return dumped(damaged_tree(rng, json.loads(data))).encode()


def damaged_lines(rng, data):
    """One of its lines holds another record."""
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = dumped(damaged_tree(rng, json.loads(lines[place])))
    return "\n".join(lines).encode()


def damaged_cells(rng, data):
    """One of the cells of a table is another one, or there is one more or less."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice((1, 1, 3))):
        row = rng.choice(rows)
        place = rng.randrange(len(row))
        cells = (
            "",
            "x",
            "nan",
            "inf",
            "-1",
            "0",
            "2",
            "1e999",
            '"',
            '"a',
            "a\rb",
            "a\0b",
            "é",
            "9" * 200_000,
            row[place],
        )
        row[place : place + 1] = rng.choice(([], [row[place]] * 2, [rng.choice(cells)]))
        if not row:
            row.append("")
    return "\n".join(map(",".join, rows)).encode()


def damaged_header(rng, data):
    """The header of a safetensors file holds something else; its length is right."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    match rng.randrange(4):
        case 0:  # another tensor of as many bytes
            entry = rng.choice(tensors)
            size = math.prod(entry["shape"])
            entry["shape"] = rng.choice(([size], [1, size], [size, 1], [], [*entry["shape"], 1], [2 * size], [0, 3]))
            entry["dtype"] = rng.choice((entry["dtype"], "I32", *KINDS))
        case 1:
            first, second = rng.choices(tensors, k=2)
            first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
        case _ if "__metadata__" in header and rng.random() < 0.8:
            header["__metadata__"] = damaged_tree(rng, header["__metadata__"])
        case _:
            header = damaged_tree(rng, header)
    text = dumped(header).encode()
    return len(text).to_bytes(8, "little") + text + body


TENSORS = (
    torch.ones(2),
    torch.ones(()),
    torch.ones(0, 0),
    torch.eye(3).int(),
    torch.eye(3).to_sparse(),
    torch.eye(3, device="meta"),
    torch.eye(3) * math.nan,
    torch.ones(1).expand(2**24, 2**24),
    torch.eye(3).cfloat(),
    torch.eye(3).cfloat().conj(),
    b"x",
    (1,),
    {1, 2},
    {1: torch.ones(1)},
    {("a",): 1},
    complex(1),
    torch.float32,
)


def damaged_archive(rng, data):
    """A file of torch.save holds something else, or another pickle."""
    if rng.random() < 0.5:
        content = torch.load(io.BytesIO(data), weights_only=True)
        out = io.BytesIO()
        tree = damaged_tree(rng, dict(content), (*VALUES, *TENSORS, *TENSORS))
        torch.save(tree, out, _use_new_zipfile_serialization=rng.random() < 0.8)
        return out.getvalue()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damaged_bytes(rng, data)
    out, place = io.BytesIO(), rng.choice(("/data.pkl", "/data.pkl", "/data.pkl", "/byteorder", "/version", "/data/0"))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged_bytes(rng, content) if name.endswith(place) else content)
    return out.getvalue()


def damaged(rng, data, *structured):
    """Bytes a third of the time, or the structure."""
    return rng.choice((damaged_bytes, *(structured or (damaged_bytes,)) * 2))(rng, data)

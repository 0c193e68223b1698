"""Records of JSON lines."""

import pytest

from lightning_curvature.storage import jsonl


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, message in [
        ('{"a": 1}\n\n{"a": \n', "x.jsonl, line 3: not JSON"),
        ('{"a": 1}\n[2]\n', "line 2: expected a JSON object, found list"),
        ('{"a": 1}\n{"b": 1}\n', r"line 2: lacks \['a'\]; it has \['b'\]"),
        ("\n\n", "the file is empty"),
        ("", "the file is empty"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            list(jsonl.read_jsonl(path, ["a"]))
    with pytest.raises(FileNotFoundError):
        list(jsonl.read_jsonl(tmp_path / "none.jsonl"))

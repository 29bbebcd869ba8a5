"""How files are damaged: bytes at random places, and values of their JSON or yaml at random places."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

from ldm.tensor_files import ENTRY

# Values that a reader might not expect in the place of another. Copies, as a further damage may change them.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 10**6, 2**31, 2**63, 2**64, -(2**63), 1e308, -0.5, float("inf"), float("nan")]),
    st.sampled_from(
        ["", "a", "../../etc/passwd", "\u0085", "\ud83e\udd84", "1e400", "x" * 5000, "builtins.eval", "os.system"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": 0}, {"target": "os.system", "params": {"command": "false"}}]),
    st.integers(),
    st.text(max_size=20),
).map(copy.deepcopy)


class Content(bytes):
    """The content of a file. hypothesis prints what strategies are made of, and megabytes take long."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@st.composite
def damaged_bytes(draw: st.DrawFn, content: Content) -> bytes:
    """Return the content of a file with one to four damages: overwritten, cut, inserted, emptied, or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = len(data)
        # Headers and tables of contents lie at the ends.
        places = [st.integers(0, min(end, 600)), st.integers(max(end - 600, 0), end), st.integers(0, end)]
        at = draw(st.one_of(places))
        kind = draw(st.sampled_from(("overwrite", "cut", "insert", "empty", "repeat", "number")))
        if kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(new)] = new
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=30))
        elif kind == "empty":
            length = draw(st.integers(1, 3000))
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "repeat":
            data[at:at] = data[max(at - draw(st.integers(1, 200)), 0) : at]
        else:
            data[at : at + 8] = draw(st.sampled_from((2**63, 2**31, 2**20, 0, 2**64 - 1))).to_bytes(8, "little")
    return bytes(data)


@st.composite
def damaged_values(draw: st.DrawFn, content: Any) -> Any:
    """Return plain containers in which one to three values are replaced, removed or renamed."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        node, key = content, None
        while isinstance(node, dict | list) and node:
            parent, keys = node, sorted(node, key=str) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(list(keys)))
            node = parent[key]
            if draw(st.integers(0, 3)) == 0:
                break
        if key is None:
            return draw(ODD)
        kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
        if kind == "replace" or isinstance(parent, list):
            parent[key] = draw(ODD)
        else:
            value = parent.pop(key)
            if kind == "rename":
                parent[draw(st.text(max_size=10))] = value
    return content


def without_check_sum(content: bytes) -> bytes:
    """Return a .safetensors without its checksum, which would tell of every damage before a loader meets it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.get("__metadata__", {}).pop(ENTRY, None)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@st.composite
def damaged_header(draw: st.DrawFn, content: Content, entry: str) -> bytes:
    """Return a .safetensors whose metadata `entry`, a JSON text, has damaged values; its tensors are whole."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    values = draw(damaged_values(json.loads(header["__metadata__"][entry])))
    header["__metadata__"][entry] = json.dumps(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]

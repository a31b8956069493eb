"""Types are decoded in any number of threads, and by distckpt.decoding alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import distckpt

PACKAGE = Path(distckpt.__file__).parent

# In a process of its own: what this is about ends it. Types that are decoded for the first time are made again and
# again; threads change as often as Python can have them.
PROGRAM = """
import sys, threading, types
from distckpt.decoding import decode_builtins, decode_json, decode_msgpack

TYPES = '''
from __future__ import annotations
from typing import Annotated
import msgspec
Size = Annotated[int, msgspec.Meta(ge=0)]
class Inner(msgspec.Struct):
    size: Size
    name: str | None = None
class Outer(msgspec.Struct):
    inner: tuple[Inner, ...]
    named: dict[str, Inner]
'''
JSON = b'{"inner": [{"size": 1}], "named": {"a": {"size": 2, "name": "n"}}}'
MSGPACK = b"\\x82\\xa5inner\\x91\\x81\\xa4size\\x01\\xa5named\\x80"
sys.setswitchinterval(1e-6)

def run(decode, data, kind, found):
    barrier.wait()
    found.append(decode(data, kind))

for number in range(300):
    module = sys.modules["made"] = types.ModuleType("made")
    exec(TYPES, module.__dict__)
    works = [
        (decode_json, JSON, module.Outer),
        (decode_json, b'{"size": 3}', module.Inner),
        (decode_msgpack, MSGPACK, module.Outer),
        (decode_builtins, {"inner": [], "named": {}}, module.Outer),
    ]
    barrier, found = threading.Barrier(len(works)), []
    threads = [threading.Thread(target=run, args=(*work, found)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(works), found
    sizes = sorted(one.size if isinstance(one, module.Inner) else len(one.inner) + len(one.named) for one in found)
    assert sizes == [0, 1, 2, 3], found
"""


def test_types_are_decoded_for_the_first_time_in_several_threads() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_process_that_is_forked_while_a_thread_finds_out_decodes() -> None:
    program = """
import os, sys, threading, time
from distckpt import decoding

class Slow:
    def __init__(self, make): self.make = make
    def __call__(self, kind):
        if kind is list:
            inside.set()
            time.sleep(0.5)
        return self.make(kind)

inside = threading.Event()
decoding._JSON._make = Slow(decoding._JSON._make)
thread = threading.Thread(target=decoding.decode_json, args=(b"[]", list))
thread.start()
assert inside.wait(60)
child = os.fork()
if not child:
    os._exit(decoding.decode_json(b"{}", dict) != {})
sys.exit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_else_decodes_into_types() -> None:
    """msgspec is used by its name alone, so that this can be seen; what decodes into any type has one argument."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "decoding.py":
            continue
        tree = ast.parse(path.read_text())
        without_type = {
            id(node.func)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        }
        for node in ast.walk(tree):
            is_hidden = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msgspec")
            is_hidden |= isinstance(node, ast.Import) and any(
                alias.name.startswith("msgspec") and (alias.asname or "." in alias.name) for alias in node.names
            )
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            is_typed = name.startswith("msgspec.") and name.endswith((".Decoder", ".convert", ".type_info", ".schema"))
            is_typed |= name in ("msgspec.json.decode", "msgspec.msgpack.decode") and id(node) not in without_type
            if is_hidden or is_typed:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert found == []

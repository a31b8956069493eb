"""The page of `distckpt inspect --html`: it shows what there is, runs nothing from disk, and needs no network.

Tests that look at it in a browser are skipped where there is no Chromium.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.cli import app
from distckpt.cli.inspect_page import page_data, page_of
from distckpt.commit import list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.inspecting import Placement, list_ranks, placements, read_entry
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.test_cli import run

HOSTILE = (
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "\"'><img src=x onerror=document.title='pwned'>",
    "\u202egnp.exe",
    "a\u2028b\u2029c\x00d\x1b",
    "[[DATA]][[SCRIPT]]",
    "__proto__",
    "constructor",
    "&lt;b&gt;&quot;",
    "длинный.ключ.שלום",
)
EMPTY_ELEMENTS = ("meta",)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")


def save_hostile(storage: Storage) -> None:
    def save(coordinator: Coordinator) -> None:
        rank = coordinator.rank
        tp, dp = rank % 2, rank // 2
        state: dict[str, object] = {
            "experts": ShardedTensor.from_rank_offsets(
                "experts.w1", torch.zeros(2, 3, 4), (0, dp, 2), (1, tp, 2), partition=("dp", "tp", None)
            ),
            "flat": ShardedTensor("flat", torch.zeros(5), global_shape=(20,), global_offset=(5 * rank,)),
            "scalar": torch.tensor(1.0),
            "empty": torch.zeros(0, 2),
            "model": {key: torch.zeros(3, 3) for key in HOSTILE},
            "values": {key: key for key in HOSTILE},
            "seed": PerRank({HOSTILE[0]: rank}),
        }
        mesh = {"tp": (tp, 2), "dp": (dp, 2)}
        with Checkpointer(storage, coordinator=coordinator, mesh=mesh) as checkpointer:
            metadata = {key: {"name": key} for key in HOSTILE}
            checkpointer.save(state, iteration=7, metadata=metadata, metrics={"</title>": 1.0})

    run_ranks(4, save)


@pytest.fixture(scope="module")
def storage() -> MemoryStorage:
    storage = MemoryStorage()
    save_hostile(storage)
    return storage


def data_of(storage: Storage) -> dict[str, object]:
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    return page_data(storage, commit, index, read_entry(storage, commit), list(index.tensors))


class Elements(HTMLParser):
    """Every element of a page that is well nested: (tag, attributes, text in it)."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in EMPTY_ELEMENTS:
            self._open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for at in self._open:
            self.found[at][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.found if name == tag]


def test_hostile_text_adds_no_element_and_comes_back_as_it_was(storage: MemoryStorage) -> None:
    data = data_of(storage)
    elements = Elements(page_of(data).decode())
    plain = Elements(page_of(data | {"title": "x", "keys": [], "values": [], "metadata": []}).decode())
    assert [tag for tag, _, _ in elements.found] == [tag for tag, _, _ in plain.found]
    embedded, script = elements.texts("script")
    assert script.startswith('"use strict";')
    found = json.loads(embedded)
    assert {f"model/{key}".replace("%", "%25") for key in HOSTILE if "/" not in key} <= set(found["keys"])
    assert [key for key, _, _ in found["values"] if "script" in key]
    assert found["values"][0][1]
    assert found["title"] == data["title"]


def test_no_character_of_data_can_end_its_element(storage: MemoryStorage) -> None:
    page = page_of(data_of(storage)).decode()
    embedded = page[page.index('id="data">') + 10 : page.index("</script>")]
    assert json.loads(embedded)
    assert not set("<>&\u2028\u2029") & set(embedded)


def test_title_from_disk_is_text_and_no_place_to_fill(storage: MemoryStorage) -> None:
    title = "[[DATA]]</title><script>"
    elements = Elements(page_of(data_of(storage) | {"title": title}).decode())
    assert elements.texts("title") == [title]
    assert len(elements.texts("script")) == 2


def test_page_allows_its_own_script_and_style_and_nothing_else(storage: MemoryStorage) -> None:
    page = page_of(data_of(storage)).decode()
    elements = Elements(page)
    [policy] = [one["content"] for tag, one, _ in elements.found if tag == "meta" and "http-equiv" in one]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    hashes = {
        name: base64.b64encode(hashlib.sha256(elements.texts(name)[-1].encode()).digest()).decode()
        for name in ("script", "style")
    }
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{hashes['script']}'",
        "style-src": f"'sha256-{hashes['style']}'",
    }


def test_page_refers_to_nothing_outside_it(storage: MemoryStorage) -> None:
    elements = Elements(page_of(data_of(storage)).decode())
    for _, attributes, _ in elements.found:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    own = elements.texts("script")[-1] + elements.texts("style")[0]
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", own))
    assert addresses == {"http://www.w3.org"}  # The name of SVG, which nobody fetches.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|url\(|@import|fetch\(", own)


def test_tensors_that_are_cut_alike_share_their_chunks(storage: MemoryStorage) -> None:
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    data = data_of(storage)
    keys, of, layouts = data["keys"], data["layout"], data["layouts"]
    assert isinstance(keys, list)
    assert isinstance(of, list)
    assert isinstance(layouts, list)
    assert of[keys.index("empty")] == -1
    assert len(layouts) < len([number for number in of if number >= 0])
    for key, number in zip(keys, of, strict=True):
        chunks = Placement.read(storage, commit, index, [key]).chunks()
        files = [index.files[file].name for file in layouts[number]["files"]] if number >= 0 else []
        assert files == [chunk.file for chunk in chunks]
    experts = layouts[of[keys.index("experts.w1")]]
    assert experts["cuts"] == [[0, 2], [0, 3], [0]]


def test_what_there_is_no_room_for_is_left_out_and_said(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.cli.inspect_page._MAX_NUMBERS", 8)
    monkeypatch.setattr("distckpt.cli.inspect_page._MAX_ROWS", 3)
    data = data_of(storage)
    assert isinstance(data["layout"], list)
    assert data["layout"].count(-1) > 1
    assert data["omitted"] == [
        f"{data['layout'].count(-1) - 1} tensors are not drawn: the page would be too large",
        f"metadata has {len(HOSTILE)} entries, of which 3 are here",
    ]
    assert (len(data["values"]), len(data["metadata"])) == (3, 3)  # type: ignore[arg-type]


def test_command_writes_the_page_of_the_tensors_that_match(tmp_path: Path) -> None:
    save_hostile(PosixStorage(tmp_path / "run"))
    page = tmp_path / "page.html"
    code, said = run("inspect", tmp_path / "run", "--html", page, "--keys", "experts*")
    assert (code, said) == (0, f"iteration 7: written: {page}\n")
    found = json.loads(Elements(page.read_text()).texts("script")[0])
    assert found["keys"] == ["experts.w1"]
    assert found["omitted"] == ["only 1 of 14 tensors are here: those that --keys matches"]
    code, said = run("inspect", tmp_path / "run", "--html", page, "--json")
    assert (code, json.loads(said)["page"]) == (0, str(page))


def test_page_that_cannot_be_made_or_written_leaves_the_old_one(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path / "run")
    save_hostile(storage)
    page = tmp_path / "page.html"
    page.write_text("old")
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    change(storage, f"{commit.directory}/{index.chunk_table.name}", flip(3))
    code, said = run("inspect", tmp_path / "run", "--html", page)
    assert (code, "DAMAGED" in said) == (1, True)
    assert page.read_text() == "old"
    change(storage, f"{commit.directory}/{index.chunk_table.name}", flip(3))
    (tmp_path / "folder").mkdir()
    for place, error in (("folder", IsADirectoryError), ("nowhere/page.html", FileNotFoundError)):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), "--html", str(tmp_path / place)])
        assert isinstance(done.exception, error)
        assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html", "run"]


def test_what_the_page_is_made_of_is_packaged() -> None:
    tree = Path(__file__).parents[2]
    text = (tree / "pyproject.toml").read_text()
    [packaged] = re.findall(r"^\[tool\.setuptools\.package-data\]\ndistckpt = (\[.*\])$", text, re.MULTILINE)
    made_of = set((tree / "distckpt/cli/page").iterdir())
    assert made_of <= {path for pattern in json.loads(packaged) for path in (tree / "distckpt").glob(pattern)}
    assert {path.suffix for path in made_of} == {".html", ".css", ".js"}


def in_browser(page: Path, profile: Path, script: str = "") -> Elements:
    """The page as Chromium has it after it ran; script: runs after its own, in a copy without its policy."""
    if script:
        policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
        text = policy.sub("", page.read_text()).replace("</body>", f"<script>{script}</script></body>")
        page = page.with_suffix(".driven.html")
        page.write_text(text)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --window-size=1400,1000 --virtual-time-budget=3000 --dump-dom"
    done = subprocess.run(
        [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout, done.stderr
    return DumpedElements(done.stdout)


class DumpedElements(Elements):
    """As a browser writes them: inputs have no end."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag in ("input", "hr", "br"):
            self._open.pop()


@pytest.fixture(scope="module")
def page(storage: MemoryStorage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_bytes(page_of(data_of(storage)))
    return file


@needs_browser
def test_browser_draws_the_page_and_runs_nothing_from_disk(page: Path, tmp_path: Path) -> None:
    elements = in_browser(page, tmp_path)
    assert "pwned" not in elements.texts("title")[0]
    assert "img" not in [tag for tag, _, _ in elements.found]
    assert len(elements.texts("script")) == 2
    classes = [attributes.get("class") for _, attributes, _ in elements.found]
    assert classes.count("row tensor-cols") == 14
    assert "chunk" in classes
    [seen] = elements.texts("main")
    assert "\u202e" not in seen
    assert "\\u{202e}gnp.exe" in seen
    assert "<%2Fscript><script>document.title='pwned'<%2Fscript>" in seen


DRIVER = """
const said = {}, press = (box, key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const type = (input, text) => { input.value = text; input.dispatchEvent(new Event("input")); };
const options = () => [...document.querySelectorAll("#tensor-list [role=option]")];
const rows = () => options().map((row) => row.firstChild.textContent);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  await wait(100);
  const [search] = document.querySelectorAll("#filters input[type=search]");
  type(search, "*W1"); await wait(300); said.glob = rows();
  type(search, "proto"); await wait(300); said.part = rows();
  type(search, ""); await wait(300);
  const list = document.getElementById("tensor-list");
  press(list, "Home"); press(list, "ArrowDown"); said.picked = document.querySelector("#detail h3").textContent;
  press(list, "End"); said.last = document.querySelector("#tensor-list [aria-selected=true]").textContent;
  document.querySelectorAll("#tensor-head button")[3].click(); said.largest = rows()[0];
  location.hash = "#key=experts.w1"; await wait(100);
  said.shown = document.querySelector("#detail h3").textContent;
  said.chunks = document.querySelectorAll("#detail rect.chunk").length;
  document.querySelectorAll("#detail rect.chunk")[3].dispatchEvent(new Event("pointerover", { bubbles: true }));
  said.chunk = document.querySelector("#detail .said").textContent;
  document.querySelector("#rank-list [role=option]").click(); said.rank = rows().length;
  document.querySelector('#treemap button[aria-label$="tensors"]').click();
  said.crumbs = [...document.querySelectorAll("#crumbs > *")].map((one) => one.textContent);
  document.querySelector("#crumbs .right").click(); said.group = rows();
  document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
})();
"""


@needs_browser
def test_page_is_searched_sorted_and_walked_through(page: Path, tmp_path: Path, storage: MemoryStorage) -> None:
    elements = in_browser(page, tmp_path, DRIVER)
    [said] = [json.loads("".join(text)) for tag, attributes, text in elements.found if attributes.get("id") == "said"]
    assert said["glob"] == ["experts.w1"]
    assert said["part"] == ["model/__proto__"]
    assert said["picked"] == "experts.w1"
    assert said["last"].startswith("scalar")
    assert said["largest"] == said["shown"] == "experts.w1"
    assert said["chunks"] == 4
    assert said["chunk"].startswith("[2:4, 3:6, 0:4], 96 bytes on rank 3 (tp 1, dp 1), in shard-00003-of-00004-")
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    assert said["rank"] == list_ranks(index, placements(storage, commit, index, list(index.tensors)))[0].tensors
    assert [crumb.split(" ")[0] for crumb in said["crumbs"]][::2] == ["all", "model"]
    assert said["crumbs"][-1] == f"List {len(HOSTILE)} tensors"
    assert len(said["group"]) == len(HOSTILE)
    assert all(key.startswith("model/") for key in said["group"])


PRINTED = """
const list = document.getElementById("value-list");
const seen = () => [list.querySelectorAll("[role=option]").length, list.textContent];
const said = {};
addEventListener("load", () => setTimeout(() => {
  dispatchEvent(new Event("beforeprint")); said.paper = seen();
  dispatchEvent(new Event("afterprint")); said.screen = seen();
  document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
}, 100));
"""


@needs_browser
def test_paper_has_the_first_rows_and_says_how_many_more_there_are(tmp_path: Path) -> None:
    """A list that is as high as all of its rows is thousands of empty sheets."""
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({f"v{i}": i for i in range(600)}, iteration=1)
    page = tmp_path / "page.html"
    page.write_bytes(page_of(data_of(storage)))
    elements = in_browser(page, tmp_path / "profile", PRINTED)
    [said] = [json.loads("".join(text)) for _, attributes, text in elements.found if attributes.get("id") == "said"]
    assert said["paper"][0] == 500
    assert said["paper"][1].endswith("and 100 more")
    assert said["screen"][0] < 100
    assert "more" not in said["screen"][1]


def test_page_of_a_path_that_is_no_text_names_it(tmp_path: Path) -> None:
    root, page = tmp_path / os.fsdecode(b"run\xff"), tmp_path / "page.html"
    with Checkpointer(root) as checkpointer:
        checkpointer.save({"step": 1}, iteration=1)
    assert run("inspect", root, "--html", page)[0] == 0
    assert "<title>iteration 1 of run\\udcff</title>" in page.read_text()

// The tensors: found by key, dtype and rank, sorted, and one of them looked into.
const COLUMNS = [
  ["key", "key"], ["dtype", "dtype"], ["shape", "shape"], ["size", "size", "num"], ["chunks", "chunks", "num"], ["", "as it is cut"],
];
const MAX_CHUNK_ROWS = 200;

function startTensors() {
  let order = "key", isDown = false, found = [], group = null, colouring = colourings[0], opened = -1;
  const kindOf = (tensor) => data.kinds[data.kind[tensor]];
  const chunkCount = (tensor) => (data.layout[tensor] < 0 ? 0 : data.layouts[data.layout[tensor]].files.length);
  const small = data.keys.map((key) => key.toLowerCase());

  const search = make("input", { type: "search", placeholder: "part of a key, or a glob: *.qkv.*", "aria-label": "Part of a key, or a glob", spellcheck: false });
  const dtype = make("select", { "aria-label": "dtype" }, make("option", { value: "" }, "every dtype"), ...data.dtypes.map((one) => make("option", { value: one.dtype }, one.dtype)));
  const rank = make("input", { type: "number", min: 0, "aria-label": "Only tensors of which this rank holds some", placeholder: "any" });
  const chip = make("button", { type: "button", hidden: true, title: "Show all groups", onclick: () => { group = null; find(); } });
  const told = make("span", { class: "count", role: "status" });
  at("filters").append(search, dtype, make("label", {}, "on rank ", rank), chip, told);
  let timer = 0;
  const later = () => { clearTimeout(timer); timer = setTimeout(find, 120); };
  for (const input of [search, dtype, rank]) input.addEventListener("input", later);

  const heads = COLUMNS.map(([name, label, kind]) => make("button", { type: "button", class: kind ?? "", disabled: name === "", onclick: () => sortBy(name) }, label));
  at("tensor-head").classList.add("tensor-cols");
  at("tensor-head").append(...heads);

  const list = new RowList(at("tensor-list"), {
    heights: [34, 54],
    fill(row) {
      const tensor = found[row], kind = kindOf(tensor), picture = make("canvas", { "aria-hidden": "true" });
      drawSmall(picture, tensor, colouring);
      const key = keyOf(data.keys[tensor]);
      key.title = plain(data.keys[tensor]);
      return make("div", { class: "row tensor-cols" }, key, make("span", { class: "dim" }, kind.dtype), make("span", { class: "mono dim" }, shapeText(kind.shape)),
        make("span", { class: "num" }, sizeText(data.bytes[tensor])), make("span", { class: "num" }, chunkCount(tensor).toLocaleString("en")), picture);
    },
    pick: (row) => open(found[row], false),
  });

  /** Whether a key is what was searched for: a glob if there is a * or ? in it, else a part. */
  function matcher(text) {
    text = text.trim().toLowerCase();
    if (!/[*?]/.test(text)) return (tensor) => small[tensor].includes(text);
    const glob = new RegExp("^" + text.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*+/g, ".*").replace(/\?/g, ".") + "$", "s");
    return (tensor) => glob.test(small[tensor]);
  }

  function find() {
    const matches = matcher(search.value);
    const only = rank.value === "" ? null : Number(rank.value);
    found = (group ? group.tensors : data.keys.map((_, tensor) => tensor)).filter((tensor) =>
      matches(tensor) && (dtype.value === "" || kindOf(tensor).dtype === dtype.value) && (only === null || holdersOf(tensor).includes(only)));
    const values = { size: (t) => data.bytes[t], chunks: chunkCount, shape: (t) => kindOf(t).shape, dtype: (t) => kindOf(t).dtype };
    if (order === "shape") found.sort((a, b) => compareShapes(values.shape(a), values.shape(b)) || a - b);
    else if (order === "dtype") found.sort((a, b) => values.dtype(a).localeCompare(values.dtype(b)) || a - b);
    else if (order === "key") found.sort((a, b) => a - b);
    else found.sort((a, b) => values[order](a) - values[order](b) || b - a);
    if (isDown) found.reverse();
    const bytes = found.reduce((sum, tensor) => sum + data.bytes[tensor], 0);
    told.textContent = count(found.length, "tensor") + ", " + sizeText(bytes);
    chip.hidden = group === null;
    chip.textContent = group === null ? "" : "in " + plain(group.name) + " ×";
    COLUMNS.forEach(([name], n) => {
      heads[n].setAttribute("aria-pressed", name === order);
      heads[n].textContent = COLUMNS[n][1] + (name === order ? (isDown ? " ↓" : " ↑") : "");
    });
    at("tensor-list").scrollTop = 0;
    at("tensor-head").style.paddingRight = 10 + at("tensor-list").offsetWidth - at("tensor-list").clientWidth + "px";
    list.show(found.length, found.indexOf(opened));
  }

  function compareShapes(a, b) {
    for (let d = 0; d < Math.min(a.length, b.length); d++) if (a[d] !== b[d]) return a[d] - b[d];
    return a.length - b.length;
  }

  function sortBy(name) {
    isDown = name === order ? !isDown : name !== "key" && name !== "dtype";
    order = name;
    find();
  }

  function open(tensor, isFromElsewhere) {
    opened = tensor;
    const box = at("detail");
    box.classList.remove("blank");
    showTensor(box, tensor, colouring, (next) => { colouring = next; list.draw(); open(opened, false); }, close);
    if (isFromElsewhere) {
      if (!found.includes(tensor)) { search.value = dtype.value = rank.value = ""; group = null; find(); }
      list.select(found.indexOf(tensor), true);
      at("tensors").scrollIntoView();
      at("tensor-list").focus({ preventScroll: true });
    }
  }

  function close() {
    opened = -1;
    at("detail").classList.add("blank");
    list.show(found.length, -1);
    at("tensor-list").focus();
  }

  find();
  if (found.length && !matchMedia("(max-width: 1080px)").matches) {
    // One of those in sight, and one that is cut.
    const rank_of = (row) => [chunkCount(found[row]), data.bytes[found[row]]];
    let best = 0;
    for (let row = 1; row < Math.min(15, found.length); row++) if (compareShapes(rank_of(row), rank_of(best)) > 0) best = row;
    list.select(best, true);
    open(found[list.selected], false);
  } else at("detail").classList.add("blank");

  /** #key=... in the address opens a tensor. */
  function openAddressed() {
    if (!location.hash.startsWith("#key=")) return;
    let key = location.hash.slice(5);
    try { key = decodeURIComponent(key); } catch { /* As it is, then. */ }
    const tensor = data.keys.indexOf(key);
    if (tensor >= 0) open(tensor, true);
  }
  openAddressed();
  addEventListener("hashchange", openAddressed);

  return {
    openTensor: (tensor) => open(tensor, true),
    openGroup(name, tensors) {
      [search.value, dtype.value, rank.value] = ["", "", ""];
      group = { name, tensors };
      find();
      at("tensors").scrollIntoView();
    },
    openRank(number) {
      [search.value, dtype.value, rank.value, group] = ["", "", number, null];
      find();
      at("tensors").scrollIntoView();
    },
  };
}

function showTensor(box, tensor, colouring, recolour, close) {
  const kind = data.kinds[data.kind[tensor]];
  const chunks = chunksOf(tensor);
  const holders = holdersOf(tensor);
  const said = make("p", { class: "said note", role: "status" }, chunks && chunks.count > 1 ? "Point at a chunk, or tap it." : "");
  const plot = make("div");
  const rows = make("tbody");
  const select = make("select", { onchange: (event) => recolour(colourings[event.target.value]) },
    ...colourings.map((one, n) => make("option", { value: n, selected: one === colouring }, plain(one.name))));
  const facts = [
    ["dtype", kind.dtype], ["shape", shapeText(kind.shape)], ["size", sizeText(data.bytes[tensor])],
    ["split by", (kind.partition ?? []).map((axis, d) => (axis === null ? null : plain(axis) + " on dim " + d)).filter(Boolean).join(", ")],
    ["blocks", (kind.blocks ?? []).some((n) => n > 1) ? shapeText(kind.blocks) + ", each split for itself" : ""],
    ["held by", kind.owner === null ? "" : plain(kind.owner) + ", one of its coordinates"],
    ["stands in", kind.container === null ? "" : plain(kind.container) || "/"],
    ["on ranks", holders.length ? rangesText(holders) + (holders.length > 1 ? " (" + holders.length + ")" : "") : ""],
  ].filter(([, text]) => text !== "");
  box.replaceChildren(
    make("button", { type: "button", class: "close", onclick: close }, "Close"), keyOf(data.keys[tensor], "h3"),
    make("dl", {}, ...facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)])),
    make("div", { class: "tools" }, make("label", {}, "coloured by ", select)), plot, said,
    make("div", { class: "scroll" }, make("table", { class: "nowrap" },
      make("thead", {}, make("tr", {}, make("th", {}, "box"), make("th", { class: "num" }, "size"), make("th", {}, "on"))), rows)));
  if (!chunks) rows.closest("table").remove();
  const box_of = (i) => [...Array(chunks.ndim).keys()].map((d) => [chunks.low(i, d), chunks.extent(i, d)]);
  const text_of = (i) => boxText(box_of(i).map(([low]) => low), box_of(i).map(([, extent]) => extent));
  const elements = kind.shape.reduce((product, extent) => product * extent, 1);
  const bytes_of = (i) => (box_of(i).reduce((product, [, extent]) => product * extent, 1) * data.bytes[tensor]) / Math.max(1, elements);
  const say = (i) => {
    said.textContent = text_of(i) + ", " + sizeText(bytes_of(i)) + " on " + placeText(rankOfFile[chunks.file(i)]) + ", in " + data.files.name[chunks.file(i)];
    for (const one of box.querySelectorAll(".on")) one.classList.remove("on");
    for (const one of box.querySelectorAll('[data-chunk="' + i + '"]')) one.classList.add("on");
  };
  drawTensor(plot, tensor, colouring, say);
  if (!chunks) return;
  let listed = 0;
  const more = make("button", { type: "button", onclick: add });
  function add() {
    for (const end = Math.min(chunks.count, listed + MAX_CHUNK_ROWS); listed < end; listed++) {
      rows.append(make("tr", { "data-chunk": listed }, make("td", { class: "mono" }, text_of(listed)), make("td", { class: "num" }, sizeText(bytes_of(listed))),
        make("td", {}, placeText(rankOfFile[chunks.file(listed)]))));
    }
    more.textContent = "Show more of " + count(chunks.count, "chunk");
    more.hidden = listed >= chunks.count;
  }
  rows.addEventListener("pointerover", (event) => {
    const row = event.target.closest("tr");
    if (row) say(Number(row.dataset.chunk));
  });
  add();
  box.append(more);
}

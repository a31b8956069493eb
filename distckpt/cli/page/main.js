// The page, from top to bottom.
function startHead() {
  const facts = new Map(data.facts);
  const is = data.resumable.is_resumable;
  const badge = make("span", { class: "badge " + (is === null ? "warn" : is ? "good" : "bad"), title: plain(facts.get("resumable") ?? "") },
    is === null ? "resumable: unknown" : is ? "resumable" : "not resumable");
  at("head").append(make("h1", {}, "Iteration " + data.iteration, badge), make("p", { class: "path" }, plain(data.location)));
  if (facts.has("DAMAGED")) at("head").append(make("p", { class: "notice bad" }, "Damaged: " + plain(facts.get("DAMAGED"))));
  for (const text of data.omitted) at("head").append(make("p", { class: "notice" }, plain(text)));
  const total = data.dtypes.reduce((sum, one) => sum + one.bytes, 0);
  const tensors = data.dtypes.reduce((sum, one) => sum + one.tensors, 0);
  const chunks = data.ranks.reduce((sum, one) => sum + one.chunks, 0);
  const mesh = data.mesh.map(([axis, size]) => plain(axis) + size).join(" ");
  const cards = [
    [sizeText(data.files.bytes.reduce((sum, bytes) => sum + bytes, 0)), "in " + count(data.files.name.length, "shard file")],
    [(data.world_size ?? 0).toLocaleString("en"), (data.world_size === 1 ? "rank" : "ranks") + (mesh ? ": " + mesh : "")],
    [tensors.toLocaleString("en"), "tensors of " + sizeText(total)],
    [chunks.toLocaleString("en"), "chunks of them"],
    [data.values.length.toLocaleString("en"), "values; " + data.per_rank.length.toLocaleString("en") + " that differ by rank"],
  ];
  const stack = make("div", { class: "stack", "aria-hidden": "true" });
  const legend = make("div", { class: "legend" });
  data.dtypes.forEach((one, n) => {
    const [part, dot] = [make("i"), make("i")];
    part.style.flex = String(Math.max(one.bytes, 1)) + " 1 0";
    part.style.background = dot.style.background = colour(n);
    stack.append(part);
    legend.append(make("span", {}, dot, one.dtype + " " + sizeText(one.bytes) + ", " + count(one.tensors, "tensor")));
  });
  const shown = data.facts.filter(([name]) => !["iteration", "DAMAGED", "tensors", "values", "size"].includes(name));
  at("overview").append(make("div", { class: "cards" }, ...cards.map(([big, text]) => make("div", { class: "card" }, make("b", {}, big), make("span", {}, text)))),
    stack, legend, make("dl", { class: "facts" }, ...shown.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, plain(text))])));
  at("foot").append("Written by distckpt inspect on " + new Date(data.written_unix_s * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC; ages are as of then.");
}

function startRanks(openRank) {
  const largest = Math.max(1, ...data.ranks.map((one) => one.bytes).slice(0, 100000));
  const sum = data.ranks.reduce((total, one) => total + one.bytes, 0);
  const without = Math.max(0, (data.world_size ?? 0) - data.ranks.length);
  at("ranks-note").textContent = data.ranks.length
    ? "Bytes of the files of each rank; the largest has " + (largest / (sum / data.ranks.length)).toFixed(2) + " times the mean." + (without ? " " + count(without, "rank") + " without a file." : "") + " Choose a rank to list its tensors."
    : "There are no files.";
  const list = new RowList(at("rank-list"), {
    heights: [30, 54],
    fill(row) {
      const one = data.ranks[row];
      const bar = make("i");
      bar.style.width = (100 * one.bytes) / largest + "%";
      bar.style.background = colour(row, data.ranks.length);
      const files = one.files[0] + (one.files.length > 1 ? " and " + (one.files.length - 1) + " more" : "");
      return make("div", { class: "row rank-cols", title: one.files.slice(0, 20).join("\n") }, make("span", {}, "rank " + one.rank), make("span", { class: "dim" }, meshText(one.mesh)),
        make("span", { class: "bar" }, bar), make("span", { class: "num" }, sizeText(one.bytes)),
        make("span", { class: "dim num" }, count(one.tensors, "tensor")), make("span", { class: "mono dim" }, files));
    },
    pick() {},
  });
  at("rank-list").addEventListener("keydown", (event) => { if (event.key === "Enter" && list.selected >= 0) openRank(data.ranks[list.selected].rank); });
  list.inner.addEventListener("click", () => { if (list.selected >= 0) openRank(data.ranks[list.selected].rank); });
  list.show(data.ranks.length);
}

function startMetadata() {
  if (!data.metadata.length) {
    at("metadata").append(make("p", { class: "note" }, "Nothing was recorded."));
    return;
  }
  const groups = new Map();
  for (const [name, text] of data.metadata) {
    const [head] = name.split(".");
    if (!groups.has(head)) groups.set(head, []);
    groups.get(head).push([name === head ? name : name.slice(head.length + 1), text]);
  }
  const parts = [...groups].map(([head, rows]) => make("div", {}, make("h3", {}, plain(head)),
    make("dl", {}, ...rows.flatMap(([name, text]) => [make("dt", {}, keyOf(name)), make("dd", {}, plain(text))]))));
  at("metadata").append(make("div", { class: "columns" }, ...parts));
}

function startValues() {
  const box = at("value-box");
  const told = make("pre", { hidden: true });
  const holder = make("div", { id: "value-list", class: "list", tabIndex: 0, role: "listbox", "aria-label": "Values" });
  if (data.values.length) {
    box.append(make("div", { class: "values" }, holder), told);
    const list = new RowList(holder, {
      heights: [30, 54],
      fill: (row) => {
        const [key, text, bytes] = data.values[row];
        return make("div", { class: "row value-cols" }, keyOf(key), make("span", { class: "num dim" }, sizeText(bytes)), make("span", { class: "mono dim" }, plain(text.slice(0, 300))));
      },
      pick: (row) => {
        const [key, text, bytes] = data.values[row];
        told.hidden = false;
        told.textContent = plain(key) + "\n" + plain(text) + (new TextEncoder().encode(text).length < bytes ? " ..." : "");
      },
    });
    list.show(data.values.length);
  } else box.append(make("p", { class: "note" }, "There are none that all ranks share."));
  if (!data.per_rank.length) return;
  box.append(make("h3", {}, "Differ by rank"), make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", {}, "key"), make("th", {}, "by"), make("th", { class: "num" }, "values"), make("th", {}, "on another layout"))),
    make("tbody", {}, ...data.per_rank.slice(0, 500).map((one) => make("tr", {}, make("td", { class: "wrap" }, keyOf(one.key)),
      make("td", {}, one.axes.map(([axis, size]) => plain(axis) + size).join(" ")), make("td", { class: "num" }, one.holders.toLocaleString("en")), make("td", {}, one.on_change)))))));
}

startHead();
const tensorList = startTensors();
startTreemap(tensorList);
startRanks(tensorList.openRank);
startMetadata();
startValues();

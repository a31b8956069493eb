// How one tensor is cut: its chunks as boxes, drawn over at most two dimensions that are cut; what else is cut makes
// several drawings.
const MAX_DRAWN = 4096;
const MAX_PANELS = 64;

/** {count, ndim, low(i, d), extent(i, d), file(i)} of a tensor's chunks; null if they are not in the page. */
function chunksOf(tensor) {
  const layout = data.layouts[data.layout[tensor]];
  if (!layout) return null;
  const whole = data.kinds[data.kind[tensor]].shape;
  const ndim = whole.length;
  const file = (i) => layout.files[i];
  if (!layout.cuts) {
    const low = (i, d) => layout.offsets[i * ndim + d];
    return { count: layout.files.length, ndim, whole, file, low, extent: (i, d) => layout.shapes[i * ndim + d] };
  }
  const strides = new Array(ndim).fill(1);
  for (let d = ndim - 2; d >= 0; d--) strides[d] = strides[d + 1] * layout.cuts[d + 1].length;
  const cell = (i, d) => Math.floor(i / strides[d]) % layout.cuts[d].length;
  const low = (i, d) => layout.cuts[d][cell(i, d)];
  const extent = (i, d) => (cell(i, d) + 1 < layout.cuts[d].length ? layout.cuts[d][cell(i, d) + 1] : whole[d]) - low(i, d);
  return { count: layout.files.length, ndim, whole, file, low, extent };
}

const ranksOf = [];
/** The ranks that hold some of a tensor, ascending. Tensors that lie alike share the list. */
function holdersOf(tensor) {
  const layout = data.layout[tensor];
  if (layout < 0) return [];
  ranksOf[layout] ??= [...new Set(data.layouts[layout].files.map((file) => rankOfFile[file]))].sort((a, b) => a - b);
  return ranksOf[layout];
}

/** What chunks may be coloured by: {name, of(file) -> text, index(file), total}. */
const colourings = [
  { name: "rank", of: (file) => placeText(rankOfFile[file]), index: (file) => rankRow.get(rankOfFile[file]), total: data.ranks.length },
  ...axes.map((axis, n) => ({
    name: axis,
    of: (file) => plain(axis) + " " + coordinate(file, axis),
    index: (file) => coordinate(file, axis) || 0,
    total: data.mesh[n][1],
  })),
  { name: "file", of: (file) => data.files.name[file], index: (file) => file, total: data.files.name.length },
];
const coordinate = (file, axis) => data.ranks[rankRow.get(rankOfFile[file])].mesh[axis];

/** The dimensions that are cut, fewest chunks first seen; at least as many as are needed for a drawing. */
function cutDimensions(chunks) {
  const cut = [];
  for (let d = 0; d < chunks.ndim; d++) {
    for (let i = 0; i < Math.min(chunks.count, MAX_DRAWN); i++) {
      if (chunks.extent(i, d) !== chunks.whole[d]) { cut.push(d); break; }
    }
  }
  for (let d = chunks.ndim - 1; d >= 0 && cut.length < Math.min(2, chunks.ndim); d--) if (!cut.includes(d)) cut.push(d);
  return cut.sort((a, b) => a - b);
}

/** A small drawing in a row of the list. */
function drawSmall(canvas, tensor, colouring) {
  const [width, height] = [84, 22];
  const ratio = Math.min(3, devicePixelRatio || 1);
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const chunks = chunksOf(tensor);
  if (!chunks) return;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [rows, columns] = cutDimensions(chunks).length > 1 ? cutDimensions(chunks).slice(-2) : [null, cutDimensions(chunks)[0] ?? null];
  const span = (i, d, length) => (d === null ? [0, length] : [(chunks.low(i, d) / chunks.whole[d]) * length, (chunks.extent(i, d) / chunks.whole[d]) * length]);
  for (let i = 0; i < Math.min(chunks.count, MAX_DRAWN); i++) {
    const [x, w] = span(i, columns, width), [y, h] = span(i, rows, height);
    pen.fillStyle = colour(colouring.index(chunks.file(i)), colouring.total);
    pen.fillRect(x, y, Math.max(0.5, w - (w > 4 ? 1 : 0)), Math.max(0.5, h - (h > 4 ? 1 : 0)));
  }
}

/** The drawing of a tensor into a box. say: told the number of the chunk that is looked at. */
function drawTensor(box, tensor, colouring, say) {
  const chunks = chunksOf(tensor);
  box.replaceChildren();
  if (!chunks) {
    const isEmpty = data.bytes[tensor] === 0;
    box.append(make("p", { class: "note" }, isEmpty ? "It has no elements, so there are no chunks." : "Its chunks are not in this page."));
    return;
  }
  const dims = cutDimensions(chunks);
  const [rows, columns] = dims.length > 1 ? dims.slice(-2) : [null, dims[0] ?? null];
  const folded = dims.slice(0, -2);
  const panels = new Map();
  const drawn = Math.min(chunks.count, MAX_DRAWN);
  for (let i = 0; i < drawn; i++) {
    const low = folded.map((d) => chunks.low(i, d)), extent = folded.map((d) => chunks.extent(i, d));
    const name = folded.length ? folded.map((d, n) => "dim " + d + ": " + low[n] + ":" + (low[n] + extent[n])).join(", ") : "";
    if (!panels.has(name)) panels.set(name, []);
    panels.get(name).push(i);
  }
  const plots = make("div", { class: "plots" });
  const isMany = panels.size > 1;
  const room = Math.max(200, box.clientWidth);
  for (const [name, mine] of [...panels].slice(0, MAX_PANELS)) {
    const width = isMany ? Math.max(120, Math.floor(room / Math.min(3, panels.size)) - 10) : room;
    const picture = panel(chunks, mine, { rows, columns, width, tensor, colouring, isMany });
    plots.append(make("figure", {}, picture, name ? make("figcaption", {}, name) : null));
  }
  box.append(plots);
  if (isMany) box.append(make("p", { class: "note" }, "Down: dim " + rows + " (" + chunks.whole[rows] + "). Across: dim " + columns + " (" + chunks.whole[columns] + ")."));
  if (panels.size > MAX_PANELS) box.append(make("p", { class: "note" }, "and " + (panels.size - MAX_PANELS) + " more like these"));
  if (drawn < chunks.count) box.append(make("p", { class: "note" }, "The first " + drawn.toLocaleString("en") + " of " + count(chunks.count, "chunk") + " are drawn."));
  const look = (event) => {
    const one = event.target.closest("[data-chunk]");
    if (one) say(Number(one.dataset.chunk));
  };
  plots.addEventListener("pointerover", look);
  plots.addEventListener("click", look);
}

function panel(chunks, mine, { rows, columns, width, tensor, colouring, isMany }) {
  const kind = data.kinds[data.kind[tensor]];
  const [left, top] = [isMany || rows === null ? 2 : 58, isMany ? 2 : 20];
  const inner = width - left - 2;
  const long = columns === null ? 1 : chunks.whole[columns], high = rows === null ? 1 : chunks.whole[rows];
  let [w, h] = [inner, rows === null ? 44 : inner * Math.min(1.6, Math.max(isMany ? 0.35 : 0.16, high / long))];
  const most = isMany ? 130 : 330;
  if (h > most) [w, h] = [Math.max(inner * 0.3, (w * most) / h), most];
  const total = [left + w + 2, top + h + 2];
  const picture = shape("svg", { width: total[0], height: total[1], viewBox: "0 0 " + total.join(" "), role: "img" });
  const split = (d) => (kind.partition && kind.partition[d] !== null ? " by " + plain(kind.partition[d]) : "");
  picture.setAttribute("aria-label", "How " + plain(data.keys[tensor]) + " is cut: " + count(chunks.count, "chunk"));
  if (!isMany) {
    if (columns !== null) picture.append(shape("text", { x: left, y: 13 }, "dim " + columns + " · " + long + split(columns)));
    if (rows !== null) {
      for (const [n, text] of ["dim " + rows, String(high), split(rows).trim()].entries()) picture.append(shape("text", { x: 2, y: top + 12 + 14 * n }, text));
    }
  }
  const span = (i, d, length) => (d === null ? [0, length] : [(chunks.low(i, d) / chunks.whole[d]) * length, (chunks.extent(i, d) / chunks.whole[d]) * length]);
  for (const i of mine) {
    const [x, bw] = span(i, columns, w), [y, bh] = span(i, rows, h);
    const file = chunks.file(i);
    const gap = Math.min(bw, bh) > 5 ? 1.5 : 0;
    picture.append(shape("rect", {
      class: "chunk", "data-chunk": i, x: left + x, y: top + y, width: Math.max(0.6, bw - gap), height: Math.max(0.6, bh - gap),
      rx: gap ? 2 : 0, fill: colour(colouring.index(file), colouring.total),
    }));
    if (bw > 26 && bh > 15) picture.append(shape("text", { class: "in", x: left + x + 5, y: top + y + 13 }, String(colouring.index(file) === undefined ? "" : labelOf(colouring, file))));
  }
  for (const [d, begin, size, isRow] of [[columns, left, w, false], [rows, top, h, true]]) {
    const blocks = d === null || !kind.blocks ? 1 : kind.blocks[d];
    for (let n = 1; n < Math.min(blocks, 64); n++) {
      const to = begin + (size * n) / blocks;
      picture.append(shape("line", { class: "block", ...(isRow ? { x1: left, x2: left + w, y1: to, y2: to } : { y1: top, y2: top + h, x1: to, x2: to }) }));
    }
  }
  return picture;
}

const labelOf = (colouring, file) => (colouring.name === "rank" ? rankOfFile[file] : colouring.index(file));

// Where the bytes are: groups of keys as areas (squarified treemap: Bruls, Huizing, van Wijk, 2000). A group is a button.
const MAX_CELLS = 150; // of one group
const CELL_AREA = 1500; // pixels that one should have
const MAX_DEPTH = 3; // of groups that are drawn in one another

const MAX_PARTS = 40; // of a path; what follows is one

/** One path of where a tensor stands and its key, in which what both have is there once. */
function joined(home, names) {
  let same = Math.min(home.length, names.length);
  while (same > 0 && !names.slice(0, same).every((name, i) => name === home[home.length - same + i])) same--;
  const path = [...home, ...names.slice(same)];
  return path.length <= MAX_PARTS ? path : [...path.slice(0, MAX_PARTS - 1), path.slice(MAX_PARTS - 1).join(".")];
}

/** Groups by the parts of keys, each with its bytes; chains of single groups are one. */
function groupTree() {
  const root = { name: "all", path: [], bytes: 0, tensors: 0, parts: new Map(), tensor: -1 };
  data.keys.forEach((key, tensor) => {
    const container = data.kinds[data.kind[tensor]].container;
    let node = root;
    for (const name of joined(container ? container.split(/[/.]/) : [], key.split(/[/.]/))) {
      node.bytes += data.bytes[tensor];
      node.tensors++;
      let next = node.parts.get(name);
      if (!next) node.parts.set(name, (next = { name, bytes: 0, tensors: 0, parts: new Map(), tensor: -1, first: tensor }));
      node = next;
    }
    node.bytes += data.bytes[tensor];
    node.tensors++;
    node.tensor = tensor;
  });
  return root;
}

/** The parts of a group, the largest first; a part that consists of one part only stands for that. */
function partsOf(node) {
  if (!node.sorted) {
    node.sorted = [...node.parts.values()].map((part) => {
      let name = part.name;
      while (part.parts.size === 1 && part.tensor < 0) {
        part = part.parts.values().next().value;
        name += "." + part.name;
      }
      return Object.assign(part, { name });
    }).sort((a, b) => b.bytes - a.bytes);
  }
  return node.sorted;
}

/** So many groups at the most: the largest and one of the rest; of many alike, runs of neighbours. */
function gathered(parts, room) {
  const together = (some, name) => ({
    name, isRest: true, tensor: -1, parts: new Map(some.map((part) => [part.name, part])),
    bytes: some.reduce((sum, part) => sum + part.bytes, 0), tensors: some.reduce((sum, part) => sum + part.tensors, 0),
  });
  const mean = parts.reduce((sum, part) => sum + part.bytes, 0) / parts.length;
  if (parts[0].bytes > 4 * mean) {
    const rest = parts.slice(room - 1);
    return [...parts.slice(0, room - 1), together(rest, rest.length.toLocaleString("en") + " more")];
  }
  const inOrder = [...parts].sort((a, b) => a.first - b.first);
  const step = Math.ceil(inOrder.length / Math.min(room, 24));
  const runs = [];
  for (let i = 0; i < inOrder.length; i += step) {
    const run = inOrder.slice(i, i + step);
    runs.push(run.length === 1 ? run[0] : together(run, run[0].name + " … " + run[run.length - 1].name));
  }
  return runs;
}

/** Rectangles {x, y, w, h} whose areas are as the sizes (descending, positive), as square as may be. */
function squarified(sizes, x, y, w, h) {
  const scale = (w * h) / sizes.reduce((sum, size) => sum + size, 0);
  const areas = sizes.map((size) => size * scale);
  const found = [];
  let begin = 0;
  while (begin < areas.length) {
    const side = Math.max(1e-9, Math.min(w, h));
    let sum = 0, end = begin, worst = Infinity;
    for (; end < areas.length; end++) {
      const next = sum + areas[end];
      const ratio = Math.max((side * side * areas[begin]) / (next * next), (next * next) / (side * side * areas[end]));
      if (ratio > worst) break;
      [sum, worst] = [next, ratio];
    }
    const thick = sum / side;
    let along = 0;
    for (let i = begin; i < end; i++) {
      const long = areas[i] / thick;
      found.push(w >= h ? { x, y: y + along, w: thick, h: long } : { x: x + along, y, w: long, h: thick });
      along += long;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
    begin = end;
  }
  return found;
}

function startTreemap({ openTensor, openGroup }) {
  const box = at("treemap");
  const root = groupTree();
  let trail = [root];

  /** The parts of the group at the end of a path. What there is no room for is one cell. */
  function cells(path, area, hue, depth) {
    const node = path[path.length - 1];
    const parts = partsOf(node).filter((part) => part.bytes > 0);
    const room = Math.min(MAX_CELLS, Math.max(8, Math.floor((area.w * area.h) / CELL_AREA)));
    const seen = parts.length > room ? gathered(parts, room) : [...parts];
    const order = seen.map((part, i) => [part, i]).sort(([a], [b]) => b.bytes - a.bytes);
    const places = squarified(order.map(([part]) => part.bytes), area.x, area.y, area.w, area.h);
    order.forEach(([part, i], n) => cell([...path, part], places[n], hue || (order.length > 1 ? colour(i) : ""), depth, n));
  }

  function cell(path, place, shade, depth, n) {
    const part = path[path.length - 1];
    const isOpen = depth < MAX_DEPTH && part.tensor < 0 && !part.isRest && place.w > 100 && place.h > 76 && part.parts.size > 1;
    label(place, shade, part, () => (part.tensor >= 0 ? openTensor(part.tensor) : go(path)), n, isOpen);
    if (isOpen) cells(path, { x: place.x + 3, y: place.y + 22, w: place.w - 6, h: place.h - 25 }, shade, depth + 1);
  }

  function label(place, shade, part, act, n, isOpen) {
    const text = plain(part.name), bytes = part.bytes;
    const share = ((100 * bytes) / Math.max(1, trail[trail.length - 1].bytes)).toFixed(1) + " %";
    const what = text + ", " + sizeText(bytes) + ", " + share + (part.tensor < 0 ? ", " + count(part.tensors, "tensor") : "");
    const button = make("button", { type: "button", title: what, "aria-label": what, onclick: act });
    Object.assign(button.style, {
      left: place.x + "px", top: place.y + "px", width: Math.max(1, place.w) + "px", height: Math.max(1, place.h) + "px",
      background: "color-mix(in srgb, " + (shade || "#aab6c4") + " " + (100 - (n % 6) * 7) + "%, white)",
    });
    if (place.w > 44 && place.h > 20) button.append(make("b", {}, text + (isOpen ? " · " + sizeText(bytes) : "")));
    if (place.w > 60 && place.h > 40 && !isOpen) button.append(make("span", { class: "s" }, sizeText(bytes)));
    box.append(button);
  }

  function go(next) {
    trail = next;
    draw();
    const first = box.querySelector("button");
    if (first && document.activeElement === document.body) first.focus({ preventScroll: true });
  }

  function draw() {
    const node = trail[trail.length - 1];
    box.replaceChildren();
    if (node.bytes > 0) cells(trail, { x: 0, y: 0, w: box.clientWidth, h: box.clientHeight }, "", 0);
    else box.append(make("p", { class: "empty" }, "There are no bytes of tensors."));
    const crumbs = trail.map((one, depth) => {
      const text = plain(one.name) + " · " + sizeText(one.bytes);
      return depth === trail.length - 1 ? make("b", {}, text) : make("button", { type: "button", onclick: () => go(trail.slice(0, depth + 1)) }, text);
    });
    const parts = crumbs.flatMap((crumb, i) => (i ? [make("span", { class: "sep" }, "›"), crumb] : [crumb]));
    if (trail.length > 1) parts.push(make("button", { type: "button", class: "right", onclick: () => openGroup(trail.slice(1).map((one) => one.name).join("."), tensorsOf(node)) }, "List " + count(node.tensors, "tensor")));
    at("crumbs").replaceChildren(...parts);
  }

  function tensorsOf(node, found = []) {
    if (node.tensor >= 0) found.push(node.tensor);
    for (const part of node.parts.values()) tensorsOf(part, found);
    return found;
  }

  new ResizeObserver(draw).observe(box);
}

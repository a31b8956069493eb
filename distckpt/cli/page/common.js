"use strict";
// What comes from the data becomes text (textContent, never markup). Characters that would turn or hide text are shown
// as their numbers.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const isNarrow = matchMedia("(max-width: 760px)");
const rankOfFile = data.files.rank;
const rankRow = new Map(data.ranks.map((one, row) => [one.rank, row]));
const axes = data.mesh.map(([name]) => name);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && name !== "role" && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function shape(tag, properties = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const ODD = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;
const numberOf = (character) => "\\u{" + character.codePointAt(0).toString(16) + "}";
const plain = (text) => String(text).replace(ODD, numberOf);

/** A key as it is, what cannot be seen of it marked. */
function keyOf(text, tag = "span") {
  const element = make(tag, { class: "key" });
  let end = 0;
  for (const match of text.matchAll(ODD)) {
    element.append(text.slice(end, match.index), make("span", { class: "odd" }, numberOf(match[0])));
    end = match.index + match[0].length;
  }
  element.append(text.slice(end));
  return element;
}

function sizeText(bytes) {
  if (bytes < 1000) return bytes + (bytes === 1 ? " byte" : " bytes");
  let unit = -1;
  for (; bytes >= 999.95 && unit < 5; unit++) bytes /= 1000;
  return bytes.toFixed(1) + " " + ["kB", "MB", "GB", "TB", "PB", "EB"][unit];
}

const count = (number, what) => number.toLocaleString("en") + " " + what + (number === 1 ? "" : "s");
const shapeText = (extents) => "[" + extents.join(", ") + "]";
const boxText = (low, extents) => "[" + low.map((start, d) => start + ":" + (start + extents[d])).join(", ") + "]";

/** 0-3,8 of ascending numbers. */
function rangesText(numbers, most = 12) {
  const ranges = [];
  for (const number of numbers) {
    const last = ranges[ranges.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else ranges.push([number, number]);
  }
  const texts = ranges.slice(0, most).map(([low, high]) => (low === high ? low : low + "-" + high));
  return texts.join(",") + (ranges.length > most ? ", ..." : "");
}

const meshText = (mesh) => axes.filter((axis) => axis in mesh).map((axis) => plain(axis) + " " + mesh[axis]).join(", ");

function placeText(rank) {
  const row = rankRow.get(rank);
  const mesh = row === undefined ? "" : meshText(data.ranks[row].mesh);
  return "rank " + rank + (mesh ? " (" + mesh + ")" : "");
}

const PALETTE = ["#7aa6e8", "#f0a35e", "#78c08a", "#e58b94", "#b79ae0", "#d7c05a", "#6cc3c9", "#dd94c9", "#a9b665", "#c49a7c", "#8fb6c9", "#c0a0a8"];
/** Of the n-th of several things. */
function colour(n, of = 12) {
  if (of <= PALETTE.length) return PALETTE[n % PALETTE.length];
  return "hsl(" + ((n * 137.508) % 360).toFixed(1) + " " + (52 + 8 * (n % 3)) + "% " + (60 + 6 * (n % 4)) + "%)";
}

const MAX_PRINTED = 500; // rows of a list

/** Rows of one height, of which only those in sight exist. */
class RowList {
  constructor(box, { heights, fill, pick }) {
    Object.assign(this, { box, heights, fill, pick, length: 0, selected: -1, printed: null });
    this.inner = make("div", { class: "inner" });
    box.replaceChildren(this.inner);
    box.addEventListener("scroll", () => this.draw());
    box.addEventListener("keydown", (event) => this.key(event));
    this.inner.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (row) this.select(Number(row.dataset.row));
    });
    new ResizeObserver(() => this.draw()).observe(box);
    isNarrow.addEventListener("change", () => this.show(this.length));
    for (const [event, most] of [["beforeprint", MAX_PRINTED], ["afterprint", null]]) addEventListener(event, () => this.print(most));
  }

  get height() {
    return this.heights[isNarrow.matches ? 1 : 0];
  }

  show(length, selected = this.selected) {
    this.length = length;
    this.selected = selected;
    // A browser's boxes end at some millions of pixels; beyond, rows are reached by filtering.
    this.inner.style.height = this.printed === null ? Math.min(length * this.height, 15e6) + "px" : "auto";
    this.draw();
  }

  /** For paper, which is not scrolled: the first rows, and how many more there are; null: for the screen again. */
  print(most) {
    this.printed = most;
    this.show(this.length);
    const more = this.length - most;
    if (most !== null && more > 0) this.inner.append(make("div", { class: "empty" }, "and " + more.toLocaleString("en") + " more"));
  }

  draw() {
    const isPrinted = this.printed !== null;
    const first = isPrinted ? 0 : Math.max(0, Math.floor(this.box.scrollTop / this.height) - 4);
    const last = Math.min(this.length, isPrinted ? this.printed : first + Math.ceil(this.box.clientHeight / this.height) + 9);
    const rows = [];
    for (let row = first; row < last; row++) {
      const element = this.fill(row);
      element.dataset.row = row;
      element.id = this.box.id + "-" + row;
      element.setAttribute("role", "option");
      element.setAttribute("aria-selected", row === this.selected);
      if (!isPrinted) element.style.top = row * this.height + "px";
      rows.push(element);
    }
    this.inner.replaceChildren(...(rows.length ? rows : [make("div", { class: "empty" }, "Nothing matches.")]));
    if (this.selected >= first && this.selected < last) this.box.setAttribute("aria-activedescendant", this.box.id + "-" + this.selected);
    else this.box.removeAttribute("aria-activedescendant");
  }

  select(row, isQuiet = false) {
    if (row < 0 || row >= this.length) return;
    this.selected = row;
    const top = row * this.height;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top + this.height > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + this.height - this.box.clientHeight;
    this.draw();
    if (!isQuiet) this.pick(row);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.select(Math.min(this.length - 1, Math.max(0, this.selected + steps[event.key])));
  }
}

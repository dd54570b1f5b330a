/* The fields captions are typed into: rows that come and go, and the pair of a comparison. Knows what is typed, not what for. */

import { byId, el } from "./dom.js";

const MIN_ROWS = 3;
let numMade = 0;

/** A caption's text area with its fault note; `label` is what a screen reader calls it. */
function captionField(label, text = "") {
  const id = `caption-${++numMade}`;
  const area = el("textarea", { id, value: text, rows: 1, spellcheck: true, aria: { label, describedby: `${id}-fault` } });
  const note = el("p", { id: `${id}-fault`, className: "fault-note", hidden: true });
  requestAnimationFrame(() => fit(area));
  return { area, note };
}

/** As high as its text, where CSS alone cannot do it. */
export function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** The ranking's rows. `changed` is called when what they hold has changed, `tooMany` when nothing was added because they would be more than `most`. */
export class Rows {
  most = 256;
  #list = byId("rows");
  #changed;
  #tooMany;
  #untouched = true;

  constructor(changed, tooMany) {
    this.#changed = changed;
    this.#tooMany = tooMany;
    this.fill([]);
  }

  get areas() {
    return [...this.#list.querySelectorAll("textarea")];
  }

  get filled() {
    return this.areas.filter((area) => area.value.trim() !== "");
  }

  /** Nobody has typed anything of their own. */
  get untouched() {
    return this.#untouched || this.filled.length === 0;
  }

  fill(texts) {
    const empty = Array(Math.max(0, MIN_ROWS - texts.length)).fill("");
    this.#list.replaceChildren();
    this.#insert([...texts, ...empty]);
    this.#untouched = true;
  }

  /** Those of `texts` that are not there yet, at the end; empty rows are used up first. */
  append(texts) {
    const present = new Set(this.areas.map((area) => area.value));
    const kept = this.filled.map((area) => area.value);
    const all = [...kept, ...texts.filter((text) => !present.has(text))];
    if (this.#refuses(all.length)) return;
    this.fill(all);
    this.#untouched = false;
    this.#changed();
  }

  /** A new, empty row, before another or at the end; null when there are as many captions as may be. */
  add(before = null) {
    return this.#refuses(this.filled.length + 1) ? null : this.#insert([""], before)[0];
  }

  #refuses(num, area = null) {
    if (num > this.most) this.#tooMany(num, this.most, area);
    return num > this.most;
  }

  /** Rows are numbered once, however many come: each number is an attribute of the page. */
  #insert(texts, before = null) {
    const made = texts.map((text) => this.#row(text));
    const rows = document.createDocumentFragment();
    rows.append(...made.map(({ row }) => row));
    this.#list.insertBefore(rows, before);
    this.#number();
    return made.map(({ area }) => area);
  }

  #row(text) {
    const { area, note } = captionField("Caption", text);
    const row = el("li", {}, area, el("button", { type: "button", className: "remove", textContent: "×" }), note);
    area.addEventListener("input", () => this.#edited(area));
    area.addEventListener("keydown", (event) => this.#keyed(event, area));
    area.addEventListener("paste", (event) => this.#pasted(event, area));
    row.querySelector("button").addEventListener("click", () => this.#remove(row));
    return { row, area };
  }

  #edited(area) {
    fit(area);
    this.#untouched = false;
    this.#changed(area);
  }

  #keyed(event, area) {
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = area.closest("li");
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      const next = row.nextElementSibling?.querySelector("textarea");
      (next?.value === "" ? next : this.add(row.nextElementSibling))?.focus();
    } else if (event.key === "Backspace" && area.value === "" && this.areas.length > 1) {
      event.preventDefault();
      this.#remove(row, { backwards: true });
    }
  }

  /** A pasted list becomes a row a line. */
  #pasted(event, area) {
    const lines = (event.clipboardData?.getData("text/plain") ?? "").split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
    if (lines.length < 2) return;
    event.preventDefault();
    const [first, ...others] = lines;
    if (this.#refuses(this.filled.filter((each) => each !== area).length + lines.length, area)) return;
    area.setRangeText(first, area.selectionStart, area.selectionEnd, "end");
    const next = area.closest("li").nextElementSibling;
    const added = this.#insert(others, next);
    this.#edited(area);
    added.at(-1).focus();
  }

  #remove(row, { backwards = false } = {}) {
    const neighbour = (backwards && row.previousElementSibling) || row.nextElementSibling || row.previousElementSibling;
    row.remove();
    if (neighbour) this.#number();
    else this.#insert([""]);
    (neighbour ?? this.#list.firstElementChild).querySelector("textarea").focus();
    this.#untouched = false;
    this.#changed();
  }

  #number() {
    for (const [index, row] of [...this.#list.children].entries()) {
      row.querySelector("textarea").setAttribute("aria-label", `Caption ${index + 1}`);
      row.querySelector("button").setAttribute("aria-label", `Remove caption ${index + 1}`);
    }
  }
}

/** The two captions of a comparison. */
export class Pair {
  constructor(changed, done) {
    this.areas = ["A", "B"].map((letter) => {
      const { area, note } = captionField(`Caption ${letter}`);
      area.rows = 3;
      area.addEventListener("input", () => (fit(area), changed(area)));
      byId("pair-fields").append(el("div", {}, el("label", { htmlFor: area.id, className: "letter" }, letter), area, note));
      return area;
    });
    const [first, second] = this.areas;
    for (const [area, next] of [[first, () => second.focus()], [second, done]]) {
      area.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        next();
      });
    }
  }

  get empty() {
    return this.areas.every((area) => area.value.trim() === "");
  }

  fill(texts) {
    this.areas.forEach((area, index) => (area.value = texts[index] ?? ""));
  }
}

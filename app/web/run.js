// Draws one training run: its numbers come every few seconds, and whole new plots take the place of the old ones.
import { ago, at, element, known, number, percent, put, signed, whole } from "./words.js";
import { poll } from "./polling.js";

const HEIGHT = 210;
const EDGE = { left: 54, right: 12, top: 12, bottom: 38 };
const ID = location.pathname.split("/").pop(); // as it stands in the address: a run's id has nothing to decode
const IS_ID = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(~[A-Za-z0-9._~-]{1,64})?$/.test(ID); // behind ~: of a model that is not the first

let shown = null; // what is drawn now
let drawnWidth = 0;

// Drawing

function drawn(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function ticks(low, high, count) {
  // At round values, at least `count` of them less one.
  const most = (high - low) / (count - 1);
  const power = 10 ** Math.floor(Math.log10(most));
  const step = [5, 2, 1].map((factor) => factor * power).find((each) => each <= most) ?? power;
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index += 1) found.push(index * step);
  return found;
}

function widened([low, high]) {
  if (low < high) return [low, high];
  const room = Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}

function labelled(values, text) {
  // With as many digits as it takes to tell neighbours apart.
  const [first, second] = values;
  const digits = values.length > 1 ? Math.ceil(Math.log10(Math.max(...values.map(Math.abs)) / (second - first))) + 1 : 3;
  return values.map((value) => [value, text(value, Math.min(15, Math.max(3, digits)))]);
}

class Plane {
  constructor(width, xs, ys, { xLabel, yLabel, yText = number, label }) {
    this.width = width;
    this.xs = widened(xs);
    this.ys = widened(ys);
    const marks = labelled(ticks(...this.ys, 4), yText);
    this.left = Math.max(EDGE.left, 24 + 6.5 * Math.max(0, ...marks.map(([, text]) => text.length)));
    this.svg = drawn("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${HEIGHT}` });
    for (const [value, text] of marks) {
      this.svg.append(drawn("line", { class: "grid", x1: this.left, x2: width - EDGE.right, y1: this.y(value), y2: this.y(value) }));
      this.svg.append(drawn("text", { class: "y", x: this.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, text));
    }
    this.below(xLabel);
    const middle = (HEIGHT - EDGE.bottom + EDGE.top) / 2;
    this.svg.append(drawn("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, yLabel));
  }

  below(xLabel) {
    const marks = labelled(ticks(...this.xs, this.width < 420 ? 4 : 6), number);
    const room = 7 * Math.max(0, ...marks.map(([, text]) => text.length)) + 8;
    const least = Math.ceil((room * marks.length) / (this.width - this.left)); // long labels: every second, or third
    marks.filter((_, place) => place % least === 0).forEach(([value, text]) => {
      const anchor = this.x(value) > this.width - 30 ? "end" : "middle";
      this.svg.append(drawn("text", { class: "x", x: Math.min(this.x(value), this.width - 4), y: HEIGHT - 22, "text-anchor": anchor }, text));
    });
    this.svg.append(drawn("text", { x: (this.left + this.width - EDGE.right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, xLabel));
  }

  x(value) {
    return this.left + ((value - this.xs[0]) / (this.xs[1] - this.xs[0])) * (this.width - this.left - EDGE.right);
  }

  y(value) {
    return HEIGHT - EDGE.bottom - ((value - this.ys[0]) / (this.ys[1] - this.ys[0])) * (HEIGHT - EDGE.bottom - EDGE.top);
  }

  level(value, kind) {
    if (value < this.ys[0] || value > this.ys[1]) return;
    this.svg.append(drawn("line", { class: kind, x1: this.left, x2: this.width - EDGE.right, y1: this.y(value), y2: this.y(value) }));
  }

  line(points, kind = "") {
    for (const piece of pieces(points)) {
      const steps = piece.map(([x, y]) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`);
      if (piece.length > 1) this.svg.append(drawn("path", { class: `line ${kind}`, d: `M${steps.join("L")}` }));
      else this.svg.append(drawn("circle", { class: `dot ${kind}`, cx: this.x(piece[0][0]), cy: this.y(piece[0][1]), r: 3 }));
    }
  }

  band(points, kind) {
    for (const piece of pieces(points)) {
      const place = (x, y) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
      const over = piece.map(([x, , high]) => place(x, high));
      const under = piece.map(([x, low]) => place(x, low)).reverse();
      this.svg.append(drawn("path", { class: kind, d: `M${[...over, ...under].join("L")}Z` }));
    }
  }
}

function pieces(points) {
  // What is unknown leaves a gap.
  const found = [[]];
  for (const point of points) {
    if (point.every(known)) found[found.length - 1].push(point);
    else if (found[found.length - 1].length) found.push([]);
  }
  return found.filter((piece) => piece.length);
}

// Figures stay where they are, and only what is in them is new: whoever reads one under the pointer or by arrow keys goes on reading.

const standing = new Map(); // by title

function figure(title, said, svg, key, readings = null) {
  const kept = standing.get(title) ?? stood(title);
  kept.said = said;
  kept.readings = readings;
  for (const { name, value } of svg.attributes) kept.svg.setAttribute(name, value);
  if (readings) kept.svg.setAttribute("tabindex", "0");
  else kept.svg.removeAttribute("tabindex");
  kept.svg.replaceChildren(...svg.childNodes, kept.guide);
  kept.key.replaceChildren(...key.map(([kind, text]) => element("span", { class: kind }, element("i"), text)));
  tell(kept);
  return kept.made;
}

function stood(title) {
  const kept = { note: element("span"), svg: drawn("svg"), key: element("div", { class: "key" }), x: null };
  kept.guide = drawn("line", { class: "guide", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  kept.made = element("figure", {}, element("figcaption", {}, title, kept.note), kept.svg, kept.key);
  kept.svg.addEventListener("pointermove", (event) => point(kept, event.clientX - kept.svg.getBoundingClientRect().left));
  kept.svg.addEventListener("keydown", (event) => step(kept, event));
  kept.svg.addEventListener("focus", () => kept.note.setAttribute("aria-live", "polite")); // of a pointer nothing is read aloud
  kept.svg.addEventListener("blur", () => kept.note.removeAttribute("aria-live"));
  for (const end of ["pointerleave", "blur"]) kept.svg.addEventListener(end, () => read(kept, null));
  standing.set(title, kept);
  return kept;
}

function nearest(xs, distance) {
  return xs.reduce((best, value, place) => (distance(value) < distance(xs[best]) ? place : best), 0);
}

function point(kept, x) {
  const { plane, xs } = kept.readings ?? { xs: [] };
  if (xs.length) read(kept, xs[nearest(xs, (value) => Math.abs(plane.x(value) - x))]);
}

function step(kept, event) {
  const { xs } = kept.readings ?? { xs: [] };
  const last = xs.length - 1;
  const now = kept.x === null ? last + 1 : nearest(xs, (value) => Math.abs(value - kept.x));
  const wanted = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last, Escape: null }[event.key];
  if (wanted === undefined || last < 0) return;
  event.preventDefault();
  read(kept, wanted === null ? null : xs[Math.max(0, Math.min(last, wanted))]);
}

function read(kept, x) {
  kept.x = x;
  tell(kept);
}

function tell(kept) {
  const isRead = kept.readings && kept.x !== null;
  kept.guide.setAttribute("visibility", isRead ? "visible" : "hidden");
  if (!isRead) return put(kept.note, kept.said);
  const { plane, xs, read: words } = kept.readings;
  const place = nearest(xs, (value) => Math.abs(value - kept.x));
  for (const end of ["x1", "x2"]) kept.guide.setAttribute(end, plane.x(xs[place]));
  return put(kept.note, words(place));
}

function empty(title, width, why) {
  const svg = drawn("svg", { role: "img", "aria-label": `${title}: ${why}`, viewBox: `0 0 ${width} ${HEIGHT}` });
  svg.append(drawn("text", { class: "unknown", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "unknown"));
  return figure(title, why, svg, []);
}

// The plots

function histogram(run, width) {
  const { edges, counts } = run.histogram;
  const total = run.total.captions;
  const narrowest = Math.min(...edges.slice(1).map((edge, index) => edge - edges[index]));
  const bins = counts.map((count, index) => ({ low: edges[index - 1] ?? -Infinity, high: edges[index] ?? Infinity, count }));
  const filled = bins.filter((bin) => bin.count);
  const [first, last] = [filled[0], filled[filled.length - 1]]; // these reach no further than the scores do
  first.low = Math.min(Math.max(first.low, run.total.min), first.high === Infinity ? run.total.min : first.high - narrowest);
  last.high = Math.max(Math.min(last.high, run.total.max), last.low + narrowest);
  for (const bin of filled) bin.density = bin.count / total / (bin.high - bin.low);
  const told = run.expected;
  const ends = told ? [told.mean - 3.5 * told.std, told.mean + 3.5 * told.std] : [];
  const xs = [Math.min(...filled.map((bin) => bin.low), ...ends), Math.max(...filled.map((bin) => bin.high), ...ends)];
  const curve = told ? normal(told, xs) : [];
  const top = Math.max(...filled.map((bin) => bin.density), ...curve.map(([, y]) => y));
  const said = `mean ${number(run.total.mean)}, ${number(run.total.min)} to ${number(run.total.max)}` + (told ? `; on validation data ${number(told.mean)} ± ${number(told.std)}` : "; validation data unknown");
  const plane = new Plane(width, xs, [0, top * 1.05], { xLabel: "score", yLabel: "share per unit of score", label: `Histogram of ${whole(total)} scores: ${said}` });
  for (const bin of filled) {
    const x = plane.x(bin.low);
    const y = plane.y(bin.density);
    plane.svg.append(drawn("rect", { class: "bar", x: x + 0.5, y, width: Math.max(1, plane.x(bin.high) - x - 1), height: plane.y(0) - y }));
  }
  if (told) plane.svg.append(drawn("path", { class: "expected", d: `M${curve.map(([x, y]) => `${plane.x(x).toFixed(1)} ${plane.y(y).toFixed(1)}`).join("L")}` }));
  return figure("Scores", said, plane.svg, [["bar", "this run, all of it"], ...(told ? [["expected", "its validation data (normal curve)"]] : [])]);
}

function normal({ mean, std }, [low, high]) {
  const steps = Array.from({ length: 121 }, (_, index) => low + ((high - low) * index) / 120);
  return steps.map((x) => [x, Math.exp(-(((x - mean) / std) ** 2) / 2) / (std * Math.sqrt(2 * Math.PI))]);
}

function trail(run) {
  // Where on the x axis each point of the history ends: captions scored so far.
  let sum = 0;
  return run.history.map((point) => (sum += point.captions));
}

const X_LABEL = "captions scored";
const domain = (xs) => [0, xs[xs.length - 1]];

function means(run, width) {
  const xs = trail(run);
  const points = run.history;
  const around = points.map((point, index) => [xs[index], known(point.group_spread) ? point.mean - point.group_spread : null, known(point.group_spread) ? point.mean + point.group_spread : null]);
  const told = run.expected;
  const values = [...points.flatMap((point) => [point.min, point.max]), ...(told ? [told.mean] : [])];
  const last = run.recent;
  const [low, high] = widened([Math.min(...values), Math.max(...values)]);
  const room = 0.05 * (high - low);
  const said = `lately ${number(last.mean)}` + (known(last.group_spread) ? `, within a group ± ${number(last.group_spread)}` : "");
  const plane = new Plane(width, domain(xs), [low - room, high + room], { xLabel: X_LABEL, yLabel: "score", label: `Mean score over the run: at first ${number(points[0].mean)}, ${said}` });
  plane.band(points.map((point, index) => [xs[index], point.min, point.max]), "range");
  plane.band(around, "band");
  if (told) plane.level(told.mean, "expected");
  plane.line(points.map((point, index) => [xs[index], point.mean]));
  const read = (index) => `after ${whole(xs[index])}: ${number(points[index].mean)} ± ${number(points[index].group_spread)}, ${number(points[index].min)} to ${number(points[index].max)}`;
  const key = [["", "mean"], ["band", "± spread within groups"], ["range", "lowest to highest"], ...(told ? [["expected", "mean on validation data"]] : [])];
  return figure("Mean score", said, plane.svg, key, { plane, xs, read });
}

function course(run, width, { title, said, lines, ys, limits, yLabel, text, key }) {
  const xs = trail(run);
  const label = `${title} over the run: ${said}`;
  const plane = new Plane(width, domain(xs), ys, { xLabel: X_LABEL, yLabel, yText: text, label });
  for (const limit of limits) plane.level(limit, "limit");
  lines.forEach(([field], index) => plane.line(run.history.map((point, place) => [xs[place], point[field]]), index ? "second" : ""));
  const read = (index) => `after ${whole(xs[index])}: ${lines.map(([field, name]) => `${name}${text(run.history[index][field])}`).join(", ")}`;
  return figure(title, said, plane.svg, [...key, ["limit", "limit"]], { plane, xs, read });
}

const shareText = (value) => percent(value);

function flat(run, width) {
  if (!run.total.compared_groups) return empty("Groups without spread", width, "every group had a single caption");
  return course(run, width, {
    title: "Groups without spread", said: `lately ${percent(run.recent.flat_share)}` + (run.recent.flat_share ? ": nothing is learned from these" : ""),
    lines: [["flat_share", ""]], ys: [0, 1], limits: [run.limits.flat_share], yLabel: "share of groups", text: shareText, key: [],
  });
}

function correlation(run, width) {
  const title = "Score against length";
  const isGrouped = run.total.compared_groups > 0;
  const field = isGrouped ? "length_correlation" : "length_correlation_overall";
  const overall = `${signed(run.recent.length_correlation_overall)} over all captions`;
  if (!known(run.total[field])) return empty(title, width, `scores or lengths never differ${isGrouped ? " within a group" : ""}`);
  return course(run, width, {
    title, said: isGrouped ? `lately r = ${signed(run.length_r)} within groups, ${overall}` : `lately r = ${signed(run.length_r)} over all captions`,
    lines: [[field, "r = "]], ys: [-1, 1], limits: [run.limits.length_correlation, -run.limits.length_correlation],
    yLabel: "correlation r", text: (value) => (value === 0 ? "0" : signed(value, 1)), key: [["", isGrouped ? "within groups" : "over all captions"]],
  });
}

function copies(run, width) {
  return course(run, width, {
    title: "Captions word for word again", said: `lately ${percent(run.recent.duplicate_share)} in the same group, ${percent(run.recent.repeat_share)} in an earlier one`,
    lines: [["duplicate_share", "same group "], ["repeat_share", "earlier group "]], ys: [0, 1], limits: [...new Set([run.limits.duplicate_share, run.limits.repeat_share])],
    yLabel: "share of captions", text: shareText, key: [["", "in the same group"], ["second", "in an earlier group"]],
  });
}

function drift(run, width) {
  const title = "Drift from validation";
  if (!run.expected) return empty(title, width, "the artifact has no score distribution");
  const values = run.history.map((point) => point.drift);
  const reach = Math.max(run.limits.drift * 1.2, ...values.map(Math.abs));
  return course(run, width, {
    title, said: `lately ${signed(run.recent.drift)} σ; ${percent(run.recent.outside_share)} of scores beyond ± 3 σ`,
    lines: [["drift", ""]], ys: [-reach, reach], limits: [run.limits.drift, -run.limits.drift],
    yLabel: "σ of validation", text: (value) => (value === 0 ? "0" : signed(value, 1)), key: [["", "mean of the run"]],
  });
}

// The page

function verdict(run) {
  const box = at("verdict");
  box.className = `verdict ${run.findings.length ? "ill" : run.early ? "" : "well"}`;
  const wanted = `${run.limits.min_groups} groups and ${run.limits.min_captions} captions`;
  const signs = run.findings.length === 1 ? "One sign" : `${run.findings.length} signs`;
  put(at("headline"), run.findings.length
    ? `${signs} to look at in the last groups.`
    : run.early ? `Too early to tell: a verdict needs ${wanted}.` : "No sign to look at in the last groups.");
  at("findings").replaceChildren(...run.findings.map((finding) => element("li", {}, finding.text)));
}

function figures(run) {
  const last = run.recent;
  const codes = new Set(run.findings.map((finding) => finding.code));
  const rows = [
    ["mean score", number(last.mean), "drift"],
    ["spread within groups", number(last.group_spread), "spread_fell"],
    ["groups without spread", percent(last.flat_share), "no_spread"],
    ["score against length, r", signed(run.length_r), "length"],
    ["twins in their group", percent(last.duplicate_share), "duplicates"],
    ["met in earlier groups", percent(last.repeat_share), "repeats"],
    ["drift", known(last.drift) ? `${signed(last.drift)} σ` : "unknown", "drift"],
    ["spread, of validation's", known(last.std_ratio) ? `${number(last.std_ratio)} ×` : "unknown", "std_ratio"],
    ["beyond ± 3 σ", percent(last.outside_share), "outside"],
    ["characters a caption", number(last.mean_length), ""],
  ];
  const kind = (text, code) => (codes.has(code) ? "over" : text === "unknown" ? "unknown" : "");
  at("figures").replaceChildren(...rows.map(([name, text, code]) => element("div", {}, element("dt", {}, name), element("dd", { class: kind(text, code) }, text))));
}

function facts(run) {
  at("facts").textContent = run.total.captions
    ? `${whole(run.total.captions)} captions in ${whole(run.total.groups)} groups since ${new Date(1000 * run.total.first_seen_s).toLocaleString()}; the last ${ago(Date.now() / 1000 - run.total.last_seen_s)}`
    : "no usable score yet";
}

function notes(run) {
  const said = [`Figures and verdict are of the last ${run.recent.groups} groups, plots of the whole run. Lengths are in characters.`];
  if (!run.expected) said.push("The artifact has no score distribution, so drift is unknown.");
  if (!run.recent.compared_groups) said.push("Every group has a single caption, so nothing is known of spread within groups.");
  if (run.open_groups) said.push(`${whole(run.open_groups)} of the groups came one caption at a time and may still grow.`);
  if (run.unusable_scores) said.push(`${whole(run.unusable_scores)} scores beyond float32 are left out.`);
  put(at("notes"), said.join(" "));
}

function plots(run) {
  const place = at("plots");
  drawnWidth = place.clientWidth;
  if (!run.total.captions || drawnWidth < 200) return place.replaceChildren();
  const columns = Math.max(1, Math.floor((drawnWidth + 14) / 354));
  const width = Math.floor((drawnWidth - 14 * (columns - 1)) / columns) - 30; // without the padding and border of a figure
  for (const plot of [histogram, means, flat, correlation, copies, drift]) {
    const made = plot(run, width);
    if (made.parentNode !== place) place.append(made);
  }
}

function show(run) {
  const isNew = JSON.stringify(run) !== JSON.stringify(shown);
  shown = run;
  facts(run);
  if (!isNew) return;
  verdict(run);
  figures(run);
  notes(run);
  plots(run);
}

function missing() {
  if (shown) return "The server has forgotten this run; this is what it last said.";
  put(at("headline"), "No scores of this run yet. It begins with the first request that names it, and idle runs make room for new ones.");
  return "";
}

at("name").textContent = ID;
document.title = `${ID} · Punchline`;
new ResizeObserver(([entry]) => {
  if (shown && entry.contentRect.width !== drawnWidth) plots(shown);
}).observe(at("plots"));
if (IS_ID) poll(`./${encodeURIComponent(ID)}/statistics`, { show, missing });
else put(at("headline"), "No run has such an id: 1 to 64 letters, digits, dots, underscores and hyphens, a letter or digit first.");

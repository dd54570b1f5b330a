// Draws one training run: asks for its numbers every few seconds and puts whole new plots in the place of the old ones.
"use strict";

const EVERY_MS = 3000;
const HEIGHT = 210;
const EDGE = { left: 54, right: 12, top: 12, bottom: 38 };
const ID = location.pathname.split("/").pop();
const at = (id) => document.getElementById(id);

let shown = null; // what is drawn now
let drawnWidth = 0;
let apiKey = ""; // in memory and nowhere else
let timer = 0;

// Words

const known = (value) => value !== null && value !== undefined;
const percent = (value) => (known(value) ? `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %` : "unknown");
const whole = (value) => Math.round(value).toLocaleString("en");
const signed = (value, digits = 2) => (known(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}` : "unknown");

function number(value) {
  if (!known(value)) return "unknown";
  const size = Math.abs(value);
  const text = size && (size < 1e-3 || size >= 1e5) ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : "") + text;
}

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Drawing

function drawn(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index += 1) found.push(index * step);
  return found;
}

function widened([low, high]) {
  if (low < high) return [low, high];
  const room = Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}

class Plane {
  constructor(width, xs, ys, { xLabel, yLabel, yText = number, label }) {
    this.width = width;
    this.xs = widened(xs);
    this.ys = widened(ys);
    this.svg = drawn("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${HEIGHT}` });
    for (const value of ticks(...this.ys, 4)) {
      this.svg.append(drawn("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: this.y(value), y2: this.y(value) }));
      this.svg.append(drawn("text", { x: EDGE.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, yText(value)));
    }
    for (const value of ticks(...this.xs, width < 420 ? 4 : 6)) {
      const anchor = this.x(value) > width - 30 ? "end" : "middle";
      this.svg.append(drawn("text", { x: Math.min(this.x(value), width - 4), y: HEIGHT - 22, "text-anchor": anchor }, number(value)));
    }
    this.svg.append(drawn("text", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, xLabel));
    const middle = (HEIGHT - EDGE.bottom + EDGE.top) / 2;
    this.svg.append(drawn("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, yLabel));
  }

  x(value) {
    return EDGE.left + ((value - this.xs[0]) / (this.xs[1] - this.xs[0])) * (this.width - EDGE.left - EDGE.right);
  }

  y(value) {
    return HEIGHT - EDGE.bottom - ((value - this.ys[0]) / (this.ys[1] - this.ys[0])) * (HEIGHT - EDGE.bottom - EDGE.top);
  }

  level(value, kind) {
    if (value < this.ys[0] || value > this.ys[1]) return;
    this.svg.append(drawn("line", { class: kind, x1: EDGE.left, x2: this.width - EDGE.right, y1: this.y(value), y2: this.y(value) }));
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

function figure(title, said, svg, key, readings = null) {
  const note = element("span", {}, said);
  const made = element("figure", {}, element("figcaption", {}, title, note), svg, legend(key));
  if (readings) follow(svg, readings, note, said);
  return made;
}

function legend(key) {
  const entry = ([kind, text]) => element("span", { class: kind }, element("i"), text);
  return element("div", { class: "key" }, ...key.map(entry));
}

function follow(svg, { plane, xs, read }, note, said) {
  const guide = drawn("line", { class: "guide", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  svg.append(guide);
  svg.addEventListener("pointermove", (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const nearest = xs.reduce((best, value, index) => (Math.abs(plane.x(value) - x) < Math.abs(plane.x(xs[best]) - x) ? index : best), 0);
    for (const end of ["x1", "x2"]) guide.setAttribute(end, plane.x(xs[nearest]));
    guide.setAttribute("visibility", "visible");
    note.textContent = read(nearest);
  });
  svg.addEventListener("pointerleave", () => {
    guide.setAttribute("visibility", "hidden");
    note.textContent = said;
  });
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
    title, said: isGrouped ? `lately r = ${signed(run.recent.length_correlation)} within groups, ${overall}` : `lately r = ${overall}`,
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
  const signs = run.findings.length === 1 ? "one sign" : `${run.findings.length} signs`;
  put("headline", run.findings.length
    ? `Looks like reward hacking: ${signs} in the last groups.`
    : run.early ? `Too early to tell: a verdict needs ${wanted}.` : "Nothing looks like reward hacking in the last groups.");
  at("findings").replaceChildren(...run.findings.map((finding) => element("li", {}, finding.text)));
}

function figures(run) {
  const last = run.recent;
  const codes = new Set(run.findings.map((finding) => finding.code));
  const rows = [
    ["mean score", number(last.mean), "drift"],
    ["spread within groups", number(last.group_spread), "spread_fell"],
    ["groups without spread", percent(last.flat_share), "no_spread"],
    ["score against length, r", signed(last.compared_groups ? last.length_correlation : last.length_correlation_overall), "length"],
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
  if (!run.recent.compared_groups) said.push("Captions came one at a time, so nothing is known of spread within groups.");
  if (run.unusable_scores) said.push(`${whole(run.unusable_scores)} scores beyond float32 are left out.`);
  at("notes").textContent = said.join(" ");
}

function plots(run) {
  const place = at("plots");
  drawnWidth = place.clientWidth;
  if (!run.total.captions || drawnWidth < 200) return place.replaceChildren();
  const columns = Math.max(1, Math.floor((drawnWidth + 14) / 354));
  const width = Math.floor((drawnWidth - 14 * (columns - 1)) / columns) - 30; // without the padding and border of a figure
  place.replaceChildren(...[histogram, means, flat, correlation, copies, drift].map((plot) => plot(run, width)));
}

function show(run) {
  const isNew = !shown || shown.total.captions !== run.total.captions || shown.total.first_seen_s !== run.total.first_seen_s;
  shown = run;
  facts(run);
  if (!isNew) return;
  verdict(run);
  figures(run);
  notes(run);
  plots(run);
}

function put(id, text) {
  // Only what is new, for whoever has the page read aloud.
  if (at(id).textContent !== text) at(id).textContent = text;
}

const say = (text) => put("state", text);

async function ask() {
  const answer = await fetch(`${ID}/statistics`, { headers: { Accept: "application/json", ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}) } });
  at("unlock").hidden = answer.status !== 401;
  if (answer.ok) {
    show(await answer.json());
    return say("");
  }
  if (answer.status === 401) {
    put("headline", apiKey ? "That key does not open this server." : "The numbers are behind the server's key.");
    apiKey = "";
    clearTimeout(timer);
    timer = -1; // until a key is given
    return say("");
  }
  if (answer.status !== 404) return say(`The server answers ${answer.status}; asking again.`);
  if (!shown) put("headline", "No scores of this run yet. It begins with the first request that names it, and idle runs make room for new ones.");
  return say(shown ? "The server has forgotten this run; this is what it last said." : "");
}

async function refresh() {
  timer = 0;
  try {
    if (!document.hidden) await ask();
  } catch (error) {
    say(`The server does not answer (${error.message}); asking again.`);
  }
  if (timer === 0) timer = setTimeout(refresh, EVERY_MS);
}

at("name").textContent = ID; // as it stands in the address: a run's id has nothing to decode
document.title = `${ID} · Punchline`;
at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = at("key").value.trim();
  at("key").value = "";
  refresh();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || timer < 0) return;
  clearTimeout(timer);
  refresh();
});
new ResizeObserver(([entry]) => {
  if (shown && entry.contentRect.width !== drawnWidth) plots(shown);
}).observe(at("plots"));
refresh();

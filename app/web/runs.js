// The list of training runs, each with what there is to look at and a way to its page.
import { ago, at, element, number, put, whole } from "./words.js";
import { poll } from "./polling.js";

const HEADS = ["run", "captions", "mean score", "last scores", "signs to look at"];

function row(run) {
  const cells = [whole(run.captions), number(run.mean), run.last_seen_s ? ago(Date.now() / 1000 - run.last_seen_s) : "none", run.findings.join(", ") || "none"];
  const name = element("th", { scope: "row" }, element("a", { href: `./${encodeURIComponent(run.id)}` }, run.id));
  return element("tr", {}, name, ...cells.map((text, place) => element("td", { "data-head": HEADS[place + 1], ...(place === 3 && run.findings.length ? { class: "over" } : {}) }, text)));
}

function show({ runs }) {
  put(at("headline"), runs.length === 0 ? "No run yet. One begins with the first scores that name it in X-Run-Id." : runs.length === 1 ? "One run is kept." : `${runs.length} runs are kept.`);
  const focused = document.activeElement?.closest("#list a")?.textContent;
  at("list").replaceChildren(...(runs.length ? [table(runs)] : []));
  if (focused) [...at("list").querySelectorAll("a")].find((link) => link.textContent === focused)?.focus();
}

function table(runs) {
  const head = element("thead", {}, element("tr", {}, ...HEADS.map((text) => element("th", { scope: "col" }, text))));
  return element("table", {}, head, element("tbody", {}, ...runs.map(row)));
}

poll("../runs", { show, missing: () => "" });

/* Shows answers: a ranking as a table with bars, a comparison side by side. Numbers are the API's; nothing is computed but widths. */

import { byId, el, written } from "./dom.js";

/** A number for people, with its exact value in `data`. */
function figure(value, text) {
  return el("data", { value: String(value) }, text);
}

const MIN_DIGITS = 3;
const MAX_DIGITS = 12;

/** A zero has no sign, whatever was rounded to it. */
function fixed(value, digits) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

/** How many digits tell apart what differs; `values` are in order. */
function digitsOf(values) {
  const alike = (digits) => values.some((value, at) => at > 0 && value !== values[at - 1] && fixed(value, digits) === fixed(values[at - 1], digits));
  let digits = MIN_DIGITS;
  while (digits < MAX_DIGITS && alike(digits)) digits += 1;
  return digits;
}

const score = (value, digits) => figure(value, fixed(value, digits));

function percent(share) {
  const text = share > 0 && share < 0.001 ? "< 0.1" : share < 1 && share > 0.999 ? "> 99.9" : (share * 100).toFixed(1);
  return figure(share, `${text} %`);
}

function bar(share) {
  return el("div", { className: "bar", aria: { hidden: true } }, el("span", { style: { width: `${share * 100}%` } }));
}

export function showRanking(answer) {
  const { ranking } = answer;
  const best = ranking.filter((place) => place.rank === 1);
  const lead = best.length > 1 ? `${best.length} share the first place: ` : ranking.length > 1 ? `Best of ${ranking.length}: ` : "Scored: ";
  byId("verdict").replaceChildren(lead, el("strong", {}, "“", written(best[0].caption), "”"));
  const digits = digitsOf(ranking.map((place) => place.score));
  const heads = [el("span", { className: "sr" }, "Rank"), "Caption", "Score", "Against the best"];
  const table = el("table", { className: "ranking", role: "table" }, el("caption", { className: "sr" }, "Captions, best first"));
  table.append(
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads.map((head) => el("th", { scope: "col", role: "columnheader" }, head)))),
    el("tbody", { role: "rowgroup" }, ...ranking.map((place) => placeRow(place, digits))),
  );
  byId("answer").replaceChildren(table, note("Against the best: how likely it is preferred to the first; 50 % is as good. Of scores only differences mean anything."));
}

/** Roles are spelt out because a narrow screen lays the rows out as grids, by which browsers forget that they are rows. */
function placeRow(place, digits) {
  const rank = place.tied ? [`=${place.rank}`, el("span", { className: "sr" }, " tied")] : [String(place.rank)];
  return el(
    "tr",
    { className: place.rank === 1 ? "best" : "", role: "row", dataset: { index: place.index } },
    el("td", { className: "rank", role: "cell" }, ...rank),
    el("th", { scope: "row", role: "rowheader" }, written(place.caption), bar(place.win_probability * 2)),
    el("td", { className: "score", role: "cell" }, score(place.score, digits)),
    el("td", { className: "win", role: "cell" }, percent(place.win_probability)),
  );
}

export function showComparison(answer, captions) {
  const { preferred, probability_a: probability, margin, scores } = answer;
  const shares = { a: probability, b: 1 - probability };
  const digits = digitsOf([scores.a, scores.b]);
  const tie = preferred === "tie";
  byId("verdict").replaceChildren(...(tie ? ["A tie: both have the same score."] : [`${preferred.toUpperCase()} is preferred: `, percent(shares[preferred]), "."]));
  const sides = ["a", "b"].map((side, index) =>
    el(
      "div",
      { className: side === preferred ? "side best" : "side", dataset: { side } },
      el("h3", {}, side.toUpperCase(), ...(side === preferred ? [el("span", { className: "badge" }, "preferred")] : [])),
      el("p", {}, written(captions[index])),
      el("dl", {}, pairOf("Preferred", percent(shares[side])), pairOf("Score", score(scores[side], digits))),
    ),
  );
  const split = el("div", { className: "split", aria: { hidden: true } }, ...["a", "b"].map((side) => el("span", { className: side === preferred ? "best" : "", style: { width: `${shares[side] * 100}%` } })));
  byId("answer").replaceChildren(el("div", { className: "sides" }, ...sides), split, note("Margin ", score(margin, digitsOf([margin, 0])), ": the score of A less that of B."));
}

const pairOf = (term, value) => el("div", {}, el("dt", {}, term), el("dd", {}, value));

const note = (...parts) => el("p", { className: "note" }, ...parts);

/** What it cost, and what the answer warns of. */
export function addUsage({ usage, warnings = [] }, milliseconds) {
  byId("answer").append(note(`${usage.computed_tokens} of ${usage.tokens} tokens computed anew, ${Math.round(milliseconds)} ms.`));
  if (warnings.includes("prompt_truncated")) byId("answer").append(note("The prompt was longer than the model takes, and was cut."));
}

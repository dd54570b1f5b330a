/* The page: what was chosen and typed becomes one request, its answer or fault is shown. An answer to what has changed meanwhile is dropped. */

import { Fault, Picture, Server } from "./asking.js";
import { curlLine } from "./curl.js";
import { byId, el } from "./dom.js";
import { clearFault, showFault, unmark } from "./faults.js";
import { Pair, Rows, fit } from "./fields.js";
import { addUsage, showComparison, showRanking } from "./result.js";
import * as shapes from "./shapes.js";

const LABELS = { rank: ["Rank captions", "Ranking…"], compare: ["Compare", "Comparing…"] };
const server = new Server();
const rows = new Rows(changed, tooMany);
const pair = new Pair(changed, () => byId("ask").focus());
const state = { card: null, picture: null, suggested: [], turn: 0, choice: 0, running: null, answered: false };
const outstanding = new Map(); // what failed and can be had again, by what it is for: how

const mode = () => document.querySelector("input[name=mode]:checked").value;
const takesImages = () => state.card?.model.takes_images !== false;

/* What is asked */

/** The request that the page stands for, and the fields its captions came from. Throws a Fault when something is missing. */
function question() {
  if (takesImages() && !state.picture) throw new Fault({ code: null, message: "choose one first", field: "image" });
  const fields = mode() === "rank" ? rows.filled : pair.areas;
  const empty = fields.findIndex((area) => area.value.trim() === "");
  if (fields.length === 0 || empty >= 0) missing(fields.length ? fields[empty] : rows.areas[0]);
  const texts = fields.map((area) => area.value);
  const prompt = byId("prompt").value.trim() === "" ? {} : { prompt: byId("prompt").value };
  const captions = mode() === "rank" ? { captions: texts } : { a: texts[0], b: texts[1] };
  return { path: mode(), body: { ...prompt, ...captions }, fields };
}

function missing(area) {
  throw Object.assign(new Fault({ code: null, message: "type something here first", index: 0 }), { area });
}

async function ask(options = {}) {
  if (state.running) return;
  clear("rows");
  clear("asking");
  const turn = ++state.turn;
  try {
    const asked = question();
    await answer(turn, { ...asked, body: { ...asked.body, ...options } });
  } catch (fault) {
    show(fault, "asking", () => ask(options), { fields: fault.area && [fault.area] });
  }
}

async function answer(turn, asked) {
  state.running = new AbortController();
  busy(true);
  const began = performance.now();
  try {
    const said = await server.postAbout(takesImages() ? state.picture : null, asked.path, asked.body, shapes[asked.path], state.running.signal);
    if (turn === state.turn) present(asked, said, performance.now() - began);
  } catch (fault) {
    if (turn === state.turn) refuse(fault, asked);
  } finally {
    if (turn === state.turn) busy(false);
  }
}

function present(asked, said, milliseconds) {
  if (asked.path === "rank") showRanking(said);
  else showComparison(said, [asked.body.a, asked.body.b]);
  addUsage(said, milliseconds);
  showCurl(asked, said);
  state.answered = true;
  byId("outdated").hidden = true;
  bringIntoView(byId("result"));
  if (said.model_fingerprint !== state.card?.model.fingerprint) loadCard();
}

function refuse(fault, asked) {
  const longest = fault.code === "deadline_exceeded" ? state.card?.settings.max_timeout_ms : null;
  const again = longest ? { timeout_ms: longest } : {};
  show(fault, "asking", () => ask(again), { fields: asked.fields, retryLabel: longest ? `Try again, for up to ${longest / 1000} s` : "Try again" });
}

/** On a phone the answer lies below what was typed. */
function bringIntoView(section) {
  if (section.getBoundingClientRect().top > innerHeight * 0.75) section.scrollIntoView({ block: "start" });
}

/** A fault where people see it; a missing key is asked for. What `retry` can bring back is outstanding until it did, or is no longer wanted. */
function show(fault, about, retry, options = {}) {
  if (!(fault instanceof Fault)) throw fault;
  const needsKey = fault.status === 401;
  if (needsKey || fault.retryable) outstanding.set(about, retry);
  if (needsKey) askForKey();
  else showFault(fault, { ...options, about, retry: tryAgain });
}

function clear(about) {
  outstanding.delete(about);
  clearFault(about);
}

/** Whatever button of a fault it was: most often one thing is the cause of all. */
async function tryAgain() {
  const due = [...outstanding];
  for (const [about] of due) clear(about);
  if (byId("key-form").hidden) byId("ask").focus({ preventScroll: true }); // the button is gone
  await Promise.all(due.map(([, retry]) => retry()));
}

function busy(is) {
  if (!is) state.running = null;
  if (!is && document.activeElement === byId("cancel")) byId("ask").focus();
  byId("cancel").hidden = !is;
  byId("result").setAttribute("aria-busy", String(is));
  byId("ask").setAttribute("aria-disabled", String(is));
  byId("ask").textContent = LABELS[mode()][is ? 1 : 0];
}

/** What runs is not waited for. */
function stop() {
  state.turn += 1;
  state.running?.abort();
  busy(false);
}

/** A picture still on its way is given up as well, or asking again would wait for it. */
function cancel() {
  state.picture?.stop();
  stop();
}

/** Something the answer depends on is another: what is shown is of before. */
function changed(area = null) {
  clear("rows");
  if (area) unmark(area);
  stop();
  byId("outdated").hidden = !state.answered;
}

/** Nothing was added: what is there stays as it is. */
function tooMany(num, most, area) {
  const message = `that would be ${num.toLocaleString("en")} captions, and this server takes ${most.toLocaleString("en")} at a time; nothing was added`;
  showFault(new Fault({ code: null, message, index: area ? 0 : null }), { about: "rows", fields: [area] });
}

/* The key */

function askForKey() {
  byId("key-form").hidden = false;
  byId("info").hidden = true; // a link carries no key
  if (server.hasKey) showFault(new Fault({ code: "unauthorized", message: "the server does not know this one", field: "key" }, 401), { about: "key" });
  byId("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  clear("key");
  try {
    server.useKey(byId("key").value.trim());
  } catch (fault) {
    showFault(fault, { about: "key" });
    return;
  }
  byId("key-form").hidden = true;
  if (await loadCard()) await tryAgain();
}

/* The model */

async function loadCard() {
  clear("card");
  try {
    state.card = await server.call("GET", "info", { shape: shapes.info });
    showCard(state.card);
    return true;
  } catch (fault) {
    show(fault, "card", loadCard);
    return false;
  }
}

function showCard({ model, runtime, settings }) {
  rows.most = settings.max_captions ?? rows.most;
  byId("model-name").textContent = model.name ?? "";
  byId("model-runs").textContent = [runtime?.device, runtime?.dtype].filter(Boolean).join(", ");
  byId("fingerprint-short").textContent = model.fingerprint.slice(0, 12);
  byId("about").textContent = model.description ?? "";
  byId("picture").hidden = !takesImages();
  byId("prompt-box").hidden = model.prompt_policy === "fixed";
  byId("prompt-note").textContent = model.default_prompt ? `Empty: the model’s own, “${model.default_prompt}”` : "Empty: the model’s own.";
  byId("model").hidden = false;
}

/* The cartoon */

async function choose(picture, suggested = []) {
  clear("asking");
  state.picture?.close();
  Object.assign(state, { picture, suggested });
  changed();
  Object.assign(byId("preview"), { src: picture.url, hidden: false });
  byId("drop-text").replaceChildren(el("strong", {}, picture.name), " ", el("span", { className: "link" }, "choose another"));
  for (const button of document.querySelectorAll("#drawn-list button")) button.setAttribute("aria-pressed", String(button.dataset.name === picture.name && suggested.length > 0));
  suggest();
  await send(picture);
}

/** Its captions, where nobody typed others; else they are offered. */
function suggest() {
  if (rows.untouched) rows.fill(state.suggested);
  offerSuggestions();
}

function offerSuggestions() {
  const present = rows.areas.map((area) => area.value);
  byId("suggest").hidden = mode() !== "rank" || state.suggested.every((text) => present.includes(text));
}

/** To the server, so that a picture it cannot read is known before captions are typed. */
async function send(picture) {
  const most = state.card?.settings.max_image_bytes ?? Number.POSITIVE_INFINITY;
  try {
    if (picture.blob.size > most) throw new Fault({ code: "image_too_large", message: `a picture may have ${most.toLocaleString("en")} bytes, this one has ${picture.blob.size.toLocaleString("en")}`, field: "image" });
    const { width, height, tokens } = await picture.received(server);
    if (picture === state.picture) byId("preview").title = `${width} × ${height} pixels, ${tokens} tokens`;
  } catch (fault) {
    if (picture === state.picture && fault.name !== "AbortError") show(fault, "asking", () => send(picture));
  }
}

function chooseFile(files) {
  const file = [...(files ?? [])].find((each) => each.type.startsWith("image/")) ?? files?.[0];
  if (!file || !takesImages()) return;
  state.choice += 1;
  choose(new Picture(file, file.name || "pasted picture"));
}

async function loadDrawn() {
  clear("drawn");
  try {
    const drawn = await server.call("GET", "cartoons/captions.json", { shape: shapes.drawn });
    byId("drawn-list").replaceChildren(...Object.entries(drawn).map(([name, captions]) => el("li", {}, drawnButton(name, captions))));
    byId("drawn").hidden = false;
  } catch (fault) {
    show(fault, "drawn", loadDrawn);
  }
}

function drawnButton(name, captions) {
  const src = `cartoons/${name}`;
  const image = el("img", { src, alt: name.replace(/\.\w+$/, "").replaceAll("-", ", "), width: 126, height: 84 });
  return el("button", { type: "button", dataset: { name }, aria: { pressed: false }, onclick: () => pick(src, name, captions) }, image);
}

/** The last choice counts, whichever file comes first. */
async function pick(src, name, captions) {
  const choice = ++state.choice;
  try {
    const blob = await server.blob(src);
    if (choice === state.choice) await choose(new Picture(blob, name), captions);
  } catch (fault) {
    if (choice === state.choice) show(fault, "asking", () => pick(src, name, captions));
  }
}

/* The line for the shell */

function showCurl(asked, said) {
  const image = said.image_id ? { image: said.image_id } : {};
  byId("curl").textContent = curlLine(server.address(asked.path), { ...image, ...asked.body }, server.hasKey);
  const about = said.image_id ? "The picture goes by its id, as long as the server keeps it; for a file write -F image=@cartoon.png. " : "";
  byId("curl-note").textContent = about + (server.hasKey ? "PUNCHLINE_API_KEY is yours to set." : "");
  byId("curl-box").hidden = false;
}

async function copy(text, what) {
  byId("copied").textContent = "";
  const done = (await copiedByClipboard(text)) || copiedBySelection(text);
  byId("copied").textContent = done ? `${what} copied.` : "This browser does not let a page copy.";
  return done;
}

/** Only there on https and on localhost, and not always allowed. */
async function copiedByClipboard(text) {
  return navigator.clipboard?.writeText(text).then(() => true, () => false);
}

function copiedBySelection(text) {
  const focused = document.activeElement;
  const area = el("textarea", { value: text, className: "sr", readOnly: true, style: { whiteSpace: "pre" } }); // else spaces are lost
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

async function copyCurl() {
  const done = await copy(byId("curl").textContent, "The line was");
  byId("copy").textContent = done ? "Copied" : "Select it and copy";
  if (!done) getSelection().selectAllChildren(byId("curl"));
  setTimeout(() => (byId("copy").textContent = "Copy"), 2000);
}

/* Wiring */

function changeMode() {
  const ranks = mode() === "rank";
  byId("rank-fields").hidden = !ranks;
  byId("pair-fields").hidden = ranks;
  byId("enter-note").hidden = byId("add").hidden = !ranks;
  offerSuggestions();
  if (!ranks && pair.empty) pair.fill(rows.filled.slice(0, 2).map((area) => area.value));
  pair.areas.forEach(fit);
  clear("asking");
  changed();
}

byId("asking").addEventListener("submit", (event) => (event.preventDefault(), ask()));
byId("key-form").addEventListener("submit", useKey);
byId("add").addEventListener("click", () => rows.add()?.focus());
byId("cancel").addEventListener("click", cancel);
byId("suggest").addEventListener("click", () => (rows.append(state.suggested), offerSuggestions()));
byId("prompt").addEventListener("input", () => (fit(byId("prompt")), changed(byId("prompt"))));
byId("file").addEventListener("change", () => chooseFile(byId("file").files));
byId("preview").addEventListener("error", () => (byId("preview").hidden = true)); // the server says why
byId("copy").addEventListener("click", copyCurl);
byId("fingerprint").addEventListener("click", () => copy(state.card.model.fingerprint, "The fingerprint was"));
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", changeMode);

document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  if (files.length) (event.preventDefault(), chooseFile(files));
});
/** Text may be dropped into a field; anything else would make the browser leave this page. */
const isOurs = (event) => event.dataTransfer?.types.includes("Files") || !event.target.closest?.("textarea, input[type=password]");

document.addEventListener("dragover", (event) => isOurs(event) && (event.preventDefault(), byId("drop").classList.add("over")));
document.addEventListener("dragleave", (event) => event.relatedTarget ?? byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  byId("drop").classList.remove("over");
  if (!isOurs(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files.length) chooseFile(event.dataTransfer.files);
  else showFault(new Fault({ code: null, message: "that was no file; save the picture first, then drop it here", field: "image" }), { about: "asking" });
});

loadCard();
loadDrawn();

/* Says what went wrong in a sentence, and marks the field at fault. */

import { byId, el } from "./dom.js";

const ADVICE = {
  animated_not_allowed: "Save one frame of it as a PNG.",
  caption_too_long: "Shorten it or take it out.",
  caption_too_large: "Shorten it or take it out.",
  deadline_exceeded: "A large model on a slow machine takes its time.",
  draining: "It is being stopped; another one may take its place.",
  image_decode_failed: "PNG, JPEG and WebP pictures work.",
  image_format_not_allowed: "PNG, JPEG and WebP pictures work.",
  image_too_large: "Make the picture smaller.",
  model_changed: "Load this page again.",
  overloaded: "Others are asking as well.",
  too_many_items: "Take some captions out.",
  too_many_tokens: "Take some captions out.",
};

const PLACES = { card: "The model: ", drawn: "The drawn cartoons: " };
const shown = new Map(); // by what it is about: the box, and the field at fault if one is

/** Show a fault in place of the last one about the same; `fields` are the captions' text areas in the order they were sent. `retry` is offered where it can help. */
export function showFault(fault, { about, fields = [], retry = null, retryLabel = "Try again" }) {
  clearFault(about);
  const area = fieldOf(fault, fields);
  const said = sentence(fault);
  if (area) mark(area, said);
  const details = [fault.code, fault.field, fault.requestId && `request ${fault.requestId}`].filter(Boolean).join(" · ");
  const box = el("div", { className: "fault" }, el("p", {}, el("strong", {}, placeOf(fault, area) || (PLACES[about] ?? "")), said));
  if (fault.code) box.append(el("p", { className: "note" }, details));
  if (fault.retryable && retry) box.append(el("button", { type: "button", onclick: retry }, retryLabel));
  byId("faults").append(box);
  shown.set(about, { box, area });
  if (area) area.focus();
  else box.scrollIntoView({ block: "nearest" });
}

export function clearFault(about) {
  const { box, area } = shown.get(about) ?? {};
  shown.delete(about);
  box?.remove();
  if (area) unmark(area);
}

export function unmark(area) {
  if (!area.hasAttribute("aria-invalid")) return;
  area.removeAttribute("aria-invalid");
  Object.assign(noteOf(area), { hidden: true, textContent: "" });
}

function mark(area, said) {
  area.setAttribute("aria-invalid", "true");
  if (area.id === "prompt") byId("prompt-box").open = true;
  Object.assign(noteOf(area), { hidden: false, textContent: said });
}

/** The note that describes a field's fault: the last of its descriptions. */
function noteOf(area) {
  return byId(area.getAttribute("aria-describedby").split(" ").at(-1));
}

function fieldOf(fault, fields) {
  if (fault.index !== null) return fields[fault.index] ?? null;
  const [a, b] = fields; // of a pair, whose captions have names instead of places in a list
  return { a, b, image: byId("file"), prompt: byId("prompt"), key: byId("key") }[fault.field] ?? null;
}

function placeOf(fault, area) {
  if (area?.id.startsWith("caption-")) return `${area.getAttribute("aria-label")}: `;
  return { image: "The cartoon: ", prompt: "The prompt: ", key: "The key: " }[fault.field] ?? "";
}

function sentence(fault) {
  const wait = fault.retryAfterS === null ? null : `The server asks to wait ${fault.retryAfterS} s.`;
  const said = fault.message.charAt(0).toUpperCase() + fault.message.slice(1);
  return [/[.!?]$/.test(said) ? said : `${said}.`, ADVICE[fault.code], wait].filter(Boolean).join(" ");
}

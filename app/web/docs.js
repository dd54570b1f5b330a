/* Shows /openapi.json as a list of routes. Knows OpenAPI, not what this server does; all that it shows is text. */

import { Fault, Server } from "./asking.js";
import { quoted } from "./curl.js";
import { byId, el } from "./dom.js";
import { description } from "./shapes.js";

const METHODS = ["get", "put", "post", "delete", "patch"];
const JSON_TYPE = "application/json";
const MAX_DEPTH = 6;
const server = new Server();
let schemas = {};

/* The description */

async function load() {
  byId("fault").hidden = true;
  byId("routes").setAttribute("aria-busy", "true");
  try {
    show(await server.call("GET", "openapi.json", { shape: description }));
  } catch (fault) {
    if (!(fault instanceof Fault)) throw fault;
    refuse(fault);
  } finally {
    byId("routes").setAttribute("aria-busy", "false");
  }
}

function show({ info = {}, paths, components = {} }) {
  schemas = components.schemas ?? {};
  byId("title").textContent = [info.title, "API", info.version].filter(Boolean).join(" ");
  if (info.description) byId("about").textContent = `${info.description} Open a route for what it takes and answers.`;
  const routes = Object.entries(paths).flatMap(([path, item]) => METHODS.filter((method) => method in item).map((method) => ({ path, method, ...item[method] })));
  const tags = [...new Set(routes.map(tagOf))];
  byId("routes").replaceChildren(...tags.map((tag) => el("section", {}, el("h2", {}, tag), ...routes.filter((route) => tagOf(route) === tag).map(routeBox))));
  openNamed();
}

const tagOf = (route) => route.tags?.[0] ?? "routes";

/** Of an address with `#post-rank` the route is open. */
function openNamed() {
  const named = byId(location.hash.slice(1));
  if (!named?.matches("details")) return;
  named.open = true;
  named.scrollIntoView();
}

function refuse(fault) {
  byId("key-form").hidden = fault.status !== 401 && fault.code !== "bad_key";
  if (!byId("key-form").hidden) {
    byId("raw").hidden = true; // a link carries no key
    byId("routes").replaceChildren(el("p", { className: "note" }, "The description is behind the server’s key."));
    byId("key").focus();
  }
  const said = fault.status !== 401 ? fault.message : server.hasKey ? "the server does not know this key" : "";
  byId("fault").hidden = said === "";
  byId("fault-text").textContent = said && `${said.charAt(0).toUpperCase()}${said.slice(1)}.`;
  byId("again").hidden = !fault.retryable;
}

function useKey(event) {
  event.preventDefault();
  try {
    server.useKey(byId("key").value.trim());
  } catch (fault) {
    refuse(fault);
    return;
  }
  byId("key-form").hidden = true;
  load();
}

/* A route */

function routeBox(route) {
  const { path, method } = route;
  const id = `${method}${path.replaceAll(/\W+/g, "-")}`;
  return el(
    "details",
    { className: "card", id },
    el("summary", {}, el("span", { className: "method" }, method.toUpperCase()), el("code", { className: "path" }, path), el("span", { className: "note" }, prose(route.summary))),
    ...(route.description ? [el("p", {}, prose(route.description))] : []),
    ...part("Parameters", parameters(route)),
    ...Object.entries(route.requestBody?.content ?? {}).flatMap(([type, content]) => bodyOf(type, content)),
    ...part("Answers", answers(route)),
    ...part("With curl", [listing(`curl for ${method.toUpperCase()} ${path}`, curlOf(route))]),
  );
}

const part = (title, nodes) => (nodes.length ? [el("h3", {}, title), ...nodes] : []);

/** Lines too long for a phone scroll, and the keyboard can reach them. */
const listing = (label, text) => el("pre", { tabIndex: 0, role: "group", aria: { label } }, text);

function parameters({ parameters: given = [] }) {
  return given.length ? [list(given.map((each) => entry(each.name, each.schema ?? {}, each.required, each.description, `in the ${each.in}`)))] : [];
}

function bodyOf(type, { schema = {}, examples = {} }) {
  const shown = Object.entries(examples).flatMap(([name, { value }]) => [el("p", { className: "note" }, `Example: ${name}`), listing(`Example: ${name}`, JSON.stringify(value, null, 2))]);
  return part(`Body, ${type}`, [...(fieldsOf(schema) ?? [el("p", { className: "note" }, typeOf(schema))]), ...shown]);
}

function answers({ responses = {} }) {
  const rows = Object.entries(responses).map(([status, { description: said, content = {} }]) => {
    const [type, { schema = {} } = {}] = Object.entries(content)[0] ?? [];
    const inner = status.startsWith("2") ? (fieldsOf(schema) ?? []) : [];
    return el("div", {}, el("dt", {}, el("code", {}, status), el("span", { className: "note" }, [type && typeOf(schema), type].filter(Boolean).join(", "))), el("dd", {}, prose(said), ...inner));
  });
  return rows.length ? [list(rows)] : [];
}

/* Schemas */

const nameOf = (schema) => schema.$ref?.split("/").at(-1);
const resolved = (schema) => (schema.$ref ? (schemas[nameOf(schema)] ?? {}) : schema);
const choices = (schema) => schema.anyOf ?? schema.oneOf ?? null;

function typeOf(schema) {
  if (schema.$ref) return nameOf(schema);
  if (choices(schema)) return [...new Set(choices(schema).map(typeOf))].join(" or ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return [schema.format === "binary" ? "bytes" : (schema.type ?? "anything")].flat().join(" or ");
}

const LIMITS = { minimum: "at least", exclusiveMinimum: "more than", maximum: "at most", minItems: "length at least", maxItems: "length at most", minLength: "length at least", maxLength: "length at most", pattern: "matches", default: "without it" };

function limitsOf(schema) {
  const own = Object.keys(LIMITS).filter((name) => (schema[name] ?? null) !== null);
  const said = own.map((name) => `${LIMITS[name]} ${typeof schema[name] === "object" ? JSON.stringify(schema[name]) : schema[name]}`);
  return [...(choices(schema) ?? []).flatMap(limitsOf), ...said];
}

/** The fields of every object that a schema stands for, as lists; null when it stands for none. `above` are the names it came through. */
function fieldsOf(schema, above = []) {
  const name = nameOf(schema);
  if ((name && above.includes(name)) || above.length > MAX_DEPTH) return null;
  const { properties, required = [], ...rest } = resolved(schema);
  const path = [...above, name ?? ""];
  if (properties) return [list(Object.entries(properties).map(([key, value]) => entry(key, value, required.includes(key), value.description, "", path)))];
  const inner = [rest.items, ...(choices(rest) ?? [])].filter(Boolean).flatMap((each) => fieldsOf(each, path) ?? []);
  return inner.length ? inner : null;
}

function entry(name, schema, isNeeded, said, where = "", above = []) {
  const facts = [where, typeOf(schema), ...limitsOf(schema)].filter(Boolean).join(", ");
  const needed = isNeeded ? [el("span", { className: "needed" }, "required")] : [];
  return el("div", {}, el("dt", {}, el("code", {}, name), el("span", { className: "note" }, facts), ...needed), el("dd", {}, prose(said), ...(fieldsOf(schema, above) ?? [])));
}

const list = (rows) => el("dl", { className: "fields" }, ...rows);

/** Text whose `code` is shown as such. */
function prose(text = "") {
  const nodes = text.split("`").map((piece, at) => (at % 2 ? el("code", {}, piece) : piece));
  return el("span", {}, ...nodes);
}

/* The line for the shell */

function curlOf({ path, method, requestBody }) {
  const content = requestBody?.content ?? {};
  const words = [`curl -sS ${quoted(server.address(path.slice(1).replaceAll(/\{(\w+)\}/g, (_, name) => name.toUpperCase())))}`];
  if (method !== (requestBody ? "post" : "get")) words.push(`-X ${method.toUpperCase()}`);
  if (server.hasKey) words.push(`-H "Authorization: Bearer $PUNCHLINE_API_KEY"`);
  if (JSON_TYPE in content) words.push(`-H ${quoted(`Content-Type: ${JSON_TYPE}`)}`, `-d ${quoted(JSON.stringify(exampleOf(content[JSON_TYPE])))}`);
  else if (requestBody) words.push(`-H ${quoted(`Content-Type: ${Object.keys(content)[0]}`)}`, "--data-binary @cartoon.png");
  return words.join(" \\\n    ");
}

/** The description's own example, else the least that the schema takes. */
function exampleOf({ schema = {}, examples = {} }) {
  return Object.values(examples)[0]?.value ?? least(schema);
}

function least(schema, depth = 0) {
  const known = resolved(schema);
  if (known.examples?.length) return known.examples[0];
  if (choices(known)) return least(choices(known)[0], depth);
  if (known.enum || "const" in known) return known.enum?.[0] ?? known.const;
  if (known.type === "array") return depth > MAX_DEPTH ? [] : [least(known.items ?? {}, depth + 1)];
  if (known.properties) return Object.fromEntries((known.required ?? []).map((name) => [name, depth > MAX_DEPTH ? null : least(known.properties[name] ?? {}, depth + 1)]));
  return { integer: 0, number: 0, boolean: true, object: {} }[known.type] ?? "…";
}

byId("key-form").addEventListener("submit", useKey);
byId("again").addEventListener("click", load);
addEventListener("hashchange", openNamed);
load();

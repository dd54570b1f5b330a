/* What the page reads of each answer. Anything may stand where the server is thought to be, and answer 200. */

/** Whether a value has at least the parts of `shape`: the name of a type, an object, a list of one or more, or a test. */
export function fits(value, shape) {
  if (typeof shape === "function") return shape(value);
  if (typeof shape === "string") return typeof value === shape;
  if (Array.isArray(shape)) return Array.isArray(value) && value.length > 0 && value.every((each) => fits(each, shape[0]));
  return value !== null && typeof value === "object" && Object.entries(shape).every(([name, part]) => fits(value[name], part));
}

const usage = { tokens: "number", computed_tokens: "number" };
const place = { rank: "number", index: "number", caption: "string", score: "number", win_probability: "number" };

export const info = { model: { fingerprint: "string" }, settings: {} };
export const drawn = (said) => fits(said, {}) && Object.values(said).every((captions) => fits(captions, ["string"]));
export const image = { image_id: "string", width: "number", height: "number", tokens: "number" };
export const rank = { ranking: [place], usage };
export const compare = { preferred: (side) => ["a", "b", "tie"].includes(side), probability_a: "number", margin: "number", scores: { a: "number", b: "number" }, usage };
export const description = { paths: (paths) => fits(paths, {}) && Object.values(paths).every((path) => fits(path, {})) };

// How the pages of runs write numbers, and how they make elements. Knows no run.

export const at = (id) => document.getElementById(id);
export const known = (value) => value !== null && value !== undefined;
export const percent = (value) => (known(value) ? `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %` : "unknown");
export const whole = (value) => Math.round(value).toLocaleString("en");
export const signed = (value, digits = 2) => (known(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}` : "unknown");

export function number(value, digits = 3) {
  if (!known(value)) return "unknown";
  const size = Math.abs(value);
  const isOdd = size && (size < 1e-3 || size >= 1e5);
  const text = isOdd ? size.toExponential(digits > 3 ? digits - 1 : 1) : String(Number(size.toPrecision(digits)));
  return (value < 0 ? "−" : "") + text;
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function put(place, text) {
  // Only what is new, for whoever has the page read aloud.
  if (place.textContent !== text) place.textContent = text;
}

/* Elements out of plain data. Text becomes text nodes: nothing here, or anywhere on the page, parses HTML. */

export const byId = (id) => document.getElementById(id);

/** An element with properties (`dataset`, `style`, `aria` as objects) and children: nodes or text. */
export function el(tag, { dataset = {}, style = {}, aria = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, dataset);
  Object.assign(node.style, style);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  node.append(...children);
  return node;
}

/** A caption as somebody wrote it, whatever its writing direction. */
export const written = (text) => el("bdi", { className: "written" }, text);

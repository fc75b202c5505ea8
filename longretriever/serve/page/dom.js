// How does data become a page? Elements made by hand: text is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `on`: handlers; `vars`: CSS variables; other attributes as they are; null, undefined, false: none. */
export function h(tag, attributes = {}, ...children) {
  return made(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return made(document.createElementNS(SVG, tag), attributes, children);
}

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === "vars") for (const [one, x] of Object.entries(value)) element.style.setProperty(`--${one}`, x);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

const ICONS = {
  plus: "M8 3.5v9M3.5 8h9",
  check: "M3.5 8.5l3 3 6-7",
  never: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 0 0 0-11zM4.2 4.2l7.6 7.6",
  adjust: "M2.5 5h5M12 5h1.5M9.7 3.2v3.6M2.5 11h1.5M8.5 11h5M6.2 9.2v3.6",
  close: "M4.5 4.5l7 7M11.5 4.5l-7 7",
};

/** A button that is only a picture: `label` is what it says. */
export function iconButton(icon, label, attributes = {}) {
  const picture = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: ICONS[icon] }));
  return h("button", { type: "button", class: "icon", "aria-label": label, title: label, ...attributes }, picture);
}

/** A button that shows more of what is above it; `open`: whether all is shown, where it can be folded again. */
export function moreButton(key, text, click, open) {
  const attributes = {
    type: "button",
    class: "plain",
    "data-key": `more-${key}`,
    "aria-expanded": open,
    on: { click },
  };
  return h("button", attributes, text);
}

/** A bar of `share` of the full width, which says nothing by itself: the number stands beside it. */
export function bar(share, paint = "") {
  const width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
  return h("span", { class: `bar ${paint}`, "aria-hidden": "true", vars: { share: width } });
}

const TAIL = 8; // characters of a long name that are always seen

/** A category's name with its color; one that is too long loses its middle. */
export function named(text, paint) {
  const at = text.length > 2 * TAIL ? text.length - TAIL : text.length;
  const label = h("span", { class: "label", title: text }, h("span", {}, text.slice(0, at)), text.slice(at));
  return h("span", { class: "name" }, h("span", { class: `dot ${paint}` }), label);
}

/** Replace what is in `root`, and keep the keyboard where it was: at the element with the same `data-key`. */
export function refill(root, ...children) {
  const held = root.contains(document.activeElement) ? document.activeElement : null;
  const key = held?.dataset.key;
  root.replaceChildren(...children);
  if (!held) return;
  const again = key && root.querySelector(`[data-key="${CSS.escape(key)}"]`);
  (again || root.closest("section, fieldset")?.querySelector("[tabindex='-1'], legend, input"))?.focus({
    preventScroll: true,
  });
}

/** A group of radio buttons that looks like one control. Returns what sets it. */
export function choice(fieldset, options, changed) {
  const name = fieldset.id;
  fieldset.append(
    ...options.map(({ value, label, title }) =>
      h(
        "label",
        { title },
        h("input", { type: "radio", name, value, on: { change: () => changed(value) } }),
        h("span", {}, label),
      ),
    ),
  );
  return (value) => {
    for (const radio of fieldset.querySelectorAll("input")) radio.checked = radio.value === value;
  };
}

/** Says something to those who do not see the page change. */
export function announce(text) {
  byId("status").textContent = text;
}

/** What went wrong, in the server's words, and what can be done. */
export function alertBox(error, retry) {
  return h(
    "div",
    { class: "alert", role: "alert" },
    h("p", {}, error.message),
    error.points?.length
      ? h(
          "ul",
          {},
          error.points.map((point) => h("li", {}, point)),
        )
      : null,
    error.mayPass ? h("button", { type: "button", on: { click: retry } }, "Try again") : null,
  );
}

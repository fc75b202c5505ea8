// Which of many does the person mean? A text field with suggestions from the server, after the ARIA pattern.

import { announce, h } from "./dom.js";
import { counted } from "./format.js";

const WAIT = 120; // milliseconds after the last key

/**
 * @param input   the text field, in an element of class "combo"
 * @param search  (text, signal) -> [{value, label, note}]
 * @param pick    called with the value chosen, and its label; also with what was typed, if `free`
 * @param left    called when the field is left
 */
export function combobox(input, { search, pick, free = false, left = () => {}, name }) {
  const list = h("ul", {
    class: "options",
    role: "listbox",
    id: `${input.id}-options`,
    "aria-label": name,
    hidden: true,
  });
  input.after(list);
  for (const [attribute, value] of [
    ["role", "combobox"],
    ["aria-autocomplete", "list"],
    ["aria-expanded", "false"],
    ["aria-controls", list.id],
  ]) {
    input.setAttribute(attribute, value);
  }
  let found = [];
  let active = -1;
  let timer = 0;
  let stop = new AbortController();

  function show(open) {
    list.hidden = !open;
    input.setAttribute("aria-expanded", String(open));
    if (!open) activate(-1);
  }

  function activate(at) {
    active = at;
    [...list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === at)));
    if (at < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", list.children[at].id);
    list.children[at].scrollIntoView({ block: "nearest" });
  }

  function close() {
    clearTimeout(timer);
    stop.abort();
    show(false);
  }

  function choose(at) {
    const { value, label } = found[at];
    close();
    pick(value, label);
  }

  async function ask() {
    stop.abort();
    stop = new AbortController();
    const { signal } = stop;
    try {
      const answer = await search(input.value.trim(), signal);
      if (signal.aborted) return;
      found = answer;
    } catch (error) {
      if (error.name === "AbortError") return;
      found = [];
    }
    list.replaceChildren(
      ...found.map(({ label, note }, i) =>
        h(
          "li",
          { role: "option", id: `${list.id}-${i}`, "aria-selected": "false" },
          h("span", {}, label),
          h("span", { class: "quiet" }, note),
        ),
      ),
    );
    active = -1;
    show(found.length > 0 && document.activeElement === input);
    if (!list.hidden) announce(`${counted(found.length, "suggestion")}`);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, WAIT);
  });
  input.addEventListener("click", () => list.hidden && ask());
  input.addEventListener("blur", () => (close(), left()));
  input.addEventListener("keydown", (event) => {
    const open = !list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) return ask();
      const step = event.key === "ArrowDown" ? 1 : -1;
      activate((active + step + found.length + (active < 0 && step < 0 ? 1 : 0)) % found.length);
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      event.stopPropagation();
      show(false);
    } else if (event.key === "Enter") {
      if (open && active >= 0) {
        event.preventDefault();
        choose(active);
      } else if (free && input.value.trim()) {
        event.preventDefault();
        close();
        pick(input.value.trim(), input.value.trim());
      }
    }
  });
  list.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose([...list.children].indexOf(option));
  });
}

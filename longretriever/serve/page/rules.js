// What is demanded of single categories? One list of rules, and the buttons beside each category that make them.

import { h, iconButton, named, refill } from "./dom.js";
import { ruleFor } from "./state.js";

const ASKS = [
  ["", "as chosen"],
  ["always", "always asked"],
  ["never", "never"],
];

/**
 * @param list     the <ul> of rules in force
 * @param rules    () -> the rules of the state, changed in place
 * @param changed  called after each change
 * @param paint    category -> class of its color
 * @param reveal   makes the list visible, where it is folded
 */
export function rulesPanel({ list, rules, changed, paint, reveal }) {
  let marking = false;

  function render() {
    refill(list, ...rules().map(row));
    mark();
  }

  function row(rule) {
    const { category } = rule;
    const number = (name, label, before, attributes) =>
      h(
        "label",
        {},
        before,
        h("input", {
          type: "number",
          value: rule[name] ?? "",
          "data-key": `${name}-${category}`,
          "aria-label": `${label} ${category}`,
          ...attributes,
          on: { input: (event) => set(rule, name, event.target) },
        }),
      );
    return h(
      "li",
      {},
      named(category, paint(category)),
      h(
        "select",
        {
          "aria-label": `When to ask about ${category}`,
          "data-key": `ask-${category}`,
          on: { change: (event) => ask(rule, event.target.value) },
        },
        ASKS.map(([value, text]) => h("option", { value, selected: value === rule.ask }, text)),
      ),
      iconButton("close", `Remove the rule for ${category}`, {
        "data-key": `remove-${category}`,
        on: { click: () => remove(rule) },
      }),
      h(
        "span",
        { class: "amounts" },
        number("quota", "Most candidates of", "at most ", { min: 0, step: 1, placeholder: "any" }),
        number("boost", "Factor on the share of", "share × ", { min: 0.01, step: "any", placeholder: "1" }),
      ),
    );
  }

  function set(rule, name, input) {
    if (input.validity.badInput) return;
    rule[name] = input.value === "" ? null : Number(input.value);
    changed({ soon: true });
  }

  function ask(rule, value) {
    rule.ask = value;
    mark();
    changed();
  }

  function remove(rule) {
    const at = rules().indexOf(rule);
    rules().splice(at, 1);
    render();
    changed();
  }

  function toggle(category, value) {
    const rule = ruleFor(rules(), category);
    rule.ask = rule.ask === value ? "" : value;
    if (!rule.ask && rule.quota === null && rule.boost === null) rules().splice(rules().indexOf(rule), 1);
    render();
    changed();
  }

  function adjust(category) {
    ruleFor(rules(), category);
    render();
    reveal();
    list.querySelector(`[data-key="${CSS.escape(`quota-${category}`)}"]`)?.focus();
  }

  /** Buttons for a category; `place` tells those of one table from those of another. */
  function buttons(id, place) {
    const category = String(id);
    if (!marking) queueMicrotask(mark); // once they all are on the page
    marking = true;
    const button = (name, icon, label, act) =>
      iconButton(icon, `${label} ${category}`, {
        "data-key": `${place}-${name}-${category}`,
        "data-ask": name,
        on: { click: act },
      });
    return h(
      "span",
      { class: "acts", "data-category": category },
      button("always", "plus", "Ask always about", () => toggle(category, "always")),
      button("never", "never", "Exclude", () => toggle(category, "never")),
      button("adjust", "adjust", "Quota and boost of", () => adjust(category)),
    );
  }

  /** Show at all buttons which rules are in force. */
  function mark() {
    marking = false;
    const asks = new Map(rules().map((rule) => [rule.category, rule]));
    for (const group of document.querySelectorAll(".acts[data-category]")) {
      const rule = asks.get(group.dataset.category);
      for (const button of group.children) {
        const { ask } = button.dataset;
        const pressed = ask === "adjust" ? rule?.quota != null || rule?.boost != null : rule?.ask === ask;
        button.setAttribute("aria-pressed", String(pressed));
      }
      group.closest("[data-row]")?.setAttribute("data-row", rule?.ask || "as-chosen");
    }
  }

  return { render, buttons, add: (category) => toggle(category, "always") };
}

// What did this user do, and when? A row for each category: its behaviors over time, and how much it is wanted.

import { bar, byId, h, moreButton, named, refill, svg } from "./dom.js";
import { count, counted, day, days, decimal, moment, percent, ticks } from "./format.js";

const FIRST = 12; // categories shown at first
const EQUATION = "Interest is Equation 3: each behavior counts 1 / its age in days.";
const FORESEEN = " P(next) is what the model foresees of the next behavior.";
const HEIGHT = 30; // of a row, in pixels
const END = 98.5; // percent of the width where the time axis ends
const LATER = 0.08; // of the life's length: so much after its end is drawn, at most

/** Draws lives into the chart. `paint`: category -> class of its color; `buttons`: (category, place) -> element. */
export function lifeView({ paint, buttons, narrow }) {
  const root = byId("life-chart");
  let life = null;
  let all = false;

  function show(given) {
    all &&= given.user_id === life?.user_id;
    life = given;
    heading();
    chart();
    latest();
  }

  function heading() {
    byId("life-title").textContent = `User ${life.user_id}`;
    const span = life.first === null ? null : days(life.first, life.last);
    byId("life-facts").replaceChildren(
      h(
        "span",
        {},
        h("b", { id: "behaviors" }, count(life.behaviors)),
        life.behaviors === 1 ? " behavior" : " behaviors",
      ),
      ...(span ? [h("span", {}, span)] : []),
      h("span", { title: "newer than the store" }, h("b", { id: "live" }, count(life.live)), " live"),
      ...Object.entries(life.profile).map(([name, value]) =>
        h("span", { class: "tag" }, `${name} `, h("b", {}, String(value ?? "unknown"))),
      ),
    );
  }

  function chart() {
    const categories = all ? life.categories : life.categories.slice(0, FIRST);
    if (!categories.length) {
      return refill(root, h("p", { class: "empty" }, `Nothing is known of this user before ${day(life.now)}.`));
    }
    const axis = timeAxis(life);
    const most = Math.max(...categories.flatMap((one) => one.counts), 1);
    const widest = Math.max(...categories.flatMap((one) => [one.share, one.foreseen ?? 0]), 1e-9);
    const long = categories.some((one) => String(one.category_id).length > 8);
    const table = h(
      "div",
      {
        class: long ? "timeline long" : "timeline",
        role: "table",
        "aria-label": "Life by category; arrow keys move among the marks",
      },
      head(axis),
      categories.map((one) => row(one, axis, most, widest)),
    );
    const hidden = life.categories.length - FIRST;
    const text = all ? "Show fewer" : `Show ${counted(hidden, "more category", "more categories")}`;
    const more = hidden > 0 && moreButton("life", text, () => ((all = !all), chart()), String(all));
    const foreseen = categories.some((one) => one.foreseen !== null);
    const note = h("p", { class: "note" }, EQUATION, foreseen ? FORESEEN : "");
    refill(root, table, note, more || "");
    thin(table);
    const first = table.querySelector("rect.mark");
    first?.setAttribute("tabindex", "0");
    table.addEventListener("keydown", (event) => walk(event, table));
  }

  function head(axis) {
    const labels = axis.ticks.map(({ at, label }) => h("span", { class: "tick", vars: { at: `${at}%` } }, label));
    return h(
      "div",
      { class: "head", role: "row" },
      h("span", { role: "columnheader" }, "Category"),
      h(
        "span",
        { role: "columnheader", class: "axis", "aria-label": "Time" },
        labels,
        h(
          "span",
          { class: "tick now", vars: { at: `${axis.now}%` }, title: moment(life.now) },
          axis.far ? "now →" : "now",
        ),
      ),
      h("span", { role: "columnheader", class: "n" }, "Behaviors"),
      h("span", { role: "columnheader" }, "Interest"),
      h("span", { role: "columnheader" }, "P(next)"),
      h("span", { role: "columnheader", class: "acts-head" }, h("span", { class: "hidden" }, "Rules")),
    );
  }

  function row(one, axis, most, widest) {
    const name = String(one.category_id);
    const color = paint(name);
    const value = (share, label) =>
      h(
        "span",
        {
          role: "cell",
          class: "value",
          "aria-label": share === null ? `${label}: unknown` : `${label} ${percent(share)}`,
        },
        share === null
          ? h("span", { class: "quiet" }, "–")
          : [bar(share / widest, color), h("span", {}, percent(share))],
      );
    return h(
      "div",
      { class: `row ${color}`, role: "row", "data-row": "as-chosen" },
      h("span", { role: "rowheader" }, named(name, color)),
      h("span", { role: "cell", class: "strip" }, strip(one, axis, most)),
      h("span", { role: "cell", class: "n" }, count(one.behaviors)),
      value(one.share, `Interest (Equation 3 score ${decimal(one.score)})`),
      value(one.foreseen, "P(next)"),
      h("span", { role: "cell" }, buttons(name, "life")),
    );
  }

  /** The behaviors of one category: a mark for each span of time that has some, higher for more of them. */
  function strip(one, axis, most) {
    const marks = one.counts.flatMap((n, i) => {
      if (!n) return [];
      const [x, width] = [axis.at(life.edges[i]), axis.at(life.edges[i + 1]) - axis.at(life.edges[i])];
      const height = 4 + (HEIGHT - 10) * Math.sqrt(n / most);
      const label = `${counted(n, "behavior")}, ${days(life.edges[i], Math.max(life.edges[i], life.edges[i + 1] - 1))}`;
      return [
        svg("rect", {
          class: "mark",
          x: `${(x + 0.1 * width).toFixed(3)}%`,
          width: `${(0.8 * width).toFixed(3)}%`,
          y: ((HEIGHT - height) / 2).toFixed(1),
          height: height.toFixed(1),
          rx: 1.5,
          "fill-opacity": (0.55 + 0.45 * Math.sqrt(n / most)).toFixed(2),
          tabindex: "-1",
          role: "img",
          "aria-label": `${one.category_id}: ${label}`,
          "data-label": label,
          "data-middle": (x + width / 2).toFixed(3),
          on: { focus: (event) => tip(event.target), blur: hideTip },
        }),
      ];
    });
    const lines = axis.ticks.map(({ at }) => line(at, "grid"));
    const drawn = svg(
      "svg",
      {
        height: HEIGHT,
        role: "group",
        "aria-label": `${one.category_id}: ${counted(one.behaviors, "behavior")}, ${days(one.first, one.last)}`,
      },
      lines,
      line(axis.now, "now"),
      marks,
    );
    drawn.addEventListener("pointermove", (event) => {
      const box = drawn.getBoundingClientRect();
      const at = (100 * (event.clientX - box.left)) / box.width;
      const nearest = closest(marks, at);
      if (nearest && (Math.abs(nearest.dataset.middle - at) * box.width) / 100 < 12) tip(nearest);
      else hideTip();
    });
    drawn.addEventListener("pointerleave", hideTip);
    return drawn;
  }

  function latest() {
    byId("recent").hidden = life.recent.length === 0;
    byId("recent-list").replaceChildren(
      h(
        "ol",
        {},
        life.recent.map((one) =>
          h(
            "li",
            {},
            h("span", { class: `dot ${paint(String(one.category_id))}` }),
            h(
              "span",
              { class: "label" },
              one.title ?? `item ${one.item_id}`,
              h("span", { class: "quiet" }, ` ${one.item_id}`),
            ),
            h("span", { class: "quiet" }, [one.behavior, day(one.timestamp)].filter(Boolean).join(" · ")),
          ),
        ),
      ),
    );
  }

  function timeAxis({ edges, now }) {
    const from = edges[0];
    const last = Math.max(edges.at(-1), from + 1);
    const to = Math.min(Math.max(now, last), last + LATER * (last - from));
    const at = (time) => END * Math.min(1, Math.max(0, (time - from) / (to - from)));
    const marks = ticks(from, to, narrow.matches ? 5 : 7).map(({ time, label }) => ({ at: at(time), label }));
    return { at, now: at(now), far: now > to + 1, ticks: marks };
  }

  return { show, redraw: () => life && chart() };
}

/** Of the labels of the axis, leave every one, every second … so that none runs into another. */
function thin(table) {
  const now = table.querySelector(".tick.now").getBoundingClientRect().left;
  const labels = [...table.querySelectorAll(".tick:not(.now)")];
  const boxes = labels.map((label) => label.getBoundingClientRect());
  const clear = (step) =>
    boxes.every((box, i) => i % step || i + step >= boxes.length || box.right <= boxes[i + step].left);
  let step = 1;
  while (!clear(step)) step += 1;
  labels.forEach((label, i) => (label.hidden = i % step > 0 || boxes[i].right > now));
}

const line = (at, name) => svg("line", { class: name, x1: `${at}%`, x2: `${at}%`, y1: 0, y2: HEIGHT });

function closest(marks, at) {
  let best = null;
  for (const mark of marks)
    if (!best || Math.abs(mark.dataset.middle - at) < Math.abs(best.dataset.middle - at)) best = mark;
  return best;
}

/** Arrow keys: along a row from mark to mark, and between rows to the mark that is nearest in time. */
function walk(event, table) {
  const mark = event.target.closest?.("rect.mark");
  if (!mark) return;
  const strips = [...table.querySelectorAll("svg")]
    .map((one) => [...one.querySelectorAll("rect.mark")])
    .filter((one) => one.length);
  const y = strips.findIndex((one) => one.includes(mark));
  const x = strips[y].indexOf(mark);
  const other = (row) => strips[row] && closest(strips[row], Number(mark.dataset.middle));
  const to = {
    ArrowLeft: () => strips[y][x - 1],
    ArrowRight: () => strips[y][x + 1],
    Home: () => strips[y][0],
    End: () => strips[y].at(-1),
    ArrowUp: () => other(y - 1),
    ArrowDown: () => other(y + 1),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  const next = to();
  if (!next) return;
  mark.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

function tip(mark) {
  const box = byId("tip");
  const at = mark.getBoundingClientRect();
  box.textContent = mark.dataset.label;
  box.hidden = false;
  const left = at.left + at.width / 2 - box.offsetWidth / 2;
  box.style.setProperty(
    "left",
    `${Math.max(8, Math.min(left, document.documentElement.clientWidth - box.offsetWidth - 8))}px`,
  );
  box.style.setProperty("top", `${at.top - box.offsetHeight - 8}px`);
}

function hideTip() {
  byId("tip").hidden = true;
}

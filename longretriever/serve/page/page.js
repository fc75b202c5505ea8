// Why does the recommender say what it says? This joins the parts: one state, two questions to the server, four views.
//
// Whatever is changed changes the state; the state goes into the address, and the server is asked again. A newer
// question stops the older one, so that the last change always wins.

import { Refused, ROOT, get, hasKey, path, post } from "./api.js";
import { candidatesView, compared, inWords } from "./candidates.js";
import { combobox } from "./combobox.js";
import { byShare, contextsView } from "./contexts.js";
import { alertBox, announce, byId, choice, h } from "./dom.js";
import { count, counted, day, fromField, milliseconds, moment, toField } from "./format.js";
import { lifeView } from "./life.js";
import { rulesPanel } from "./rules.js";
import { DEFAULTS, asId, asked, curl, fromHash, python, ruleFor, toHash } from "./state.js";

const SOON = 150; // milliseconds that a person may go on typing or sliding
const SETTLED = 1_500; // a list shown for so long is what the next one is compared with
const COLORS = 7;
const MERGES = { probability: "probability", quota: "quota", "round-robin": "round robin", score: "score" };
const SELECTS = {
  model: "As the model was made for.",
  pgin: "The N categories most likely to come next, as the model foresees.",
  top: "The N categories of highest interest (Equation 3).",
  random: "N categories drawn at random of the M of highest interest (Equation 3).",
};

const narrow = matchMedia("(max-width: 40rem)");
const folded = matchMedia("(max-width: 68rem)");
const state = fromHash(location.hash);
let model = null; // ModelFacts
let colors = new Map(); // category -> class, for those most wanted of this life
let life = null,
  answer = null;

const paint = (category) => (category === null ? "whole" : (colors.get(String(category)) ?? "other"));

const rules = rulesPanel({
  list: byId("rules"),
  rules: () => state.rules,
  changed: change,
  paint,
  reveal: () => (byId("knobs").open = true),
});
const lives = lifeView({ paint, buttons: rules.buttons, narrow });
const contexts = contextsView({ paint, buttons: rules.buttons });
const candidates = candidatesView({ paint, kind: () => byId("kind").value, add: addEvent, similar: similarTo });

// -- the state, the address, the questions

let timer = 0;

/** To be called after each change of the state. `soon`: the person may go on; `user`: it is another life. */
function change({ soon = false, user = false } = {}) {
  const address = toHash(state);
  if (user) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  show();
  clearTimeout(timer);
  if (user) lived();
  timer = setTimeout(ask, soon ? SOON : 0);
}

/** A question of which only the last one counts. `regions`: the elements that wait for it. */
function latest(question, failed, regions) {
  let stop = new AbortController();
  return async () => {
    stop.abort();
    stop = new AbortController();
    const { signal } = stop;
    busy(regions, true);
    try {
      await question(signal);
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      if (!(error instanceof Refused)) console.error(error);
      failed(error);
    } finally {
      if (stop.signal === signal) busy(regions, false);
    }
  };
}

const waiting = new Set();

function busy(regions, on) {
  for (const id of regions) {
    byId(id).setAttribute("aria-busy", String(on));
    if (on) waiting.add(id);
    else waiting.delete(id);
  }
  byId("progress").classList.toggle("on", waiting.size > 0);
}

const lived = latest(
  async (signal) => {
    const query = { now: state.now, spans: narrow.matches ? 32 : 64, recent: 12, categories: 60 };
    const found = await get(path("users", state.user), query, signal);
    life = found;
    color(found.categories);
    byId("life-alert").replaceChildren();
    byId("life").classList.remove("failed");
    lives.show(found);
    rules.render();
    if (answer) drawAnswer();
  },
  (error) => {
    life = null;
    if (answer) (color(byShare(answer)), drawAnswer());
    byId("life-title").textContent = `User ${state.user}`;
    byId("life-facts").textContent = "\u00a0";
    byId("life").classList.add("failed");
    byId("life-alert").replaceChildren(alertBox(error, lived));
  },
  ["life"],
);

function color(categories) {
  const known = categories.map((one) => one.category_id).filter((category) => category !== null);
  colors = new Map(known.slice(0, COLORS).map((category, i) => [String(category), `c${i}`]));
}

const ask = latest(
  async (signal) => {
    const found = await post("/v1/retrieve", asked(state, model.ids), signal);
    arrived(found);
  },
  (error) => {
    byId("candidates").classList.add("failed");
    byId("contexts").classList.add("failed");
    byId("candidates-alert").replaceChildren(alertBox(error, ask));
  },
  ["contexts", "candidates"],
);

// -- the answer, and what the next one is compared with

let base = null; // {user, ranks} of the list that was shown before
let last = null; // {user, ranks, at} of the one shown now
let since = null;
let because = ""; // what the person did that may have changed the list

function arrived(found) {
  const ranks = new Map(found.candidates.map((one) => [one.item_id, one.rank]));
  if (last && (because || base?.user !== last.user || performance.now() - last.at > SETTLED)) base = last;
  since = base && base.user === found.user_id ? compared(base.ranks, found.candidates) : null;
  last = { user: found.user_id, ranks, at: performance.now() };
  answer = found;
  if (!life) color(byShare(found));
  for (const id of ["candidates", "contexts"]) byId(id).classList.remove("failed");
  byId("candidates-alert").replaceChildren(
    ...(found.fallback
      ? [h("p", { class: "alert calm" }, "Nothing is known of this user, so this is what is popular.")]
      : []),
    ...(found.live
      ? []
      : [h("p", { class: "alert" }, "Live events cannot be had now: this is what the store alone says.")]),
  );
  if (found.model !== model.model) facts(); // the server has taken over a newer one
  drawAnswer();
  drawTimes(found.timings);
  const asking = `${counted(found.candidates.length, "candidate")} from ${counted(found.contexts.length, "context")}`;
  byId("candidates-facts").textContent =
    found.timings.total === undefined ? asking : `${asking} in ${milliseconds(found.timings.total)}`;
  byId("since").textContent = since
    ? `Since the list before${because}: ${inWords(since)}.`
    : "Press an item to see what is like it.";
  announce(`${asking}${since ? `; ${inWords(since)}` : ""}`);
  because = "";
}

function drawAnswer() {
  contexts.show(answer);
  candidates.show(answer, since, state.view);
}

const shade = (i) => `color-mix(in oklab, var(--accent), var(--line) ${(i * 37) % 90}%)`; // neighbours differ

function drawTimes(timings) {
  const stages = Object.entries(timings).filter(([stage]) => stage !== "total");
  const total = timings.total ?? stages.reduce((sum, [, ms]) => sum + ms, 0);
  const part = (ms) => `${((100 * ms) / (total || 1)).toFixed(2)}%`;
  byId("times").replaceChildren(
    h(
      "div",
      { class: "stack", "aria-hidden": "true" },
      stages.map(([stage, ms], i) =>
        h("span", { title: `${stage} ${milliseconds(ms)}`, vars: { share: part(ms), paint: shade(i) } }),
      ),
    ),
    h(
      "ul",
      { class: "legend", "aria-labelledby": "times-title" },
      stages.map(([stage, ms], i) =>
        h("li", {}, h("span", { class: "dot", vars: { paint: shade(i) } }), `${stage} `, h("b", {}, milliseconds(ms))),
      ),
      h("li", {}, "total ", h("b", {}, milliseconds(total))),
    ),
  );
}

// -- the controls

const setView = choice(
  byId("view"),
  [
    { value: "contexts", label: "By context" },
    { value: "list", label: "One list" },
  ],
  (view) => {
    state.view = view;
    history.replaceState(null, "", toHash(state));
    if (answer) candidates.show(answer, since, view);
  },
);
let setSelect = () => {};
let resized = 0;

/** Is a seed of any use, the way contexts are chosen now? */
const draws = () =>
  state.select === "random" ||
  (state.select === "model" && !model.selects.includes("pgin") && model.selects.includes("random"));

/** Make all controls say what the state is; but leave the field alone that is being edited. */
function show() {
  const fill = (id, value) => document.activeElement !== byId(id) && (byId(id).value = value ?? "");
  fill("user", state.user);
  for (const id of ["k", "n", "m", "seed"]) fill(id, state[id]);
  fill("now", state.now === null ? "" : toField(state.now));
  byId("merge").value = state.merge;
  byId("seen").checked = state.seen;
  fill("returns", state.returns ?? 0.5);
  byId("returns").classList.toggle("unset", state.returns === null);
  byId("returns-said").textContent = state.returns === null ? "" : `${Math.round(100 * state.returns)}%`;
  byId("returns").setAttribute(
    "aria-valuetext",
    state.returns === null ? "as the model judges" : `${Math.round(100 * state.returns)}%`,
  );
  byId("returns-reset").disabled = state.returns === null;
  setView(state.view);
  setSelect(state.select);
  document.title = state.user ? `User ${state.user} · LongRetriever` : "LongRetriever";
  if (!model) return;
  byId("n").placeholder = draws() ? "5" : state.select === "model" ? "auto" : "20";
  byId("m").placeholder = draws() ? "20" : "–";
  byId("m").disabled = !draws();
  byId("draw").disabled = !draws();
  byId("select-note").textContent = SELECTS[state.select] ?? "";
  byId("now-note").textContent =
    state.now === null
      ? ({ wall: "Empty: now.", log: "Empty: just after the last behavior." }[model.clock] ?? "Empty: now.")
      : "Later behaviors do not count.";
  const body = asked(state, model.ids);
  byId("curl").textContent = curl(ROOT, body, hasKey());
  byId("python").textContent = python(ROOT, body, hasKey());
}

function onNumber(id, then = change) {
  const input = byId(id);
  input.addEventListener("input", () => {
    if (input.validity.badInput) return; // a number that is out of range goes to the server, which says so
    state[id] = input.value === "" ? DEFAULTS[id] : Number(input.value);
    then({ soon: true });
  });
  input.addEventListener("change", show); // an emptied field says its default again
}

function wire() {
  for (const id of ["aside", "choose"]) byId(id).inert = false;
  for (const id of ["k", "n", "m", "seed"]) onNumber(id);
  byId("now").addEventListener("input", ({ target }) => {
    if (target.validity.badInput) return;
    state.now = fromField(target.value);
    change({ soon: true });
    lived();
  });
  byId("merge").addEventListener("change", ({ target }) => ((state.merge = target.value), change()));
  byId("seen").addEventListener("change", ({ target }) => ((state.seen = target.checked), change()));
  byId("returns").addEventListener(
    "input",
    ({ target }) => ((state.returns = Number(target.value)), change({ soon: true })),
  );
  byId("returns-reset").addEventListener("click", () => {
    state.returns = null;
    byId("returns").focus();
    byId("returns").value = 0.5;
    change();
  });
  byId("draw").addEventListener("click", () => {
    state.seed = (state.seed + 1) % Number.MAX_SAFE_INTEGER;
    because = ", drawn again";
    change();
  });
  byId("reset").addEventListener("click", () => {
    const { user, view } = state;
    const past = state.now !== null;
    Object.assign(state, DEFAULTS, { user, view, rules: [] });
    rules.render();
    change();
    if (past) lived();
  });
  for (const form of ["ask", "choose"]) byId(form).addEventListener("submit", (event) => event.preventDefault());
  byId("who").addEventListener("submit", (event) => (event.preventDefault(), meet(byId("user").value)));
  byId("another").addEventListener("click", another);
  byId("event").addEventListener("submit", (event) => (event.preventDefault(), addChosen()));
  byId("kind").addEventListener("change", () => candidates.draw());
  for (const id of ["curl", "python"])
    byId(`copy-${id}`).addEventListener("click", ({ target }) => copy(byId(id), target));
  byId("skip").addEventListener("click", (event) => (event.preventDefault(), byId("candidates-title").focus()));
  byId("theme").addEventListener("click", () => theme(!isDark()));
  addEventListener("popstate", again);
  addEventListener("scroll", () => (byId("tip").hidden = true), { passive: true });
  narrow.addEventListener("change", () => life && lived());
  addEventListener("resize", () => (clearTimeout(resized), (resized = setTimeout(lives.redraw, SOON))));
  const fold = () => ["knobs", "adding"].forEach((id) => (byId(id).open = !folded.matches));
  folded.addEventListener("change", fold);
  fold();
  combobox(byId("user"), {
    name: "Users",
    free: true,
    search: findUsers,
    pick: meet,
    left: () => (byId("user").value = state.user),
  });
  combobox(byId("category"), { name: "Categories", free: true, search: findCategories, pick: ruled });
  combobox(byId("item"), {
    name: "Items",
    search: findItems,
    pick: (value, label) => {
      chosen = { value, label };
      byId("item").value = label;
    },
  });
  byId("item").addEventListener("input", () => (chosen = null));
  const limit = model.limits?.k;
  if (limit) byId("k").max = limit;
  byId("merge").append(
    h("option", { value: "" }, `model: ${MERGES[model.merge] ?? model.merge}`),
    ...model.merges.map((name) => h("option", { value: name }, MERGES[name] ?? name)),
  );
  const kinds = model.kinds.length ? model.kinds : [""];
  byId("kind").append(...kinds.map((kind) => h("option", { value: kind }, kind || "(none)")));
  byId("kind").value = kinds.includes("click") ? "click" : kinds[0];
  setSelect = choice(
    byId("select"),
    model.selects.map((value) => ({ value, label: value, title: SELECTS[value] })),
    (select) => {
      state.select = select;
      change();
    },
  );
}

/** The address was changed: by the Back button, or by hand. */
function again() {
  Object.assign(state, fromHash(location.hash));
  document.activeElement?.blur();
  rules.render();
  show();
  lived();
  ask();
}

// -- users

function meet(user) {
  state.user = String(user).trim();
  if (!state.user) return;
  byId("user").value = state.user;
  change({ user: true });
}

const some = (limit) => get("/v1/users", { limit, seed: Math.floor(Math.random() * 2 ** 31) });

async function another() {
  try {
    const { users } = await some(2);
    const other = users.find((user) => String(user.user_id) !== state.user);
    if (other) meet(other.user_id);
  } catch (error) {
    byId("life-alert").replaceChildren(alertBox(error, another));
  }
}

async function findUsers(like, signal) {
  const { users } = await get("/v1/users", { like, limit: 8, seed: like ? null : 1 }, signal);
  return users.map(({ user_id: value, behaviors, last: time }) => ({
    value,
    label: String(value),
    note: `${counted(behaviors, "behavior")}${time === null ? "" : ` · ${day(time)}`}`,
  }));
}

// -- categories, items, events

async function findCategories(like, signal) {
  const { categories } = await get("/v1/catalogue/categories", { like, limit: 8 }, signal);
  return categories.map(({ category_id: value, items }) => ({
    value,
    label: String(value),
    note: counted(items, "item"),
  }));
}

function ruled(category) {
  byId("category").value = "";
  if (ruleFor(state.rules, String(category)).ask !== "always") rules.add(String(category));
}

let chosen = null; // the item picked among the suggestions

async function findItems(like, signal) {
  const { items } = await get("/v1/catalogue/items", { like, limit: 8 }, signal);
  return items.map(({ item_id: value, title, category_id: category }) => ({
    value,
    label: title ?? String(value),
    note: `${title === null ? "" : `${value} · `}${category}`,
  }));
}

async function addChosen() {
  const text = byId("item").value.trim();
  const one =
    chosen && chosen.label === text
      ? { item_id: chosen.value, title: text }
      : { item_id: asId(text, model.ids.item_id), title: null };
  if (await addEvent(one)) {
    byId("item").value = "";
    chosen = null;
  }
}

/** Write a behavior of this user, and ask again. */
async function addEvent({ item_id: item, title }) {
  const kind = byId("kind").value;
  const user = state.user;
  const what = `${kind || "met"} ${title ?? item}`;
  const note = byId("event-note");
  note.classList.remove("wrong");
  note.textContent = "Adding …";
  try {
    await post("/v1/events", {
      user_id: asId(user, model.ids.user_id),
      item_id: item,
      behavior: kind,
      event_id: `page-${random()}`,
    });
  } catch (error) {
    note.classList.add("wrong");
    note.textContent = [error.message, ...(error.points ?? [])].join(" ");
    announce(note.textContent);
    return false;
  }
  note.textContent = `Added: ${what}.${state.now === null ? "" : " It does not count while you ask as of the past."}`;
  if (user !== state.user) return true;
  because = ` (${what})`;
  lived();
  ask();
  facts();
  return true;
}

const random = () => [...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(36)).join("");

const likes = new Map();

async function similarTo(item) {
  if (!likes.has(item)) likes.set(item, await get(path("items", item, "similar"), { k: 8 }));
  return likes.get(item);
}

// -- copying, colors, facts

async function copy(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // without https the old way is the only one
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = "Copy"), 1_500);
}

const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () =>
  document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : system.matches;

function theme(dark) {
  const own = dark !== system.matches; // as the system has it: nothing to remember
  if (own) document.documentElement.dataset.theme = dark ? "dark" : "light";
  else delete document.documentElement.dataset.theme;
  try {
    if (own) localStorage.setItem("theme", dark ? "dark" : "light");
    else localStorage.removeItem("theme");
  } catch {
    // storage may be forbidden
  }
  byId("theme").setAttribute("aria-pressed", String(dark));
}

function drawModel() {
  const facts = [
    ["Model", model.model],
    ["Method", `${model.method}, ${count(model.dimension)} dimensions`],
    ["Made", moment(model.made)],
    ["Loaded", moment(model.loaded)],
    ["Index", `${counted(model.items, "item")} in ${counted(model.categories, "category", "categories")}`],
    ["Store", `${counted(model.behaviors, "behavior")} of ${counted(model.users, "user")}`],
    ["From", `${day(model.first_time)} to ${day(model.last_time)}`],
    ["Live events", count(model.live_events)],
    ["Merge", MERGES[model.merge] ?? model.merge],
    ["Clock", model.clock === "log" ? "the log's: just after its last event" : "the wall's"],
    ["Package", `longretriever ${model.package}`],
  ];
  byId("model-facts").replaceChildren(
    ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

async function facts() {
  try {
    model = await get("/v1/model");
    drawModel();
  } catch {
    // those shown are a little old, then
  }
}

// -- the beginning

async function begin() {
  byId("progress").classList.add("on");
  rules.render();
  show();
  try {
    model = await get("/v1/model");
    if (!state.user) {
      const { users } = await some(12); // of some, the one with the longest life: there is most to see
      if (!users.length) throw new Refused(0, "The store knows no user yet.");
      state.user = String(users.reduce((a, b) => (b.behaviors > a.behaviors ? b : a)).user_id);
      history.replaceState(null, "", toHash(state));
    }
  } catch (error) {
    if (!(error instanceof Refused)) console.error(error);
    byId("progress").classList.remove("on");
    byId("main").classList.add("failed");
    byId("life-alert").replaceChildren(alertBox(error, () => location.reload()));
    return;
  }
  wire();
  drawModel();
  show();
  lived();
  ask();
}

byId("theme").setAttribute("aria-pressed", String(isDark()));
system.addEventListener("change", () => byId("theme").setAttribute("aria-pressed", String(isDark())));
begin();

// What does the server say? JSON, or an error in its own words; a key is asked for where one is needed.

import { byId } from "./dom.js";

export const ROOT = new URL(".", location.href.split("#")[0]).href.replace(/\/$/, "");
const KEY = "longretriever-key";
let key = remembered();

/** Why a request was not answered. `points`: where in it, and what is wrong there. */
export class Refused extends Error {
  constructor(status, detail, points = []) {
    super(detail);
    this.status = status;
    this.points = points;
  }

  /** May the same request be answered another time? */
  get mayPass() {
    return this.status === 0 || this.status === 401 || this.status >= 500;
  }
}

export const hasKey = () => key !== null;

export const get = (path, query = {}, signal = undefined) => asked("GET", withQuery(path, query), undefined, signal);
export const post = (path, body, signal = undefined) => asked("POST", path, body, signal);
/** A path out of parts, each of which may hold anything. */
export const path = (...parts) => `/v1/${parts.map((part) => encodeURIComponent(part)).join("/")}`;

function withQuery(to, query) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${to}?${new URLSearchParams(given)}` : to;
}

async function asked(method, to, body, signal) {
  for (;;) {
    const used = key;
    const response = await sent(method, to, body, signal);
    if (response.status !== 401) return read(response);
    await newKey(used, await reason(response));
    signal?.throwIfAborted();
  }
}

async function sent(method, to, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(ROOT + to, {
      method,
      headers,
      body: body && JSON.stringify(body),
      signal,
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
}

async function read(response) {
  if (response.ok) return response.json();
  throw await reason(response);
}

async function reason(response) {
  const said = await response.json().catch(() => null);
  const detail =
    typeof said?.detail === "string" ? said.detail : `The server answered ${response.status} ${response.statusText}.`;
  const points = said?.errors ?? [];
  return new Refused(response.status, detail, points.length > 1 ? points.map(point) : []); // the detail says the first
}

const point = ({ where, what }) => `${[where].flat().join(".")}: ${what}`;

// -- the key

let asking = null; // the dialog is shown once, for all requests that wait for it

function newKey(used, refused) {
  if (key !== used) return Promise.resolve(); // another request has brought one meanwhile
  asking ??= dialog(used, refused).finally(() => (asking = null));
  return asking;
}

function dialog(used, refused) {
  const [box, form, text, wrong] = ["key", "key-form", "key-text", "key-wrong"].map(byId);
  wrong.textContent = used === null ? "" : refused.message;
  text.value = "";
  return new Promise((resolve, reject) => {
    const done = new AbortController();
    const on = (target, event, handler) => target.addEventListener(event, handler, { signal: done.signal });
    const close = () => (done.abort(), box.close());
    on(form, "submit", (event) => {
      event.preventDefault();
      key = text.value;
      remember();
      close();
      resolve();
    });
    on(byId("key-cancel"), "click", () => (close(), reject(refused)));
    on(box, "cancel", () => (close(), reject(refused)));
    box.showModal();
    text.focus();
  });
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function remember() {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it lasts as long as the page, then
  }
}

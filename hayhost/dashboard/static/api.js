// The management API: requests, errors, and streams of events, each with the token if there is one.

const KEY = "hayhost-token";
const UNSEEN = 10_000;
let token = sessionStorage.getItem(KEY) || "";
let refused = () => {};

export const hasToken = () => token !== "";
export const onRefused = (callback) => (refused = callback);

export function setToken(value) {
  token = value;
  value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);
}

// `fields` has the message for each wrong field of a 422.
export class ApiError extends Error {
  constructor(status, message, fields, body) {
    super(message);
    this.status = status;
    this.fields = fields || {};
    this.body = body;
  }
}

export function path(...parts) {
  return "/" + parts.map(encodeURIComponent).join("/");
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? "?" + new URLSearchParams(given) : "";
}

export function headers(more) {
  return token ? {Authorization: `Bearer ${token}`, ...more} : {...more};
}

export async function request(method, url, body, more) {
  const given = headers(body === undefined ? more : {"Content-Type": "application/json", ...more});
  let answer;
  try {
    answer = await fetch(url, {
      method, headers: given, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    });
  } catch {
    throw new ApiError(0, "The host cannot be reached");
  }
  const text = await answer.text();
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    value = {error: text.slice(0, 500)};
  }
  if (answer.ok) return value;
  if (answer.status === 401) refused();
  const fields = Object.fromEntries((value?.errors || []).map((one) => [one.field, one.message]));
  throw new ApiError(answer.status, String(value?.error || `The host answered ${answer.status}`), fields, value);
}

export const call = (method, url, body, more) => request(method, "/api/v1" + url, body, more);
export const get = (url) => call("GET", url);

// All items of a list, page by page; `more` is called with what is there after each.
export async function all(url, more = () => {}) {
  const items = [];
  let after = "";
  do {
    const page = await get(url + (url.includes("?") ? "&" : "?") + new URLSearchParams({limit: "1000", after}));
    items.push(...page.items);
    more(items);
    after = page.next;
  } while (after);
  return items;
}

// Events as they happen: `event(kind, data)`, `state("open" | "closed" | "missing")`. EventSource cannot send a token;
// this can. The function that is returned ends it. A page that nobody sees gives its connection back after a while, as
// a browser has only six for all pages of a host; `state("open")` tells that it has one again.
export function listen(url, event, state = () => {}) {
  let ended = false;
  let connection = new AbortController();
  let seen = () => {};
  let leaving = null;
  const looked = () => {
    clearTimeout(leaving);
    if (document.hidden) leaving = setTimeout(() => connection.abort(), UNSEEN);
    else seen();
  };
  document.addEventListener("visibilitychange", looked);
  (async () => {
    let pause = 500;
    while (!ended) {
      connection = new AbortController();
      try {
        const answer = await fetch("/api/v1" + url, {headers: headers(), signal: connection.signal, cache: "no-store"});
        if (answer.status === 401) refused();
        if (answer.status === 404) return state("missing");
        if (!answer.ok) throw new Error(String(answer.status));
        state("open");
        pause = 250;
        await read(answer.body.getReader(), event);
      } catch {
        // the host is away or has ended the stream, or this page has
      }
      if (ended) return;
      if (connection.signal.aborted && document.hidden) await new Promise((done) => (seen = done));
      else {
        state("closed");
        await new Promise((done) => setTimeout(done, pause * (0.75 + Math.random() / 2)));
        pause = Math.min(pause * 2, 10_000);
      }
    }
  })();
  return () => {
    ended = true;
    document.removeEventListener("visibilitychange", looked);
    clearTimeout(leaving);
    seen();
    connection.abort();
  };
}

async function read(reader, event) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += decoder.decode(value, {stream: true});
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
      }
      if (fields.data !== undefined) event(fields.event || "message", JSON.parse(fields.data));
    }
  }
}

// One worker: how it is, what it says, and its routes and tools to be tried.

import {h} from "./dom.js";
import {call, get, headers, listen, path, query, request} from "./api.js";
import {ago, area, badge, block, button, card, choice, empty, facts, failed, field, focusFirstWrong, input, latency, loading, number, page, size, span, tag, toast} from "./parts.js";
import {argumentField, parsed, properties} from "./forms.js";
import {calmly, host, redraw, resource} from "./state.js";

const enc = encodeURIComponent;
const MOST_LINES = 1000;
const MOST_SHOWN = 64 << 10;

export function worker(plugin, org) {
  const base = "/plugins" + path(plugin, org);
  const it = resource(async () => {
    const [list, described, health] = await Promise.all([
      get("/workers" + query({plugin, org, limit: 1})), get(path("plugins", plugin)),
      request("GET", `${base}/health`).catch((error) => (error.status === 503 && error.body?.state ? error.body : {missing: error.message})),
    ]);
    return {worker: list.items[0] || null, plugin: described, health};
  });
  const again = calmly(it.load);
  const log = logOf(plugin, org);
  const routes = tryOf(base);
  const tools = toolsOf(base);

  async function restart() {
    const {restarted} = await call("POST", path("orgs", org, "plugins", plugin, "restart"), {});
    toast(restarted ? "A new worker serves, or is started by the next request" : "The new worker did not start; see its log", restarted ? "" : "bad");
    await it.load();
  }

  function status() {
    const {worker: one, health} = it.value;
    if (health.missing) return h("p", {class: "wrong"}, health.missing);
    return facts([
      ["State", h("span", {class: "row"}, badge(health.state), one?.why && h("span", {class: "small"}, one.why))],
      health.lastError && ["Last error", h("span", {class: "mono small wrong"}, health.lastError)],
      ["Health", badge(health.status, {healthy: "good", degraded: "warn", unhealthy: "bad"}[health.status])],
      one?.since && ["Since", ago(one.since)], health.uptime > 0 && ["Up for", span(health.uptime)],
      ["Version", health.version], ["Process", health.pid ?? "none"],
      health.pid !== null && ["Memory", h("span", {}, size(one?.pss ?? health.memory.pss), h("span", {class: "muted"}, ` of its own, ${size(one?.rss ?? health.memory.rss)} resident`))],
      ["Isolation", `${health.isolation}, ${health.sharing === "strict" ? "loaded for itself" : "forked"}`],
      one && ["Requests", `${number(one.requests)}, ${number(one.inFlight)} under way, ${number(one.waiting)} wait`],
      one?.errors !== undefined && ["Failed", number(one.errors)],
      one && ["Latency", h("span", {}, latency(one, true), h("span", {class: "muted small"}, " p50 / p99"))],
      one && ["Restarts", number(one.restarts)],
      ["MCP servers", health.mcpServers.servers.join(", ") || "none"],
      ...Object.entries(health.mcpServers.notRunning || {}).map(([id, server]) => [id, h("span", {class: "wrong"}, `${server.state}: ${server.error || ""}`)]),
    ]);
  }

  const view = () => {
    const crumbs = [["Workers", "#/workers"]];
    if (it.error) return page(`${plugin} of ${org}`, {crumbs}, failed(it.error));
    if (!it.value) return page(`${plugin} of ${org}`, {crumbs}, loading());
    const meta = it.value.plugin.metadata;
    return page(`${it.value.plugin.displayName} of ${org}`, {
      crumbs, about: [badge(it.value.health.state || "unknown"), tag(plugin), tag(org)],
      actions: host.store && [h("a", {class: "button", href: `#/orgs/${enc(org)}/${enc(plugin)}`}, "Settings"), button("Restart", restart, {redraw})],
    },
      h("div", {class: "columns"}, card("How it is", {id: "how"}, status()), card("Try a route", {id: "try"}, routes.view(meta?.routes || []))),
      log.view(), card("Tools", {id: "tools", flush: tools.listed()}, tools.view(it.value.plugin.capabilities.includes("mcp"))));
  };
  return {
    title: `${plugin} of ${org}`, view, tick: it.load, close: log.close,
    event: (kind, data) => (kind === "lost" || (data.plugin === plugin && (data.org === org || kind === "plugin"))) && again(),
  };
}

// ---- the log

function logOf(plugin, org) {
  let items = [];
  let known = new Set();
  let level = "";
  let text = "";
  let follow = true;
  let available = true;
  let node = null;
  let stop = () => {};

  function add(records) {
    for (const one of records) {
      if (known.has(one.id)) continue;
      known.add(one.id);
      items.push(one);
    }
    if (items.length > MOST_LINES) {
      items = items.slice(-MOST_LINES);
      known = new Set(items.map((one) => one.id));
    }
    redraw();
    if (follow) requestAnimationFrame(() => requestAnimationFrame(() => node && (node.scrollTop = node.scrollHeight)));
  }

  // First the latest that there are, then what comes; after a break, what is known already is left out.
  function begin() {
    stop();
    items = [];
    known = new Set();
    const mine = (stop = listen("/logs/stream" + query({plugin, org, level, limit: 300}), (kind, data) => kind === "log" && mine === stop && add([data]), (state) => {
      available = state !== "missing";
      redraw();
    }));
  }

  const clock = (at) => {
    const date = new Date(typeof at === "number" ? at * 1000 : at);
    return Number.isNaN(date.getTime()) ? String(at) : `${date.toTimeString().slice(0, 8)}.${String(date.getMilliseconds()).padStart(3, "0")}`;
  };
  const line = (one) => h("li", {key: one.id, class: one.level},
    h("span", {class: "muted"}, clock(one.time)), h("span", {class: "level"}, one.level),
    h("span", {class: "text"}, one.event, one.meta && Object.keys(one.meta).length > 0 && h("span", {class: "meta"}, ` ${JSON.stringify(one.meta)}`),
      one.dropped > 0 && h("span", {class: "meta"}, ` (${one.dropped} dropped)`), one.traceback && h("div", {class: "meta"}, one.traceback)));

  const view = () => {
    const shown = text ? items.filter((one) => `${one.event} ${one.traceback || ""}`.toLowerCase().includes(text.toLowerCase())) : items;
    return h("section", {class: "card", "aria-labelledby": "log-title", key: "log"},
      h("div", {class: "card-head"}, h("h2", {id: "log-title"}, "Log"),
        h("div", {class: "filters"},
          field("log-text", "Find", {}, input(text, (value) => ((text = value), redraw()), {type: "search"})),
          field("log-level", "Level", {}, choice(level, [["", "All"], ["debug", "Debug"], ["info", "Info"], ["warning", "Warning"], ["error", "Error"]], (value) => ((level = value), begin()))),
          h("label", {class: "row nowrap"}, h("input", {type: "checkbox", checked: follow, onchange: (event) => ((follow = event.target.checked), add([]))}), "Follow"))),
      !available ? empty("There is no log here", "This host does not keep its log; read it where the host writes it.")
        : shown.length ? h("ol", {class: "log", tabindex: 0, "aria-label": "Log records", ref: (made) => (node = made)}, shown.map(line))
          : empty("Nothing has been logged", "What the plugin prints, logs and raises for this organisation appears here as it happens."));
  };
  begin();
  return {view, close: () => stop()};
}

// ---- routes

function tryOf(base) {
  let chosen = 0;
  let params = {};
  let search = "";
  let body = "";
  let type = "application/json";
  let answer = null;

  async function send(route) {
    const filled = route.path.replace(/\{(\w+)\}/g, (_, name) => enc(params[name] || ""));
    const started = performance.now();
    const withBody = !["GET", "DELETE"].includes(route.method);
    const stop = AbortSignal.timeout(60_000);
    try {
      // Cookies stay out of it, redirects are shown and not followed, and what comes back is only ever shown as text.
      const got = await fetch(base + filled + (search ? "?" + search.replace(/^\?/, "") : ""), {
        method: route.method, headers: headers(withBody && body ? {"Content-Type": type} : {}), body: withBody && body ? body : undefined,
        credentials: "omit", redirect: "manual", cache: "no-store", signal: stop,
      });
      const [text, cut] = await start(got);
      answer = {
        status: got.type === "opaqueredirect" ? "redirect" : got.status, took: performance.now() - started, text, cut,
        headers: [...got.headers].map(([name, value]) => `${name}: ${value}`).join("\n"),
      };
    } catch (error) {
      answer = {status: "failed", took: performance.now() - started, text: error.message, headers: ""};
    }
  }

  // The first part of a body that may be endless.
  async function start(got) {
    if (!got.body) return ["", false];
    const reader = got.body.getReader();
    const decoder = new TextDecoder();
    let text = "";
    while (text.length < MOST_SHOWN) {
      const {done, value} = await reader.read();
      if (done) return [pretty(text, got.headers.get("Content-Type") || ""), false];
      text += decoder.decode(value, {stream: true});
    }
    reader.cancel().catch(() => {});
    return [text.slice(0, MOST_SHOWN), true];
  }

  function pretty(text, kind) {
    if (!kind.includes("json")) return text;
    try {
      return JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      return text;
    }
  }

  const view = (routes) => {
    if (!routes.length) return h("p", {class: "muted"}, "This plugin has no routes.");
    const route = routes[Math.min(chosen, routes.length - 1)];
    const names = [...route.path.matchAll(/\{(\w+)\}/g)].map((one) => one[1]);
    const tone = typeof answer?.status === "number" ? (answer.status < 300 ? "good" : answer.status < 500 ? "warn" : "bad") : "warn";
    return [
      h("form", {class: "form", onsubmit: (event) => (event.preventDefault(), document.getElementById("send").click())},
        field("route", "Route", {}, choice(String(chosen), routes.map((one, index) => [String(index), `${one.method} ${one.path}`]), (value) => ((chosen = Number(value)), (answer = null), redraw()))),
        names.map((name) => field(`param-${name}`, name, {required: true}, input(params[name] || "", (value) => (params[name] = value)))),
        field("query", "Query", {}, input(search, (value) => (search = value), {placeholder: "limit=10&after=…"})),
        !["GET", "DELETE"].includes(route.method) && [
          field("content-type", "Type of the body", {}, choice(type, [["application/json", "JSON"], ["text/plain", "Text"], ["application/x-www-form-urlencoded", "Form"]], (value) => (type = value))),
          field("body", "Body", {}, area(body, (value) => (body = value), {placeholder: "{}"}))],
        h("div", {class: "row"}, button("Send", () => send(route), {key: "send", id: "send", kind: "main", redraw}))),
      answer && h("div", {class: "form", role: "status"},
        h("div", {class: "row"}, badge(String(answer.status), tone), h("span", {class: "muted"}, `${answer.took.toFixed(0)} ms`)),
        answer.text !== "" && block(answer.text, "The answer"), answer.cut && h("p", {class: "muted small"}, "Only the first part is shown."),
        answer.headers && h("details", {}, h("summary", {}, "Headers"), block(answer.headers, "The answer's headers"))),
    ];
  };
  return {view};
}

// ---- tools

function toolsOf(base) {
  let list = null;
  let open = "";
  let typed = {};
  let wrong = {};
  let result = null;

  async function load() {
    list = (await request("GET", `${base}/mcp/list-tools`)).tools;
  }

  async function run(tool) {
    const given = {};
    wrong = {};
    for (const entry of properties(tool.inputSchema)) {
      const [name, , type, required] = entry;
      try {
        const value = parsed(type, typed[name] || "");
        if (value !== undefined) given[name] = value;
        else if (required) wrong[name] = "is required";
      } catch (error) {
        wrong[name] = error.message;
      }
    }
    if (Object.keys(wrong).length) return focusFirstWrong();
    const started = performance.now();
    try {
      const answer = await request("POST", `${base}/mcp/call-tool`, {toolName: tool.name, arguments: given});
      result = {ok: !answer?.isError, text: JSON.stringify(answer, null, 2), took: performance.now() - started};
    } catch (error) {
      result = {ok: false, text: error.message, took: performance.now() - started};
    }
  }

  function form(tool) {
    const entries = properties(tool.inputSchema);
    return h("div", {class: "form"},
      entries.length === 0 && h("p", {class: "muted small"}, "It takes no arguments."),
      entries.map((entry, index) => argumentField(`arg-${index}`, entry, typed[entry[0]] || "", wrong[entry[0]], (value) => ((typed[entry[0]] = value), delete wrong[entry[0]]))),
      h("div", {class: "row"}, button("Call", () => run(tool), {key: "call-tool", kind: "main", redraw})),
      result && h("div", {class: "form", role: "status"}, h("div", {class: "row"}, badge(result.ok ? "ok" : "failed"), h("span", {class: "muted"}, `${result.took.toFixed(0)} ms`)), block(result.text, "The tool's result")));
  }

  const view = (has) => {
    if (!has) return h("p", {class: "muted"}, "This plugin has no MCP tools.");
    if (!list) return h("div", {class: "row"}, button("List its tools", load, {redraw}), h("span", {class: "muted small"}, "This starts the worker if it does not run."));
    if (!list.length) return [h("p", {class: "muted"}, "It offers no tools to this organisation now."), h("div", {class: "row"}, button("List its tools", load, {redraw}))];
    return h("ul", {class: "list"}, list.map((tool) => h("li", {class: "tool", key: `${tool.serverId} ${tool.name}`},
      h("div", {class: "form"},
        h("div", {class: "row"}, h("b", {class: "mono"}, String(tool.name)), tool.serverId && tag(String(tool.serverId))),
        tool.description && h("p", {class: "muted small"}, String(tool.description)),
        open === tool.name && form(tool)),
      h("button", {type: "button", "aria-expanded": open === tool.name ? "true" : "false", "aria-label": `${open === tool.name ? "Close" : "Call"} ${tool.name}`, onclick: () => {
        open = open === tool.name ? "" : tool.name;
        [typed, wrong, result] = [{}, {}, null];
        redraw();
      }}, open === tool.name ? "Close" : "Call it…"))));
  };
  return {view, listed: () => list?.length > 0};
}

// What is wrong now, and what there is.

import {h} from "./dom.js";
import {ago, badge, card, facts, number, page, span, tick} from "./parts.js";
import {host} from "./state.js";

const enc = encodeURIComponent;

function target(problem) {
  if (problem.kind === "isolation") return ["#/doctor", "Open the doctor"];
  if (problem.kind === "auth" || problem.kind === "refresh") return problem.count === 1 ? [`#/orgs/${enc(problem.orgs[0])}/${enc(problem.plugin)}`, "Open its settings"] : null;
  if (problem.count === 1) return [`#/workers/${enc(problem.plugin)}/${enc(problem.orgs[0])}`, "Open the worker"];
  if (problem.count > 1) return [`#/workers?q=${enc(problem.plugin)}`, "Show the workers"];
  if (problem.plugin) return [`#/plugins/${enc(problem.plugin)}`, "Open the plugin"];
  return null;
}

function one(problem) {
  const link = target(problem);
  const orgs = problem.count > 1 ? `${number(problem.count)} organisations: ${problem.orgs.join(", ")}${problem.count > problem.orgs.length ? "…" : ""}` : problem.orgs[0];
  return h("li", {class: `problem ${problem.severity}`, key: `${problem.kind} ${problem.plugin} ${problem.orgs[0]} ${problem.why}`},
    h("div", {class: "row between"},
      h("h3", {}, problem.title), h("span", {class: "row"}, badge(problem.severity), problem.since && h("span", {class: "muted small"}, "since ", ago(problem.since)))),
    problem.plugin && h("p", {class: "small"}, h("b", {}, problem.plugin), orgs && ` of ${orgs}`),
    h("p", {class: "why", tabindex: 0, role: "group", "aria-label": "Why"}, problem.why),
    h("p", {class: "do"}, h("b", {}, "What to do: "), problem.remedy, "."),
    link && h("p", {}, h("a", {href: link[0]}, link[1])));
}

const tile = (text, value, note, href) =>
  h(href ? "a" : "div", {class: "card tile", href}, h("span", {class: "muted"}, text), h("b", {}, value), h("span", {class: "small muted"}, note));

export function overview() {
  const view = () => {
    const problems = host.problems.filter((one) => one.severity !== "notice");
    const notices = host.problems.filter((one) => one.severity === "notice");
    const {plugins, workers} = host;
    const serving = (workers.ready || 0) + (workers.degraded || 0);
    const all = Object.values(plugins).reduce((sum, count) => sum + count, 0);
    const totals = h("div", {class: "tiles"},
      tile("Plugins", number(all), plugins.error ? `${plugins.error} do not load` : plugins.loading ? `${plugins.loading} are loading` : "all loaded", "#/plugins"),
      tile("Workers", number(serving), `of ${number(host.maxWorkers)} at most`, "#/workers"),
      tile("In trouble", number((workers.degraded || 0) + (workers.error || 0)), `${number(workers.error || 0)} of them down`, "#/workers?q=error"),
      tile("Requests", number(host.requests), `${number(host.inFlight)} under way, ${number(host.waiting)} wait`),
      tile("Failed", number(host.errors), "answered with 5xx"),
      tile("Restarts", number(host.restarts), "after a crash"));
    return page("Overview", {},
      card(problems.length ? "What is wrong now" : "Nothing is wrong", {flush: true, id: "wrong", actions: problems.length > 0 && h("span", {class: "count"}, number(problems.length))},
        problems.length
          ? h("ul", {class: "problems", "aria-label": "Problems"}, problems.map(one))
          : h("div", {class: "fine"}, tick(), host.seen ? "Every plugin is loaded, no worker is in trouble, and all credentials are good." : "Looking…")),
      totals,
      notices.length > 0 && card("Good to know", {flush: true, id: "notices"}, h("ul", {class: "problems"}, notices.map(one))),
      card("This host", {id: "this-host"}, facts([
        ["Version", host.version], ["Mode", host.mode], ["Isolation", host.org ? host.isolation : h("a", {href: "#/doctor"}, host.isolation)], ["Up for", span(Date.now() / 1000 - host.started)],
        ["Store", host.store ? "yes" : "none: every org is known, and nothing is kept"],
        ["You are", host.open ? "on this machine; there is no token yet, so nobody needs one" : host.actor],
      ])));
  };
  return {title: "Overview", view};
}

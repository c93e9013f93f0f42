// What isolation this machine gives, tried for real.

import {h} from "./dom.js";
import {get} from "./api.js";
import {ago, badge, button, card, facts, failed, page} from "./parts.js";
import {redraw, resource} from "./state.js";

export function doctor() {
  let age = 3600;
  const report = resource(() => get(`/doctor?maxAge=${age}`));

  async function examine() {
    age = 10;
    await report.load();
    age = 3600;
  }

  const layer = (one) => h("li", {key: one.layer},
    h("div", {}, h("div", {class: "row"}, h("b", {}, one.layer), badge(one.inForce ? "in force" : "missing", one.inForce ? "good" : "warn")), h("div", {class: "muted small"}, one.about),
      one.problem && h("div", {class: "small"}, one.problem), one.remedy && h("div", {class: "small"}, h("b", {}, "What to do: "), one.remedy)));
  const canary = (one) => h("li", {key: one.attempt}, h("span", {}, one.attempt), one.refused ? badge(`refused (${one.refused})`, "good") : badge("succeeded", "bad"));

  const view = () => {
    const it = report.value;
    return page("Doctor", {
      about: it ? [badge(it.ok ? "ok" : "not ok", it.ok ? "good" : "bad"), h("span", {}, "examined ", ago(it.examinedAt))] : "What isolation this machine gives, tried for real.",
      actions: [button("Examine again", examine, {redraw})],
    },
      report.error ? failed(report.error)
        : !it ? h("div", {class: "empty", "aria-busy": "true"}, h("p", {}, "A worker tries what it must not be able to do. This takes some seconds."))
          : [card("The machine", {id: "machine"}, facts([
            ["Isolation", h("span", {}, h("b", {}, it.level), h("span", {class: "muted"}, `, ${it.required} is required`))], ["Kernel", `${it.kernel}, ${it.machine}`], ["Python", it.python],
            ["Runs as", it.user], ["Landlock", `ABI ${it.landlockAbi}`], it.error && ["Error", h("span", {class: "wrong"}, it.error)],
          ])),
          h("div", {class: "columns"},
            card("Layers", {id: "layers", flush: true}, h("ul", {class: "list"}, it.layers.map(layer))),
            it.canaries.length > 0 && card("What a worker could do when it tried", {id: "canaries", flush: true}, h("ul", {class: "list"}, it.canaries.map(canary))))]);
  };
  return {title: "Doctor", view};
}

// One plugin of one organisation: install it, its settings, the account that it is connected to, its pages.

import {h, safeUrl} from "./dom.js";
import {all, call, get, path} from "./api.js";
import {ago, announce, badge, button, card, confirm, empty, facts, failed, field, focusFirstWrong, input, loading, page, tag, toast} from "./parts.js";
import {MASK, configField, parsed, shown} from "./forms.js";
import {calmly, host, redraw, resource} from "./state.js";

const enc = encodeURIComponent;

export function settings(org, name) {
  const url = path("orgs", org, "plugins", name);
  const typed = {}; // field -> what was changed here and not saved yet: text, or null to remove what is stored
  let wrong = {};
  let keys = {}; // auth method -> what was typed
  let window_ = null;
  let connecting = "";
  let result = null;

  const it = resource(async () => {
    const [plugin, installed] = await Promise.all([get(path("plugins", name)), all(path("orgs", org, "plugins"))]);
    return {plugin, installed: installed.find((one) => one.plugin === name) || null};
  });
  const again = calmly(it.load);

  const schema = () => it.value.plugin.metadata?.configSchema || {};
  const methods = () => it.value.plugin.metadata?.authMethods || [];
  const config = () => it.value.installed?.config || {};
  const byAccount = () => new Set(methods().filter((one) => one.type === "apiKey").map((one) => one.configField));

  // ---- settings

  function state(key, one) {
    const stored = config()[key];
    const secret = one.sensitive && stored === MASK;
    if (key in typed) return {text: typed[key] ?? "", stored: secret, remove: typed[key] === null};
    return {text: one.sensitive ? "" : shown(one.type, stored), stored: secret, remove: false};
  }

  function changes() {
    const given = {};
    const problems = {};
    for (const [key, text] of Object.entries(typed)) {
      const one = schema()[key] || {type: "json"};
      try {
        given[key] = text === null ? null : parsed(one.type, text) ?? null;
        if (one.sensitive && text === "") delete given[key];
      } catch (error) {
        problems[`config.${key}`] = error.message;
      }
    }
    return {given, problems};
  }

  async function change(body) {
    const {installed} = it.value;
    wrong = {};
    try {
      const answer = installed
        ? await call("PATCH", url, body, {"If-Match": `"${installed.revision}"`})
        : await call("PUT", url, body, {"If-None-Match": "*"});
      it.value = {...it.value, installed: answer};
      for (const key of Object.keys(typed)) delete typed[key];
      return answer;
    } catch (error) {
      if (error.status === 412) {
        await it.load();
        throw new Error("Somebody else changed it meanwhile. What they did is loaded, and what you typed is still there: look, and save again");
      }
      if (!Object.keys(error.fields || {}).length) throw error;
      wrong = error.fields;
      announce(`${Object.keys(wrong).length} fields are wrong`);
      focusFirstWrong();
      return null;
    }
  }

  async function save() {
    const {given, problems} = changes();
    if (Object.keys(problems).length) {
      wrong = problems;
      focusFirstWrong();
      return;
    }
    const fresh = !it.value.installed;
    if (fresh) for (const key in given) if (given[key] === null) delete given[key];
    const answer = await change({config: given});
    if (!answer) return;
    const failures = Object.entries(answer.hooks || {});
    if (failures.length) toast(`Saved, but ${failures.map(([hook, why]) => `${hook} failed: ${why}`).join("; ")}`, "bad");
    else toast(fresh ? `${name} is installed for ${org}` : "Saved");
  }

  function form() {
    const {plugin, installed} = it.value;
    const hidden = byAccount();
    const fields = Object.entries(schema()).filter(([key]) => !hidden.has(key) || config()[key] !== undefined);
    const known = new Set(fields.map(([key]) => `config.${key}`));
    const other = Object.entries(wrong).filter(([key]) => !known.has(key) && !key.startsWith("auth."));
    return h("form", {class: "form", novalidate: true, onsubmit: (event) => {
      event.preventDefault();
      event.submitter?.blur?.();
      document.getElementById("save")?.click();
    }},
      fields.length === 0 && h("p", {class: "muted"}, "This plugin has no settings."),
      fields.map(([key, one]) => h("div", {key, class: "stack-tight"},
        configField(key, one, {
          state: state(key, one), wrong: wrong[`config.${key}`], fromEnv: plugin.fromEnv.includes(key),
          required: one.required && one.default === undefined && !plugin.fromEnv.includes(key),
        }, (text) => ((typed[key] = text), delete wrong[`config.${key}`])),
        one.sensitive && config()[key] === MASK && typed[key] !== null && h("button", {type: "button", class: "quiet", onclick: () => ((typed[key] = null), redraw())}, `Remove the stored ${one.label || key}`))),
      other.length > 0 && h("ul", {class: "wrong", role: "alert"}, other.map(([key, text]) => h("li", {}, `${key}: ${text}`))),
      h("div", {class: "row"}, button(installed ? "Save" : "Install", save, {key: "save", id: "save", kind: "main", redraw})));
  }

  // ---- accounts

  async function useKey(method) {
    const answer = await change({auth: {methodId: method.id, credentials: {[method.configField]: keys[method.id] || ""}}});
    if (!answer) return;
    keys = {};
    said(answer.authValidity !== "invalid");
  }

  function said(valid) {
    result = valid;
    announce(valid ? "The plugin accepts the credentials" : "The plugin does not accept the credentials");
  }

  async function check() {
    said((await call("POST", `${url}/validate`, {})).valid);
  }

  async function disconnect() {
    if (!(await confirm("Remove the credentials?", `${name} of ${org} is not connected any more.`, "Remove", "danger"))) return;
    await change({auth: null});
    result = null;
  }

  // The provider's pages are in a window of their own, so that nothing typed here is lost. When the host has the
  // tokens it says so by an event; when the window is closed before that, nothing was connected.
  function connect(method) {
    window_?.close();
    const opened = window.open("", "_blank", "popup,width=560,height=720");
    if (!opened) return toast("The browser did not open a window: allow it for this page", "bad");
    opened.opener = null;
    window_ = opened;
    connecting = method.id;
    result = null;
    const before = it.value.installed.revision;
    redraw();
    call("POST", `${url}/oauth/start?method=${enc(method.id)}`).then((answer) => {
      const to = safeUrl(answer.authorizationUrl);
      if (!to) throw new Error("The plugin's authorization URL is not one of the web");
      opened.location.replace(to);
      watch(opened, before);
    }).catch((error) => {
      opened.close();
      connecting = "";
      toast(error.message, "bad");
      redraw();
    });
  }

  async function watch(opened, before) {
    while (connecting && window_ === opened) {
      await new Promise((done) => setTimeout(done, 600));
      const after = it.value?.installed;
      if (after && after.revision !== before && after.auth) {
        connecting = "";
        opened.close();
        said(after.authValidity !== "invalid");
      } else if (opened.closed) {
        await it.load();
        if (it.value?.installed?.revision === before) {
          connecting = "";
          toast("The window was closed before the account was connected", "bad");
        }
      }
      redraw();
    }
  }

  function account(method) {
    const {installed} = it.value;
    const used = installed.auth?.methodId === method.id;
    const problem = wrong["auth.credentials"] || wrong[`auth.credentials.${method.configField}`] || wrong["auth.methodId"];
    return h("div", {class: "form", key: method.id},
      h("div", {class: "row"}, h("h3", {}, method.label), tag(method.type === "oauth2" ? "OAuth 2" : "API key"), used && badge(installed.authValidity === "unknown" ? "connected" : installed.authValidity, installed.authValidity === "invalid" ? "bad" : "good")),
      method.type === "oauth2"
        ? h("div", {class: "row"},
          h("button", {type: "button", class: "main", "aria-busy": connecting === method.id ? "true" : null, onclick: () => connect(method)}, used ? "Connect again" : "Connect"),
          h("span", {class: "muted small"}, method.scopes.length ? `Asks for ${method.scopes.join(", ")}` : "", connecting === method.id && " · Go on in the window that was opened"))
        : h("form", {class: "form", onsubmit: (event) => {
          event.preventDefault();
          document.getElementById(`use-${method.id}`)?.click();
        }},
          field(`key-${method.id}`, method.label, {wrong: problem, hint: used ? "One is stored. It is never shown; what is typed here replaces it." : null},
            input(keys[method.id] || "", (value) => (keys[method.id] = value), {type: "password", autocomplete: "new-password", placeholder: used ? "•••••••• stored" : schema()[method.configField]?.placeholder || ""})),
          h("div", {class: "row"}, button("Check and save", () => useKey(method), {key: `use-${method.id}`, id: `use-${method.id}`, redraw}))));
  }

  function accounts() {
    const {installed} = it.value;
    if (!installed) return h("p", {class: "muted"}, "Install it first; the account comes next.");
    return [methods().map(account),
      result !== null && h("p", {class: result ? "row" : "wrong", role: "status"}, result ? badge("The plugin accepts the credentials", "good") : "The plugin does not accept the credentials."),
      installed.auth && h("div", {class: "row"}, button("Check now", check, {redraw}), button("Remove the credentials", disconnect, {redraw, kind: "quiet"}))];
  }

  // ----

  async function change_(action) {
    const after = await call("POST", `${url}/${action}`, {});
    it.value = {...it.value, installed: after};
    toast(`${name} is ${after.enabled ? "enabled" : "disabled"} for ${org}`);
  }

  async function uninstall() {
    if (!(await confirm(`Uninstall ${name}?`, `Its settings and credentials of ${org} are removed for good, and its worker stops.`, "Uninstall", "danger"))) return;
    await call("DELETE", url);
    toast(`${name} was uninstalled`);
    location.hash = `#/orgs/${enc(org)}`;
  }

  const view = () => {
    const crumbs = [...(host.org ? [] : [["Organisations", "#/orgs"]]), [org, `#/orgs/${enc(org)}`]];
    if (it.error) return page(name, {crumbs}, failed(it.error));
    if (!it.value) return page(name, {crumbs}, loading());
    const {plugin, installed} = it.value;
    const meta = plugin.metadata;
    const pages = [...(meta?.pages || []).map((one) => [one.title, one.slot || "standalone", one.component]), ...(meta?.uiExtensions || []).map((one) => ["Extension", one.slot, one.component])];
    return page(plugin.displayName, {
      crumbs,
      about: installed ? [badge(installed.enabled ? installed.state : "disabled"), h("span", {}, "changed ", ago(installed.updated))] : [badge("not installed", "")],
      actions: installed && [
        h("a", {class: "button", href: `#/workers/${enc(name)}/${enc(org)}`}, "Worker"),
        button(installed.enabled ? "Disable" : "Enable", () => change_(installed.enabled ? "disable" : "enable"), {key: "switch", redraw}),
        button("Uninstall", uninstall, {redraw, kind: "danger"}),
      ],
    },
      !meta && h("p", {class: "bar"}, "The plugin does not load, so its settings cannot be shown or changed. ", h("a", {href: `#/plugins/${enc(name)}`}, "See why")),
      installed?.error && card("Its last error", {id: "last-error"}, h("p", {class: "wrong mono"}, installed.error)),
      meta && h("div", {class: "columns"},
        card("Settings", {id: "settings"}, form()),
        h("div", {class: "stack"},
          card("Account", {id: "account"}, methods().length ? accounts() : h("p", {class: "muted"}, "This plugin needs no account.")),
          card("Pages", {id: "pages"}, pages.length
            ? facts(pages.map(([title, slot, component]) => [title, h("span", {}, tag(slot), " ", h("span", {class: "mono small"}, component))]))
            : h("p", {class: "muted"}, "This plugin brings no pages of its own.")))));
  };
  return {
    title: `${name} of ${org}`, view,
    event: (kind, data) => (kind === "lost" || (data.plugin === name && (data.org === org || kind === "plugin"))) && again(),
    close: () => (connecting = ""),
  };
}

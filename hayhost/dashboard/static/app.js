// The frame: who is asking, which page is shown, and what happens on the host as it happens.

import {h, render} from "./dom.js";
import {get, hasToken, listen, onRefused, setToken} from "./api.js";
import {announce, button, field, input, toast} from "./parts.js";
import {host, onRedraw, redraw} from "./state.js";
import {overview} from "./overview.js";
import {plugin, plugins} from "./plugins.js";
import {org, orgs} from "./orgs.js";
import {settings} from "./settings.js";
import {workers} from "./workers.js";
import {worker} from "./worker.js";
import {audit} from "./audit.js";
import {doctor} from "./doctor.js";

const PAGES = [
  [/^\/$/, overview], [/^\/plugins$/, plugins], [/^\/plugins\/([^/]+)$/, plugin], [/^\/orgs$/, orgs], [/^\/orgs\/([^/]+)$/, org],
  [/^\/orgs\/([^/]+)\/([^/]+)$/, settings], [/^\/workers$/, workers], [/^\/workers\/([^/]+)\/([^/]+)$/, worker],
  [/^\/audit$/, audit], [/^\/doctor$/, doctor],
];
const THEMES = ["auto", "light", "dark"];

let page = null;
let stop = null;
let signIn = null;
let theme = localStorage.getItem("hayhost-theme") || "auto";

function links() {
  const own = host.org;
  return [
    ["/", "Overview", host.problems.filter((one) => one.severity !== "notice").length], ["/plugins", "Plugins"],
    host.store && (own ? [`/orgs/${encodeURIComponent(own)}`, "Organisation"] : ["/orgs", "Organisations"]),
    ["/workers", "Workers"], host.store && ["/audit", "Audit log"], !own && ["/doctor", "Doctor"],
  ].filter(Boolean);
}

function view() {
  if (signIn) return signInForm();
  if (!host.version) return h("main", {id: "main", class: "empty"}, h("p", {}, host.failed || "Connecting to the host…"));
  const here = location.hash.slice(1) || "/";
  const away = host.connection === "closed";
  return h("div", {class: "shell"},
    h("header", {class: "side"}, h("div", {class: "side-inner"},
      h("a", {class: "brand", href: "#/"}, h("img", {src: "/dashboard/icon.svg", alt: ""}), "hayhost"),
      h("nav", {"aria-label": "Pages"}, h("ul", {}, links().map(([to, text, count]) =>
        h("li", {}, h("a", {href: "#" + to, "aria-current": (to === "/" ? here === "/" : here.startsWith(to)) ? "page" : null},
          text, count > 0 && h("span", {class: "count"}, count, h("span", {class: "hidden"}, " problems"))))))),
      h("div", {class: "foot"},
        h("span", {class: `live ${away ? "away" : ""}`}, away ? "Disconnected" : "Live"),
        h("span", {class: "wide"}, `${host.version}, ${host.mode}`),
        h("span", {class: "wide"}, host.open ? "No token needed on this machine" : host.org ? `Signed in for ${host.org}` : "Signed in as admin"),
        h("div", {class: "row"},
          h("button", {type: "button", class: "quiet", onclick: nextTheme, title: "Automatic, light or dark"}, `Colours: ${theme}`),
          hasToken() && h("button", {type: "button", class: "quiet", onclick: leave}, "Sign out"))))),
    h("main", {id: "main", tabindex: -1},
      away && h("p", {class: "bar", role: "alert"}, "The host cannot be reached. What is shown is from before; it is connected again as soon as it is back."),
      page && page.view()));
}

function signInForm() {
  const enter = async (event) => {
    event.preventDefault();
    setToken(signIn.token.trim());
    await start();
  };
  return h("main", {id: "main", class: "signin"},
    h("form", {class: "card", onsubmit: enter}, h("div", {class: "card-body"},
      h("h1", {id: "title", tabindex: -1}, "Sign in to hayhost"),
      h("p", {class: "muted"}, "This host is managed with bearer tokens. Make one with “hayhost token create NAME”. It is kept in this tab only."),
      field("token", "Token", {wrong: signIn.wrong}, input(signIn.token, (value) => (signIn.token = value), {type: "password", placeholder: "hay_…", autocomplete: "current-password"})),
      h("div", {class: "row"}, h("button", {class: "main", type: "submit"}, "Sign in")))));
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("hayhost-theme", theme);
  dress();
  redraw();
}

function dress() {
  theme === "auto" ? delete document.documentElement.dataset.theme : (document.documentElement.dataset.theme = theme);
}

function leave() {
  setToken("");
  location.hash = "#/";
  location.reload();
}

// ---- pages

function route() {
  page?.close?.();
  page = null;
  const here = location.hash.slice(1) || "/";
  for (const [pattern, open] of PAGES) {
    const found = pattern.exec(here.split("?")[0]);
    if (!found) continue;
    try {
      page = open(...found.slice(1).map(decodeURIComponent), new URLSearchParams(here.split("?")[1] || ""));
    } catch (error) {
      if (!(error instanceof URIError)) throw error;
    }
    break;
  }
  if (!page) page = {title: "Not found", view: () => h("div", {class: "empty"}, h("h1", {id: "title", tabindex: -1}, "There is no such page"), h("a", {href: "#/"}, "To the overview"))};
  document.title = `${page.title} · hayhost`;
}

function navigated() {
  if (signIn || !host.version) return;
  route();
  draw();
  window.scrollTo(0, 0);
  document.getElementById("title")?.focus({preventScroll: true});
  announce(page.title);
}

// ---- what happens

let asking = false;
let askAgain = false;
export async function refresh() {
  if (asking) return void (askAgain = true);
  asking = true;
  try {
    const [status, problems] = await Promise.all([get("/host"), get("/problems")]);
    const before = host.problems.length;
    Object.assign(host, status, {problems: problems.items, failed: ""});
    if (before !== host.problems.length && host.seen) announce(host.problems.length ? `${host.problems.length} problems` : "No problems any more");
    host.seen = true;
  } catch (error) {
    host.failed = error.message;
  }
  redraw();
  await new Promise((done) => setTimeout(done, 700));
  asking = false;
  if (askAgain) (askAgain = false), refresh();
}

function happened(kind, data) {
  page?.event?.(kind, data);
  refresh();
}

async function start() {
  signIn = signIn && {...signIn, wrong: ""};
  try {
    Object.assign(host, await get("/host"));
    signIn = null;
  } catch (error) {
    if (error.status === 401) signIn = {token: "", wrong: hasToken() ? error.message : ""};
    else {
      host.failed = error.message;
      setTimeout(start, 2000);
    }
    setToken(error.status === 401 ? "" : sessionStorage.getItem("hayhost-token") || "");
    draw();
    return;
  }
  route();
  draw();
  refresh();
  stop?.();
  stop = listen("/events", happened, (state) => {
    const before = host.connection;
    host.connection = state;
    if (state === "closed" && before !== "closed") announce("The host cannot be reached");
    if (state === "open" && before === "closed") announce("Connected again");
    if (state === "open" && before) page?.event?.("lost", {}); // what happened meanwhile, nobody told
    refresh();
  });
}

let drawing = false;
function draw() {
  drawing = false;
  render(document.getElementById("app"), view());
}

onRedraw(() => {
  if (!drawing) (drawing = true), requestAnimationFrame(draw);
});
onRefused(() => {
  if (signIn || !host.version) return;
  stop?.();
  setToken("");
  page?.close?.();
  page = null;
  host.version = "";
  signIn = {token: "", wrong: "The token is not good any more"};
  redraw();
});

dress();
window.addEventListener("hashchange", navigated);
window.addEventListener("resize", redraw);
setInterval(() => document.visibilityState === "visible" && host.version && (refresh(), page?.tick?.()), 5000);
start();

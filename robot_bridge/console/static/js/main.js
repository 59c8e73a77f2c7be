// Boot: login, pages, keys, messages.

import { attribute, button, fill, h, say } from "./dom.js";
import { Driver } from "./drive.js";
import { Episodes } from "./episodes.js";
import { Fleet } from "./fleet.js";
import { KeyPage } from "./keypage.js";
import { Keys } from "./keys.js";
import { Learner } from "./learner.js";
import { api, Link } from "./link.js";
import { Live } from "./live.js";
import { t } from "./strings.js";

const root = document.getElementById("app");
const PAGES = ["live", "episodes", "learner", "fleet", "keys"];
// A hint stays for so long after the doubt fell, so that it can be read and is not said at every chunk.
const HINT_S = 3;

class App {
  constructor() {
    this.link = new Link();
    this.keys = new Keys();
    this.driver = new Driver(this.link, this.keys);
    this.driver.enabled = () => this.mine && this.page === "live";
    this.session = null;
    this.cells = [];
    this.cell = null;
    this.states = new Map();
    this.hinted = new Map();
    this.mine = false;
    this.page = "";
    this.limits = {};
    this.has = {};
    this.link.addEventListener("hello", (event) => this.hello(event.detail));
    this.link.addEventListener("state", (event) => this.onState(event.detail));
    this.link.addEventListener("off", () => this.showLink());
    this.link.addEventListener("pong", () => this.showLink());
    this.link.addEventListener("login", () => this.login());
    this.link.addEventListener("refused", (event) => this.onRefused(event.detail));
    this.link.addEventListener("driven", (event) => event.detail.news === "over" && this.driver.letGo("over"));
    this.driver.addEventListener("stop", () => this.stop());
    window.addEventListener("hashchange", () => this.route());
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
    window.addEventListener("keydown", (event) => this.onKey(event, true), true);
    window.addEventListener("keyup", (event) => this.onKey(event, false), true);
  }

  // Session -------------------------------------------------------------------

  async boot() {
    theme.apply();
    const token = new URLSearchParams(location.hash.slice(1)).get("token");
    if (token) {
      // The token leaves the address at once: it must not stay in the history or in a screenshot.
      history.replaceState(null, "", location.pathname);
      await this.enter(token, localStorage.getItem("vla_post.name") ?? "");
      return;
    }
    try {
      this.session = await api("/api/session");
      this.open();
    } catch {
      this.login();
    }
  }

  async enter(token, name) {
    try {
      this.session = await api("/api/session", { method: "POST", body: { token, name } });
      localStorage.setItem("vla_post.name", name);
      this.open();
    } catch (error) {
      this.login(error.message);
    }
  }

  login(message = "") {
    this.session = null;
    const token = h("input", { type: "password", autocomplete: "off", required: true, name: "token", autofocus: true });
    const name = h("input", { type: "text", maxlength: 40, value: localStorage.getItem("vla_post.name") ?? "", name: "name", autocomplete: "nickname" });
    const form = h("form", {
      class: "login card",
      onsubmit: (event) => {
        event.preventDefault();
        this.enter(token.value.trim(), name.value.trim());
      },
    },
    h("h1", {}, t("login.title")), h("p", { class: "note" }, t("login.hint")),
    h("label", {}, t("login.token"), token), h("label", {}, t("login.name"), name),
    h("p", { class: "error", role: "alert" }, message), h("button", { type: "submit", class: "primary" }, t("login.go")));
    fill(root, h("main", { class: "login-page" }, form));
    token.focus();
  }

  async logout() {
    this.driver.letGo("logout");
    this.link.close();
    await api("/api/session", { method: "DELETE" }).catch(() => ({}));
    this.login();
  }

  // Frame ---------------------------------------------------------------------

  open() {
    this.live = new Live(this);
    this.pages = {
      live: this.live,
      episodes: new Episodes(this),
      learner: new Learner(this),
      fleet: new Fleet(this),
      keys: new KeyPage(this),
    };
    this.nav = h("nav", { "aria-label": t("nav.label") },
      PAGES.map((page) => h("a", { href: `#${page}`, "data-page": page }, t(`nav.${page}`))));
    this.cellChoice = h("select", { "aria-label": t("nav.cell"), "data-do": "cell", onchange: () => this.attend(this.cellChoice.value) });
    this.linkState = h("span", { class: "link", role: "status" });
    this.stopButton = h("button", { type: "button", class: "stop", "data-do": "stop", onclick: () => this.stop() }, t("stop"), h("kbd", {}));
    this.who = h("span", { class: "who-am-i" });
    this.main = h("main", { id: "content", tabindex: "-1" });
    this.messages = h("div", { class: "messages", role: "log", "aria-live": "polite" });
    fill(root,
      h("a", { class: "skip", href: "#content", onclick: (event) => { event.preventDefault(); this.main.focus(); } }, t("skip")),
      h("header", { class: "top" },
        h("span", { class: "brand" }, h("img", { src: "/static/icon.svg", alt: "", width: 24, height: 24 }), h("span", {}, "vla_post")),
        this.cellChoice, this.nav, h("span", { class: "grow" }), this.linkState, this.who, theme.button(() => this.recolour()),
        button(t("logout"), () => this.logout(), { class: "quiet", "data-do": "logout" }), this.stopButton),
      this.main, this.messages);
    this.showKeys();
    this.showLink();
    this.link.connect();
  }

  hello(message) {
    this.session = message.session;
    this.cells = message.cells;
    this.has = message.has;
    const role = t(`role.${this.session.role}`);
    say(this.who, this.session.name === this.session.role ? role : `${this.session.name} (${role})`);
    if (message.title) document.title = `${message.title}: ${t("app")}`;
    fill(this.cellChoice, this.cells.map((cell) => h("option", { value: cell.cell }, cell.cell)));
    this.cellChoice.hidden = this.cells.length < 2;
    this.nav.querySelector("[data-page=fleet]").hidden = this.cells.length < 2;
    const kept = this.cell?.cell ?? localStorage.getItem("vla_post.cell");
    this.cell = null;
    this.choose(this.cells.find((cell) => cell.cell === kept) ?? this.cells[0]);
    this.route();
    this.showLink();
  }

  choose(cell) {
    if (!cell || this.cell?.cell === cell.cell) return;
    this.driver.letGo("cell");
    this.cell = cell;
    this.mine = false;
    localStorage.setItem("vla_post.cell", cell.cell);
    this.cellChoice.value = cell.cell;
    this.keys.setAxes(cell.action.names);
    this.driver.attend(cell);
    this.live.enter(cell);
    this.showKeys();
    if (this.states.has(cell.cell)) this.live.show(this.states.get(cell.cell));
    if (this.page && this.page !== "live") this.live.leave();
  }

  attend(name) {
    this.choose(this.cells.find((cell) => cell.cell === name));
    location.hash = "#live";
  }

  route() {
    if (!this.session || !this.cell) return;
    const [page, ...rest] = location.hash.slice(1).split("/");
    const next = PAGES.includes(page) ? page : "live";
    const argument = rest.join("/");
    const before = this.page;
    this.page = next;
    if (before === "live" && next !== "live") {
      this.driver.letGo("page");
      this.live.leave();
    }
    for (const link of this.nav.querySelectorAll("a")) attribute(link, "aria-current", link.dataset.page === next ? "page" : null);
    const shown = this.pages[next];
    if (this.main.firstChild !== shown.element) fill(this.main, shown.element);
    if (next !== "live") shown.enter(argument);
    else if (before && before !== "live") this.live.watch();
    document.body.dataset.page = next;
  }

  // Charts took their colours from the style sheet when they were drawn.
  recolour() {
    if (this.session) this.pages?.[this.page]?.recolour?.();
  }

  // Commands ------------------------------------------------------------------

  async stop(cell = this.cell?.cell) {
    this.driver.letGo("stop");
    if (!cell) return;
    const reply = await this.link.stop(cell);
    this.tell(reply.ok ? t("stop.sent", { cell }) : t("failed", { message: reply.message || t("link.off") }), reply.ok ? "good" : "bad");
  }

  async command(name, args = {}, cell = this.cell?.cell) {
    const reply = await this.link.command(cell, name, args);
    if (!reply.ok) this.tell(t("refused", { message: reply.message || t("link.off") }), "bad");
    return reply;
  }

  toggleLease() {
    return this.command(this.mine ? "release_lease" : "lease");
  }

  onState(state) {
    const now = performance.now() / 1e3;
    const driving = state.online && state.mode === "POLICY";
    if (!driving) this.hinted.delete(state.cell);
    else if (state.hint?.on) this.hinted.set(state.cell, now);
    state.unsure = now - (this.hinted.get(state.cell) ?? -Infinity) < HINT_S;
    this.states.set(state.cell, state);
    if (state.cell === this.cell?.cell) this.live.show(state);
    this.pages.fleet.changed();
  }

  onRefused(message) {
    if (message.code !== "rate") this.driver.letGo("refused");
    this.tell(t("refused", message), "bad");
  }

  // Keys ----------------------------------------------------------------------

  onKey(event, down) {
    if (!this.session) return;
    const action = this.keys.action(event.code);
    if (action === null) return;
    if (action === "stop") {
      if (down && !event.repeat) {
        event.preventDefault();
        this.stop();
      }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || this.pages?.keys.catching) return;
    const target = event.target;
    const typing = target instanceof Element && target.matches("input:not([type=range]), textarea, select, [contenteditable]");
    const choosing = target instanceof Element && target.matches("button:focus-visible, a:focus-visible, summary:focus-visible")
      && (event.code === "Space" || event.code === "Enter");
    if (this.page !== "live" || document.querySelector("dialog[open]")) return;
    if (down && (typing || choosing)) return;
    this.act(action, event, down);
  }

  act(action, event, down) {
    const sign = action[0] === "+" ? 1 : action[0] === "-" ? -1 : 0;
    if (action === "hold" || sign) {
      if (down) event.preventDefault();
      if (event.repeat) return;
      if (action === "hold") {
        if (down) this.driver.press("key");
        else this.driver.release("key");
      } else {
        this.driver.move(action, down ? { [action.slice(1)]: sign } : null);
      }
      return;
    }
    if (!down || event.repeat) return;
    event.preventDefault();
    if (action === "lease") this.toggleLease();
    else if (action === "slower" || action === "faster") this.driver.setSpeed(this.driver.speed + (action === "faster" ? 0.05 : -0.05));
    else if (action === "resume") this.command("resume");
    else this.live.episodeCommand(action);
  }

  showKeys() {
    say(this.stopButton.lastChild, this.keys.label("stop"));
    attribute(this.stopButton, "title", `${t("stop.title", { key: this.keys.label("stop") })} ${t("stop.note")}`);
    this.live.showKeys();
  }

  // Messages ------------------------------------------------------------------

  showLink() {
    if (!this.linkState) return;
    const on = this.link.open;
    attribute(this.linkState, "data-on", on);
    const round = this.link.round === null ? "" : t("link.round", { ms: this.link.round.toFixed(this.link.round < 10 ? 1 : 0) });
    say(this.linkState, on ? round : t("link.off"));
    attribute(this.linkState, "title", on ? t("link.on") : null);
    attribute(document.body, "data-link", on ? "on" : "off");
    if (!on && this.cell) this.live.show({ ...(this.states.get(this.cell.cell) ?? {}), online: false, lease: null });
  }

  tell(text, kind = "", undo = null) {
    const message = h("div", { class: `message ${kind}`, role: kind === "bad" ? "alert" : null }, h("span", {}, text));
    if (undo) message.append(button(t("undo"), () => { message.remove(); undo(); }, { class: "quiet", "data-do": "undo" }));
    message.append(button("×", () => message.remove(), { class: "quiet", "aria-label": t("dismiss") }));
    this.messages.append(message);
    while (this.messages.children.length > 4) this.messages.firstChild.remove();
    setTimeout(() => message.remove(), undo ? 15000 : 6000);
  }
}

const theme = {
  all: ["auto", "light", "dark"],
  get now() {
    const kept = localStorage.getItem("vla_post.theme");
    return this.all.includes(kept) ? kept : "auto";
  },
  apply() {
    document.documentElement.dataset.theme = this.now;
  },
  button(changed) {
    const element = button("", () => {
      localStorage.setItem("vla_post.theme", this.all[(this.all.indexOf(this.now) + 1) % 3]);
      this.apply();
      show();
      changed();
    }, { class: "quiet theme", "data-do": "theme" });
    const show = () => {
      say(element, { auto: "◐", light: "☀", dark: "☾" }[this.now]);
      element.title = t(`theme.${this.now}`);
      element.setAttribute("aria-label", t(`theme.${this.now}`));
    };
    show();
    return element;
  },
};

const app = new App();
// For tests and benchmarks: what was drawn and when, never a way around a check.
window.vlaConsole = app;
app.boot();

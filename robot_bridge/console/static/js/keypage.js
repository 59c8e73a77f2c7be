// The keyboard map, and how to change it.

import { button, fill, h } from "./dom.js";
import { GROUPS, keyName } from "./keys.js";
import { t } from "./strings.js";

export class KeyPage {
  constructor(app) {
    this.app = app;
    this.catching = null;
    this.body = h("div", { class: "key-groups" });
    this.gamepad = h("section", { class: "card" }, h("h2", {}, t("keys.gamepad")), h("p", {}, t("keys.gamepad.hint")));
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("h1", {}, t("keys.title")),
        button(t("keys.reset"), () => { app.keys.reset(); this.enter(); app.showKeys(); }, { "data-do": "keys-reset" })),
      h("p", { class: "note" }, t("keys.hint")), this.body);
    window.addEventListener("keydown", (event) => this.catch(event), true);
  }

  enter() {
    const { keys } = this.app;
    this.catching = null;
    const group = (name, rows) => h("section", { class: "card" }, h("h2", {}, t(`keys.group.${name}`)), h("ul", { class: "keys" }, rows));
    const known = keys.all();
    const sign = (text) => h("span", { class: "note", "aria-hidden": "true" }, text);
    const jog = keys.axes.filter((name) => `+${name}` in known).map((name) => h("li", {}, h("span", {}, name),
      h("span", { class: "key-pair" }, sign("−"), this.cap(`-${name}`), sign("+"), this.cap(`+${name}`))));
    fill(this.body, Object.entries(GROUPS).map(([name, names]) => group(name, names.map((action) => h("li", {}, h("span", {}, keys.title(action)), this.cap(action))))),
      group("jog", jog), this.gamepad);
  }

  cap(name) {
    const { keys } = this.app;
    return button(keys.label(name), () => {
      this.enter();
      const again = this.body.querySelector(`[data-key="${CSS.escape(name)}"]`);
      again.textContent = t("keys.press");
      again.classList.add("catching");
      again.focus();
      this.catching = name;
    }, { class: "keycap", "data-key": name, "aria-label": `${keys.title(name)}: ${keys.label(name)}` });
  }

  catch(event) {
    if (this.catching === null || ["Shift", "Control", "Alt", "Meta", "Tab"].includes(event.key)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const name = this.catching;
    if (name !== "stop" && this.app.keys.action(event.code) === "stop") {
      this.enter(); // it stops, here as everywhere, and stays the stop key
      return;
    }
    const other = this.app.keys.set(name, event.code);
    if (other) this.app.tell(t("keys.taken", { key: keyName(event.code), what: this.app.keys.title(other) }));
    this.enter();
    this.app.showKeys();
    this.body.querySelector(`[data-key="${CSS.escape(name)}"]`)?.focus();
  }
}

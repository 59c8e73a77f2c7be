// The keyboard map, and how to change it.

import { button, fill, h } from "./dom.js";
import { GROUPS, keyName } from "./keys.js";
import { t } from "./strings.js";

export class KeyPage {
  constructor(app) {
    this.app = app;
    this.catching = null;
    this.body = h("div", { class: "key-groups" });
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("h1", {}, t("keys.title")),
        button(t("keys.reset"), () => { app.keys.reset(); this.enter(); app.showKeys(); }, { "data-do": "keys-reset" })),
      h("p", { class: "note" }, t("keys.hint")), this.body,
      h("section", { class: "card" }, h("h2", {}, t("keys.gamepad")), h("p", {}, t("keys.gamepad.hint"))));
    window.addEventListener("keydown", (event) => this.catch(event), true);
  }

  enter() {
    const { keys } = this.app;
    this.catching = null;
    const jog = keys.axes.flatMap((name) => [`+${name}`, `-${name}`]).filter((name) => name in keys.all());
    const groups = { ...GROUPS, jog };
    fill(this.body, Object.entries(groups).map(([group, names]) =>
      h("section", { class: "card" }, h("h2", {}, t(`keys.group.${group}`)),
        h("ul", { class: "keys" }, names.map((name) => this.row(name))))));
  }

  row(name) {
    const { keys } = this.app;
    const element = button(keys.label(name), () => {
      this.enter();
      const again = this.body.querySelector(`[data-key="${CSS.escape(name)}"]`);
      again.textContent = t("keys.press");
      again.classList.add("catching");
      again.focus();
      this.catching = name;
    }, { class: "keycap", "data-key": name, "aria-label": `${keys.title(name)}: ${keys.label(name)}` });
    return h("li", {}, h("span", {}, keys.title(name)), element);
  }

  catch(event) {
    if (this.catching === null || ["Shift", "Control", "Alt", "Meta", "Tab"].includes(event.key)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const name = this.catching;
    const other = this.app.keys.set(name, event.code);
    if (other) this.app.tell(t("keys.taken", { key: keyName(event.code), what: this.app.keys.title(other) }));
    this.enter();
    this.app.showKeys();
    this.body.querySelector(`[data-key="${CSS.escape(name)}"]`)?.focus();
  }
}

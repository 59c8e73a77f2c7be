// Which key does what; kept in the browser.

import { t } from "./strings.js";

const STORE = "vla_post.keys";

const DEFAULTS = {
  stop: "Escape",
  hold: "Space",
  resume: "KeyP",
  lease: "KeyL",
  slower: "Minus",
  faster: "Equal",
  start: "Digit4",
  success: "Digit1",
  failure: "Digit2",
  cancel: "Digit3",
  reset_done: "Digit5",
};

export const GROUPS = {
  safety: ["stop"],
  drive: ["hold", "resume", "lease", "slower", "faster"],
  episode: ["start", "success", "failure", "cancel", "reset_done"],
};

const ROWS = ["KeyQ KeyA", "KeyW KeyS", "KeyE KeyD", "KeyR KeyF", "KeyT KeyG", "KeyY KeyH", "KeyU KeyJ", "KeyI KeyK"];
const CARTESIAN = { _dx: "ArrowUp ArrowDown", _dy: "ArrowLeft ArrowRight", _dz: "PageUp PageDown" };

// Plus and minus key of an axis: arrows where it is a direction in space, else two rows of keys.
function axisDefault(name, index) {
  for (const [ending, keys] of Object.entries(CARTESIAN)) if (name.endsWith(ending)) return keys.split(" ");
  if (name === "gripper") return ["BracketRight", "BracketLeft"];
  return (ROWS[index] ?? "").split(" ");
}

export class Keys {
  constructor() {
    this.changed = {};
    try {
      const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
      if (kept && typeof kept === "object") this.changed = kept;
    } catch {
      // an unreadable map is no map
    }
    this.axes = [];
  }

  setAxes(names) {
    this.axes = names;
  }

  defaults() {
    const all = { ...DEFAULTS };
    this.axes.forEach((name, index) => {
      const [plus, minus] = axisDefault(name, index);
      if (plus) all[`+${name}`] = plus;
      if (minus) all[`-${name}`] = minus;
    });
    return all;
  }

  all() {
    const all = this.defaults();
    for (const name of Object.keys(all)) if (typeof this.changed[name] === "string") all[name] = this.changed[name];
    return all;
  }

  action(code) {
    for (const [name, key] of Object.entries(this.all())) if (key === code) return name;
    return null;
  }

  // Gives `code` to `name`; whoever had it gets the old key, so every action keeps one.
  set(name, code) {
    const all = this.all();
    const other = this.action(code);
    if (other !== null && other !== name) this.changed[other] = all[name];
    this.changed[name] = code;
    this.keep();
    return other === name ? null : other;
  }

  reset() {
    this.changed = {};
    this.keep();
  }

  keep() {
    localStorage.setItem(STORE, JSON.stringify(this.changed));
  }

  label(name) {
    return keyName(this.all()[name] ?? "");
  }

  title(name) {
    if (name.startsWith("+")) return t("jog.plus", { name: name.slice(1) });
    if (name.startsWith("-")) return t("jog.minus", { name: name.slice(1) });
    return t(`keys.${name}`);
  }
}

const NAMES = {
  ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Minus: "−", Equal: "+",
  BracketLeft: "[", BracketRight: "]", Escape: "Esc", Space: "Space", PageUp: "PgUp", PageDown: "PgDn",
};

export function keyName(code) {
  return NAMES[code] ?? code.replace(/^(Key|Digit)/, "");
}

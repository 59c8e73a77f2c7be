// Hold-to-run: everything that can hold the deadman or move an axis ends up here.
//
// A hold ends when the last source lets go, when the window loses focus or is hidden, when the
// connection is lost, or when this page noticed that it was frozen. A new hold needs a fresh press.

const PERIOD_MS = 40;

export class Driver extends EventTarget {
  constructor(link, keys) {
    super();
    this.link = link;
    this.keys = keys;
    this.cell = null;
    this.axes = [];
    this.sources = new Map(); // what holds the deadman -> {axis: value} that it also moves
    this.moves = new Map(); // keys that move an axis while something else holds
    this.spoiled = new Set(); // sources that must let go before they count again
    this.hold = 0;
    this.number = 0;
    this.speed = 0.25;
    this.last = 0;
    this.silenceMs = 200;
    this.pair = 0;
    this.padHeld = false;
    this.gamepad = null;
    this.enabled = () => false;
    setInterval(() => this.tick(), PERIOD_MS);
    window.addEventListener("blur", () => this.letGo("blur"));
    document.addEventListener("visibilitychange", () => document.hidden && this.letGo("hidden"));
    window.addEventListener("pagehide", () => this.letGo("pagehide"));
    link.addEventListener("off", () => this.letGo("connection"));
  }

  attend({ cell, action, silence_ms: silence }) {
    if (this.cell !== cell) this.letGo("cell");
    this.cell = cell;
    this.axes = action.names;
    this.silenceMs = silence;
  }

  get held() {
    return this.hold !== 0;
  }

  press(source, axes = {}) {
    if (this.spoiled.has(source)) return;
    this.sources.set(source, axes);
    if (!this.hold) this.begin();
    else this.say();
  }

  // A key that moves an axis, but does not hold the deadman.
  move(source, axes) {
    if (axes === null) this.moves.delete(source);
    else this.moves.set(source, axes);
    if (this.hold) this.say();
  }

  release(source) {
    this.spoiled.delete(source);
    if (!this.sources.delete(source)) return;
    if (this.sources.size === 0) this.end();
    else this.say();
  }

  letGo(why) {
    for (const source of this.sources.keys()) this.spoiled.add(source);
    this.sources.clear();
    this.moves.clear();
    if (this.hold) this.end(why);
  }

  begin() {
    if (!this.cell || !this.link.open || !document.hasFocus() || !this.enabled()) {
      this.letGo("not allowed");
      return;
    }
    // On the server's clock, so that it also rises over reloads of the page.
    this.hold = this.number = Math.max(this.number + 1, Math.round(this.link.now() * 10));
    this.last = performance.now();
    this.say();
    this.dispatchEvent(new CustomEvent("begin"));
  }

  end(why = "") {
    this.hold = 0;
    this.say();
    this.dispatchEvent(new CustomEvent("end", { detail: why }));
  }

  say() {
    this.last = performance.now();
    return this.link.drive(this.cell, this.hold, this.hold ? this.sum() : {}, this.speed);
  }

  sum() {
    const total = {};
    for (const axes of [...this.sources.values(), ...this.moves.values()]) {
      for (const [name, value] of Object.entries(axes)) {
        if (this.axes.includes(name)) total[name] = Math.max(-1, Math.min(1, (total[name] ?? 0) + value));
      }
    }
    return total;
  }

  tick() {
    this.readGamepad();
    if (!this.hold) return;
    if (performance.now() - this.last > this.silenceMs) this.letGo("frozen");
    else this.say();
  }

  setSpeed(speed) {
    this.speed = Math.min(1, Math.max(0.05, Math.round(speed * 20) / 20));
    this.dispatchEvent(new CustomEvent("speed"));
  }

  // Which axes the two sticks move.
  pairAxes() {
    return this.axes.slice(this.pair * 4, this.pair * 4 + 4);
  }

  readGamepad() {
    const pad = [...(navigator.getGamepads?.() ?? [])].find((p) => p && p.connected) ?? null;
    if ((pad?.id ?? null) !== (this.gamepad ?? null)) {
      this.gamepad = pad?.id ?? null;
      if (!pad) this.release("gamepad");
      this.dispatchEvent(new CustomEvent("gamepad"));
    }
    if (!pad) return;
    const down = (index) => pad.buttons[index]?.pressed === true;
    if (down(1) && !this.stopDown) this.dispatchEvent(new CustomEvent("stop"));
    this.stopDown = down(1);
    const turn = down(15) ? 1 : down(14) ? -1 : 0;
    if (turn && !this.turned) {
      const pairs = Math.max(1, Math.ceil(this.axes.length / 4));
      this.pair = (this.pair + turn + pairs) % pairs;
      this.dispatchEvent(new CustomEvent("gamepad"));
    }
    this.turned = turn !== 0;
    if (down(5)) {
      const values = [0, 1, 2, 3].map((i) => shaped(pad.axes[i] ?? 0) * (i % 2 ? -1 : 1));
      const axes = {};
      this.pairAxes().forEach((name, i) => {
        if (values[i]) axes[name] = values[i];
      });
      this.press("gamepad", axes);
    } else {
      this.release("gamepad");
    }
  }
}

// A dead zone, then a square law: slow where a thumb trembles.
function shaped(value) {
  const size = Math.max(0, Math.abs(value) - 0.12) / 0.88;
  return Math.sign(value) * Math.min(1, size * size);
}

// The page on which a cell is watched and driven.

import { Cameras } from "./cameras.js";
import { chart, colour, runs, short } from "./charts.js";
import { attribute, button, fill, h, say } from "./dom.js";
import { api } from "./link.js";
import { Plan, SECONDS } from "./plan.js";
import { t } from "./strings.js";
import { clock, span } from "./times.js";

const TIMELINE_S = 120;
const TRACE_S = 120;

export class Live {
  constructor(app) {
    this.app = app;
    this.cameras = new Cameras(app.link);
    this.plan = new Plan();
    this.state = null;
    this.traces = new Map();
    this.runs = [];
    this.clipped = {};
    this.limits = new Map();
    this.paths = {};
    this.build();
    const on = (type, handler) => app.link.addEventListener(type, (event) => {
      if (event.detail?.cell === app.cell?.cell) handler(event.detail);
    });
    on("trace", (message) => this.plan.trace(message));
    on("chunk", (message) => {
      this.plan.setChunk(message);
      this.paths = message.paths;
      this.showPaths();
    });
    on("streams", (message) => this.showStreams(message));
    on("timeline", (message) => (this.runs = message.runs));
    on("event", (message) => this.addEvent(message.event));
    on("events", (message) => {
      fill(this.events);
      for (const event of message.events) this.addEvent(event);
    });
    app.driver.addEventListener("begin", () => this.showHold());
    app.driver.addEventListener("end", () => this.showHold());
    app.driver.addEventListener("speed", () => this.showSpeed());
    app.driver.addEventListener("gamepad", () => this.showGamepad());
    setInterval(() => this.element.isConnected && this.second(), 250);
  }

  // Building ------------------------------------------------------------------

  build() {
    this.mode = h("span", { class: "mode-word" });
    this.says = h("span", { class: "mode-says" });
    this.reason = h("span", { class: "mode-reason" });
    this.since = h("span", { class: "mode-since" });
    this.live = h("div", { class: "visually-hidden", role: "status", "aria-live": "assertive" });
    this.facts = h("dl", { class: "facts" });
    // Said politely: nothing happens by itself. The numbers, which change all the time, are not said.
    this.unsure = h("span", { class: "hint-word", role: "status", "aria-live": "polite" });
    this.unsureWhy = h("span", { class: "hint-why" });
    this.hint = h("div", { class: "hint" }, this.unsure, this.unsureWhy);
    this.banner = h("section", { class: "banner", "aria-label": t("control.title") },
      h("div", { class: "mode" }, h("span", { class: "mode-icon", "aria-hidden": "true" }), this.mode, this.since),
      h("div", { class: "mode-text" }, this.says, this.reason), this.hint, this.facts);
    this.timeline = h("canvas", { class: "timeline", role: "img", "aria-label": t("timeline.title") });
    this.timelineText = h("span", { class: "note" });
    this.traceBox = h("section", { class: "card", hidden: true }, h("h2", {}, t("traces.title")));
    this.traceCanvases = new Map();
    this.thresholdText = h("span", { class: "note", "data-threshold": "" });
    this.streams = h("tbody");
    this.nodes = h("ul", { class: "nodes" });
    this.events = h("ol", { class: "events" });
    this.element = h("div", { class: "live" },
      this.live, this.banner,
      h("div", { class: "live-main" },
        h("section", { class: "card flush" }, h("h2", { class: "visually-hidden" }, t("cameras.title")), this.cameras.element),
        h("section", { class: "card" },
          h("div", { class: "card-head" }, h("h2", {}, t("timeline.title")), this.timelineText, whoLegend()), this.timeline),
        h("section", { class: "card" }, h("h2", {}, t("plan.title", { seconds: SECONDS })), this.plan.element),
        this.traceBox, this.buildHealth()),
      h("aside", { class: "live-side" }, this.buildControl(), this.buildEpisode(), this.buildJogCard()));
  }

  buildControl() {
    const { app } = this;
    this.leaseText = h("p", { class: "lease-text" });
    this.leaseButton = button("", () => app.toggleLease(), { class: "primary", "data-do": "lease" });
    this.clutch = h("p", { class: "clutch", role: "status" });
    this.holdButton = h("button", { type: "button", class: "hold", "data-do": "hold" },
      h("span", { class: "hold-word" }, t("hold.button")), h("kbd", {}));
    holdable(this.holdButton, app.driver, "button", {});
    this.resume = button(t("resume"), () => app.command("resume"), { "data-do": "resume", class: "policy" });
    this.still = button(t("hold.request"), () => app.command("hold"), { "data-do": "still" });
    this.resetStop = button(t("reset.stop"), () => app.command("reset_stop"), { "data-do": "reset_stop", class: "warn", hidden: true });
    this.jog = h("div", { class: "jog" });
    this.speed = h("input", {
      type: "range", min: "5", max: "100", step: "5", "data-do": "speed",
      oninput: () => app.driver.setSpeed(Number(this.speed.value) / 100),
    });
    this.speedText = h("span", { class: "note" });
    this.pad = h("p", { class: "note" });
    this.holdHint = h("p", { class: "note" });
    return h("section", { class: "card control" }, h("h2", {}, t("control.title")),
      this.leaseText, this.leaseButton,
      h("div", { class: "row" }, this.resume, this.still, this.resetStop),
      this.holdButton, this.clutch, this.holdHint);
  }

  buildJogCard() {
    return h("section", { class: "card" }, h("h2", {}, t("jog.title")),
      h("label", { class: "speed" }, this.speedText, this.speed), this.jog, this.pad);
  }

  buildEpisode() {
    const { app } = this;
    this.episodeText = h("p", { class: "episode-text" });
    this.task = h("select", { "data-do": "task", onchange: () => this.showTask() });
    this.instruction = h("input", { type: "text", maxlength: 200, "data-do": "instruction" });
    this.limit = h("span", { class: "note" });
    this.seed = h("input", { type: "number", min: "0", step: "1", value: "0", "data-do": "seed" });
    this.seedBox = h("label", {}, t("episode.seed"), this.seed);
    const key = (name) => h("kbd", { "data-key": name }, app.keys.label(name));
    const act = (name, kind) => h("button", { type: "button", class: kind, "data-do": name, onclick: () => this.episodeCommand(name) },
      t(`episode.${name}`), key(name));
    this.start = act("start", "primary");
    this.success = act("success", "good");
    this.failure = act("failure", "bad");
    this.cancel = act("cancel", "");
    this.resetDone = act("reset_done", "");
    return h("section", { class: "card" }, h("h2", {}, t("episode.title")), this.episodeText,
      h("label", {}, t("episode.task"), this.task), h("label", {}, t("episode.instruction"), " ", this.limit, this.instruction), this.seedBox,
      h("div", { class: "row" }, this.start, this.resetDone),
      h("div", { class: "row" }, this.success, this.failure, this.cancel));
  }

  buildHealth() {
    return h("div", { class: "thirds" },
      h("section", { class: "card" }, h("h2", {}, t("streams.title")),
        h("table", { class: "streams" },
          h("thead", {}, h("tr", {}, ["name", "rate", "age", "lost"].map((name) => h("th", { scope: "col" }, t(`streams.${name}`))))),
          this.streams)),
      h("section", { class: "card" }, h("h2", {}, t("streams.nodes")), this.nodes),
      h("section", { class: "card" }, h("h2", {}, t("events.title")), this.events));
  }

  // A cell is chosen ------------------------------------------------------------

  enter(cell) {
    this.state = null;
    this.traces.clear();
    this.clipped = {};
    fill(this.events);
    fill(this.streams);
    this.runs = [];
    this.paths = {};
    this.cameras.show(cell.cameras);
    this.plan.show(cell.action);
    fill(this.task, Object.keys(cell.tasks).map((name) => h("option", { value: name }, name)));
    this.seedBox.hidden = !cell.simulated;
    this.showTask();
    this.buildJog(cell);
    this.watch();
    this.showSpeed();
    this.showGamepad();
    this.showHold();
  }

  watch() {
    const { cell } = this.app;
    this.app.link.watch(cell.cell, cell.cameras.map((_, index) => index));
  }

  leave() {
    this.app.link.watch(null, []);
  }

  buildJog(cell) {
    const { app } = this;
    const side = (name, sign) => {
      const word = sign > 0 ? "plus" : "minus";
      const element = h("button", { type: "button", class: "jog-button", "aria-label": t(`jog.${word}`, { name }), "data-axis": `${sign > 0 ? "+" : "-"}${name}` },
        h("span", { "aria-hidden": "true" }, sign > 0 ? "+" : "−"), h("kbd", {}, app.keys.label(`${sign > 0 ? "+" : "-"}${name}`)));
      holdable(element, app.driver, `pad${sign}${name}`, { [name]: sign });
      return element;
    };
    fill(this.jog, cell.action.names.map((name) =>
      h("div", { class: "jog-row" }, side(name, -1), h("span", { class: "jog-name" }, name), side(name, 1))));
  }

  showTask() {
    const task = this.app.cell?.tasks[this.task.value];
    this.instruction.value = "";
    this.instruction.placeholder = task?.instruction ?? "";
    say(this.limit, task ? t("episode.limit", { seconds: task.time_limit_s }) : "");
  }

  episodeCommand(name) {
    if (name !== "start") return this.app.command(name);
    const seed = Number.parseInt(this.seed.value, 10);
    return this.app.command("start", { task: this.task.value, instruction: this.instruction.value.trim(), seed: Number.isInteger(seed) && seed >= 0 ? seed : 0 }).then((reply) => {
      if (reply.ok && this.app.cell?.simulated) this.seed.value = String((Number.isInteger(seed) ? seed : 0) + 1);
      return reply;
    });
  }

  // What the cell says ----------------------------------------------------------

  show(state) {
    this.state = state;
    const { app } = this;
    const mode = state.online ? state.mode || "OFF" : "OFF";
    attribute(this.banner, "data-mode", mode);
    say(this.mode, t(`mode.${mode}`));
    const says = t(`says.${mode}`, { operator: state.operator || app.session.name });
    const detail = state.phase ? t(`phase.${state.phase}`) : state.reason || "";
    say(this.says, says);
    say(this.reason, mode === "OFF" ? "" : detail);
    say(this.live, `${t(`mode.${mode}`)}. ${says} ${mode === "OFF" ? "" : detail}`);
    this.showFacts(state);
    this.showHint(state);
    this.showLease(state);
    this.showEpisode(state);
    this.showClutch(state);
    this.showPaths();
    this.resetStop.hidden = mode !== "FAULT";
    for (const [name, value] of Object.entries(state.traces ?? {})) this.addTrace(name, value);
  }

  // Only what is about to run: nobody follows the plan while a person drives.
  showPaths() {
    this.cameras.drawPaths(this.state?.online && this.state.mode === "POLICY" ? this.paths : {});
  }

  showFacts(state) {
    const rows = [];
    const policy = state.policy ?? {};
    rows.push(policy.version === undefined ? t("banner.nopolicy") : policy.version === 0 ? t("banner.fixed") : t("banner.version", policy));
    if (state.mode === "POLICY") rows.push(t("banner.chunk", { ms: state.chunk_age_ms }));
    const { shadow } = state;
    if (shadow?.version) rows.push(t(shadow.chunks ? "banner.shadow" : "banner.shadow.waits", { version: shadow.version, mean: `${(100 * (shadow.mean ?? 0)).toFixed(1)} %` }));
    const episode = state.episode;
    if (!episode) rows.push(t("banner.noepisode"));
    else if (!episode.running) rows.push(`${episode.task}, ${t("banner.waiting")}`);
    else rows.push(`${episode.task}  ${clock(episode.elapsed_s)}${episode.limit_s ? ` / ${clock(episode.limit_s)}` : ""}`);
    const text = rows.join("|");
    if (this.factText !== text) {
      this.factText = text;
      fill(this.facts, rows.map((row) => h("dd", {}, row)));
    }
  }

  showHint(state) {
    const on = Boolean(state.online && state.unsure);
    attribute(this.hint, "data-on", on);
    say(this.unsure, on ? t("hint.unsure") : "");
    const numbers = { doubt: short(state.traces?.doubt), threshold: short(state.hint?.threshold) };
    say(this.unsureWhy, on ? t("hint.why", numbers) : "");
    say(this.thresholdText, state.hint ? t("trace.threshold", numbers) : "");
  }

  showLease(state) {
    const { app } = this;
    const mine = state.lease?.id === app.session.id;
    const viewer = app.session.role !== "operator";
    app.mine = mine;
    let text = t("lease.free");
    if (mine) text = state.lease.asked_by ? t("lease.asked", { name: state.lease.asked_by }) : t("lease.mine");
    else if (viewer) text = t("lease.viewer");
    else if (state.lease) text = t("lease.other", state.lease);
    else if (state.foreign) text = t("lease.foreign");
    say(this.leaseText, text);
    attribute(this.leaseText, "data-asked", mine && state.lease.asked_by !== "");
    say(this.leaseButton, mine ? t("lease.give") : t("lease.take"));
    attribute(this.leaseButton, "class", mine ? "" : "primary");
    this.leaseButton.disabled = viewer || !state.online;
    const inMode = (...modes) => mine && state.online && modes.includes(state.mode);
    this.resume.disabled = !inMode("HOLD");
    this.still.disabled = !inMode("POLICY", "HUMAN");
    this.resetStop.disabled = !mine;
    this.holdButton.disabled = !inMode("HOLD", "POLICY", "HUMAN");
    for (const element of this.jog.querySelectorAll("button")) element.disabled = this.holdButton.disabled;
  }

  showEpisode(state) {
    const episode = state.episode;
    const { mine } = this.app;
    say(this.episodeText, !episode ? t("episode.none") : t(episode.running ? "episode.running" : "episode.reset", episode));
    this.start.disabled = !mine || !state.online || Boolean(episode);
    this.resetDone.disabled = !mine || !episode || episode.running;
    this.success.disabled = this.failure.disabled = !mine || !episode || !episode.running;
    this.cancel.disabled = !mine || !episode;
    this.task.disabled = this.seed.disabled = this.instruction.disabled = Boolean(episode);
  }

  showClutch(state) {
    const now = performance.now();
    for (const [name, count] of Object.entries(state.clipped ?? {})) {
      if (count > (this.clipped[name] ?? count)) this.limits.set(name, now);
      this.clipped[name] = count;
    }
    const atLimit = [...this.limits].filter(([, when]) => now - when < 600).map(([name]) => name);
    const { held } = this.app.driver;
    const driving = this.app.mine && state.mode === "HUMAN" && held;
    const kind = driving ? (atLimit.length ? "limit" : "on") : held ? "engaging" : "off";
    attribute(this.clutch, "data-clutch", kind);
    say(this.clutch, t(`clutch.${kind}`, { names: atLimit.join(", ") }));
    say(this.holdButton.firstChild, driving ? t("hold.active") : held ? t("hold.engaging") : t("hold.button"));
  }

  showHold() {
    attribute(this.holdButton, "aria-pressed", String(this.app.driver.held));
    attribute(this.element, "data-held", this.app.driver.held);
    if (this.state) this.showClutch(this.state);
  }

  showKeys() {
    say(this.holdButton.lastChild, this.app.keys.label("hold"));
    say(this.holdHint, t("hold.hint", { key: this.app.keys.label("hold") }));
    for (const element of this.element.querySelectorAll("kbd[data-key]")) say(element, this.app.keys.label(element.dataset.key));
    if (this.app.cell) this.buildJog(this.app.cell);
  }

  showSpeed() {
    const percent = Math.round(this.app.driver.speed * 100);
    this.speed.value = String(percent);
    say(this.speedText, t("jog.speed", { percent }));
  }

  showGamepad() {
    const { driver } = this.app;
    say(this.pad, driver.gamepad
      ? `${t("jog.gamepad", { name: driver.gamepad.slice(0, 40) })}. ${t("jog.pair", { names: driver.pairAxes().join(", ") })}`
      : t("jog.nogamepad"));
  }

  showStreams(message) {
    const { cell } = this.app;
    const limit = (row) => row.nominal_hz ? Math.max(500, 3000 / row.nominal_hz) : Infinity;
    fill(this.streams, message.streams.map((row) => {
      const late = row.nominal_hz !== null && !cell.lockstep && (row.age_ms === null || row.age_ms > limit(row));
      const rate = row.rate_hz === null ? "–" : short(row.rate_hz);
      const age = row.age_ms === null ? "–" : row.age_ms < 10000 ? `${row.age_ms} ms` : span(row.age_ms / 1e3);
      return h("tr", { "data-late": late, "data-stream": row.key },
        h("th", { scope: "row" }, row.key.replace("observation.images.", "")),
        h("td", {}, row.nominal_hz ? `${rate} / ${short(row.nominal_hz)} Hz` : `${rate} Hz`),
        h("td", {}, age),
        h("td", { "data-losing": row.losing }, row.lost === null ? "–" : String(row.lost)));
    }));
    fill(this.nodes, (this.state?.nodes ?? []).map((node) => h("li", { "data-level": node.level },
      h("b", {}, node.name), " ", t(`node.${node.level}`), node.message ? `: ${node.message}` : "")));
  }

  addEvent(event) {
    const item = h("li", { "data-type": event.type }, h("time", {}, clock(event.stamp_ns / 1e9)), " ", describe(event));
    this.events.prepend(item);
    while (this.events.children.length > 60) this.events.lastChild.remove();
  }

  addTrace(name, value) {
    if (!this.traces.has(name)) {
      this.traces.set(name, []);
      const canvas = h("canvas", { class: "trace", role: "img", "aria-label": t(`trace.${name}`) });
      this.traceCanvases.set(name, canvas);
      this.traceBox.append(h("div", { class: "card-head" }, h("h3", {}, t(`trace.${name}`)), name === "doubt" && this.thresholdText), canvas);
      this.traceBox.hidden = false;
    }
    const points = this.traces.get(name);
    points.push([performance.now() / 1e3, value]);
    while (points.length && points[0][0] < points[points.length - 1][0] - TRACE_S) points.shift();
  }

  recolour() {
    this.plan.dirty = true;
    this.second();
    this.showPaths();
  }

  // Four times a second: what changes with time alone, and drawing.
  second() {
    const { state } = this;
    if (!state) return;
    const now = this.app.link.now();
    say(this.since, state.mode_since_ms ? t("banner.for", { time: span((now - state.mode_since_ms) / 1e3) }) : "");
    if (this.app.mine) this.showClutch(state);
    this.plan.draw();
    this.drawTimeline(now);
    for (const [name, points] of this.traces) {
      const end = points[points.length - 1][0];
      const series = [{ points: points.map(([x, y]) => [x - end, y]), colour: colour("accent") }];
      if (name === "doubt" && state.hint) {
        const { threshold } = state.hint;
        series.push({ points: [[-TRACE_S, threshold], [0, threshold]], colour: colour("warn-ink"), dash: [6, 4] });
      }
      chart(this.traceCanvases.get(name), { series, xRange: [-TRACE_S, 0] });
    }
  }

  drawTimeline(now) {
    const from = now - TIMELINE_S * 1e3;
    const spans = this.runs.map(([start, who], i) => [start, this.runs[i + 1]?.[0] ?? now, who]);
    runs(this.timeline, spans, from, now);
    const total = { policy: 0, human: 0, hold: 0 };
    for (const [start, stop, who] of spans) {
      if (who in total) total[who] += Math.max(0, stop - Math.max(start, from));
    }
    const sum = Object.values(total).reduce((a, b) => a + b, 0) || 1;
    say(this.timelineText, Object.entries(total).map(([who, ms]) => `${t(`timeline.${who}`)} ${Math.round((100 * ms) / sum)} %`).join(", "));
  }
}

// A button that counts only while it is pressed.
export function holdable(element, driver, source, axes) {
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || element.disabled) return;
    event.preventDefault();
    element.setPointerCapture(event.pointerId);
    driver.press(source, axes);
  });
  const release = () => driver.release(source);
  for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(type, release);
  element.addEventListener("contextmenu", (event) => event.preventDefault());
  element.addEventListener("keydown", (event) => {
    if (event.repeat || (event.code !== "Enter" && event.code !== "Space")) return;
    event.preventDefault();
    driver.press(source, axes);
  });
  element.addEventListener("keyup", release);
  element.addEventListener("blur", release);
}

function whoLegend() {
  return h("p", { class: "legend" }, ["policy", "human", "hold"].map((who) => [h("span", { class: `key who ${who}` }), t(`timeline.${who}`)]));
}

function describe(event) {
  if (event.type === "command") {
    return t("event.command", { by: event.by, name: event.name, refused: event.ok ? "" : t("event.refused", event) });
  }
  const words = ["task", "outcome", "reason", "version", "node", "state"].map((name) => event[name]).filter((value) => value !== undefined && value !== "");
  return `${event.type.replaceAll("_", " ")}${words.length ? `: ${words.join(", ")}` : ""}`;
}

export { api };

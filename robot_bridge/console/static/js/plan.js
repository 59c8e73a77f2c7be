// Commands of the last seconds per axis, what was measured, and the chunk about to run.

import { colour, line, prepare, range, short } from "./charts.js";
import { attribute, fill, h } from "./dom.js";
import { t } from "./strings.js";

export const SECONDS = 8;
const AHEAD = 0.28; // share of the width for what is about to run

export class Plan {
  constructor() {
    this.grid = h("div", { class: "plan-grid" });
    this.element = h("div", {}, this.grid, legend());
    this.rows = [];
    this.chunk = null;
    this.plots = [];
    this.action = null;
    this.dirty = false;
  }

  show(action) {
    this.action = action;
    this.rows = [];
    this.chunk = null;
    this.plots = action.names.map((name) => {
      const canvas = h("canvas", { role: "img", "aria-label": name });
      const value = h("span", { class: "value" });
      return { canvas, value, element: h("div", { class: "plot" }, h("div", { class: "plot-head" }, h("span", {}, name), value), canvas) };
    });
    fill(this.grid, this.plots.map((plot) => plot.element));
  }

  trace(message) {
    const last = this.rows[this.rows.length - 1];
    if (last && message.stamp_s < last.stamp_s) this.rows = []; // the scene's clock began again
    this.rows.push(message);
    const from = message.stamp_s - SECONDS;
    while (this.rows.length && this.rows[0].stamp_s < from) this.rows.shift();
    this.dirty = true;
  }

  setChunk(message) {
    this.chunk = message.points.length ? message : null;
    this.dirty = true;
  }

  draw() {
    if (!this.dirty || !this.rows.length || !this.action) return;
    this.dirty = false;
    const now = this.rows[this.rows.length - 1].stamp_s;
    const policy = this.rows[this.rows.length - 1].label.startsWith("policy");
    const colours = { executed: colour("ink"), measured: colour("muted"), chunk: colour("who-policy"), line: colour("line"), human: colour("who-human") };
    this.plots.forEach((plot, axis) => this.drawAxis(plot, axis, now, policy, colours));
  }

  drawAxis(plot, axis, now, policy, colours) {
    const { context, width, height } = prepare(plot.canvas);
    const executed = this.rows.map((row) => [row.stamp_s, row.executed[axis]]);
    const measured = this.rows.filter((row) => row.measured).map((row) => [row.stamp_s, row.measured[axis]]);
    const chunk = this.chunk && policy
      ? this.chunk.points.map((point, i) => [this.chunk.stamp_s + i * this.chunk.dt_s, point[axis]]).filter(([when]) => when >= now)
      : [];
    const span = this.action.high[axis] - this.action.low[axis];
    const ys = range([...executed, ...measured, ...chunk].map((p) => p[1]), span * 0.02);
    const nowX = width * (1 - AHEAD);
    const ahead = this.chunk ? Math.max(this.chunk.points.length * this.chunk.dt_s, 0.05) : 1;
    const x = (when) => (when <= now ? nowX * (1 - (now - when) / SECONDS) : nowX + ((when - now) / ahead) * width * AHEAD);
    const y = (value) => (value === null ? NaN : height - 3 - ((value - ys[0]) / (ys[1] - ys[0])) * (height - 6));
    context.fillStyle = colour("sunken");
    context.fillRect(nowX, 0, width - nowX, height);
    line(context, [[nowX, 0], [nowX, height]], { stroke: colours.line, width: 1 });
    line(context, measured.map(([a, b]) => [x(a), y(b)]), { stroke: colours.measured, width: 3 });
    line(context, executed.map(([a, b]) => [x(a), y(b)]), { stroke: colours.executed, width: 1.3 });
    line(context, chunk.map(([a, b]) => [x(a), y(b)]), { stroke: colours.chunk, width: 2, dash: [4, 3] });
    plot.value.textContent = short(executed[executed.length - 1][1]);
    attribute(plot.canvas, "data-chunk", chunk.length);
  }
}

function legend() {
  return h("p", { class: "legend" },
    h("span", { class: "key executed" }), t("plan.executed"),
    h("span", { class: "key measured" }), t("plan.measured"),
    h("span", { class: "key chunk" }), t("plan.chunk"));
}

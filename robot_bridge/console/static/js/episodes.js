// Recorded episodes: list, film strip, replay, labels.

import { chart, colour, runs } from "./charts.js";
import { attribute, button, fill, h, say } from "./dom.js";
import { api } from "./link.js";
import { t } from "./strings.js";
import { clock, when } from "./times.js";

const PAGE = 25;
const STRIP = 12;
const OUTCOMES = ["success", "failure", "aborted", "interrupted"];

export class Episodes {
  constructor(app) {
    this.app = app;
    this.offset = 0;
    this.shown = null;
    this.total = 0;
    this.task = h("select", { "aria-label": t("list.filter.task"), onchange: () => this.filter() });
    this.outcome = h("select", { "aria-label": t("list.filter.outcome"), onchange: () => this.filter() },
      h("option", { value: "" }, t("list.alloutcomes")), OUTCOMES.map((name) => h("option", { value: name }, t(`outcome.${name}`))));
    this.count = h("span", { class: "note" });
    this.rows = h("tbody");
    this.newer = button(t("list.newer"), () => this.turn(-PAGE));
    this.older = button(t("list.older"), () => this.turn(PAGE));
    this.detail = new Detail(app, () => this.load());
    const heads = ["when", "task", "outcome", "drivers", "takeovers", "version", "length", "operator", "remarks"];
    this.element = h("div", { class: "page episodes" },
      h("div", { class: "page-head" }, h("h1", {}, t("list.title")), this.count, h("span", { class: "grow" }), this.task, this.outcome),
      h("div", { class: "split" },
        h("section", { class: "card table-card" },
          h("table", { class: "list" }, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, t(`list.${name}`))))), this.rows),
          h("div", { class: "row pager" }, this.newer, this.older)),
        this.detail.element));
    app.link.addEventListener("event", (event) => {
      if (this.element.isConnected && event.detail.event.type === "episode_end") setTimeout(() => this.load(), 1500);
    });
  }

  enter(uuid) {
    this.load();
    if (uuid && uuid !== this.shown) this.open(uuid);
  }

  recolour() {
    this.load();
    this.detail.recolour();
  }

  filter() {
    this.offset = 0;
    this.load();
  }

  turn(by) {
    this.offset = Math.max(0, this.offset + by);
    this.load();
  }

  async load() {
    const query = new URLSearchParams({ limit: PAGE, offset: this.offset });
    if (this.task.value) query.set("task", this.task.value);
    if (this.outcome.value) query.set("outcome", this.outcome.value);
    let body;
    try {
      body = await api(`/api/episodes?${query}`);
    } catch (error) {
      this.app.tell(t("failed", { message: error.message }), "bad");
      return;
    }
    this.total = body.total;
    say(this.count, t("list.count", body));
    const chosen = this.task.value;
    const options = ["", ...body.tasks];
    if ([...this.task.options].map((o) => o.value).join() !== options.join()) {
      fill(this.task, options.map((name) => h("option", { value: name }, name || t("list.alltasks"))));
      this.task.value = options.includes(chosen) ? chosen : "";
    }
    fill(this.rows, body.episodes.map((episode) => this.row(episode)));
    if (!body.episodes.length) fill(this.rows, h("tr", {}, h("td", { colspan: 9, class: "empty" }, t("list.none"))));
    for (const [index, canvas] of [...this.rows.querySelectorAll("canvas")].entries()) drawRuns(canvas, body.episodes[index]);
    this.newer.disabled = this.offset === 0;
    this.older.disabled = this.offset + PAGE >= this.total;
  }

  row(episode) {
    const open = button(when(episode.created_s), () => this.open(episode.uuid), { class: "as-link" });
    const remarks = [...episode.problems, episode.notes].filter(Boolean).join(" · ");
    return h("tr", { "data-uuid": episode.uuid, "aria-current": episode.uuid === this.shown ? "true" : null, onclick: () => this.open(episode.uuid) },
      h("td", {}, open), h("td", {}, episode.task), h("td", {}, outcome(episode.outcome)),
      h("td", {}, h("canvas", { class: "mini-runs", role: "img", "aria-label": drivers(episode) })),
      h("td", { class: "number" }, String(episode.interventions)), h("td", { class: "number" }, episode.version ? `v${episode.version}` : "–"),
      h("td", { class: "number" }, `${episode.duration_s.toFixed(1)} s`), h("td", {}, episode.operator || "–"),
      h("td", { class: "remarks", title: remarks }, remarks));
  }

  open(uuid) {
    if (this.shown === uuid) return;
    this.shown = uuid;
    for (const row of this.rows.querySelectorAll("tr")) attribute(row, "aria-current", row.dataset.uuid === uuid ? "true" : null);
    this.detail.open(uuid);
  }
}

class Detail {
  constructor(app, changed) {
    this.app = app;
    this.changed = changed;
    this.element = h("section", { class: "card detail", "aria-live": "off" }, h("p", { class: "empty" }, t("detail.none")));
    this.data = null;
    this.playing = false;
    this.pictures = new Map();
  }

  async open(uuid) {
    this.pause();
    try {
      this.data = await api(`/api/episodes/${encodeURIComponent(uuid)}`);
    } catch (error) {
      this.app.tell(t("failed", { message: error.message }), "bad");
      return;
    }
    this.pictures.clear();
    this.build();
  }

  build() {
    const { data } = this;
    const may = this.app.session.role === "operator";
    this.camera = data.cameras[0] ?? null;
    this.label = h("div", { class: "row", role: "group", "aria-label": t("detail.relabel") }, ["success", "failure", "aborted"].map((name) =>
      button(t(`outcome.${name}`), () => this.relabel({ outcome: name }), {
        "data-do": `label-${name}`, "aria-pressed": String(data.outcome === name), disabled: !may, class: { success: "good", failure: "bad" }[name] ?? "",
      })));
    this.notes = h("textarea", { rows: 2, maxlength: 2000, "data-do": "notes", value: data.notes, disabled: !may });
    this.scrub = h("input", { type: "range", min: 0, max: Math.max(0, data.steps_shown.length - 1), value: 0, "aria-label": t("detail.scrub"), oninput: () => { this.pause(); this.at(Number(this.scrub.value)); } });
    this.clock = h("span", { class: "note" });
    this.playButton = button(t("detail.play"), () => (this.playing ? this.pause() : this.play()), { "data-do": "play" });
    this.big = h("img", { class: "replay", alt: "" });
    this.strip = h("div", { class: "strip" });
    this.cameraChoice = h("select", { "aria-label": t("detail.camera"), onchange: () => { this.camera = this.cameraChoice.value; this.pictures.clear(); this.showStrip(); this.at(Number(this.scrub.value)); } },
      data.cameras.map((name) => h("option", { value: name }, name.replace("observation.images.", ""))));
    this.runs = h("canvas", { class: "timeline", role: "img", "aria-label": drivers(data) });
    this.plots = (data.series[0]?.axes ?? []).map((name) => h("canvas", { class: "trace small", role: "img", "aria-label": name }));
    this.overlays = Object.keys(data.overlays).map((name) => [name, h("canvas", { class: "trace", role: "img", "aria-label": name })]);
    fill(this.element,
      h("div", { class: "card-head" }, h("h2", {}, t("detail.title", { uuid: data.uuid.slice(0, 8) })), outcome(data.outcome)),
      h("p", { class: "note" }, `${data.task}: “${data.instruction}”`),
      data.problems.length ? h("p", { class: "warning" }, t("detail.problems", { problems: data.problems.join("; ") })) : null,
      this.label,
      h("label", {}, t("detail.notes"), this.notes),
      h("div", { class: "row" }, button(t("detail.save"), () => this.relabel({ notes: this.notes.value }), { "data-do": "save-notes", disabled: !may })),
      data.cameras.length
        ? [h("div", { class: "card-head" }, h("h3", {}, t("detail.strip")), data.cameras.length > 1 ? this.cameraChoice : null), this.strip, this.big]
        : h("p", { class: "note" }, t("detail.nocamera")),
      h("div", { class: "row player" }, this.playButton, this.scrub, this.clock),
      this.runs,
      h("h3", {}, t("detail.series")),
      h("div", { class: "plan-grid" }, this.plots.map((canvas, i) => h("div", { class: "plot" }, h("div", { class: "plot-head" }, data.series[0].axes[i]), canvas))),
      this.overlays.length ? [h("h3", {}, t("detail.overlays")), this.overlays.map(([name, canvas]) => [h("div", { class: "plot-head" }, name), canvas])] : null,
      h("p", { class: "note" }, t("detail.late", { n: data.late_ticks, of: data.steps_shown.length, dropped: data.dropped_ticks })));
    this.showStrip();
    drawRuns(this.runs, data);
    this.at(0);
  }

  recolour() {
    if (!this.data) return;
    drawRuns(this.runs, this.data);
    this.at(this.index);
  }

  showStrip() {
    if (!this.camera) return;
    const n = this.data.steps;
    const steps = Array.from({ length: Math.min(STRIP, n) }, (_, i) => Math.round((i * (n - 1)) / Math.max(1, STRIP - 1)));
    fill(this.strip, steps.map((step) => button(h("img", { src: this.url(step), alt: clock(this.timeOf(step)), loading: "lazy" }), () => {
      this.pause();
      this.at(this.nearest(step));
    }, { class: "thumb" })));
  }

  url(step) {
    return `/api/episodes/${encodeURIComponent(this.data.uuid)}/pictures/${encodeURIComponent(this.camera)}/${step}`;
  }

  nearest(step) {
    const { steps_shown: steps } = this.data;
    let best = 0;
    steps.forEach((value, i) => {
      if (Math.abs(value - step) < Math.abs(steps[best] - step)) best = i;
    });
    return best;
  }

  timeOf(step) {
    return this.data.time_s[this.nearest(step)] ?? 0;
  }

  at(index) {
    const { data } = this;
    this.index = index;
    this.scrub.value = String(index);
    const time = data.time_s[index] ?? 0;
    say(this.clock, `${clock(time)} / ${clock(data.duration_s)}`);
    if (this.camera && data.steps) {
      const src = this.url(data.steps_shown[index] ?? 0);
      if (this.big.getAttribute("src") !== src) this.big.src = src;
    }
    this.drawPlots(time);
  }

  drawPlots(time) {
    const { data } = this;
    const colours = { sent: colour("ink"), policy: colour("who-policy"), human: colour("who-human") };
    this.plots.forEach((canvas, axis) => {
      const series = [...data.series].reverse().map((s) => ({
        points: s.values.map((row, i) => [data.time_s[i], row[axis]]), colour: colours[s.name], dash: s.name === "policy" ? [4, 3] : [],
      }));
      chart(canvas, { series, marks: [{ x: time }], xRange: [0, Math.max(data.duration_s, 1e-3)] });
    });
    for (const [name, canvas] of this.overlays) {
      chart(canvas, { series: [{ points: data.overlays[name].map((y, i) => [data.time_s[i], y]), colour: colour("accent") }], marks: [{ x: time }], xRange: [0, data.duration_s] });
    }
  }

  play() {
    this.playing = true;
    say(this.playButton, t("detail.pause"));
    const { data } = this;
    let index = this.index >= data.time_s.length - 1 ? 0 : this.index;
    const start = performance.now() - (data.time_s[index] ?? 0) * 1e3;
    let drawn = 0;
    const step = (now) => {
      if (!this.playing || !this.element.isConnected) return;
      const time = (now - start) / 1e3;
      while (index < data.time_s.length - 1 && data.time_s[index + 1] <= time) index += 1;
      if (now - drawn > 60) {
        drawn = now;
        this.at(index);
      }
      if (index >= data.time_s.length - 1) this.pause();
      else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  pause() {
    this.playing = false;
    if (this.playButton) say(this.playButton, t("detail.play"));
  }

  async relabel(changes, undoing = false) {
    const { uuid } = this.data;
    const reply = await this.app.command("label", { uuid, ...changes });
    if (!reply.ok) return;
    const before = Object.fromEntries(Object.keys(changes).map((name) => [name, reply.before[name]]));
    const text = undoing ? t("label.undone", { outcome: t(`outcome.${reply.after.outcome}`) })
      : "outcome" in changes ? t("label.done", { outcome: t(`outcome.${changes.outcome}`) }) : t("label.notes");
    this.app.tell(text, "good", undoing ? null : () => this.relabel(before, true));
    if (this.data?.uuid === uuid) await this.open(uuid);
    this.changed();
  }
}

function outcome(name) {
  return h("span", { class: "outcome", "data-outcome": name }, t(`outcome.${name}`));
}

function drivers(episode) {
  const total = {};
  for (const [start, stop, who] of episode.runs) total[who] = (total[who] ?? 0) + stop - start;
  return Object.entries(total).map(([who, n]) => `${t(`timeline.${who}`)} ${Math.round((100 * n) / Math.max(1, episode.steps))} %`).join(", ");
}

function drawRuns(canvas, episode) {
  runs(canvas, episode.runs, 0, Math.max(1, episode.steps));
}

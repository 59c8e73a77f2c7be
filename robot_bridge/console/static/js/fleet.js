// All cells on one page; the one that needs a person most comes first.

import { short } from "./charts.js";
import { attribute, button, h, say } from "./dom.js";
import { t } from "./strings.js";
import { clock, span } from "./times.js";

export class Fleet {
  constructor(app) {
    this.app = app;
    this.grid = h("ol", { class: "fleet" });
    this.cards = new Map();
    this.due = false;
    this.unsure = h("p", { class: "visually-hidden", role: "status", "aria-live": "polite" });
    this.element = h("div", { class: "page" }, this.unsure,
      h("div", { class: "page-head" }, h("h1", {}, t("fleet.title")), h("span", { class: "note" }, t("fleet.order"))), this.grid);
    setInterval(() => this.changed(), 1000);
  }

  enter() {
    this.show();
  }

  changed() {
    if (!this.element.isConnected || this.due) return;
    this.due = true;
    setTimeout(() => this.show(), 200);
  }

  show() {
    this.due = false;
    const { app } = this;
    const now = app.link.now();
    const rows = app.cells.map((cell) => {
      const state = app.states.get(cell.cell) ?? { online: false };
      return { cell, state, ...need(state, now) };
    });
    rows.sort((a, b) => b.score - a.score || a.cell.cell.localeCompare(b.cell.cell));
    const unsure = rows.filter((row) => row.unsure).map((row) => row.cell.cell).sort();
    say(this.unsure, unsure.length ? t("fleet.unsure", { cells: unsure.join(", ") }) : "");
    rows.forEach((row, i) => {
      if (!this.cards.has(row.cell.cell)) this.cards.set(row.cell.cell, this.card(row.cell));
      const card = this.cards.get(row.cell.cell);
      // Moving a card that has the focus would lose it.
      if (this.grid.children[i] !== card.element && !this.grid.contains(document.activeElement)) this.grid.insertBefore(card.element, this.grid.children[i] ?? null);
      else if (!card.element.isConnected) this.grid.append(card.element);
      this.update(card, row);
    });
  }

  card(cell) {
    const { app } = this;
    const parts = {
      mode: h("span", { class: "fleet-mode" }), need: h("p", { class: "fleet-need" }), facts: h("p", { class: "note" }), lease: h("p", { class: "note" }),
      attend: button(t("fleet.attend"), async () => {
        app.attend(cell.cell);
        if (app.session.role === "operator") await app.command("lease", {}, cell.cell);
      }, { class: "primary", "data-do": `attend-${cell.cell}` }),
      stop: button(t("stop"), () => app.stop(cell.cell), { class: "stop small", "aria-label": `${t("stop")} ${cell.cell}`, "data-do": `stop-${cell.cell}` }),
    };
    parts.element = h("li", { class: "card fleet-card", "data-cell": cell.cell },
      h("div", { class: "card-head" }, h("h2", {}, cell.cell), parts.mode), parts.need, parts.facts, parts.lease, h("div", { class: "row" }, parts.attend, parts.stop));
    return parts;
  }

  update(card, { state, text, mode, score, unsure }) {
    attribute(card.element, "data-mode", mode);
    attribute(card.element, "data-urgent", score >= 100);
    attribute(card.element, "data-unsure", unsure);
    say(card.mode, t(`mode.${mode}`));
    say(card.need, text);
    const episode = state.episode;
    const facts = [
      state.policy?.version ? t("banner.version", state.policy) : "", episode ? `${episode.task} ${clock(episode.elapsed_s ?? 0)}` : "",
      state.traces?.doubt === undefined ? "" : t(state.hint ? "fleet.doubt.of" : "fleet.doubt", { value: short(state.traces.doubt), threshold: short(state.hint?.threshold) }),
    ];
    say(card.facts, facts.filter(Boolean).join(" · "));
    const mine = state.lease?.id === this.app.session.id;
    say(card.lease, mine ? t("lease.mine") : state.lease ? t("lease.other", state.lease) : state.foreign ? t("lease.foreign") : t("lease.free"));
    card.attend.disabled = !state.online;
    say(card.attend, this.app.session.role === "operator" && !state.foreign ? t("fleet.attend") : t("fleet.watch"));
  }
}

// How much a cell needs a person: stopped, then holding inside an episode (longest first), then a
// policy that doubts more than people let pass (most, in shares of that threshold, first), then an
// idle cell, then those that work, by their doubt.
function need(state, now) {
  const mode = state.online ? state.mode || "OFF" : "OFF";
  const held = Math.max(0, (now - (state.mode_since_ms ?? now)) / 1e3);
  const time = span(held);
  if (mode === "FAULT") return { mode, score: 1000 + held, text: t("fleet.need.FAULT", { time }) };
  if (mode === "HOLD" && state.episode) return { mode, score: 100 + Math.min(800, held), text: `${t("fleet.need.HOLD", { time })}: ${state.reason}` };
  if (mode === "HOLD") return { mode, score: 20, text: t("fleet.need.idle") };
  if (mode === "POLICY") {
    const doubt = state.traces?.doubt ?? 0;
    const threshold = state.hint?.threshold || 1; // before one is known, doubt only orders the cells
    const share = doubt / threshold;
    if (state.unsure) return { mode, unsure: true, score: 30 + 60 * (share / (1 + share)), text: t("fleet.need.unsure") };
    return { mode, score: 10 + 9 * (share / (1 + share)), text: t("fleet.need.POLICY") };
  }
  if (mode === "HUMAN") return { mode, score: 5, text: t("fleet.need.HUMAN", { operator: state.operator || state.lease?.name || "" }) };
  return { mode, score: 0, text: t("fleet.need.OFF") };
}

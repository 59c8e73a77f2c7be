// The learner's curves, what the episodes say about versions, and the versions themselves.

import { chart, colour, prepare } from "./charts.js";
import { append, button, fill, h, say } from "./dom.js";
import { api } from "./link.js";
import { t } from "./strings.js";
import { span, when } from "./times.js";

export class Learner {
  constructor(app) {
    this.app = app;
    this.cards = h("div", { class: "tiles" });
    this.loss = h("canvas", { class: "chart", role: "img", "aria-label": t("learner.loss") });
    this.success = h("canvas", { class: "chart", role: "img", "aria-label": t("learner.success") });
    this.curves = h("div", { class: "curve-grid" });
    this.lossNote = h("span", { class: "note" });
    this.shares = h("tbody");
    this.mixtureNote = h("span", { class: "note" });
    this.mixture = h("section", { class: "card", hidden: true }, h("div", { class: "card-head" }, h("h2", {}, t("mixture.title")), this.mixtureNote,
      h("p", { class: "legend" }, ["online", "offline"].map((kind) => [h("span", { class: `key mix ${kind}` }), t(`mixture.${kind}`)]))),
      h("table", { class: "mixture" }, h("thead", { class: "visually-hidden" }, h("tr", {}, ["task", "share", "online", "offline"].map((name) => h("th", { scope: "col" }, t(`mixture.${name}`))))), this.shares));
    this.more = h("details", { class: "card" }, h("summary", {}, t("learner.curves")), this.curves);
    this.more.addEventListener("toggle", () => this.drawCurves());
    this.versions = h("tbody");
    this.pinned = h("p", { class: "note" });
    this.history = h("ol", { class: "events" });
    this.rollback = button(t("versions.rollback"), () => this.ask("rollback", null), { "data-do": "rollback", class: "warn" });
    const heads = ["version", "parent", "made", "step", "success", "metrics"];
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("h1", {}, t("learner.title"))), this.cards,
      h("div", { class: "halves" },
        h("section", { class: "card" }, h("div", { class: "card-head" }, h("h2", {}, t("learner.loss")), this.lossNote), this.loss),
        h("section", { class: "card" }, h("h2", {}, t("learner.success")), this.success)),
      this.mixture, this.more,
      h("section", { class: "card table-card" },
        h("div", { class: "card-head" }, h("h2", {}, t("versions.title")), this.pinned, h("span", { class: "grow" }), this.rollback),
        h("table", { class: "list" }, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, t(`versions.${name}`))), h("th", {}))), this.versions)),
      h("section", { class: "card" }, h("h2", {}, t("versions.history")), this.history));
    setInterval(() => this.element.isConnected && !document.hidden && this.load(), 3000);
  }

  enter() {
    this.load();
  }

  recolour() {
    if (!this.progress) return;
    this.drawLoss();
    this.drawSuccess();
    this.drawCurves();
  }

  async load() {
    try {
      [this.progress, this.registry] = await Promise.all([api("/api/learner"), api("/api/versions")]);
    } catch (error) {
      if (error.status !== 401) this.app.tell(t("failed", { message: error.message }), "bad");
      return;
    }
    this.showTiles();
    this.showVersions();
    this.recolour();
    this.showMixture();
  }

  showMixture() {
    const { mixture, mixture_updates: n } = this.progress;
    say(this.mixtureNote, n ? t("mixture.mean", { n }) : t("mixture.fixed"));
    const percent = (x) => `${(100 * x).toFixed(1)} %`;
    const most = Math.max(0.01, ...mixture.map((row) => row.online + row.offline));
    this.mixture.hidden = !mixture.length;
    fill(this.shares, mixture.map((row) => {
      const bar = h("div", { class: "mix-bar", "aria-hidden": "true" }, ["online", "offline"].map((kind) => h("span", { class: `mix ${kind}` })));
      ["online", "offline"].forEach((kind, i) => (bar.children[i].style.width = `${(100 * row[kind]) / most}%`));
      return h("tr", { "data-task": row.task }, h("th", { scope: "row" }, row.task), h("td", { class: "grow" }, bar),
        h("td", { class: "number" }, percent(row.online)), h("td", { class: "number" }, percent(row.offline)));
    }));
  }

  showTiles() {
    const { progress, registry } = this;
    const { recent } = progress;
    const tile = (title, value, text = "", bar = null) => h("section", { class: "tile" }, h("h3", {}, title), h("p", { class: "big" }, value), bar, h("p", { class: "note" }, text));
    const percent = (x) => `${Math.round(100 * x)} %`;
    const share = recent.episodes ? recent.success_alone / recent.episodes : 0;
    const newest = registry.versions[0]?.version;
    const fresh = ["tick_to_batch_s", "update_to_robot_s"].filter((name) => name in progress.freshness);
    const stale = [...this.app.states.values()].filter((s) => s.policy?.version && newest)
      .map((s) => [newest - s.policy.version, t("learner.stale.cell", { cell: s.cell, runs: s.policy.version, newest })]);
    fill(this.cards,
      tile(t("learner.recent", { n: recent.episodes }), recent.episodes ? percent(share) : "–",
        recent.episodes ? `${t("learner.recent.text", { alone: recent.success_alone, n: recent.episodes })}. ${t("learner.interval", { low: percent(recent.low), high: percent(recent.high) })}` : t("list.none"),
        recent.episodes ? interval(share, recent.low, recent.high) : null),
      tile(t("learner.intervened"), recent.episodes ? percent(recent.intervened / recent.episodes) : "–", recent.episodes ? `${percent(recent.human_share)} ${t("learner.humanshare")}` : ""),
      tile(t("learner.human"), progress.human_minutes.toFixed(1), t("learner.episodes", { n: progress.episodes })),
      stale.length ? tile(t("learner.stale"), String(Math.max(...stale.map(([n]) => n))), stale.map(([, text]) => text).join("; ")) : null,
      fresh.length ? tile(t("learner.fresh"), span(progress.freshness[fresh[0]]), fresh.map((name) => t(`learner.${name}`, { time: span(progress.freshness[name]) })).join("; ")) : null);
  }

  drawLoss() {
    const { progress } = this;
    const points = progress.curves.loss ?? [];
    const last = progress.last;
    say(this.lossNote, !points.length ? t("learner.none") : [t("learner.update", { n: last.update }), progress.silent_s > 5 ? t("learner.silent", { time: span(progress.silent_s) }) : ""].filter(Boolean).join(", "));
    chart(this.loss, { series: [{ points, colour: colour("accent") }], marks: progress.published.map((p) => ({ x: p.at_update })), zero: true });
  }

  drawCurves() {
    if (!this.more.open || !this.progress) return;
    const names = Object.keys(this.progress.curves).filter((name) => name !== "loss");
    if (this.curveNames !== names.join()) {
      this.curveNames = names.join();
      this.curveCanvases = names.map((name) => h("canvas", { class: "trace", role: "img", "aria-label": name }));
      fill(this.curves, names.map((name, i) => h("div", { class: "plot" }, h("div", { class: "plot-head" }, name), this.curveCanvases[i])));
    }
    names.forEach((name, i) => chart(this.curveCanvases[i], { series: [{ points: this.progress.curves[name], colour: colour("accent") }] }));
  }

  drawSuccess() {
    const { versions } = this.progress;
    const { context, width, height } = prepare(this.success);
    const left = 40, bottom = 34, top = 8;
    const y = (share) => top + (1 - share) * (height - top - bottom);
    context.font = `11px ${colour("font")}`;
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      context.lineWidth = 1;
      context.strokeStyle = colour("line");
      context.beginPath();
      context.moveTo(left, Math.round(y(share)) + 0.5);
      context.lineTo(width - 6, Math.round(y(share)) + 0.5);
      context.stroke();
      context.fillStyle = colour("muted");
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(`${share * 100} %`, left - 6, y(share));
    }
    const step = (width - left - 6) / Math.max(1, versions.length);
    versions.forEach((version, i) => {
      const x = left + (i + 0.5) * step;
      const share = version.success_alone / version.episodes;
      context.strokeStyle = context.fillStyle = colour("good");
      context.lineWidth = 2;
      context.beginPath();
      context.moveTo(x, y(version.low));
      context.lineTo(x, y(version.high));
      context.stroke();
      context.beginPath();
      context.arc(x, y(share), 4.5, 0, 7);
      context.fill();
      if (step > 26 || i % Math.ceil(30 / step) === 0) {
        context.fillStyle = colour("muted");
        context.textAlign = "center";
        context.textBaseline = "alphabetic";
        context.fillText(version.version ? `v${version.version}` : "–", x, height - 18);
        context.fillText(`${version.success_alone}/${version.episodes}`, x, height - 5);
      }
    });
  }

  showVersions() {
    const { registry, progress } = this;
    const may = this.app.session.role === "operator";
    this.rollback.disabled = !may || registry.active === null;
    this.rollback.hidden = !this.app.has.registry;
    const gate = registry.gate === null ? "" : registry.gate > 0 ? t("versions.gate", { percent: Number((100 * registry.gate).toPrecision(3)) }) : t("versions.gate.any");
    say(this.pinned, [registry.pinned ? t("versions.pinned") : "", gate].filter(Boolean).join(". "));
    if (!registry.versions.length) {
      fill(this.versions, h("tr", {}, h("td", { colspan: 7, class: "empty" }, t("versions.none"))));
    } else {
      const found = new Map(progress.versions.map((v) => [v.version, v]));
      fill(this.versions, registry.versions.map((v) => {
        const active = v.version === registry.active;
        const played = found.get(v.version);
        const { canary } = registry;
        const tried = canary?.version === v.version;
        const beside = this.shadowed(v.version).map((s) => s.cell);
        const act = (name, off = false) => button(t(`versions.${name}`), () => this.ask(name, name === "withdraw" ? null : v.version), { disabled: !may || off, "data-do": `${name}-${v.version}` });
        return h("tr", { "data-version": v.version, "aria-current": active ? "true" : null },
          h("td", {}, h("b", {}, `v${v.version}`), active ? h("span", { class: "badge" }, t("versions.active")) : null,
            tried ? h("span", { class: "badge try" }, t("versions.tried", { who: whom(canary) })) : null, v.rejected ? h("span", { class: "badge no" }, t("versions.rejected")) : null,
            v.held ? h("span", { class: "badge no", title: v.held }, t("versions.held")) : null,
            beside.length ? h("span", { class: "badge try" }, t("versions.shadowed", { cells: beside.join(", ") })) : null),
          h("td", {}, v.parent ? `v${v.parent}` : "–"), h("td", {}, when(v.created_s)), h("td", { class: "number" }, String(v.learner_step)),
          h("td", {}, played ? `${played.success_alone}/${played.episodes}` : "–"),
          h("td", { class: "remarks" }, [metrics(v.metrics), v.held ? t("versions.held.why", { why: v.held }) : "", ...this.shadows(v.version)].filter(Boolean).join("; ")),
          h("td", {}, h("div", { class: "row end" }, active ? null : [
            button(t("versions.shadow.button"), () => this.askShadow(v.version), { disabled: !may, "data-do": `shadow-${v.version}` }),
            tried ? act("withdraw") : act("canary", canary !== null || registry.active === null), act("activate")])));
      }));
    }
    fill(this.history, registry.history.slice(0, 30).map((entry) => h("li", {}, h("time", {}, when(entry.stamp_ns / 1e9)), ` ${entry.action} v${entry.version} ${entry.reason}`)));
  }

  // States of the cells in which this version is the shadow.
  shadowed(version) {
    return [...this.app.states.values()].filter((s) => s.shadow?.version === version);
  }

  // What shadows of this version would have done otherwise, by cell; and who would not have it.
  shadows(version) {
    const percent = (x) => `${(100 * x).toFixed(1)} %`;
    const refused = [...this.app.states.values()].filter((s) => s.shadow?.refused?.startsWith(`shadow '${version}' `))
      .map((s) => t("versions.shadow.refused", { cell: s.cell, message: s.shadow.refused }));
    return refused.concat(this.shadowed(version).filter((s) => s.shadow.chunks)
      .map((s) => t("versions.shadow", { cell: s.cell, n: s.shadow.chunks, mean: percent(s.shadow.mean), first: percent(s.shadow.first), worst: percent(s.shadow.worst) })));
  }

  // Which cells let a version run beside their policy, and what that means.
  async askShadow(version) {
    let plan;
    try {
      plan = await api(`/api/versions/plan?${new URLSearchParams({ action: "shadow", version })}`);
    } catch (error) {
      this.app.tell(t("refused", { message: error.message }), "bad");
      return;
    }
    const before = (cell) => this.app.states.get(cell.cell)?.shadow?.version;
    const boxes = plan.cells.map((cell) => h("input", { type: "checkbox", value: cell.cell, disabled: !cell.runs, "data-do": `shadow-in-${cell.cell}`,
      checked: Boolean(cell.runs) && (before(cell) === version || plan.cells.length === 1), onchange: () => show() }));
    const changes = () => plan.cells.flatMap((cell, i) => {
      const was = before(cell) === version;
      return boxes[i].disabled || boxes[i].checked === was ? [] : [{ ...cell, to: version, starts: boxes[i].checked, before: before(cell) }];
    });
    const list = h("ul", { class: "plan-list", "aria-live": "polite" });
    const sure = button(t("plan.do"), () => go(), { class: "primary", "data-do": "plan-yes" });
    const show = () => {
      const found = changes();
      sure.disabled = !found.length;
      fill(list, [...plan.cells.filter((cell) => !cell.runs).map((cell) => t("plan.shadow.fixed", cell)),
        ...found.flatMap((c) => [c.starts && c.before ? t("plan.shadow.replaces", c) : null, t(c.starts ? "plan.shadow.starts" : "plan.shadow.ends", c)]),
        found.some((c) => c.starts) ? t("plan.shadow.cost") : null].filter(Boolean).map((line) => h("li", {}, line)));
    };
    const go = async () => {
      const found = changes();
      dialog.close();
      for (const { cell, starts } of found) {
        const reply = await this.app.command("shadow", { version: starts ? version : null }, cell);
        if (reply.ok) this.app.tell(t(starts ? "plan.done.shadow" : "plan.shadow.ends", { cell, to: version }), "good");
      }
      this.load();
    };
    show();
    const dialog = sheet(t("plan.shadow", { to: version }),
      h("fieldset", {}, h("legend", {}, t("plan.shadow.who")), boxes.map((box) => h("label", { class: "check" }, box, box.value))), list, sure);
  }

  // Says what will happen, then asks.
  async ask(action, version) {
    const names = this.app.cells.map((cell) => cell.cell);
    const percent = h("input", { type: "number", min: "0", max: "100", step: "5", value: names.length > 1 ? "25" : "0", "data-do": "percent" });
    const boxes = names.map((name) => h("input", { type: "checkbox", value: name, checked: names.length === 1, "data-do": `try-${name}` }));
    const chosen = () => boxes.filter((box) => box.checked).map((box) => box.value);
    const look = () => {
      const query = new URLSearchParams({ action });
      if (version !== null) query.set("version", version);
      if (action === "canary") {
        query.set("percent", String(Math.round(Number(percent.value))));
        query.set("cells", chosen().join(","));
      }
      return api(`/api/versions/plan?${query}`);
    };
    let plan;
    try {
      plan = await look();
    } catch (error) {
      this.app.tell(t("refused", { message: error.message }), "bad");
      return;
    }
    const pin = h("input", { type: "checkbox", checked: true, "data-do": "pin" });
    const reason = h("input", { type: "text", maxlength: 150, "data-do": "reason" });
    const list = h("ul", { class: "plan-list", "aria-live": "polite" });
    const sure = button(t("plan.do"), () => go(), { class: "primary", "data-do": "plan-yes" });
    const show = () => {
      fill(list, lines(action, plan, pin.checked, Number(percent.value)).map((line) => h("li", {}, line)));
      sure.disabled = action === "canary" && !(Number(percent.value) > 0 || chosen().length);
    };
    pin.addEventListener("change", show);
    for (const input of [percent, ...boxes]) {
      input.addEventListener("change", async () => {
        sure.disabled = true;
        plan = await look().catch(() => plan);
        show();
      });
    }
    show();
    const go = async () => {
      dialog.close();
      const args = { reason: reason.value };
      if (action !== "withdraw") args.version = plan.to;
      if (action === "activate") args.pin = pin.checked;
      if (action === "canary") Object.assign(args, { share: Number(percent.value) / 100, cells: chosen() });
      const reply = await this.app.command(action, args);
      if (reply.ok) this.app.tell(t(`plan.done.${action}`, reply), "good");
      this.load();
    };
    const dialog = sheet(t(`plan.${action}`, plan),
      action !== "canary" ? null : h("fieldset", {}, h("legend", {}, t("plan.who")),
        h("label", {}, t("plan.percent"), percent), boxes.map((box) => h("label", { class: "check" }, box, box.value))),
      list,
      action !== "activate" ? null : h("label", { class: "check" }, pin, t("plan.pinbox")),
      h("label", {}, t("plan.reason"), reason), sure);
  }
}

// A question whose last part is the button that says yes.
function sheet(title, ...parts) {
  const sure = parts.pop();
  const dialog = h("dialog", { "aria-labelledby": "plan-title", onclose: () => dialog.remove() },
    h("h2", { id: "plan-title" }, title), parts,
    h("div", { class: "row end" }, button(t("plan.cancel"), () => dialog.close(), { "data-do": "plan-no" }), sure));
  append(document.body, [dialog]);
  dialog.showModal();
  return dialog;
}

// What will happen, in sentences.
function lines(action, plan, pin, percent) {
  const swap = (cell) => t(cell.swap === "chunk" ? "plan.cell.chunk" : cell.in_episode ? "plan.cell.episode" : "plan.cell.idle", cell);
  const taking = plan.cells.filter((cell) => cell.takes);
  if (action === "withdraw") return [t("plan.withdrawn", plan), ...taking.map(swap), t("plan.rejects", plan)];
  const first = [plan.from === null ? t("plan.nothing") : t("plan.now", plan), t("plan.checked", plan), plan.held ? t("plan.held", plan) : null].filter(Boolean);
  if (action === "canary") {
    const here = taking.map((cell) => cell.cell).join(", ");
    return [...first, percent > 0 ? t("plan.tries", { ...plan, percent }) : null, here ? t("plan.here", { ...plan, here }) : t("plan.nohere"),
      t("plan.stay", plan), ...taking.map(swap), t("plan.again"), t("plan.waits", plan)].filter(Boolean);
  }
  return [...first, plan.ends === null ? null : t("plan.ends", plan), ...taking.map(swap), t("plan.again"),
    t(plan.pins || pin ? "plan.pin" : "plan.follow")].filter(Boolean);
}

function whom({ share, cells }) {
  return [share > 0 ? t("versions.share", { percent: Math.round(100 * share) }) : null, ...cells].filter(Boolean).join(", ");
}

function metrics(values) {
  return Object.entries(values).map(([name, value]) => `${name} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`).join(", ");
}

function interval(share, low, high) {
  const bar = h("div", { class: "interval", "aria-hidden": "true" }, h("span", { class: "span" }), h("span", { class: "point" }));
  bar.firstChild.style.left = `${low * 100}%`;
  bar.firstChild.style.width = `${(high - low) * 100}%`;
  bar.lastChild.style.left = `${share * 100}%`;
  return bar;
}

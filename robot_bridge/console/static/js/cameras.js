// Pictures: decoded off the page's thread, drawn once a frame, acknowledged when drawn.

import { colour, line, prepare } from "./charts.js";
import { attribute, fill, h, say } from "./dom.js";
import { t } from "./strings.js";

const HEADER = 16;

export class Cameras {
  constructor(link) {
    this.link = link;
    this.element = h("div", { class: "cameras" });
    this.views = [];
    this.clearStats();
    this.ready = new Map(); // camera -> {bitmap, sentMs, age}
    this.decoding = new Set();
    this.newest = new Map();
    this.asked = false;
    link.addEventListener("picture", (event) => this.receive(event.detail));
    setInterval(() => this.count(), 1000);
  }

  // Ages in ms of the last pictures: when they arrived here, were decoded, were drawn.
  clearStats() {
    this.stats = { drawn: 0, arrived: [], decoded: [], ages: [] };
  }

  age(picture, list) {
    const age = this.link.now() - picture.sentMs + picture.age;
    list.push(age);
    if (list.length > 5000) list.splice(0, 2500);
    return age;
  }

  show(cameras) {
    this.ready.clear();
    this.newest.clear();
    this.decoding.clear();
    this.views = cameras.map((camera) => {
      const canvas = h("canvas", { width: camera.width, height: camera.height, role: "img", "aria-label": camera.name });
      const plan = h("canvas", { class: "plan-over", "aria-hidden": "true" });
      const note = h("span", { class: "note" }, t("camera.wait"));
      const figure = h("figure", { class: "camera" }, canvas, plan, h("figcaption", {}, h("b", {}, camera.name), note));
      return { canvas, plan, note, figure, context: null, drawn: 0, age: 0, seen: 0 };
    });
    attribute(this.element, "data-count", this.views.length);
    fill(this.element, this.views.map((view) => view.figure));
    if (!cameras.length) fill(this.element, h("p", { class: "empty" }, t("cameras.none")));
  }

  receive(data) {
    if (data.byteLength <= HEADER) return;
    const view = new DataView(data);
    const camera = view.getUint8(0);
    if (view.getUint8(1) !== 1) return;
    const picture = { age: view.getUint16(2, true), sentMs: view.getFloat64(8, true), data };
    this.age(picture, this.stats.arrived);
    this.newest.set(camera, picture);
    this.decode(camera);
  }

  async decode(camera) {
    if (this.decoding.has(camera) || !this.newest.has(camera)) return;
    const picture = this.newest.get(camera);
    this.newest.delete(camera);
    this.decoding.add(camera);
    try {
      picture.bitmap = await createImageBitmap(new Blob([new Uint8Array(picture.data, HEADER)], { type: "image/jpeg" }));
      this.age(picture, this.stats.decoded);
      this.ready.get(camera)?.bitmap.close();
      this.ready.set(camera, picture);
      if (!this.asked) {
        this.asked = true;
        requestAnimationFrame(() => this.draw());
      }
    } catch {
      this.link.send({ type: "drawn", cameras: [camera] }); // a torn picture is skipped
    } finally {
      this.decoding.delete(camera);
      this.decode(camera);
    }
  }

  draw() {
    this.asked = false;
    const done = [];
    for (const [camera, picture] of this.ready) {
      const view = this.views[camera];
      done.push(camera);
      if (!view) continue;
      const { bitmap } = picture;
      if (view.canvas.width !== bitmap.width || view.canvas.height !== bitmap.height) {
        view.canvas.width = bitmap.width;
        view.canvas.height = bitmap.height;
        view.context = null;
      }
      view.context ??= view.canvas.getContext("2d", { alpha: false });
      view.context.drawImage(bitmap, 0, 0);
      bitmap.close();
      view.drawn += 1;
      view.age = this.age(picture, this.stats.ages);
      view.seen = performance.now();
      this.stats.drawn += 1;
    }
    this.ready.clear();
    if (done.length) this.link.send({ type: "drawn", cameras: done });
  }

  // Where the plan leads the tool: camera -> [[x, y]] in shares of the picture; {} draws nothing.
  drawPaths(paths) {
    this.views.forEach((view, number) => {
      const points = paths[number] ?? [];
      if (!points.length && !view.plan.dataset.points) return;
      attribute(view.plan, "data-points", points.length || null);
      const { context, width, height } = prepare(view.plan);
      const scale = Math.min(width / view.canvas.width, height / view.canvas.height); // as object-fit does
      const [w, tall] = [view.canvas.width * scale, view.canvas.height * scale];
      const shown = points.filter(([x]) => x !== null).map(([x, y]) => [(width - w) / 2 + x * w, (height - tall) / 2 + y * tall]);
      if (!shown.length) return;
      line(context, shown, { stroke: "rgb(0 0 0 / 60%)", width: 5 });
      line(context, shown, { stroke: colour("over-picture"), width: 2.5 });
      context.fillStyle = colour("over-picture");
      context.beginPath();
      context.arc(...shown[shown.length - 1], 4, 0, 7);
      context.fill();
    });
  }

  count() {
    for (const view of this.views) {
      const late = performance.now() - view.seen > 1000;
      attribute(view.figure, "data-late", late);
      say(view.note, late ? t("camera.wait") : t("camera.age", { fps: view.drawn, age: Math.round(view.age) }));
      view.drawn = 0;
    }
  }
}

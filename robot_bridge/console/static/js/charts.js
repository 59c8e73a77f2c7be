// Small charts on canvas. Colours come from the style sheet, so that themes apply.

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Makes the canvas as sharp as the screen; returns a context in CSS pixels.
export function prepare(canvas) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

export function line(context, points, { stroke, width = 1.5, dash = [] }) {
  context.beginPath();
  let down = false;
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) {
      down = false;
      continue;
    }
    if (down) context.lineTo(x, y);
    else context.moveTo(x, y);
    down = true;
  }
  context.strokeStyle = stroke;
  context.lineWidth = width;
  context.setLineDash(dash);
  context.lineJoin = "round";
  context.stroke();
  context.setLineDash([]);
}

export function range(values, least = 0) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (Number.isFinite(value)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (!Number.isFinite(low)) return [0, 1];
  const missing = Math.max(0, least - (high - low)) / 2;
  const margin = Math.max((high - low) * 0.08, missing, 1e-6);
  return [low - margin, high + margin];
}

export function short(value) {
  if (!Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.01 || size >= 10000)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

// A chart with axes: series [{points: [[x, y]], colour, dash}], marks [{x, label}].
export function chart(canvas, { series, marks = [], yRange, xRange, zero = false }) {
  const { context, width, height } = prepare(canvas);
  const left = 44, right = 8, top = 8, bottom = 20;
  const all = series.flatMap((s) => s.points);
  const xs = xRange ?? range(all.map((p) => p[0]));
  const ys = yRange ?? range(zero ? [0, ...all.map((p) => p[1])] : all.map((p) => p[1]));
  const x = (value) => left + ((value - xs[0]) / (xs[1] - xs[0] || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - ys[0]) / (ys[1] - ys[0] || 1)) * (height - top - bottom);
  context.font = `11px ${colour("font") || "system-ui"}`;
  context.fillStyle = colour("muted");
  context.strokeStyle = colour("line");
  context.lineWidth = 1;
  for (const step of ticks(ys, 4)) {
    context.beginPath();
    context.moveTo(left, Math.round(y(step)) + 0.5);
    context.lineTo(width - right, Math.round(y(step)) + 0.5);
    context.stroke();
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(short(step), left - 6, y(step));
  }
  context.textBaseline = "alphabetic";
  context.textAlign = "center";
  for (const step of ticks(xs, Math.max(2, Math.floor(width / 110)))) context.fillText(short(step), x(step), height - 5);
  for (const mark of marks) {
    if (mark.x < xs[0] || mark.x > xs[1]) continue;
    context.strokeStyle = colour("mark");
    context.setLineDash([2, 3]);
    context.beginPath();
    context.moveTo(Math.round(x(mark.x)) + 0.5, top);
    context.lineTo(Math.round(x(mark.x)) + 0.5, height - bottom);
    context.stroke();
    context.setLineDash([]);
  }
  for (const { points, colour: stroke, dash } of series) {
    line(context, points.map(([a, b]) => [x(a), b === null ? NaN : y(b)]), { stroke, dash });
  }
  return { x, y, xs, ys };
}

function ticks([low, high], count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? raw;
  const out = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-12; value += step) {
    out.push(Math.abs(value) < step / 1e6 ? 0 : value);
    if (out.length > 20) break;
  }
  return out;
}

// Who drove: [start, stop, who] in any unit, with a pattern beside the colour.
export function runs(canvas, spans, from, to) {
  const { context, width, height } = prepare(canvas);
  context.fillStyle = colour("sunken");
  context.fillRect(0, 0, width, height);
  const x = (value) => ((value - from) / (to - from || 1)) * width;
  for (const [start, stop, who] of spans) {
    const a = Math.max(0, x(start));
    const b = Math.min(width, x(stop));
    if (b <= a) continue;
    const wide = Math.max(1, b - a);
    context.fillStyle = colour(`who-${who}`) || colour("muted");
    context.fillRect(a, 0, wide, height);
    if (who === "human") hatch(context, a, wide, height);
  }
}

function hatch(context, left, width, height) {
  context.save();
  context.beginPath();
  context.rect(left, 0, width, height);
  context.clip();
  context.strokeStyle = colour("hatch");
  context.lineWidth = 1.5;
  for (let i = left - height - (left % 7); i < left + width; i += 7) {
    context.beginPath();
    context.moveTo(i, height);
    context.lineTo(i + height, 0);
    context.stroke();
  }
  context.restore();
}

// The one WebSocket: messages, pictures, and the server's clock.

const PING_MS = 1000;

export class Link extends EventTarget {
  constructor() {
    super();
    this.socket = null;
    this.seq = 0;
    this.next = 1;
    this.waiting = new Map();
    this.offset = null; // server's clock minus performance.now(), in ms
    this.samples = [];
    this.round = null;
    this.wanted = false;
    this.watching = null;
    this.delay = 250;
    this.received = 0;
    setInterval(() => this.ping(), PING_MS);
  }

  get open() {
    return this.socket !== null && this.socket.readyState === WebSocket.OPEN && this.offset !== null;
  }

  connect() {
    this.wanted = true;
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/ws`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      this.delay = 250;
      this.seq = 0;
      this.samples = [];
    };
    socket.onmessage = (message) => this.receive(message.data);
    socket.onclose = () => this.closed(socket);
  }

  close() {
    this.wanted = false;
    this.socket?.close();
  }

  closed(socket) {
    if (this.socket !== socket) return;
    this.socket = null;
    this.offset = null;
    for (const { resolve } of this.waiting.values()) resolve({ ok: false, code: "offline", message: "" });
    this.waiting.clear();
    this.dispatchEvent(new CustomEvent("off"));
    if (this.wanted) setTimeout(() => this.wanted && this.again(), this.delay);
    this.delay = Math.min(this.delay * 2, 4000);
  }

  async again() {
    // A session that ended needs a login, not another try.
    try {
      const answer = await fetch("/api/session");
      if (answer.status === 401) {
        this.wanted = false;
        this.dispatchEvent(new CustomEvent("login"));
        return;
      }
    } catch {
      // the server is away; the socket will say so too
    }
    if (this.wanted && this.socket === null) this.connect();
  }

  now() {
    return performance.now() + (this.offset ?? 0);
  }

  send(body) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(body));
    return true;
  }

  ping() {
    this.send({ type: "ping", t: performance.now() });
  }

  receive(data) {
    this.received += 1;
    if (typeof data !== "string") {
      this.dispatchEvent(new CustomEvent("picture", { detail: data }));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "hello") {
      // Rough until the first ping is answered, which takes a round trip less.
      this.offset = message.now_ms - performance.now();
      for (let i = 0; i < 3; i += 1) this.ping();
    } else if (message.type === "pong") {
      this.clock(message);
    } else if (message.type === "reply" && this.waiting.has(message.id)) {
      this.waiting.get(message.id).resolve(message);
      this.waiting.delete(message.id);
    }
    this.dispatchEvent(new CustomEvent(message.type, { detail: message }));
  }

  clock({ t, now_ms }) {
    // The sample with the shortest way says best how the clocks differ.
    const now = performance.now();
    this.samples.push({ round: now - t, offset: now_ms - (t + now) / 2 });
    if (this.samples.length > 16) this.samples.shift();
    const best = this.samples.reduce((a, b) => (a.round < b.round ? a : b));
    this.offset = best.offset;
    this.round = this.samples[this.samples.length - 1].round;
  }

  stop(cell) {
    const id = this.next++;
    if (!this.send({ type: "stop", id, cell })) return Promise.resolve({ ok: false, message: "" });
    return new Promise((resolve) => this.waiting.set(id, { resolve }));
  }

  command(cell, name, args = {}) {
    const id = this.next++;
    const body = { type: "command", id, seq: this.seq++, t: this.now(), cell, name, arguments: args };
    if (!this.send(body)) return Promise.resolve({ ok: false, code: "offline", message: "" });
    return new Promise((resolve) => this.waiting.set(id, { resolve }));
  }

  drive(cell, hold, axes, speed) {
    const seq = this.seq++;
    this.send({ type: "drive", cell, seq, t: this.now(), hold, axes, speed });
    return seq;
  }

  watch(cell, cameras) {
    this.watching = { cell, cameras };
    this.send({ type: "watch", cell, cameras });
  }
}

export async function api(path, options = {}) {
  const answer = await fetch(path, {
    method: options.method ?? "GET",
    headers: options.body === undefined ? {} : { "content-type": "application/json" },
    body: options.body === undefined ? undefined : JSON.stringify(options.body),
  });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(body.error ?? body.message ?? answer.statusText);
    error.status = answer.status;
    throw error;
  }
  return body;
}

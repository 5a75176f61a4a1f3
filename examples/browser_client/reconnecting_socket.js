// A WebSocket that dials again after a disconnect. Copy this file; it needs no other.

const MIN_DELAY = 200; // ms before every dial
const MAX_DELAY = 30_000;
const MAX_HINT = 300_000;
const CONNECT_TIMEOUT = 10_000;
const PROBE_TIMEOUT = 5_000;
const STABLE_AFTER = 5_000; // a connection that lasts this long resets the backoff

const FINAL = new Set([1000, 1002, 1003, 1007, 1008, 1009, 1010, 3000, 3003]);
const RETRIED = new Set([4408, 4412, 4429]); // among 4400 to 4499
const BUSY = new Set([1012, 1013, 1014, 4429, 4503]); // many clients were closed together: spread wider

export function isFinal(code) {
  return FINAL.has(code) || (code >= 4400 && code < 4500 && !RETRIED.has(code));
}

// Full jitter: a random time in a window that doubles. `retry=<ms>` in the close reason replaces it.
export function delayFor(attempt, code, reason, random = Math.random) {
  const hint = /\bretry=(\d{1,7})\b/.exec(reason);
  if (hint && (attempt < 3 || code === 4429)) {
    const hinted = Math.min(Math.max(Number(hint[1]), attempt < 3 ? 0 : MIN_DELAY), MAX_HINT);
    return hinted + random() * (MIN_DELAY + hinted / 10);
  }
  const window = 1_000 * 2 ** Math.min(attempt, 30) * (BUSY.has(code) ? 5 : 1);
  return MIN_DELAY + random() * Math.min(MAX_DELAY, window);
}

export class ReconnectingSocket {
  // url: a string, or a function that returns one, or a promise of one. It is called for every dial.
  // onmessage(data): each message of the application, parsed if it is JSON.
  // onstate(state, detail): "connecting", "open", "waiting" {code, reason, delay} or "closed" {code, reason}.
  constructor(url, { onmessage = () => {}, onstate = () => {}, pingInterval = 25_000, pingTimeout = 20_000 } = {}) {
    Object.assign(this, { url, onmessage, onstate, pingInterval, pingTimeout });
    this.state = "closed";
    this.attempt = 0;
    this.token = null; // reconnect token; the server accepts each one once
    this.timers = {};
    this.wake = () => (document.hidden ? undefined : this.check());
    addEventListener("online", this.wake);
    document.addEventListener("visibilitychange", this.wake);
    this.dial();
  }

  // Send now. Returns false if the connection is not open: nothing is queued.
  send(data) {
    if (this.state !== "open" || this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(typeof data === "string" ? data : JSON.stringify(data));
    return true;
  }

  // Close for good.
  close() {
    this.finish(1000, "closed by the page");
  }

  async dial() {
    const generation = (this.generation = {}); // events of an older socket are ignored
    const current = () => this.generation === generation;
    this.clearTimers();
    this.set("connecting");
    this.timer("connect", CONNECT_TIMEOUT, () => this.lost(4408, "connect timeout"));
    let url;
    try {
      url = new URL(await (typeof this.url === "function" ? this.url() : this.url), location.href);
    } catch (error) {
      return current() && this.lost(1006, String(error));
    }
    if (!current()) return;
    url.protocol = url.protocol.replace("http", "ws");
    if (this.token) url.searchParams.set("reconnect_token", this.token);
    const socket = (this.socket = new WebSocket(url));
    socket.onopen = () => current() && this.opened();
    socket.onmessage = (event) => current() && this.received(event.data);
    socket.onclose = (event) => current() && this.lost(event.code, event.reason);
  }

  opened() {
    this.clearTimers();
    this.token = null; // used
    this.set("open");
    this.timer("stable", STABLE_AFTER, () => (this.attempt = 0));
    this.alive();
  }

  received(data) {
    this.alive();
    if (data === '{"type":"ping"}') return this.socket.send("pong"); // heartbeat of the server
    let message = data;
    try {
      message = JSON.parse(data);
    } catch {} // text that is not JSON, or binary
    if (message?.type === "pong") return; // answer to our own ping
    if (message?.type === "token") this.token = message.token;
    else this.onmessage(message);
  }

  // A browser hides ping frames, so the page sends pings of its own to notice a dead server.
  alive() {
    clearTimeout(this.timers.answer);
    this.timer("ping", this.pingInterval, () => this.ask(this.pingTimeout));
  }

  ask(timeout) {
    this.socket.send('{"type":"ping"}');
    this.timer("answer", timeout, () => this.lost(4408, "no answer"));
  }

  // The network is back, or the page is visible again: dial now, or make sure that the connection is alive.
  check() {
    if (this.state === "waiting") this.dial();
    else if (this.state === "open") this.ask(PROBE_TIMEOUT);
  }

  lost(code, reason) {
    if (isFinal(code)) return this.finish(code, reason);
    this.drop(4000); // does not wait for the close event of a dead network
    const delay = delayFor(this.attempt++, code, reason);
    this.set("waiting", { code, reason, delay });
    this.timer("dial", delay, () => this.dial());
  }

  finish(code, reason) {
    this.drop(1000);
    removeEventListener("online", this.wake);
    document.removeEventListener("visibilitychange", this.wake);
    this.set("closed", { code, reason });
  }

  drop(code) {
    this.clearTimers();
    this.generation = null;
    this.socket?.close(code);
  }

  set(state, detail = {}) {
    this.state = state;
    this.onstate(state, detail);
  }

  timer(name, delay, callback) {
    clearTimeout(this.timers[name]);
    this.timers[name] = setTimeout(callback, delay);
  }

  clearTimers() {
    Object.values(this.timers).forEach(clearTimeout);
    this.timers = {};
  }
}

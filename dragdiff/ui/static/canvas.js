// A canvas on which a person places drag points and paints a mask over a picture: its state, view and gestures.
import { HANDLE, TARGET, arrow, crosshair, dot, haloed, label } from "./marks.js";
import { Mask, sheet } from "./mask.js";

const REACH = 14; // how near a press must be to take hold of a point, CSS px
const SLACK = 3; // a press that moves no further than this is a click, CSS px
const MARGIN = 12; // left free around a fitted picture, CSS px
const HISTORY = 200;
const EMPTY = Object.freeze({ pairs: [], pending: null, strokes: [], base: null });
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const distance = ([ax, ay], [bx, by]) => Math.hypot(ax - bx, ay - by);
const middle = ([ax, ay], [bx, by]) => [(ax + bx) / 2, (ay + by) / 2];
const same = (a, b) => a[0] === b[0] && a[1] === b[1];

/** Decode a URL or Blob; through <img>, since the page's CSP lets images, not fetch, read data: URLs. */
async function decode(source) {
  const url = source instanceof Blob ? URL.createObjectURL(source) : source;
  const image = new Image();
  try {
    image.src = url;
    await image.decode();
    return image;
  } finally {
    if (url !== source) URL.revokeObjectURL(url);
  }
}

export class DragCanvas extends EventTarget {
  #canvas; #ctx; #picture = null; #loads = 0; #frame = 0;
  #state = EMPTY; #undo = []; #redo = [];
  #mask = new Mask(1, 1);
  #scale = 1; #origin = [0, 0]; #fitted = true; // screen = picture * scale + origin
  #tool = "points"; #brushSize = 24; #maskOpacity = 0.5;
  #gesture = null; #touches = new Map(); #hover = null;
  #cursor = [0, 0]; #keyboard = false; #space = false;

  /** Take over an existing, focusable <canvas>, whose CSS size is the page's affair. */
  constructor(canvas) {
    super();
    this.#canvas = canvas;
    this.#ctx = canvas.getContext("2d");
    canvas.style.touchAction = "none";
    const on = (type, handler, options) => canvas.addEventListener(type, handler.bind(this), options);
    on("pointerdown", this.#down);
    on("pointermove", this.#move);
    on("pointerup", this.#up);
    on("pointercancel", this.#lost);
    on("lostpointercapture", this.#lost);
    on("pointerleave", () => { this.#hover = null; this.#request(); });
    on("wheel", this.#wheel, { passive: false });
    on("contextmenu", (e) => e.preventDefault());
    on("mousedown", (e) => e.preventDefault()); // no autoscroll on the middle button, no text selection
    on("focus", () => { this.#keyboard = canvas.matches(":focus-visible"); this.#request(); });
    on("keydown", this.#key);
    on("keyup", (e) => { if (e.key === " ") { this.#space = false; this.#request(); } });
    on("blur", () => { this.#space = this.#keyboard = false; this.#request(); });
    new ResizeObserver(() => (this.#fitted ? this.fit() : this.#request())).observe(canvas);
  }

  /** Show a picture with its points and mask; history and view start afresh. */
  async load(source, { points = [], mask = null } = {}) {
    const turn = ++this.#loads;
    const [image, grey] = await Promise.all([decode(source), mask && decode(mask)]);
    if (turn !== this.#loads) return; // a later load has overtaken this one
    this.#cancel();
    const [w, h] = [image.naturalWidth, image.naturalHeight];
    this.#picture = sheet(w, h);
    this.#picture.getContext("2d").drawImage(image, 0, 0);
    this.#mask = new Mask(w, h);
    this.#undo = [];
    this.#redo = [];
    this.#state = { ...EMPTY, pairs: points.map((p) => this.#pair(p)), base: grey && this.#mask.layer(grey) };
    this.#cursor = [w >> 1, h >> 1];
    this.#mask.draw(this.#state);
    this.fit();
    this.#changed();
  }

  get width() { return this.#picture?.width ?? 0; }
  get height() { return this.#picture?.height ?? 0; }
  get points() { return structuredClone(this.#state.pairs); }
  get pending() { return this.#state.pending && [...this.#state.pending]; }
  get canUndo() { return this.#undo.length > 0; }
  get canRedo() { return this.#redo.length > 0; }
  get tool() { return this.#tool; }
  set tool(value) { this.#cancel(); this.#tool = value; this.#request(); }
  get brushSize() { return this.#brushSize; }
  set brushSize(value) { this.#brushSize = Math.max(1, Number(value) || 1); this.#request(); }
  get maskOpacity() { return this.#maskOpacity; }
  set maskOpacity(value) { this.#maskOpacity = clamp(Number(value) || 0, 0, 1); this.#request(); }

  /** The mask as a PNG Blob, white on black, or null if nothing is painted. */
  async mask() {
    const { strokes, base } = this.#state;
    return strokes.length || base ? this.#mask.toBlob() : null; // most have none: no need to look at the pixels
  }

  // ---- points, mask, history ----

  /** Move the i-th pair. */
  setPair(i, pair) {
    const old = this.#state.pairs[i], now = this.#pair(pair);
    if (!old || (same(old[0], now[0]) && same(old[1], now[1]))) return;
    this.#commit({ pairs: this.#state.pairs.with(i, now) });
  }

  /** Remove the i-th pair. */
  deletePair(i) {
    if (this.#state.pairs[i]) this.#commit({ pairs: this.#state.pairs.filter((_, j) => j !== i) });
  }

  /** Remove all points. */
  clearPoints() {
    if (this.#state.pairs.length || this.#state.pending) this.#commit({ pairs: [], pending: null });
  }

  /** Remove the mask. */
  clearMask() {
    if (this.#state.strokes.length || this.#state.base) this.#commit({ strokes: [], base: null });
  }

  /** Swap painted and unpainted. */
  invertMask() {
    if (!this.#picture) return;
    this.#cancel(); // a stroke under way is not part of the mask
    this.#commit({ strokes: [], base: this.#mask.inverted() });
  }

  /** Take the last change back. */
  undo() { this.#travel(this.#undo, this.#redo); }

  /** Make the change last taken back again. */
  redo() { this.#travel(this.#redo, this.#undo); }

  #travel(from, to) {
    this.#cancel();
    if (!from.length) return;
    to.push(this.#state);
    this.#adopt(from.pop());
  }

  /** One undoable step. */
  #commit(patch) {
    this.#cancel();
    this.#undo = [...this.#undo, this.#state].slice(-HISTORY);
    this.#redo = [];
    this.#adopt({ ...this.#state, ...patch });
  }

  #adopt(state) {
    const old = this.#state;
    this.#state = state;
    if (state.strokes !== old.strokes || state.base !== old.base) this.#mask.draw(this.#state);
    this.#changed();
  }

  #changed() {
    this.#request();
    this.dispatchEvent(new Event("change"));
  }

  /** Nearest pixel of the picture. */
  #pixel([x, y]) {
    if (!Number.isFinite(+x) || !Number.isFinite(+y)) throw new RangeError("a point needs two numbers");
    return [clamp(Math.floor(x), 0, this.width - 1), clamp(Math.floor(y), 0, this.height - 1)];
  }

  #pair([handle, target]) { return [this.#pixel(handle), this.#pixel(target)]; }

  /** A handle, or the target of the handle that waits for one. */
  #place(p) {
    const { pairs, pending } = this.#state;
    this.#commit(pending ? { pairs: [...pairs, [pending, p]], pending: null } : { pending: p });
  }

  /** Remove what a hit names. */
  #remove({ pair }) {
    if (pair < 0) this.#commit({ pending: null });
    else this.deletePair(pair);
  }

  /** The state with the point that a hit names moved to p. */
  #moved(state, { pair, end }, p) {
    if (pair < 0) return { ...state, pending: p };
    return { ...state, pairs: state.pairs.with(pair, state.pairs[pair].with(end, p)) };
  }

  // ---- view ----

  /** Show the whole picture. */
  fit() {
    const { clientWidth: W, clientHeight: H } = this.#canvas;
    this.#fitted = true;
    if (!this.#picture || !W || !H) return; // hidden: the ResizeObserver calls again
    this.#scale = this.#fitScale();
    this.#origin = [(W - this.width * this.#scale) / 2, (H - this.height * this.#scale) / 2];
    this.#request();
  }

  /** Zoom about the middle of the canvas. */
  zoomBy(factor) { this.#zoomAt(factor, [this.#canvas.clientWidth / 2, this.#canvas.clientHeight / 2]); }

  #fitScale() {
    const { clientWidth: W, clientHeight: H } = this.#canvas;
    return Math.max(1e-4, Math.min((W - 2 * MARGIN) / this.width, (H - 2 * MARGIN) / this.height));
  }

  #zoomAt(factor, [x, y]) {
    if (!this.#picture) return;
    const fit = this.#fitScale();
    const scale = clamp(this.#scale * factor, Math.min(fit, 1) / 4, Math.max(fit * 4, 40));
    const k = scale / this.#scale, [ox, oy] = this.#origin;
    this.#scale = scale;
    this.#origin = [x - (x - ox) * k, y - (y - oy) * k];
    this.#fitted = false;
    this.#request();
  }

  #pan(dx, dy) {
    this.#origin = [this.#origin[0] + dx, this.#origin[1] + dy];
    this.#fitted = false;
    this.#request();
  }

  #toPicture([x, y]) { return [(x - this.#origin[0]) / this.#scale, (y - this.#origin[1]) / this.#scale]; }
  #toScreen([x, y]) { return [x * this.#scale + this.#origin[0], y * this.#scale + this.#origin[1]]; }
  #centre([x, y]) { return this.#toScreen([x + 0.5, y + 0.5]); }

  // ---- pointer ----

  /** Where an event is, in CSS px within the canvas. */
  #at(e) {
    const box = this.#canvas.getBoundingClientRect();
    return [e.clientX - box.left - this.#canvas.clientLeft, e.clientY - box.top - this.#canvas.clientTop];
  }

  /** The point nearest to a place on screen, {pair, end}, or null; pair -1 is the pending handle. */
  #hit(at) {
    const { pairs, pending } = this.#state;
    const all = pairs.flatMap((ends, pair) => ends.map((p, end) => ({ pair, end, p })));
    if (pending) all.push({ pair: -1, end: 0, p: pending });
    let best = null, reach = REACH;
    for (const one of all) {
      const d = distance(this.#centre(one.p), at);
      if (d <= reach) [best, reach] = [one, d]; // <=: the later one is drawn on top
    }
    return best;
  }

  #down(e) {
    if (!this.#picture) return;
    const at = this.#at(e), id = e.pointerId;
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(id);
    this.#keyboard = false;
    this.#hover = at;
    this.#request();
    if (e.pointerType === "touch") {
      this.#touches.set(id, at);
      if (this.#touches.size === 2) {
        this.#cancel(); // what the first finger began was the start of a pinch
        this.#gesture = { kind: "pinch" };
      }
    }
    if (this.#gesture) return;
    const hit = this.#hit(at);
    if (e.button === 2 || (e.button === 0 && e.ctrlKey)) { // Ctrl+click is a Mac's right click
      if (hit) this.#remove(hit);
    } else if (e.button === 1 || (e.button === 0 && (this.#space || this.#tool === "pan"))) {
      this.#gesture = { kind: "pan", id, last: at };
    } else if (e.button === 0 && this.#tool === "points") {
      this.#gesture = { kind: "point", id, start: at, hit, before: this.#state, moved: false };
    } else if (e.button === 0) {
      const stroke = { erase: this.#tool === "eraser", size: this.#brushSize, points: [this.#toPicture(at)] };
      this.#gesture = { kind: "stroke", id, stroke };
      this.#mask.paint(stroke);
    }
  }

  #move(e) {
    const at = this.#at(e), g = this.#gesture;
    this.#hover = at;
    this.#keyboard = false;
    this.#request();
    if (g?.kind === "pinch") this.#pinch(e.pointerId, at);
    if (!g || g.id !== e.pointerId) return;
    if (g.kind === "pan") {
      this.#pan(at[0] - g.last[0], at[1] - g.last[1]);
      g.last = at;
    } else if (g.kind === "stroke") {
      const events = e.getCoalescedEvents?.() ?? [];
      const from = g.stroke.points.length;
      for (const one of events.length ? events : [e]) g.stroke.points.push(this.#toPicture(this.#at(one)));
      this.#mask.paint(g.stroke, from);
    } else if (g.hit) {
      g.moved ||= distance(at, g.start) > SLACK;
      if (!g.moved) return;
      // Keep the grip: the point moves by as much as the pointer did.
      const [x, y] = this.#centre(g.hit.p);
      const p = this.#pixel(this.#toPicture([x + at[0] - g.start[0], y + at[1] - g.start[1]]));
      if (same(p, g.now ?? g.hit.p)) return;
      g.now = p;
      this.#adopt(this.#moved(g.before, g.hit, p));
    }
  }

  #pinch(id, at) {
    if (!this.#touches.has(id)) return;
    const pair = [...this.#touches.keys()].slice(0, 2);
    const [a, b] = pair.map((k) => this.#touches.get(k));
    this.#touches.set(id, at);
    if (!b) return; // one finger is left over; the gesture ends with it
    const [c, d] = pair.map((k) => this.#touches.get(k));
    const from = middle(a, b), to = middle(c, d);
    this.#pan(to[0] - from[0], to[1] - from[1]);
    this.#zoomAt(distance(c, d) / Math.max(distance(a, b), 1), to);
  }

  #up(e) {
    const at = this.#at(e), g = this.#gesture;
    this.#touches.delete(e.pointerId);
    if (e.pointerType === "touch") this.#hover = null;
    this.#request();
    if (g?.kind === "pinch" && !this.#touches.size) this.#gesture = null;
    if (!g || g.id !== e.pointerId) return;
    this.#gesture = null;
    if (g.kind === "stroke") {
      this.#commit({ strokes: [...this.#state.strokes, g.stroke] });
    } else if (g.kind === "point" && g.now) {
      const { pairs, pending } = this.#state;
      this.#state = g.before; // so that the whole drag is one step
      this.#commit({ pairs, pending });
    } else if (g.kind === "point" && !g.moved) {
      // A click on a point starts no new pair (it may be a double click), but can end one near by.
      const free = !g.hit || (this.#state.pending && g.hit.pair >= 0);
      const near = this.#pixel(this.#toPicture(at));
      const outside = distance(this.#centre(near), at) > REACH + this.#scale;
      if (free && !outside) this.#place(near);
    }
  }

  /** The system took the pointer away. */
  #lost(e) {
    this.#touches.delete(e.pointerId);
    const g = this.#gesture;
    if (g && (g.id === e.pointerId || (g.kind === "pinch" && !this.#touches.size))) this.#cancel();
  }

  /** Drop the gesture under way, with what it has changed. */
  #cancel() {
    const g = this.#gesture;
    this.#gesture = null;
    if (g?.kind === "stroke") this.#mask.draw(this.#state);
    if (g?.now) this.#adopt(g.before);
    this.#request();
  }

  #wheel(e) {
    if (!this.#picture) return;
    e.preventDefault();
    const unit = [1, 33, 400][e.deltaMode] * (e.ctrlKey ? 0.01 : 0.0015); // Ctrl: a trackpad's pinch
    this.#zoomAt(Math.exp(clamp(-e.deltaY * unit, -1, 1)), this.#at(e));
  }

  // ---- keyboard ----

  #key(e) {
    if (this.#picture && !e.altKey && this.#handle(e)) e.preventDefault();
  }

  /** Act on a key; whether there was anything to do. */
  #handle(e) {
    const { pairs, pending } = this.#state, { key, shiftKey: shift } = e;
    if (e.ctrlKey || e.metaKey) {
      const letter = key.toLowerCase();
      if (letter === "z") shift ? this.redo() : this.undo();
      else if (letter === "y" && e.ctrlKey && !shift) this.redo();
      else return false;
      return true;
    }
    if (ARROWS[key]) this.#step(ARROWS[key], shift ? 10 : 1);
    else if (key === "+" || key === "=") this.zoomBy(1.25);
    else if (key === "-") this.zoomBy(0.8);
    else if (shift) return false;
    else if (key === "0") this.fit();
    else if (key === " ") { this.#space = true; this.#request(); }
    else if (key === "Enter" && this.#tool !== "pan") this.#press();
    else if (key === "Escape" && this.#gesture) this.#cancel();
    else if ((key === "Escape" || key === "Delete" || key === "Backspace") && pending) this.#commit({ pending: null });
    else if ((key === "Delete" || key === "Backspace") && pairs.length) this.deletePair(pairs.length - 1);
    else return false;
    return true;
  }

  /** Move the crosshair, and the view where it would leave it. */
  #step([dx, dy], by) {
    this.#keyboard = true;
    this.#cursor = this.#pixel([this.#cursor[0] + dx * by, this.#cursor[1] + dy * by]);
    const [x, y] = this.#centre(this.#cursor), { clientWidth: W, clientHeight: H } = this.#canvas;
    const [px, py] = [clamp(x, MARGIN, W - MARGIN) - x, clamp(y, MARGIN, H - MARGIN) - y];
    if (Math.abs(px) > this.#scale || Math.abs(py) > this.#scale) this.#pan(px, py);
    this.#request();
  }

  /** What a click does, at the crosshair. */
  #press() {
    this.#keyboard = true;
    const [x, y] = this.#cursor;
    if (this.#tool === "points") return this.#place([x, y]);
    const stroke = { erase: this.#tool === "eraser", size: this.#brushSize, points: [[x + 0.5, y + 0.5]] };
    this.#commit({ strokes: [...this.#state.strokes, stroke] });
  }

  // ---- drawing ----

  /** Draw at the next frame, once however often asked. */
  #request() {
    this.#frame ||= requestAnimationFrame(() => { this.#frame = 0; this.#draw(); });
  }

  #draw() {
    const canvas = this.#canvas, ctx = this.#ctx, ratio = window.devicePixelRatio || 1;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    const [W, H] = [Math.round(w * ratio), Math.round(h * ratio)];
    if (canvas.width !== W || canvas.height !== H) Object.assign(canvas, { width: W, height: H });
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, w, h);
    if (!this.#picture) return;

    const box = [...this.#origin, this.width * this.#scale, this.height * this.#scale];
    ctx.imageSmoothingEnabled = this.#scale <= 4;
    ctx.drawImage(this.#picture, ...box);
    ctx.globalAlpha = this.#maskOpacity;
    ctx.drawImage(this.#mask.canvas, ...box);
    ctx.globalAlpha = 1;

    const { pairs, pending } = this.#state;
    const pointer = this.#keyboard ? this.#centre(this.#cursor) : this.#hover;
    pairs.forEach(([a, b]) => arrow(ctx, this.#centre(a), this.#centre(b)));
    pairs.forEach(([a, b], i) => {
      dot(ctx, this.#centre(a), HANDLE);
      dot(ctx, this.#centre(b), TARGET);
      label(ctx, this.#centre(a), i + 1);
    });
    if (pending) {
      const from = this.#centre(pending);
      if (pointer && this.#tool === "points") haloed(ctx, (c) => { c.moveTo(...from); c.lineTo(...pointer); }, [5, 4]);
      dot(ctx, from, HANDLE);
      label(ctx, from, pairs.length + 1);
    }
    const brush = this.#tool === "brush" || this.#tool === "eraser";
    if (brush && pointer) haloed(ctx, (c) => c.arc(...pointer, (this.#brushSize / 2) * this.#scale, 0, 2 * Math.PI));
    if (this.#keyboard) crosshair(ctx, pointer);
    canvas.style.cursor = this.#cursorStyle(brush);
  }

  #cursorStyle(brush) {
    if (this.#gesture?.kind === "pan") return "grabbing";
    if (this.#space || this.#tool === "pan") return "grab";
    if (brush) return "crosshair"; // the circle alone is hard to see when the brush is small
    return this.#gesture?.now || (this.#hover && this.#hit(this.#hover)) ? "move" : "crosshair";
  }
}

// What may change: strokes over a base layer, kept at the picture's own size. Its alpha says what is painted.

const TINT = "rgb(255,170,0)";

/** An off-screen canvas of the given size. */
export function sheet(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

export class Mask {
  #ctx;

  constructor(width, height) {
    this.canvas = sheet(width, height);
    this.#ctx = this.canvas.getContext("2d");
  }

  /** Draw it anew. */
  draw({ strokes, base }) {
    this.#ctx.globalCompositeOperation = "source-over";
    this.#ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (base) this.#ctx.drawImage(base, 0, 0);
    for (const stroke of strokes) this.paint(stroke);
  }

  /** Draw a stroke, from its given point on. */
  paint({ erase, size, points }, from = 0) {
    const ctx = this.#ctx;
    ctx.globalCompositeOperation = erase ? "destination-out" : "source-over";
    ctx.fillStyle = ctx.strokeStyle = TINT;
    ctx.lineWidth = size;
    ctx.lineCap = ctx.lineJoin = "round";
    ctx.beginPath(); // a dot of its own: a line of no length may draw nothing
    ctx.arc(...points[from], size / 2, 0, 2 * Math.PI);
    ctx.fill();
    ctx.beginPath();
    for (const p of points.slice(Math.max(from - 1, 0))) ctx.lineTo(...p);
    ctx.stroke();
  }

  /** A base layer out of a grey picture: its grey becomes alpha. */
  layer(image) {
    const base = sheet(this.canvas.width, this.canvas.height), ctx = base.getContext("2d");
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(image, 0, 0, base.width, base.height);
    const pixels = ctx.getImageData(0, 0, base.width, base.height), { data } = pixels;
    for (let i = 0; i < data.length; i += 4) data[i + 3] = Math.round((data[i] * data[i + 3]) / 255);
    ctx.putImageData(pixels, 0, 0);
    ctx.globalCompositeOperation = "source-in";
    ctx.fillStyle = TINT;
    ctx.fillRect(0, 0, base.width, base.height);
    return base;
  }

  /** A base layer with painted and unpainted swapped. */
  inverted() {
    const base = sheet(this.canvas.width, this.canvas.height), ctx = base.getContext("2d");
    ctx.fillStyle = TINT;
    ctx.fillRect(0, 0, base.width, base.height);
    ctx.globalCompositeOperation = "destination-out";
    ctx.drawImage(this.canvas, 0, 0);
    return base;
  }

  /** A PNG, white on black, or null if nothing is painted: the eraser may have taken all back. */
  async toBlob() {
    const { width, height } = this.canvas;
    const image = this.#ctx.getImageData(0, 0, width, height), { data } = image;
    let painted = false;
    // Two-valued, so that soft brush edges mean the same to every reader.
    for (let i = 0; i < data.length; i += 4) {
      data[i] = data[i + 1] = data[i + 2] = data[i + 3] > 127 ? 255 : 0;
      data[i + 3] = 255;
      painted ||= data[i] > 0;
    }
    if (!painted) return null;
    const out = sheet(width, height);
    out.getContext("2d").putImageData(image, 0, 0);
    return new Promise((resolve) => out.toBlob(resolve, "image/png"));
  }
}

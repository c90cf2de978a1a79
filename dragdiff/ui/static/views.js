// Views of results: the moving picture, the curve, source against result. They only show what they are given.

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** px from each handle to its target at one step. */
const distances = (handles, points) => handles.map(([x, y], i) => Math.hypot(points[i][1][0] - x, points[i][1][1] - y));

/** The preview with handles on their way; `image` is loaded. */
export function drawLive(canvas, image, size, way, points) {
  const scale = Math.max(1, Math.round(420 / size[0]));
  canvas.width = size[0] * scale;
  canvas.height = size[1] * scale;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const at = ([x, y]) => [(x + 0.5) * scale, (y + 0.5) * scale];
  const unit = canvas.width / 80;
  points.forEach(([, target], i) => {
    pen.lineWidth = unit / 2;
    pen.strokeStyle = "#e41a1c";
    pen.beginPath();
    way.forEach(([, handles]) => pen.lineTo(...at(handles[i])));
    pen.stroke();
    const now = way.length ? way.at(-1)[1][i] : points[i][0];
    for (const [place, colour] of [[target, "#1f5adc"], [now, "#e41a1c"]]) {
      pen.beginPath();
      pen.arc(...at(place), unit, 0, 7);
      pen.fillStyle = colour;
      pen.fill();
      pen.lineWidth = unit / 3;
      pen.strokeStyle = "white";
      pen.stroke();
    }
  });
}

/** One line for each pair. */
export function drawCurve(svg, way, points) {
  const all = way.map(([, handles]) => distances(handles, points));
  const most = Math.max(1, ...all.flat());
  const x = (step) => 30 + (260 * step) / Math.max(1, way.at(-1)[0]);
  const y = (d) => 80 - (70 * d) / most;
  svg.replaceChildren();
  const add = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    svg.append(element);
  };
  add("path", { d: "M30 8V80H292", fill: "none", stroke: "currentColor" });
  add("text", { x: 26, y: 16, "font-size": 9, "text-anchor": "end", fill: "currentColor" }, most.toFixed(0));
  add("text", { x: 26, y: 82, "font-size": 9, "text-anchor": "end", fill: "currentColor" }, "0");
  points.forEach((_, i) => {
    const line = all.map((d, k) => `${x(way[k][0]).toFixed(1)},${y(d[i]).toFixed(1)}`).join(" ");
    add("polyline", { points: line, fill: "none", stroke: "#e41a1c", "stroke-width": 1.5 });
    if (points.length > 1) add("text", { x: 33 + 8 * i, y: y(all[0][i]) - 3, "font-size": 9, fill: "currentColor" }, i + 1);
  });
}

/** A curve as a picture of its own. */
export function curve(way, points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 300 90", role: "img", "aria-label": "Distance to the target, px, by step" })) svg.setAttribute(key, value);
  drawCurve(svg, way, points);
  return svg;
}

/** Source and result in one place, parted by a slider. */
export function slider(left, right) {
  const over = make("img", { className: "over", src: left, alt: "source" });
  const range = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: "How much of the source is shown" });
  const part = () => (over.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`);
  range.addEventListener("input", part);
  part();
  const both = make("div", { className: "both" }, make("img", { src: right, alt: "edited" }), over);
  return make("div", { className: "slider" }, both, range);
}

/** How far each pixel has changed: black is not at all; the brightest change is white. */
export async function difference(left, right) {
  const load = (src) => new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = src;
  });
  const [a, b] = await Promise.all([load(left), load(right)]);
  const canvas = make("canvas", { width: a.naturalWidth, height: a.naturalHeight, className: "difference" });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const pixels = (image) => {
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    return pen.getImageData(0, 0, canvas.width, canvas.height);
  };
  const one = pixels(a), other = pixels(b);
  const change = new Float32Array(one.data.length / 4);
  for (let i = 0; i < change.length; i++)
    for (let c = 0; c < 3; c++) change[i] += Math.abs(one.data[4 * i + c] - other.data[4 * i + c]) / 3;
  const most = change.reduce((x, y) => Math.max(x, y), 1);
  for (let i = 0; i < change.length; i++) one.data.fill((255 * change[i]) / most, 4 * i, 4 * i + 3);
  pen.putImageData(one, 0, 0);
  return make("div", {}, canvas, make("p", { className: "soft", textContent: `brightest: ${most.toFixed(0)} of 255 levels` }));
}

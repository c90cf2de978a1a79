// What is drawn over the picture: sizes are in CSS px, whatever the zoom.

export const HANDLE = "#e41a1c", TARGET = "#1f5adc";
const INK = "#222";
const DOT = 6; // radius of a point

/** Stroke a path dark on white, to be seen on any picture. */
export function haloed(ctx, path, dash = []) {
  ctx.beginPath();
  path(ctx);
  ctx.lineCap = ctx.lineJoin = "round";
  for (const [style, width, pattern] of [["#fff", 4.5, []], [INK, 1.75, dash]]) {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.setLineDash(pattern);
    ctx.stroke();
  }
  ctx.setLineDash([]);
}

export function arrow(ctx, a, b) {
  const length = Math.hypot(a[0] - b[0], a[1] - b[1]), angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
  const along = (p, turn, by) => [p[0] + by * Math.cos(angle + turn), p[1] + by * Math.sin(angle + turn)];
  if (length < 1) return;
  const tip = along(b, 0, -(DOT + 3)); // clear of the target's dot
  haloed(ctx, (c) => {
    c.moveTo(...a);
    c.lineTo(...b);
    if (length < 3 * DOT) return; // no room for a head
    c.moveTo(...along(tip, 2.6, 9));
    c.lineTo(...tip);
    c.lineTo(...along(tip, -2.6, 9));
  });
}

export function dot(ctx, [x, y], colour) {
  for (const [style, radius] of [["#fff", DOT + 1.5], [colour, DOT]]) {
    ctx.fillStyle = style;
    ctx.beginPath();
    ctx.arc(x, y, radius, 0, 2 * Math.PI);
    ctx.fill();
  }
}

export function label(ctx, [x, y], text) {
  ctx.font = "bold 11px system-ui, sans-serif";
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const width = ctx.measureText(text).width + 7;
  const [cx, cy] = [x + DOT + 3 + width / 2, y - DOT - 8];
  ctx.fillStyle = "rgba(255,255,255,.9)";
  ctx.fillRect(cx - width / 2, cy - 7.5, width, 15);
  ctx.fillStyle = INK;
  ctx.fillText(text, cx, cy + 0.5);
}

export function crosshair(ctx, [x, y]) {
  haloed(ctx, (c) => {
    for (const [dx, dy] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
      c.moveTo(x + 4 * dx, y + 4 * dy);
      c.lineTo(x + 13 * dx, y + 13 * dy);
    }
  });
}

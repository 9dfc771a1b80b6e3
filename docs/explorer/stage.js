// The picture of the first view: Q left, K above, V below, S in the middle, m, l and O right, one square a number.
// Saturated squares are in fast memory, pale ones in slow memory.
"use strict";

const SVG = {
  make(name, attributes = {}, parent = null, text = null) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  },
};

class Stage {
  constructor(element, choose) {
    this.element = element;
    this.choose = choose; // called with the row that was clicked
    new ResizeObserver(() => this.scene && this.fit()).observe(element);
    element.addEventListener("click", (event) => {
      if (!this.scene) return;
      const y = event.clientY - this.svg.getBoundingClientRect().top;
      const row = this.rowAt.findIndex((edge) => y < edge + this.unit);
      if (row >= 0 && y >= 0) this.choose(row);
    });
  }

  // scene: {p, x, walk, wanted}
  build(scene) {
    this.scene = scene;
    const range = (rows) => {
      const all = rows.flat().filter(Number.isFinite);
      const [low, high] = [Math.min(...all), Math.max(...all)];
      return (value) => (Number.isFinite(value) ? (high > low ? (value - low) / (high - low) : 1) : 0);
    };
    const scores = scene.walk.steps.filter((s) => s.kind === "score").map((s) => s.s.flat());
    this.tone = { q: range(scene.x.q), k: range(scene.x.k), v: range(scene.x.v), o: range(scene.wanted) };
    this.tone.s = range(scores.length ? scores : [[0]]);
    this.tone.l = (value) => value / scene.p.n;
    this.size = this.svg = this.last = null; // of another scene; nothing is drawn while the view is hidden
    this.fit();
  }

  fit() {
    const width = Math.floor(this.element.clientWidth);
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const key = `${width} ${window.innerWidth} ${window.innerHeight} ${rem} ${Text.language}`;
    if (width === 0 || key === this.size) return;
    this.size = key;
    this.draw(width, rem);
    if (this.last) this.show(...this.last);
  }

  draw(width, rem) {
    const { m, n, d, bm, bn } = this.scene.p;
    const font = Math.max(12, 0.8 * rem);
    const gap = Math.max(8, 0.6 * rem);
    const label = 1.7 * font;
    const mark = font; // the arrow of the chosen row
    const crack = Math.max(n / bn, m / bm) > 12 ? 1 : 3; // between tiles
    const cracks = (count, tile) => crack * (Math.ceil(count / tile) - 1);
    const wide = (width - mark - 3.5 * gap - cracks(n, bn)) / (2 * d + n + 2);
    // beside the words the picture ends above the controls; above the words it may be as high as it is wide
    const beside = window.innerWidth >= 60 * rem;
    const start = this.element.getBoundingClientRect().top + window.scrollY;
    const room = beside ? Math.max(18 * rem, window.innerHeight - start - 7.2 * rem) : width;
    const high = (room - 2 * label - cracks(m, bm)) / (2 * d + m);
    const u = (this.unit = Math.max(3, Math.floor(Math.min(wide, high, 2.4 * rem) * 2) / 2));
    const along = (count, tile, from) => Array.from({ length: count }, (_, i) => from + i * u + crack * Math.floor(i / tile));
    const left = mark + Math.max(0, (width - mark - u * (2 * d + n + 2) - 3.5 * gap - cracks(n, bn)) / 2);
    const xs = { q: along(d, d, left), s: along(n, bn, left + d * u + gap) };
    const after = xs.s[n - 1] + u + gap;
    xs.m = [after];
    xs.l = [after + u + gap / 2];
    xs.o = along(d, d, after + 2 * u + 1.5 * gap);
    const ys = { k: along(d, d, 0), s: along(m, bm, d * u + label) };
    ys.v = along(d, d, ys.s[m - 1] + u + label);
    this.rowAt = ys.s;

    const svg = (this.svg = SVG.make("svg", { width, height: ys.v[d - 1] + u, "aria-hidden": "true" }));
    const defs = SVG.make("defs", {}, svg);
    for (const [id, step] of [["hatch", 5], ["dense", 3]]) {
      const pattern = SVG.make("pattern", { id, width: step, height: step, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, defs);
      SVG.make("rect", { width: 1, height: step, class: "hatch-line" }, pattern);
    }
    const square = Math.max(u - 1, u * 0.85);
    const block = (name, rows, columns, x, y) =>
      Array.from({ length: rows }, (_, i) =>
        Array.from({ length: columns }, (_, j) =>
          SVG.make("rect", { x: x(i, j), y: y(i, j), width: square, height: square, rx: u > 9 ? 1.5 : 0, class: `cell ${name}` }, svg)));
    this.cells = {
      q: block("q", m, d, (i, j) => xs.q[j], (i) => ys.s[i]),
      k: block("k", n, d, (i) => xs.s[i], (i, j) => ys.k[j]),
      v: block("v", n, d, (i) => xs.s[i], (i, j) => ys.v[j]),
      m: block("state", m, 1, () => xs.m[0], (i) => ys.s[i]),
      l: block("state", m, 1, () => xs.l[0], (i) => ys.s[i]),
      o: block("o", m, d, (i, j) => xs.o[j], (i) => ys.s[i]),
    };
    this.drawScores(svg, xs.s, ys.s, square, u);
    this.frames = Object.fromEntries(["q", "k", "v", "s", "o", "state"].map((name) => [name, SVG.make("rect", { class: `frame ${name}`, rx: 2 }, svg)]));
    this.place = { xs, ys, u };
    this.arrow = SVG.make("path", { class: "arrow", d: `M 0 0 l ${font * 0.6} ${font * 0.4} l ${-font * 0.6} ${font * 0.4} z` }, svg);
    this.arrowAt = (row) => `translate(${left - font * 0.9} ${ys.s[row] + u / 2 - font * 0.4})`;

    const words = (key, x, y, anchor, name) => SVG.make("text", { x, y, "text-anchor": anchor, "font-size": font, class: name }, svg, key);
    const above = ys.s[0] - 0.5 * font;
    words(Text.t("queries"), xs.q[0], above, "start", "q");
    words(Text.t("keys"), xs.s[0] - gap, ys.k[0] + (d * u) / 2 + font / 3, "end", "k");
    words(Text.t("values"), xs.s[0] - gap, ys.v[0] + (d * u) / 2 + font / 3, "end", "v");
    words("m", xs.m[0] + u / 2, above, "middle", "plain");
    words("l", xs.l[0] + u / 2, above, "middle", "plain");
    words(Text.t("output"), xs.o[0], above, "start", "o");
    this.scoreLabel = words("", xs.s[0], above, "start", "plain");
    this.scoreRoom = xs.s[n - 1] + u - xs.s[0] > 10 * font;
    this.element.replaceChildren(svg);
  }

  // Score squares that are never made have no square but a hatch; skipped tiles a denser one over the whole tile.
  drawScores(svg, xs, ys, square, u) {
    const { p } = this.scene;
    this.cells.s = Array.from({ length: p.m }, () => new Array(p.n).fill(null));
    for (let top = 0; top < p.m; top += p.bm) {
      const bottom = Math.min(top + p.bm, p.m);
      const [first, last] = Attention.visits(p, top, bottom);
      for (let start = 0; start < p.n; start += p.bn) {
        const end = Math.min(start + p.bn, p.n);
        if (start / p.bn < first || start / p.bn >= last) {
          const width = xs[end - 1] + u - xs[start] - 1;
          SVG.make("rect", { x: xs[start], y: ys[top], width, height: ys[bottom - 1] + u - ys[top] - 1, class: "skip-tile" }, svg);
          continue;
        }
        for (let i = top; i < bottom; i++) {
          for (let j = start; j < end; j++) {
            const seen = Attention.sees(p, i, j);
            const node = SVG.make("rect", { x: xs[j], y: ys[i], width: square, height: square, rx: u > 9 ? 1.5 : 0, class: seen ? "cell s" : "mask-cell" }, svg);
            if (seen) this.cells.s[i][j] = node;
          }
        }
      }
    }
  }

  // What of each matrix is where after `step`; `row` has the arrow.
  show(step, row) {
    this.last = [step, row];
    if (!this.svg) return;
    const { p, x, walk } = this.scene;
    const within = (i, [lo, hi]) => i >= lo && i < hi;
    const paint = (node, place, tone) => {
      node.setAttribute("data-at", place);
      node.style.fillOpacity = place === "fast" ? 0.22 + 0.78 * tone : place === "slow" ? 0.1 + 0.3 * tone : "";
    };
    const done = step.kind === "done";
    const [from] = done ? [p.m] : step.rows;
    for (let i = 0; i < p.m; i++) {
      const active = within(i, step.rows);
      const r = i - step.rows[0];
      const written = i < from || (active && step.kind === "write");
      for (let c = 0; c < p.d; c++) {
        paint(this.cells.q[i][c], active ? "fast" : "slow", this.tone.q(x.q[i][c]));
        const value = written ? walk.out[i][c] : active && step.l[r] > 0 ? step.acc[r][c] / step.l[r] : null;
        paint(this.cells.o[i][c], value === null ? "empty" : written ? "slow" : "fast", value === null ? 0 : this.tone.o(value));
      }
      const started = active && step.kind !== "write";
      paint(this.cells.m[i][0], started && step.m[r] > -Infinity ? "fast" : "empty", started ? this.tone.s(step.m[r]) : 0);
      paint(this.cells.l[i][0], started && step.l[r] > 0 ? "fast" : "empty", started ? this.tone.l(step.l[r]) : 0);
      for (let j = 0; j < p.n; j++) {
        const node = this.cells.s[i][j];
        if (!node) continue;
        const made = active && step.s && within(j, step.cols);
        const past = written || (active && j < step.seen);
        if (made) paint(node, "fast", step.p ? step.p[r][j - step.cols[0]] : this.tone.s(step.s[r][j - step.cols[0]]));
        else paint(node, past ? "past" : "empty", 0);
      }
    }
    for (let j = 0; j < p.n; j++) {
      for (let c = 0; c < p.d; c++) {
        const place = within(j, step.cols) ? "fast" : "slow";
        paint(this.cells.k[j][c], place, this.tone.k(x.k[j][c]));
        paint(this.cells.v[j][c], place, this.tone.v(x.v[j][c]));
      }
    }
    this.frame(step);
    this.scoreLabel.textContent = this.scoreRoom ? Text.t(step.p ? "weights" : "scores") : step.p ? "P" : "S";
    this.arrow.setAttribute("transform", this.arrowAt(row));
  }

  frame(step) {
    const { xs, ys, u } = this.place;
    const whole = (edges) => [0, edges.length];
    const put = (name, on, x, [x0, x1], y, [y0, y1]) => {
      const frame = this.frames[name];
      frame.style.display = on ? "" : "none";
      if (!on) return;
      const box = { x: x[x0] - 2, y: y[y0] - 2, width: x[x1 - 1] + u - x[x0] + 3, height: y[y1 - 1] + u - y[y0] + 3 };
      for (const [key, value] of Object.entries(box)) frame.setAttribute(key, value);
    };
    const tile = step.tile >= 0;
    const keys = step.cols[1] > step.cols[0];
    put("q", tile, xs.q, whole(xs.q), ys.s, step.rows);
    put("o", tile, xs.o, whole(xs.o), ys.s, step.rows);
    put("state", tile && step.kind !== "write", [xs.m[0], xs.l[0]], [0, 2], ys.s, step.rows);
    put("k", keys, xs.s, step.cols, ys.k, whole(ys.k));
    put("v", keys, xs.s, step.cols, ys.v, whole(ys.v));
    put("s", Boolean(step.s), xs.s, step.cols, ys.s, step.rows);
  }
}

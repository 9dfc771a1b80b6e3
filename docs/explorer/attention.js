// Attention on small numbers: inputs from a seed, the walk of flash attention over tiles, the full softmax.
// No drawing here. Row i of M sees key j of N iff i + N - M - left <= j <= i + N - M + right; null is unbounded.
"use strict";

const Attention = (() => {
  const ITEM = 2; // bytes of an input or output element; lse takes 4 a row

  function sees(p, i, j) {
    const diagonal = i + p.n - p.m;
    return (p.left === null || j >= diagonal - p.left) && (p.right === null || j <= diagonal + p.right);
  }

  // Numbers in (0, 1) from a 32-bit seed (mulberry32), then normal ones by Box and Muller.
  function normals(seed) {
    let state = seed >>> 0;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
    return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  }

  function inputs(p) {
    const next = normals(p.seed);
    const matrix = (rows) => Array.from({ length: rows }, () => Array.from({ length: p.d }, next));
    return { q: matrix(p.m), k: matrix(p.n), v: matrix(p.n) };
  }

  // Key tiles [lo, hi) that a tile of query rows [start, end) visits: those between its first and last visible key.
  function visits(p, start, end) {
    const low = p.left === null ? 0 : Math.max(0, start + p.n - p.m - p.left);
    const high = p.right === null ? p.n : Math.min(p.n, end + p.n - p.m + p.right);
    return high > low ? [Math.floor(low / p.bn), Math.ceil(high / p.bn)] : [0, 0];
  }

  // The whole computation, one record a step. m, l and acc are those of the tile's rows after the step.
  function walk(p, x) {
    const scale = 1 / Math.sqrt(p.d);
    const steps = [];
    const out = [];
    const lse = [];
    const tally = { read: 0, written: 0 };
    const record = (kind, more) => steps.push({ kind, ...tally, ...more });
    record("start", { tile: -1, rows: [0, 0], cols: [0, 0], seen: 0 });
    for (let tile = 0; tile * p.bm < p.m; tile++) {
      const rows = [tile * p.bm, Math.min((tile + 1) * p.bm, p.m)];
      const height = rows[1] - rows[0];
      const [first, last] = visits(p, ...rows);
      const where = { tile, rows, visited: [first, last] };
      let m = new Array(height).fill(-Infinity);
      let l = new Array(height).fill(0);
      let acc = Array.from({ length: height }, () => new Array(p.d).fill(0));
      tally.read += height * p.d * ITEM;
      record("query", { ...where, cols: [0, 0], seen: first * p.bn, m, l, acc });
      for (let block = first; block < last; block++) {
        const cols = [block * p.bn, Math.min((block + 1) * p.bn, p.n)];
        const here = { ...where, block, cols };
        tally.read += 2 * (cols[1] - cols[0]) * p.d * ITEM;
        record("load", { ...here, seen: cols[0], m, l, acc });

        const s = m.map((_, r) => score(p, x, scale, rows[0] + r, cols));
        record("score", { ...here, seen: cols[0], m, l, acc, s });

        const before = m;
        m = before.map((old, r) => Math.max(old, ...s[r]));
        // A row that has seen no key keeps -inf; subtracting that from -inf would give NaN, so subtract 0.
        const base = m.map((value) => (value === -Infinity ? 0 : value));
        const alpha = before.map((old, r) => Math.exp(old - base[r]));
        record("max", { ...here, seen: cols[0], m, l, acc, s, before, alpha });

        const weights = s.map((row, r) => row.map((value) => Math.exp(value - base[r])));
        const sums = weights.map((row) => row.reduce((a, b) => a + b, 0));
        const oldSum = l;
        l = oldSum.map((old, r) => alpha[r] * old + sums[r]);
        acc = acc.map((row, r) =>
          row.map((old, c) => alpha[r] * old + weights[r].reduce((a, w, j) => a + w * x.v[cols[0] + j][c], 0)));
        record("add", { ...here, seen: cols[1], m, l, acc, s, before, alpha, p: weights, sums, oldSum });
      }
      acc.forEach((row, r) => {
        out.push(row.map((value) => (l[r] === 0 ? 0 : value / l[r])));
        lse.push(l[r] === 0 ? -Infinity : m[r] + Math.log(l[r]));
      });
      tally.written += height * (p.d * ITEM + 4);
      record("write", { ...where, cols: [0, 0], seen: p.n, m, l, acc });
    }
    record("done", { tile: -1, rows: [0, 0], cols: [0, 0], seen: p.n });
    return { steps, out, lse };
  }

  function score(p, x, scale, i, [lo, hi]) {
    const row = [];
    for (let j = lo; j < hi; j++) {
      let dot = 0;
      for (let c = 0; c < p.d; c++) dot += x.q[i][c] * x.k[j][c];
      row.push(sees(p, i, j) ? scale * dot : -Infinity);
    }
    return row;
  }

  // The definition, with none of the above: all scores of row i at once, over the keys before `limit`.
  function full(p, x, i, limit = p.n) {
    const keys = [...Array(Math.min(limit, p.n)).keys()].filter((j) => sees(p, i, j));
    if (keys.length === 0) return new Array(p.d).fill(0);
    const s = keys.map((j) => x.k[j].reduce((sum, kc, c) => sum + kc * x.q[i][c], 0) / Math.sqrt(p.d));
    const top = Math.max(...s);
    const e = s.map((value) => Math.exp(value - top));
    const total = e.reduce((a, b) => a + b, 0);
    return x.v[0].map((_, c) => keys.reduce((sum, j, n) => sum + (e[n] / total) * x.v[j][c], 0));
  }

  function difference(a, b) {
    return a.reduce((most, value, c) => Math.max(most, Math.abs(value - b[c])), 0);
  }

  return { ITEM, sees, inputs, visits, walk, full, difference };
})();

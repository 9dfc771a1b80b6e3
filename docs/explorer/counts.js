// What attention moves and how long it takes: the closed forms of flash_attn/cost/counts.py and the schedule of
// flash_attn/cost/kernels.py on the numbers of data.js. A test holds both to the Python.
"use strict";

const Counts = (() => {
  // Pairs with 0 <= i < m, 0 <= j < n, j <= i + shift.
  function below(m, n, shift) {
    const first = Math.min(Math.max(-shift, 0), m);
    const full = Math.min(Math.max(n - 1 - shift, first), m);
    const ramp = full - first;
    return (ramp * (first + full - 1 + 2 * (shift + 1))) / 2 + (m - full) * n;
  }

  function visiblePairs(m, n, left, right) {
    const upper = right === null ? m * n : below(m, n, n - m + right);
    const lower = left === null ? 0 : below(m, n, n - m - left - 1);
    return Math.max(0, upper - lower);
  }

  function visibleKeys(m, n, left, right) {
    const low = left === null ? 0 : Math.max(0, n - m - left);
    const high = right === null ? n : Math.min(n, n + right);
    return Math.max(0, high - low);
  }

  // For each query tile: [key tiles visited, how many of them hold a pair that must be masked].
  function tileSteps(m, n, left, right, bm, bn) {
    const found = [];
    for (let start = 0; start < m; start += bm) {
      const last = Math.min(start + bm, m) - 1;
      let low = left === null ? 0 : Math.max(0, start + n - m - left);
      let high = right === null ? n : Math.min(n, last + n - m + right + 1);
      const steps = Math.max(0, Math.ceil(high / bn) - Math.floor(low / bn));
      low = left === null ? 0 : Math.max(0, last + n - m - left);
      high = right === null ? n : Math.min(n, start + n - m + right + 1);
      const whole = Math.max(0, Math.floor(high / bn) - Math.ceil(low / bn));
      found.push([steps, steps - Math.min(whole, steps)]);
    }
    return found;
  }

  // a: {batch, heads, m, n, d, left, right, direction}. Bytes that must move, by tensor, with and without the scores.
  function count(a) {
    const size = FLASH_DATA.itemsize;
    const forward = a.direction === "forward";
    const pairs = visiblePairs(a.m, a.n, a.left, a.right) * a.batch * a.heads;
    const rows = a.batch * a.heads * a.m;
    const query = rows * a.d * size;
    const keys = a.batch * a.heads * visibleKeys(a.m, a.n, a.left, a.right) * a.d * size;
    const read = { q: query, k: keys, v: keys };
    if (!forward) Object.assign(read, { out: query, dout: query, lse: rows * 4 });
    const written = forward ? { out: query, lse: rows * 4 } : { dq: query, dk: keys, dv: keys };
    const scores = a.batch * a.heads * a.m * a.n * size;
    const sum = (tensors) => Object.values(tensors).reduce((x, y) => x + y, 0);
    const flash = { read: sum(read), written: sum(written) };
    flash.total = flash.read + flash.written;
    // Forward: S and P written and read. Backward: P read, dP written and read, dS written and read twice.
    const [more, less] = forward ? [2, 2] : [4, 2];
    const standard = { read: flash.read + more * scores, written: flash.written + less * scores };
    standard.total = standard.read + standard.written;
    const macs = pairs * a.d * (forward ? 2 : 5);
    return {
      pairs, rows, read, written, scores, flash, standard, exps: pairs,
      matmulFlops: 2 * macs,
      flops: 2 * macs + FLASH_DATA.softmax_ops[a.direction] * pairs,
    };
  }

  // What a walk over tiles loads and stores when nothing is cached between query tiles.
  function streamed(p) {
    let read = p.m * p.d * Attention.ITEM;
    for (let start = 0; start < p.m; start += p.bm) {
      const [first, last] = Attention.visits(p, start, Math.min(start + p.bm, p.m));
      const keys = Math.min(last * p.bn, p.n) - first * p.bn;
      read += 2 * Math.max(0, keys) * p.d * Attention.ITEM;
    }
    return { read, written: p.m * (p.d * Attention.ITEM + 4) };
  }

  // When the last of `workers` finishes, if each takes the longest item that is left as soon as it is free.
  function makespan(given, workers) {
    const items = given.filter(([, copies]) => copies).sort((x, y) => y[0] - x[0]);
    if (items.length === 0) return 0;
    const total = items.reduce((sum, [cost, copies]) => sum + cost * copies, 0);
    const number = items.reduce((sum, [, copies]) => sum + copies, 0);
    const longest = items[0][0];
    const shortest = items[items.length - 1][0];
    if (number <= workers) return longest;
    if (longest === shortest) return Math.ceil(number / workers) * longest;
    if (number > FLASH_DATA.simulated) return total / workers + shortest / 2;
    const free = new Array(workers).fill(0); // a heap, the first to be free on top
    for (const [cost, copies] of items) {
      for (let copy = 0; copy < copies; copy++) {
        const value = free[0] + cost;
        let at = 0;
        for (let child = 1; child < workers; child = 2 * at + 1) {
          if (child + 1 < workers && free[child + 1] < free[child]) child++;
          if (free[child] >= value) break;
          free[at] = free[child];
          at = child;
        }
        free[at] = value;
      }
    }
    return Math.max(...free);
  }

  function workItems(m, n, left, right, bm, bn, copies) {
    const found = new Map();
    for (const [steps, masked] of tileSteps(m, n, left, right, bm, bn)) {
      const key = `${steps},${masked}`;
      const item = found.get(key) ?? { steps, masked, copies: 0 };
      item.copies += copies;
      found.set(key, item);
    }
    return [...found.values()];
  }

  // The kernels of a call: {items, share, flops, exps, bytes} a step, and memory traffic.
  function passes(a, work, gpu) {
    const size = FLASH_DATA.itemsize;
    const heads = a.batch * a.heads;
    const token = 2 * a.d * size;
    const mask = a.right === null ? "full" : "causal";
    const tiles = gpu.tiles[a.direction][mask][a.d][FLASH_DATA.sizes.length.indexOf(a.n)];
    const [[bm, bn, share]] = tiles;
    const rowItems = ([x, y]) => workItems(a.m, a.n, a.left, a.right, x, y, heads);
    const only = (memory) => ({ items: [], share: 1, flops: 0, exps: 0, bytes: 0, memory });
    if (a.direction === "forward") {
      const flops = 4 * bm * bn * a.d;
      return [{ items: rowItems(tiles[0]), share, flops, exps: bm * bn, bytes: bn * token, memory: work.flash.total }];
    }
    // An item is a tile of keys: from the keys the mask is the same band with its sides exchanged.
    const keyItems = workItems(a.n, a.m, a.right, a.left, bn, bm, heads);
    const { q, k, v, out, dout, lse } = work.read;
    const { dq, dk, dv } = work.written;
    const reads = q + k + v + dout;
    const query = bm * (token + 8);
    const before = out + dout + 3 * lse;
    const hopper = gpu.backend === "hopper";
    if (hopper && a.d <= 128) {
      const wide = work.rows * a.d * 4; // dQ in fp32, added up in L2
      const bytes = query + bm * a.d * 4;
      const main = { items: keyItems, share: 1, flops: 10 * bm * bn * a.d, exps: bm * bn, bytes, memory: reads + dk + dv };
      return [only(before + wide), main, only(wide + dq)];
    }
    const [rm, rn, rowShare] = hopper ? [128, bn, 1] : tiles[1];
    return [
      only(before),
      { items: keyItems, share, flops: 8 * bm * bn * a.d, exps: bm * bn, bytes: query, memory: reads + dk + dv },
      { items: rowItems([rm, rn]), share: rowShare, flops: 6 * rm * rn * a.d, exps: rm * rn, bytes: rn * token, memory: reads + dq },
    ];
  }

  // Seconds by cause, of self-attention (m = n, one of the lengths of data.js) on a GPU of data.js.
  function time(a, name) {
    const gpu = FLASH_DATA.gpus[name];
    const c = FLASH_DATA.families[gpu.backend][a.direction];
    const work = count(a);
    const all = passes(a, work, gpu);
    const parts = { matrix: 0, softmax: 0, overhead: 0, imbalance: 0, memory: 0, l2: 0, launch: gpu.launch * all.length };
    for (const one of all) {
      const matrix = one.flops / ((c.matrix * gpu.matrix) / gpu.processors);
      const softmax = (one.exps * c.exp) / (gpu.exps / gpu.processors);
      // Few programs spread over the processors before any two share one.
      const number = one.items.reduce((sum, item) => sum + item.copies, 0);
      const share = Math.max(1, Math.min(one.share, Math.ceil(number / gpu.processors)));
      const l2 = one.bytes / share / ((gpu.l2_bandwidth * FLASH_DATA.sustained.l2) / gpu.processors);
      const step = Math.max(matrix + softmax + c.step, l2);
      const workers = gpu.processors * share;
      const items = one.items.map((item) => [(item.steps * step + item.masked * c.mask) * share + c.tile, item.copies]);
      const total = items.reduce((sum, [cost, copies]) => sum + cost * copies, 0) / workers;
      const steps = one.items.reduce((sum, item) => sum + item.steps * item.copies, 0) / gpu.processors;
      const busy = makespan(items, workers);
      parts.matrix += steps * matrix;
      parts.softmax += steps * softmax;
      parts.l2 += steps * (step - matrix - softmax - c.step);
      parts.overhead += total - steps * (step - c.step);
      parts.imbalance += busy - total;
      parts.memory += Math.max(0, one.memory / (gpu.bandwidth * FLASH_DATA.sustained.bandwidth) - busy);
    }
    const seconds = Object.values(parts).reduce((x, y) => x + y, 0);
    // Standard attention waits at least for its own traffic, and needs room for one score matrix.
    const moving = work.standard.total / (gpu.bandwidth * FLASH_DATA.sustained.bandwidth);
    return { parts, seconds, work, standard: { seconds: moving, fits: work.scores <= gpu.memory } };
  }

  return { visiblePairs, visibleKeys, tileSteps, count, streamed, makespan, time };
})();

// What tests/test_explorer.py asks of the page in the browser; run once on every page that it opens.
"use strict";

const Check = (() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  function rgba(color) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  }

  // WCAG 2.2: relative luminance and contrast ratio.
  function luminance(color) {
    const linear = color.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  function ratio(a, b) {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  }

  function ground(element) {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    throw Error("nothing opaque behind the text");
  }

  // [contrast, text] of every visible piece of text.
  function textContrast() {
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const [text, e] = [walk.currentNode.data.trim(), walk.currentNode.parentElement];
      if (!text || !e.checkVisibility() || e.closest("script, option")) continue;
      for (let up = e; up; up = up.parentElement) if (getComputedStyle(up).opacity !== "1") throw Error(`${text} is translucent`);
      const style = getComputedStyle(e);
      found.push([ratio(rgba(e instanceof SVGElement ? style.fill : style.color), ground(e)), text.slice(0, 40)]);
    }
    return found;
  }

  // [contrast, name] of the colours that shapes and outlines are drawn in.
  function drawnContrast() {
    return ["q", "k", "v", "o", "s", "edge"].map((name) => {
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = `var(--${name})`;
      const color = rgba(getComputedStyle(probe).color);
      probe.remove();
      return [ratio(color, ground(document.body)), name];
    });
  }

  function unnamed() {
    const name = (e) => [e.getAttribute("aria-label"), e.getAttribute("aria-labelledby"), e.textContent, ...[...(e.labels ?? [])].map((l) => l.textContent)].join("");
    const all = document.querySelectorAll("button, input, select, summary, [role=img], [role=group], nav, section");
    return [...all].filter((e) => !name(e).trim()).map((e) => e.outerHTML.slice(0, 80));
  }

  function reachable() {
    const all = document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]');
    return [...all].filter((e) => e.checkVisibility() && !e.disabled && !(e.type === "radio" && !e.checked)).length;
  }

  function focused() {
    const e = document.activeElement;
    const style = getComputedStyle(e);
    const name = e.id || e.dataset.view || e.dataset.preset || e.value || e.tagName;
    return { name, outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 };
  }

  const plain = (value) => (value === -Infinity ? "-inf" : value); // JSON has no infinity

  function numbers(p) {
    const x = Attention.inputs(p);
    const walk = Attention.walk(p, x);
    const steps = walk.steps.map((s) => ({ ...s, m: s.m && s.m.map(plain), s: null, before: null }));
    const full = x.q.map((_, i) => Attention.full(p, x, i));
    return { x, out: walk.out, lse: walk.lse.map(plain), steps, full, streamed: Counts.streamed(p) };
  }

  const times = (cases) =>
    cases.map(([gpu, batch, heads, s, d, mask, direction]) =>
      Counts.time({ batch, heads, m: s, n: s, d, left: null, right: mask === "causal" ? 0 : null, direction }, gpu));

  const closedForms = (cases, bm, bn) =>
    cases.map((a) => [Counts.visiblePairs(...a), Counts.visibleKeys(...a), Counts.tileSteps(...a, bm, bn)]);

  function stopped(done) {
    const look = setInterval(() => {
      if (App.state.timer !== null) return;
      clearInterval(look);
      done();
    }, 50);
  }

  function step(number) {
    const slider = document.getElementById("position");
    slider.value = number;
    slider.dispatchEvent(new Event("input"));
  }

  function paste(selector, text) {
    const field = document.querySelector(selector);
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function breakWalk(error) {
    const walk = Attention.walk;
    Attention.walk = (p, x) => {
      const result = walk(p, x);
      result.out[0][0] += error;
      return result;
    };
  }

  const open = () => document.querySelectorAll("details").forEach((d) => (d.open = true));

  return { textContrast, drawnContrast, unnamed, reachable, focused, numbers, times, closedForms, stopped, step, paste, breakWalk, open };
})();

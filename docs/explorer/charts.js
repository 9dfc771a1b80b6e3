// The second and third view: bytes as bars, a curve and tables; time as bars by cause.
"use strict";

const Charts = (() => {
  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  // rows of [header, cell, ...]; the first holds the column headers.
  function table(element, caption, rows) {
    const [head, ...body] = rows;
    const line = (cells, scope) =>
      make("tr", {}, ...cells.map((cell, at) => (at === 0 || scope === "col" ? make("th", { scope }, cell) : make("td", {}, cell))));
    element.replaceChildren(
      make("caption", {}, caption),
      make("thead", {}, line(head, "col")),
      make("tbody", {}, ...body.map((cells) => line(cells, "row"))));
  }

  const bar = (segments, of, label) => {
    const pieces = segments.map(([name, value]) => {
      const piece = make("i", { class: `piece ${name}` });
      piece.style.width = `${(100 * value) / of}%`;
      return piece;
    });
    return make("div", { class: "bar", role: "img", "aria-label": label }, ...pieces);
  };

  function traffic(sizes, toy) {
    const { t, bytes } = Text;
    const work = Counts.count(sizes);
    const ratio = work.standard.total / work.flash.total;
    document.getElementById("ratio").textContent = ratio.toFixed(ratio < 99.95 ? 1 : 0);
    const whole = work.standard.total;
    const entry = (name, total, segments) => {
      const parts = segments.map(([part, value]) => `${t(part === "io" ? "inputsOutputs" : "scoreTraffic")} ${bytes(value)}`);
      const text = make("p", {}, make("span", {}, t(name)), make("b", {}, bytes(total)));
      return make("div", { class: "entry" }, text, bar(segments, whole, `${t(name)}: ${parts.join(", ")}`),
        make("p", { class: "parts" }, ...segments.map(([part], at) => make("span", {}, make("i", { class: `swatch ${part}` }), parts[at]))));
    };
    document.getElementById("traffic-bars").replaceChildren(
      entry("standard", whole, [["io", work.flash.total], ["score", whole - work.flash.total]]),
      entry("flash", work.flash.total, [["io", work.flash.total]]));

    const small = Counts.count({ batch: 1, heads: 1, m: toy.m, n: toy.n, d: toy.d, left: toy.left, right: toy.right, direction: "forward" });
    const streamed = Counts.streamed(toy);
    const head = ["", t("read"), t("written"), t("total")];
    const figure = (value, shown) => make("data", { value }, shown(value));
    const line = (name, tally, shown) => [t(name), ...[tally.read, tally.written, tally.read + tally.written].map((value) => figure(value, shown))];
    table(document.getElementById("traffic-real"), t("realCaption"), [head, line("standard", work.standard, bytes), line("flash", work.flash, bytes)]);
    table(document.getElementById("traffic-toy"), t("toyCaption"),
      [head, line("standard", small.standard, Text.exact), line("flashStreamed", streamed, Text.exact), line("flashOnce", small.flash, Text.exact)]);
    growth(sizes, work);
  }

  // Both totals over all lengths, logarithmic on both axes.
  function growth(sizes, work) {
    const element = document.getElementById("growth");
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const width = Math.max(260, element.clientWidth);
    const height = Math.round(width * 0.56);
    const font = Math.max(12, 0.78 * rem);
    const edge = { left: 4.4 * font, right: font, top: font, bottom: 2.2 * font };
    const lengths = FLASH_DATA.sizes.length;
    const totals = lengths.map((length) => Counts.count({ ...sizes, m: length, n: length }));
    const logs = totals.flatMap((w) => [Math.log10(w.flash.total), Math.log10(w.standard.total)]);
    const [low, high] = [Math.floor(Math.min(...logs)), Math.ceil(Math.max(...logs))];
    const x = (at) => edge.left + (at / (lengths.length - 1)) * (width - edge.left - edge.right);
    const y = (value) => height - edge.bottom - ((Math.log10(value) - low) / (high - low)) * (height - edge.top - edge.bottom);
    const label = Text.t("growthLabel", { length: sizes.n, standard: Text.bytes(work.standard.total), flash: Text.bytes(work.flash.total) });
    const svg = SVG.make("svg", { width, height, role: "img", "aria-label": label });
    const words = (text, at, to, anchor, name = "plain") =>
      SVG.make("text", { x: at, y: to, "text-anchor": anchor, "font-size": font, class: name }, svg, text);
    for (let power = low; power <= high; power++) {
      SVG.make("line", { x1: edge.left, x2: width - edge.right, y1: y(10 ** power), y2: y(10 ** power), class: "rule" }, svg);
      if ((power - low) % Math.ceil((high - low) / 4) === 0) {
        words(Text.bytes(10 ** power).replace(".00", "").replace(".0", ""), edge.left - 0.6 * font, y(10 ** power) + font / 3, "end");
      }
    }
    const chosen = lengths.indexOf(sizes.n);
    SVG.make("line", { x1: x(chosen), x2: x(chosen), y1: edge.top, y2: height - edge.bottom, class: "now" }, svg);
    lengths.forEach((length, at) => {
      if (at % 2 === 0) words(length >= 1024 ? `${length / 1024}k` : String(length), x(at), height - 0.6 * font, "middle");
    });
    for (const name of ["standard", "flash"]) {
      const points = totals.map((w, at) => `${x(at)},${y(w[name].total)}`);
      SVG.make("polyline", { points: points.join(" "), class: `curve ${name}` }, svg);
      SVG.make("circle", { cx: x(chosen), cy: y(work[name].total), r: 0.32 * font, class: `dot ${name}` }, svg);
      const at = lengths.length - 3;
      words(Text.t(name), x(at) - 0.6 * font, y(totals[at][name].total) + (name === "flash" ? 1.9 : -0.7) * font, name === "flash" ? "middle" : "end", `name ${name}`);
    }
    element.replaceChildren(svg);
  }

  const PARTS = ["matrix", "softmax", "overhead", "imbalance", "memory", "l2", "launch"];

  function time(sizes, chosen, choose) {
    const { t, seconds } = Text;
    const all = Object.keys(FLASH_DATA.gpus).map((name) => [name, Counts.time(sizes, name)]);
    const longest = Math.max(...all.map(([, one]) => one.seconds));
    const field = document.getElementById("gpus");
    const focused = field.contains(document.activeElement);
    const rows = all.map(([name, one]) => {
      const input = make("input", { type: "radio", name: "gpu", value: name });
      input.checked = name === chosen;
      input.addEventListener("change", () => choose(name));
      const segments = PARTS.map((part) => [part, one.parts[part]]);
      const shown = bar(segments, longest, `${FLASH_DATA.gpus[name].title}: ${seconds(one.seconds)}`);
      shown.setAttribute("aria-hidden", "true");
      return make("label", { class: "gpu" }, input, make("span", { class: "name" }, FLASH_DATA.gpus[name].title), make("b", {}, seconds(one.seconds)), shown);
    });
    field.replaceChildren(field.querySelector("legend"), ...rows);
    if (focused) field.querySelector("input:checked").focus();

    const gpu = FLASH_DATA.gpus[chosen];
    const [, one] = all.find(([name]) => name === chosen);
    document.getElementById("time-summary").textContent = t(one.standard.fits ? "timeSummary" : "timeNoRoom", {
      gpu: gpu.title,
      time: seconds(one.seconds),
      rate: (one.work.matmulFlops / one.seconds / 1e12).toFixed(0),
      standard: seconds(one.standard.seconds),
      scores: Text.bytes(one.work.scores),
    });
    table(document.getElementById("time-parts"), gpu.title, [
      [t("part"), t("took"), t("share")],
      ...PARTS.map((part) => [t(part), seconds(one.parts[part]), `${Math.abs((100 * one.parts[part]) / one.seconds).toFixed(1)} %`]),
      [t("total"), seconds(one.seconds), "100 %"],
    ]);
    document.querySelectorAll("#time-parts tbody tr").forEach((row, at) => {
      if (PARTS[at]) row.firstChild.prepend(make("i", { class: `swatch ${PARTS[at]}` }));
    });
  }

  // The chosen row's output so far, a bar a dimension, and the full softmax as lines.
  // `reach` holds every value that the row takes.
  function outputs(element, row, values, wanted, reach) {
    const { t, number } = Text;
    const width = Math.max(200, element.clientWidth);
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const height = 4.5 * rem;
    const [low, high] = [Math.min(-0.01, ...reach), Math.max(0.01, ...reach)];
    const y = (value) => 2 + ((high - value) / (high - low)) * (height - 4);
    const each = width / wanted.length;
    const label = t("barsLabel", { row, values: values.map((v) => number(v, 3)).join(", "), wanted: wanted.map((v) => number(v, 3)).join(", ") });
    const svg = SVG.make("svg", { width, height, role: "img", "aria-label": label });
    SVG.make("line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "rule" }, svg);
    values.forEach((value, c) => {
      SVG.make("rect", { x: c * each + each * 0.22, width: each * 0.56, y: Math.min(y(value), y(0)), height: Math.abs(y(value) - y(0)), class: "output" }, svg);
      SVG.make("line", { x1: c * each + each * 0.1, x2: c * each + each * 0.9, y1: y(wanted[c]), y2: y(wanted[c]), class: "wanted" }, svg);
    });
    element.replaceChildren(svg, make("p", { class: "hint" }, t("barsCaption")));
  }

  return { make, traffic, time, outputs };
})();

// State, controls and words of the page. The state is also in the address, so that a setting can be linked.
"use strict";

const App = (() => {
  const $ = (id) => document.getElementById(id);
  const { t, number, tiny } = Text;

  // name: [lowest, highest]. -1 is no limit.
  const LIMITS = { m: [1, 32], n: [1, 32], bm: [1, 16], bn: [1, 16], d: [1, 8], left: [-1, 32], right: [-1, 32], seed: [0, 999999] };
  const DEFAULT = { m: 12, n: 16, bm: 4, bn: 4, d: 4, left: -1, right: -1, seed: 7, causal: false };
  const PRESETS = {
    presetFull: {},
    presetCausal: { causal: true },
    presetWindow: { m: 16, left: 4, right: 1 },
    presetEmpty: { m: 16, n: 10, causal: true },
    presetDecode: { m: 1, bm: 1, n: 24 },
  };
  const SIZES = {
    batch: FLASH_DATA.sizes.batch,
    heads: FLASH_DATA.sizes.heads,
    length: FLASH_DATA.sizes.length,
    headDim: FLASH_DATA.sizes.head_dim,
    mask: ["causal", "full"],
    direction: ["forward", "backward"],
    gpu: Object.keys(FLASH_DATA.gpus),
  };
  const VIEWS = ["watch", "traffic", "time"];

  const state = {
    view: "watch",
    toy: { ...DEFAULT, causal: true }, // as typed and valid
    big: { batch: 4, heads: 32, length: 4096, headDim: 128, mask: "causal", direction: "forward", gpu: "h200" },
    step: 0,
    row: 0,
    timer: null,
  };
  let scene; // {p, x, walk, wanted}
  let stage;

  // ---- the small problem

  function problem(toy) {
    const bound = (value) => (value < 0 ? null : value);
    return { ...toy, left: bound(toy.left), right: toy.causal ? 0 : bound(toy.right) };
  }

  function rebuild() {
    pause();
    const p = problem(state.toy);
    const x = Attention.inputs(p);
    const walk = Attention.walk(p, x);
    const wanted = x.q.map((_, i) => Attention.full(p, x, i));
    scene = { p, x, walk, wanted };
    state.step = 0;
    state.row = 0;
    $("position").max = walk.steps.length - 1;
    stage.build(scene);
    summarize();
    show();
    remember();
  }

  function summarize() {
    const { toy } = state;
    const open = toy.left < 0 && toy.right < 0;
    const window = { left: toy.left, right: toy.causal ? 0 : toy.right };
    const mask = toy.causal && toy.left < 0 ? t("maskCausal") : open ? t("maskFull") : t("maskWindow", window);
    $("summary").textContent = t("summary", { ...toy, ...lengths(toy), mask });
    for (const button of $("presets").children) {
      const wanted = { ...DEFAULT, ...PRESETS[button.dataset.preset], seed: toy.seed };
      button.setAttribute("aria-pressed", Object.keys(wanted).every((key) => wanted[key] === toy[key]));
    }
  }

  function fill() {
    for (const name of Object.keys(LIMITS)) {
      $(name).value = state.toy[name];
      $(name).removeAttribute("aria-invalid");
    }
    $("causal").checked = state.toy.causal;
    $("right").disabled = state.toy.causal;
    $("error").textContent = "";
  }

  // The value of a field, or null after saying what is wrong with it.
  function parse(name, text) {
    const [low, high] = LIMITS[name];
    const trimmed = text.trim().replace("−", "-");
    const value = /^-?\d{1,9}$/.test(trimmed) ? Number(trimmed) : NaN;
    if (value >= low && value <= high) return value;
    const shown = trimmed === "" ? t("nothing") : trimmed.slice(0, 24);
    $("error").textContent = t("bad", { name: t(name), low, high, value: shown });
    return null;
  }

  function read() {
    const toy = { causal: $("causal").checked };
    let wrong = null;
    for (const name of Object.keys(LIMITS)) {
      toy[name] = parse(name, $(name).value);
      if (toy[name] === null) wrong ??= name;
      $(name).setAttribute("aria-invalid", toy[name] === null);
    }
    $("right").disabled = toy.causal;
    if (wrong) {
      parse(wrong, $(wrong).value); // the message is about the first wrong field
      return;
    }
    $("error").textContent = "";
    state.toy = toy;
    rebuild();
  }

  // ---- stepping

  function go(step) {
    const last = scene.walk.steps.length - 1;
    state.step = Math.max(0, Math.min(last, step));
    const { rows, tile } = scene.walk.steps[state.step];
    if (tile >= 0 && (state.row < rows[0] || state.row >= rows[1])) {
      state.row = Math.min(rows[0] + (state.row % scene.p.bm), rows[1] - 1);
    }
    if (state.step === last) pause();
    show();
  }

  function pause() {
    clearInterval(state.timer);
    state.timer = null;
    $("narration").setAttribute("aria-live", "polite");
    playButton();
  }

  function play() {
    if (state.step === scene.walk.steps.length - 1) go(0);
    $("narration").setAttribute("aria-live", "off"); // a reader could not keep up; pausing speaks again
    state.timer = setInterval(() => go(state.step + 1), 1200 / Number($("speed").value));
    playButton();
  }

  const toggle = () => (state.timer === null ? play() : pause());

  function playButton() {
    const running = state.timer !== null;
    $("play").setAttribute("aria-label", t(running ? "pause" : "play"));
    $("play").textContent = running ? "⏸\uFE0E" : "▶\uFE0E";
  }

  function chooseRow(row) {
    state.row = Math.max(0, Math.min(scene.p.m - 1, row));
    show();
  }

  // ---- words and numbers of one step

  const several = (count, single, many) => (count === 1 ? t(single) : t(many, { count }));
  const lengths = ({ m, n }) => ({ queries: several(m, "query1", "queryMany"), keys: several(n, "key1", "keyMany") });
  // people count from one
  const span = ([lo, hi], single, many) => t(hi - lo === 1 ? single : many, { first: lo + 1, last: hi });

  function narrate(step) {
    const { p, walk, wanted } = scene;
    const tiles = Math.ceil(p.n / p.bn);
    const rows = span(step.rows, "row1", "rowMany");
    const pieces = [];
    let wrong = false;
    if (step.kind === "start") {
      const count = (number) => several(number, "tile1", "tileMany");
      pieces.push(t("start", { ...lengths(p), qTiles: count(Math.ceil(p.m / p.bm)), kTiles: count(tiles) }));
    } else if (step.kind === "query") {
      const left = step.visited[1] - step.visited[0];
      pieces.push(t("query", { rows }));
      if (left === 0) pieces.push(t("queryNone"));
      else if (left < tiles) pieces.push(t("querySkips", { skipped: tiles - left, tiles }));
    } else if (step.kind === "score") {
      const masked = step.s.flat().filter((value) => value === -Infinity).length;
      pieces.push(t("score", { d: p.d, rows: step.s.length, cols: step.s[0].length }));
      if (masked) pieces.push(t("scoreMasked", { masked }));
    } else if (step.kind === "max") {
      pieces.push(t(step.block === step.visited[0] ? "maxFirst" : "max"));
    } else if (step.kind === "write") {
      const dead = step.l.filter((value) => value === 0).length;
      pieces.push(t("write", { rows }));
      if (dead) pieces.push(t("writeDead", { dead }));
    } else if (step.kind === "done") {
      const worst = Math.max(...walk.out.map((row, i) => Attention.difference(row, wanted[i])));
      const visited = walk.steps.filter((s) => s.kind === "load").length;
      wrong = worst > 1e-12;
      pieces.push(t(wrong ? "doneBad" : "done", { M: p.m, d: p.d, visited, all: Math.ceil(p.m / p.bm) * tiles, difference: tiny(worst) }));
    } else {
      pieces.push(t(step.kind, { keys: span(step.cols, "keyRange1", "keyRangeMany"), last: step.cols[1] }));
    }
    $("step-title").textContent = t(wrong ? "doneBadTitle" : `${step.kind}Title`);
    $("step-text").textContent = pieces.join(Text.language === "zh" ? "" : " ");
  }

  // What row `row` has reached: values so far, and the keys they stand for.
  function reached(step, row) {
    const { p, x, walk, wanted } = scene;
    const done = step.kind === "done";
    const active = row >= step.rows[0] && row < step.rows[1];
    if (done || (row < step.rows[0] && step.tile >= 0) || (active && step.kind === "write")) {
      return { stage: "written", values: walk.out[row], seen: wanted[row] };
    }
    if (!active) return { stage: "waiting", values: new Array(p.d).fill(0), seen: new Array(p.d).fill(0) };
    const r = row - step.rows[0];
    const values = step.acc[r].map((value) => (step.l[r] > 0 ? value / step.l[r] : 0));
    return { stage: "active", r, values, seen: Attention.full(p, x, row, step.seen) };
  }

  // Every value that the output of a row takes on its way, so that its picture keeps one scale.
  function passed(row) {
    const { walk, wanted } = scene;
    const sums = walk.steps.filter((s) => s.kind === "add" && row >= s.rows[0] && row < s.rows[1] && s.l[row - s.rows[0]] > 0);
    return [...wanted[row], ...sums.flatMap((s) => s.acc[row - s.rows[0]].map((value) => value / s.l[row - s.rows[0]]))];
  }

  function rowByHand(step) {
    const { p, walk, wanted } = scene;
    const { row } = state;
    const now = reached(step, row);
    const keys = Array.from({ length: p.n }, (_, j) => Attention.sees(p, row, j)).filter(Boolean).length;
    const title = { written: "rowDone", waiting: "rowWaiting", active: "rowTitle" }[now.stage];
    $("row-title").textContent = t(title, { row: row + 1, keys: several(keys, "key1", "keyMany") });
    const lines = now.stage === "active" ? formulas(step, now.r) : [["s", "–"], ["m", "–"], ["α", "–"], ["l", "–"]];
    if (now.stage === "written") lines[3] = ["lse", number(walk.lse[row], 3)];
    const meaning = { s: "meansScores", m: "meansMaximum", α: "meansRescale", l: "meansSum", lse: "meansLse" };
    $("formulas").replaceChildren(...lines.flatMap(([name, value, fresh]) => {
      const [dt, dd] = [Charts.make("dt", {}, Charts.make("i", {}, name), t(meaning[name])), Charts.make("dd", {}, value)];
      if (fresh) dt.className = dd.className = "fresh";
      return [dt, dd];
    }));
    Charts.outputs($("bars"), row + 1, now.values, wanted[row], passed(row));
    verdict(step, now);
  }

  function formulas(step, r) {
    const fresh = (kind) => step.kind === kind;
    const s = step.s ? step.s[r].map((value) => number(value)).join("  ") : "–";
    const m = number(step.m[r]);
    const l = number(step.l[r]);
    let top = m;
    let alpha = "–";
    if (step.before) {
      top = `max(${number(step.before[r])}, ${number(Math.max(...step.s[r]))}) = ${m}`;
      const power = step.before[r] === -Infinity ? "−∞" : `${number(step.before[r])} − ${number(step.m[r])}`.replace("− −", "+ ");
      alpha = `exp(${power}) = ${number(step.alpha[r])}`;
    }
    const sum = fresh("add") ? `${number(step.alpha[r])} × ${number(step.oldSum[r])} + ${number(step.sums[r])} = ${l}` : l;
    return [["s", s, fresh("score")], ["m", top, fresh("max")], ["α", alpha, fresh("max")], ["l", sum, fresh("add")]];
  }

  function verdict(step, now) {
    const { p, walk, wanted } = scene;
    const rows = step.kind === "done" ? p.m : step.kind === "write" ? step.rows[1] : step.rows[0];
    const worst = Math.max(0, ...walk.out.slice(0, rows).map((row, i) => Attention.difference(row, wanted[i])));
    const lines = [
      [t("verdictRow"), now.stage === "waiting" ? "–" : tiny(Attention.difference(now.values, now.seen))],
      [t("verdictRowAll"), now.stage === "waiting" ? "–" : tiny(Attention.difference(now.values, wanted[state.row]))],
      [t("verdictWritten", { rows }), rows ? tiny(worst) : "–"],
    ];
    $("verdict").querySelector("dl").replaceChildren(...lines.flatMap(([name, value]) => [Charts.make("dt", {}, name), Charts.make("dd", {}, value)]));
    const all = { batch: 1, heads: 1, m: p.m, n: p.n, d: p.d, left: p.left, right: p.right, direction: "forward" };
    const bytes = (value) => `${Text.exact(value)}\u00a0B`;
    $("moved").textContent = t("verdictMoved", { read: bytes(step.read), written: bytes(step.written), standard: bytes(Counts.count(all).standard.total) });
  }

  function show() {
    const step = scene.walk.steps[state.step];
    stage.show(step, state.row);
    stage.element.setAttribute("aria-label", t("stageLabel", { row: state.row + 1 }));
    narrate(step);
    rowByHand(step);
    const last = scene.walk.steps.length - 1;
    $("position").value = state.step;
    $("position").setAttribute("aria-valuetext", `${t("counter", { step: state.step, steps: last })}: ${$("step-title").textContent}`);
    $("position").style.setProperty("--done", `${(100 * state.step) / last}%`);
    $("counter").textContent = `${state.step} / ${last}`;
    $("first").disabled = $("back").disabled = state.step === 0;
    $("last").disabled = $("forward").disabled = state.step === last;
  }

  // ---- the real sizes

  function sizes() {
    const { batch, heads, length, headDim, mask, direction } = state.big;
    return { batch, heads, m: length, n: length, d: headDim, left: null, right: mask === "causal" ? 0 : null, direction };
  }

  function sizeForms() {
    const shown = { mask: { causal: "maskCausal", full: "maskFull" }, direction: { forward: "directionForward", backward: "directionBackward" } };
    for (const form of document.querySelectorAll("form.sizes")) {
      form.replaceChildren(...Object.keys(SIZES).filter((name) => name !== "gpu").map((name) => {
        const id = `${form.parentElement.id}-${name}`;
        const options = SIZES[name].map((value) => Charts.make("option", { value }, shown[name] ? t(shown[name][value]) : String(value)));
        const select = Charts.make("select", { id, "data-size": name }, ...options);
        select.value = state.big[name];
        select.addEventListener("change", () => {
          setSize(name, select.value);
          drawSizes();
        });
        return Charts.make("label", { for: id }, Charts.make("span", {}, t(name)), select);
      }));
    }
  }

  function setSize(name, text) {
    const found = SIZES[name].find((value) => String(value) === text);
    $("size-error").textContent = found === undefined ? t("badChoice", { name: t(name), list: SIZES[name].join(", "), value: text.slice(0, 24) }) : "";
    if (found !== undefined) state.big[name] = found;
    for (const select of document.querySelectorAll(`[data-size=${name}]`)) select.value = state.big[name];
    return found !== undefined;
  }

  function drawSizes() {
    Charts.traffic(sizes(), scene.p);
    if (state.view === "time") {
      Charts.time(sizes(), state.big.gpu, (gpu) => {
        setSize("gpu", gpu);
        drawSizes();
      });
    }
    remember();
  }

  // ---- view, language, theme, address

  function view(name) {
    if (name !== "watch") pause();
    state.view = name;
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
    for (const button of $("views").children) {
      if (button.dataset.view === name) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
    if (name === "watch") {
      stage.fit();
      show();
      remember();
    } else {
      drawSizes();
    }
  }

  function translate(language) {
    Text.language = language;
    document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
    document.title = t("title");
    for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
    for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
    $("language").textContent = language === "zh" ? "English" : "中文";
    $("language").lang = language === "zh" ? "en" : "zh";
    themeButton();
    playButton();
    sizeForms();
    $("error").textContent = "";
    if (scene) {
      summarize();
      view(state.view);
    }
  }

  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const themeButton = () => ($("theme").textContent = t(dark() ? "light" : "dark"));

  function talk(on) {
    document.documentElement.classList.toggle("talk", on);
    $("talk").setAttribute("aria-pressed", on);
    view(state.view);
  }

  function remember() {
    const { view: name, toy, big } = state;
    const all = { view: name, ...toy, causal: Number(toy.causal), ...big, lang: Text.language };
    history.replaceState(null, "", `#${new URLSearchParams(all)}`);
  }

  // Take from the address what is valid, and say what is not.
  function recall() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (Object.hasOwn(TEXT, given.get("lang") ?? "")) translate(given.get("lang"));
    let trouble = "";
    for (const [name, text] of given) {
      if (name in LIMITS) {
        const value = parse(name, text);
        if (value === null) trouble ||= $("error").textContent;
        else state.toy[name] = value;
      } else if (name in SIZES && !setSize(name, text)) {
        trouble ||= $("size-error").textContent;
      }
    }
    if (given.has("causal")) state.toy.causal = given.get("causal") === "1";
    if (VIEWS.includes(given.get("view"))) state.view = given.get("view");
    return trouble;
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || state.view !== "watch") return;
    const tag = event.target.tagName;
    const slider = event.target.id === "position";
    if (tag === "SELECT" || tag === "SUMMARY" || (tag === "INPUT" && !slider)) return;
    const onStage = event.target === stage.element;
    const actions = {
      ArrowRight: !slider && (() => go(state.step + 1)),
      ArrowLeft: !slider && (() => go(state.step - 1)),
      " ": tag !== "BUTTON" && toggle,
      ArrowUp: onStage && (() => chooseRow(state.row - 1)),
      ArrowDown: onStage && (() => chooseRow(state.row + 1)),
      Home: onStage && (() => go(0)),
      End: onStage && (() => go(Infinity)),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    if (event.key !== " ") pause();
    action();
  }

  function listen() {
    for (const [id, to] of [["first", () => 0], ["back", () => state.step - 1], ["forward", () => state.step + 1], ["last", () => Infinity]]) {
      $(id).addEventListener("click", () => {
        pause();
        go(to());
      });
    }
    $("play").addEventListener("click", toggle);
    $("speed").addEventListener("change", () => {
      if (state.timer === null) return;
      pause();
      play();
    });
    $("position").addEventListener("input", () => {
      pause();
      go(Number($("position").value));
    });
    $("toy").addEventListener("input", read);
    $("toy").addEventListener("submit", (event) => event.preventDefault());
    $("views").addEventListener("click", (event) => event.target.dataset.view && view(event.target.dataset.view));
    $("language").addEventListener("click", () => translate(Text.language === "zh" ? "en" : "zh"));
    $("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      themeButton();
    });
    $("talk").addEventListener("click", () => talk(!document.documentElement.classList.contains("talk")));
    document.addEventListener("keydown", keys);
    window.addEventListener("hashchange", () => location.hash.includes("=") && arrive());
    let waiting = null;
    window.addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => view(state.view), 100);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeButton);
  }

  function start() {
    stage = new Stage($("stage"), chooseRow);
    for (const name of Object.keys(PRESETS)) {
      const button = Charts.make("button", { type: "button", "data-preset": name, "data-t": name });
      button.addEventListener("click", () => {
        state.toy = { ...DEFAULT, ...PRESETS[name], seed: state.toy.seed };
        fill();
        rebuild();
      });
      $("presets").append(button);
    }
    translate(navigator.language.startsWith("zh") ? "zh" : "en");
    arrive();
    listen();
  }

  function arrive() {
    const trouble = recall();
    fill();
    rebuild();
    sizeForms();
    view(state.view);
    $("error").textContent = $("size-error").textContent = trouble;
  }

  start();
  return { state, get scene() { return scene; }, sizes };
})();

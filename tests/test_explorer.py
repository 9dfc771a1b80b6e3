"""The explorer's page (docs/explorer) in a real browser: numbers against the oracle and the cost model, use without a
mouse or eyes, small and large screens, bad input. Without a browser these tests skip; under CI=1 they fail instead.
"""

import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from browser import browser

from flash_attn import flash_attn_func, use_backend
from flash_attn.cost import counts, kernels
from flash_attn.problem import Problem

FOLDER = Path(__file__).parents[1] / "docs" / "explorer"
VIEWS = ("watch", "traffic", "time")
PRESETS = ("presetFull", "presetCausal", "presetWindow", "presetEmpty", "presetDecode")
PHONE, LAPTOP, TALK = (360, 740), (1280, 800), (1920, 1080)
EXACTLY = dict(atol=1e-13, rtol=1e-13)  # fp64, of numbers of size 1

spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
make_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_data)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile"), Path(__file__).with_name("explorer.js")) as running:
        yield running


class Page:
    """The explorer in the browser."""

    def __init__(self, started):
        self.started = started
        self.open()

    def __getattr__(self, name):
        return getattr(self.started, name)

    def open(self, size=LAPTOP, **settings):
        self.started.open(FOLDER / "index.html", size, **settings)

    def step(self, number):
        self.run("Check.step(arguments[0])", number)

    def differences(self):
        return [number(text) for text in self.texts("#verdict dd")]


@pytest.fixture
def page(started):
    """A fresh page; whatever a test does, the console must stay empty."""
    started.console()
    yield Page(started)
    assert started.console() == []


def number(text):
    """A number as the page writes it."""
    digits = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
    return float(text.replace("−∞", "-inf").replace("−", "-").replace(" × 10", "e").translate(digits))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- numbers


def test_data_is_what_the_cost_model_says():
    """If this fails: python docs/explorer/make_data.py."""
    assert (FOLDER / "data.js").read_text() == make_data.text()


NAMES = ("m", "n", "bm", "bn", "d", "left", "right")
TOYS = [
    # whole and ragged tiles, M above and below N, windows, rows without a key
    (12, 16, 4, 4, 4, None, 0),
    (12, 16, 4, 4, 4, None, None),
    (1, 1, 1, 1, 1, None, None),
    (1, 24, 1, 4, 4, None, None),
    (7, 13, 3, 5, 8, None, 0),
    (16, 10, 4, 4, 4, None, 0),
    (16, 5, 5, 3, 2, 1, 1),
    (32, 32, 16, 7, 8, 3, 0),
    (9, 30, 2, 4, 5, 6, 2),
    (30, 9, 4, 16, 3, 0, 0),
    (32, 1, 1, 1, 8, None, 0),
]


def toy(setting, seed=7):
    return {**dict(zip(NAMES, setting, strict=True)), "seed": seed}


def sees(p, i, j):
    """The contract's mask."""
    at = i + p["n"] - p["m"]
    return (p["left"] is None or j >= at - p["left"]) and (p["right"] is None or j <= at + p["right"])


def oracle(p, x):
    """(out, lse) of the package's fp64 reference on the page's inputs."""
    q, k, v = (tensor(x[name])[None, :, None] for name in "qkv")
    window = tuple(-1 if side is None else side for side in (p["left"], p["right"]))
    with use_backend("reference"):
        out, lse, _ = flash_attn_func(q, k, v, window_size=window, return_attn_probs=True)
    return out[0, :, 0], lse[0, 0]


def partial(p, x, upto):
    """(out, lse) over the keys before `upto`, by the formula."""
    q, k, v = (tensor(x[name]) for name in "qkv")
    hidden = [[j >= upto or not sees(p, i, j) for j in range(p["n"])] for i in range(p["m"])]
    s = (q @ k.T / p["d"] ** 0.5).masked_fill(torch.tensor(hidden), -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v, s.logsumexp(-1)


@pytest.mark.parametrize("setting", TOYS, ids=str)
def test_every_step_of_the_walk_agrees_with_the_oracle(page, setting):
    p = toy(setting)
    got = page.run("Check.numbers(arguments[0])", p)
    want, lse = oracle(p, got["x"])
    torch.testing.assert_close(tensor(got["out"]), want, **EXACTLY)
    torch.testing.assert_close(tensor(got["full"]), want, **EXACTLY)
    for row, gone in enumerate(lse.isinf()):
        assert (got["lse"][row] == "-inf") == gone
        if gone:
            assert got["out"][row] == [0] * p["d"]
        else:
            assert got["lse"][row] == pytest.approx(lse[row].item(), abs=1e-13)
    for step in got["steps"]:
        if step["kind"] == "add":
            running_values_are_those_of_the_keys_so_far(p, got["x"], step)
    tiles = counts.tile_steps(p["m"], p["n"], p["left"], p["right"], p["bm"], p["bn"])
    loads = [step["tile"] for step in got["steps"] if step["kind"] == "load"]
    assert [loads.count(tile) for tile in range(len(tiles))] == [steps for steps, _ in tiles]
    end = got["steps"][-1]
    assert (end["read"], end["written"]) == (got["streamed"]["read"], got["streamed"]["written"])


def running_values_are_those_of_the_keys_so_far(p, x, step):
    out, lse = partial(p, x, step["seen"])
    for r, row in enumerate(range(*step["rows"])):
        m, l = step["m"][r], step["l"][r]
        if l == 0:
            assert m == "-inf" and lse[row].isinf()
        else:
            torch.testing.assert_close(tensor(step["acc"][r]) / l, out[row], **EXACTLY)
            assert m + math.log(l) == pytest.approx(lse[row].item(), abs=1e-13)


def test_inputs_follow_the_seed(page):
    once, again, other = (
        page.run("Attention.inputs(arguments[0])", toy(TOYS[0], seed)) for seed in (3, 3, 4)
    )
    assert once == again != other
    many = tensor(page.run("Attention.inputs(arguments[0])", toy((2000, 1, 1, 1, 8, None, None)))["q"])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_closed_forms_are_those_of_the_cost_model(page):
    small = list(itertools.product(range(1, 7), range(1, 7), (None, 0, 1, 3, 20), (None, 0, 2, 20)))
    found = page.run("Check.closedForms(arguments[0], 4, 3)", small)
    for case, (pairs, keys, tiles) in zip(small, found, strict=True):
        assert pairs == counts.visible_pairs(*case), case
        assert keys == counts.visible_keys(*case), case
        assert [tuple(tile) for tile in tiles] == counts.tile_steps(*case, 4, 3), case


COUNTED = [
    # batch, heads, m, n, d, left, right
    (4, 32, 4096, 4096, 128, None, 0),
    (1, 16, 512, 512, 64, None, None),
    (32, 128, 131072, 131072, 256, None, 0),
    (1, 1, 12, 16, 4, None, 0),
    (1, 1, 16, 10, 4, None, 0),
    (2, 3, 100, 37, 7, 5, 2),
    (1, 1, 1, 24, 4, None, None),
]


@pytest.mark.parametrize("direction", counts.DIRECTIONS)
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_counts_are_those_of_the_cost_model(page, case, direction):
    batch, heads, m, n, d, left, right = case
    names = ("batch", "heads", "m", "n", "d", "left", "right", "direction")
    got = page.run("Counts.count(arguments[0])", dict(zip(names, (*case, direction), strict=True)))
    problem = Problem(batch, heads, heads, m, n, d, d, torch.bfloat16, left=left, right=right)
    want = counts.count(problem, direction)
    assert {**got["read"], **got["written"]} == want.tensors
    assert (got["pairs"], got["rows"], got["exps"]) == (want.pairs, want.rows, want.exps)
    assert got["scores"] == want.score_bytes
    assert (got["flash"]["total"], got["standard"]["total"]) == (want.flash_bytes, want.standard_bytes)
    # JavaScript's numbers are doubles: beyond 2**53 an integer is rounded
    assert float(got["matmulFlops"]) == float(want.matmul_flops)
    assert float(got["flops"]) == pytest.approx(float(want.flops), rel=1e-15)


def test_times_are_those_of_the_cost_model(page):
    lengths = itertools.cycle(make_data.LENGTHS)
    sizes = ((1, 16), (4, 32), (32, 128))
    choices = itertools.product(
        make_data.GPUS, sizes, make_data.HEAD_DIMS, make_data.MASKS, counts.DIRECTIONS
    )
    cases = [(gpu, *size, next(lengths), *others) for gpu, size, *others in choices]
    for case, got in zip(cases, page.run("Check.times(arguments[0])", cases), strict=True):
        gpu, *problem, direction = case
        want = kernels.estimate(make_data.problem(*problem), direction, gpu)
        assert got["seconds"] == pytest.approx(want.time_s, rel=1e-12), case
        assert got["parts"] == pytest.approx(want.parts, rel=1e-9, abs=1e-12 * want.time_s), case


# ---- what is shown


@pytest.mark.parametrize("preset", PRESETS)
def test_it_ends_equal_to_the_full_softmax_and_says_so(page, preset):
    page.click(f"[data-preset={preset}]")
    assert page.text("#step-title") == "Everything is in slow memory"
    page.click("#last")
    assert page.text("#step-title") == "The same as the full softmax"
    assert number(re.search(r"at once: (.*)\.$", page.text("#step-text")).group(1)) < 1e-14
    assert len(page.differences()) == 3 and max(page.differences()) < 1e-14


def test_a_wrong_result_is_not_called_equal(page):
    """The verdict compares: break the walk and it must say so."""
    page.run("Check.breakWalk(1e-6)")
    page.click("[data-preset=presetFull]")
    page.click("#last")
    assert page.text("#step-title") != "The same as the full softmax"
    assert "1.0 × 10⁻⁶. That is more than rounding." in page.text("#step-text")
    assert number(page.texts("#verdict dd")[2]) == 1e-6


def test_the_formulas_show_the_numbers_of_the_step(page):
    p = toy((12, 16, 4, 4, 4, None, None))
    page.open(causal=0, **{name: p[name] for name in ("m", "n", "bm", "bn", "d", "seed")})
    x = page.run("App.scene.x")
    s = tensor(x["q"])[5] @ tensor(x["k"]).T / 2
    steps = page.run("App.scene.walk.steps.map((s) => [s.kind, s.tile, s.block])")
    page.step(steps.index(["add", 1, 2]))  # the third key tile of the second query tile
    page.focus("#stage")
    page.press("ARROW_DOWN")  # from the first row of the tile to the second
    assert page.text("#row-title") == "Row 6 by hand"
    scores, top, alpha, total = page.texts("#formulas dd")
    m, before = s[:12].max(), s[:8].max()

    def shown(text):
        return number(text.split(" = ")[-1])

    assert [number(value) for value in scores.split()] == [round(value, 2) for value in s[8:12].tolist()]
    assert shown(top) == round(m.item(), 2)
    assert shown(alpha) == round((before - m).exp().item(), 2)
    assert shown(total) == round((s[:12] - m).exp().sum().item(), 2)
    so_far, whole, _ = page.differences()
    out, _ = partial(p, x, 12)
    missing = (out[5] - oracle(p, x)[0][5]).abs().max().item()
    assert so_far < 1e-14 and whole == pytest.approx(missing, abs=0.005) and missing > 0.01


def test_skipped_tiles_and_masked_pairs_are_drawn_as_such(page):
    page.open(m=16, n=10, causal=1)  # six rows see no key
    tiles = counts.tile_steps(16, 10, None, 0, 4, 4)
    assert page.run("document.querySelectorAll('.skip-tile').length") == 4 * 3 - sum(
        steps for steps, _ in tiles
    )
    inside = sum(4 * min(4 * steps, 10) for steps, _ in tiles)  # pairs of the visited tiles
    assert page.run("document.querySelectorAll('.mask-cell').length") == inside - counts.visible_pairs(
        16, 10, None, 0
    )
    page.click("#forward")
    assert "No row here sees any key" in page.text("#step-text")
    page.click("#forward")
    assert "4 of them saw no key: output 0" in page.text("#step-text")
    page.click("#last")
    assert page.run("App.scene.walk.out.map((row) => row.every((x) => x === 0))") == [True] * 6 + [False] * 10


def values(page, selector):
    return page.run(
        "[...document.querySelectorAll(arguments[0] + ' data')].map((e) => Number(e.value))", selector
    )


@pytest.mark.parametrize("direction", counts.DIRECTIONS)
def test_traffic_shown_is_that_of_the_cost_model(page, direction):
    page.open(view="traffic", m=16, n=10, causal=1)
    page.choose("#traffic-length", "8192")
    page.choose("#traffic-direction", direction)
    work = counts.count(make_data.problem(4, 32, 8192, 128, "causal"), direction)
    standard, flash = (values(page, "#traffic-real")[at : at + 3] for at in (0, 3))
    assert (standard[2], flash[2]) == (work.standard_bytes, work.flash_bytes)
    assert (standard[0] + standard[1], flash[0] + flash[1]) == (standard[2], flash[2])
    assert page.text("#ratio") == f"{work.standard_bytes / work.flash_bytes:.1f}"
    small = counts.count(Problem(1, 1, 1, 16, 10, 4, 4, torch.float16, right=0))
    shown = values(page, "#traffic-toy")
    assert (shown[2], shown[8]) == (small.standard_bytes, small.flash_bytes)
    walk = page.run("App.scene.walk.steps.at(-1)")
    assert shown[3:5] == [walk["read"], walk["written"]]


def test_time_shown_is_that_of_the_cost_model(page):
    page.open(view="time", gpu="a100")
    page.choose("#time-length", "16384")
    page.click("input[value=h100]")
    want = kernels.estimate(make_data.problem(4, 32, 16384, 128, "causal"), "forward", "h100")
    assert f"{want.time_s * 1e3:.1f} ms, {want.tflops:.0f} TFLOP/s" in page.text("#time-summary")
    shares = [float(text.split()[0]) for text in page.texts("#time-parts tbody td:last-child")]
    assert shares[:-1] == [round(100 * value / want.time_s, 1) for value in want.parts.values()]
    page.open(view="time", length=131072, batch=32, heads=128, gpu="l40s")
    assert "does not fit" in page.text("#time-summary")


# ---- use


def test_keys_step_play_and_choose_a_row(page):
    def state():
        return int(page.text("#counter").split(" / ")[0]), page.attribute("#play", "aria-label")

    page.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert state() == (3, "Play")
    page.press("ARROW_LEFT")
    assert state() == (2, "Play")
    page.press("SPACE")
    assert state()[1] == "Pause" and page.attribute("#narration", "aria-live") == "off"
    page.press("SPACE")
    assert state()[1] == "Play" and page.attribute("#narration", "aria-live") == "polite"
    page.focus("#stage")
    page.press("END")
    assert page.text("#step-title") == "The same as the full softmax"
    page.press("HOME", "ARROW_DOWN", "ARROW_DOWN", "ARROW_UP")
    assert state()[0] == 0 and page.run("App.state.row") == 1
    page.focus("#position")
    page.press("ARROW_RIGHT")
    assert state()[0] == 1  # the slider's own step, not twice


def test_it_plays_to_the_end_and_stops(page):
    page.open(m=1, n=2, bm=1, bn=1, d=1)
    page.choose("#speed", "4")
    page.click("#play")
    page.driver.execute_async_script("Check.stopped(arguments[0])")
    assert page.text("#step-title") == "The same as the full softmax"


@pytest.mark.parametrize("view", VIEWS)
def test_everything_is_reached_by_tab_and_shows_the_focus(page, view):
    page.open(view=view)
    page.run("Check.open()")
    seen = []
    for _ in range(page.run("Check.reachable()")):
        page.press("TAB")
        focused = page.run("Check.focused()")
        assert focused["outlined"], f"{focused['name']} does not show that it has the focus"
        seen.append(focused["name"])
    assert len(set(seen)) == len(seen) > 10, seen


def test_controls_have_names_and_steps_are_spoken(page):
    for view in VIEWS:
        page.open(view=view)
        assert page.run("Check.unnamed()") == []
        assert page.run("[...document.querySelectorAll('[aria-current]')].map((e) => e.dataset.view)") == [
            view
        ]
    html = (FOLDER / "index.html").read_text()
    ids = re.findall(r' id="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:aria-\w+by| for)="([\w-]+)"', html)) <= set(ids)
    page.open()
    assert page.attribute("#narration", "aria-live") == "polite"
    assert page.attribute("#narration", "aria-atomic") == "true"
    spoken = set()
    for _ in range(7):
        page.press("ARROW_RIGHT")
        spoken.add(page.text("#narration"))
    assert len(spoken) == 7


BAD = [
    ("m", "0", "Queries M must be a whole number from 1 to 32, got 0."),
    ("m", "33", "Queries M must be a whole number from 1 to 32, got 33."),
    ("n", "abc", "Keys N must be a whole number from 1 to 32, got abc."),
    ("n", "", "Keys N must be a whole number from 1 to 32, got nothing."),
    ("bm", "2.5", "Query tile must be a whole number from 1 to 16, got 2.5."),
    ("bn", "99999999999999999999", "Key tile must be a whole number from 1 to 16, got 99999999999999999999."),
    ("d", "1e1", "Head dim D must be a whole number from 1 to 8, got 1e1."),
    ("left", "-2", "Window left must be a whole number from -1 to 32, got -2."),
    ("seed", "<b>x</b>", "Seed must be a whole number from 0 to 999999, got <b>x</b>."),
]


@pytest.mark.parametrize("field, value, message", BAD)
def test_bad_input_gets_a_message_and_changes_nothing(page, field, value, message):
    page.click("#settings summary")
    before = page.run("[App.scene.p, App.scene.walk.out]")
    page.run("Check.paste(...arguments)", f"#{field}", value)
    assert page.text("#error").startswith(message)
    assert page.attribute(f"#{field}", "aria-invalid") == "true"
    assert page.run("[App.scene.p, App.scene.walk.out]") == before
    page.type(f"#{field}", "3")
    assert page.text("#error") == "" and page.run(f"App.state.toy.{field}") == 3
    page.open(**{field: value.replace("<", "%3C")})  # the same in the address
    assert page.text("#error").startswith(message)


def test_bad_sizes_in_the_address_get_a_message(page):
    page.open(view="time", length=7)
    assert page.text("#size-error").startswith("Length S must be one of 512, 1024")
    page.open(view="time", gpu="abacus")
    assert "got abacus" in page.text("#size-error") and "NVIDIA H200" in page.text("#time-summary")


def test_the_address_holds_the_settings(page):
    page.click("#settings summary")
    page.type("#n", "20")
    page.click("#language")
    address = page.driver.current_url
    page.driver.get("about:blank")
    page.driver.get(address)
    assert page.run("[App.scene.p.n, document.documentElement.lang]") == [20, "zh-Hans"]


def test_both_languages_say_everything(page):
    words = page.run("TEXT")
    assert words["en"].keys() == words["zh"].keys()
    for key, english in words["en"].items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", words["zh"][key])), (
            key
        )
    html = (FOLDER / "index.html").read_text()
    assert set(re.findall(r'data-(?:t|label)="(\w+)"', html)) <= words["en"].keys()
    for key, text in re.findall(r'data-t="(\w+)"[^>]*>([^<]+)<', html):
        assert text == words["en"][key], key  # the HTML itself is the English page
    page.click("#language")
    assert page.run("document.documentElement.lang") == "zh-Hans"
    assert page.text("#step-title") == words["zh"]["startTitle"]


# ---- looks


@pytest.mark.parametrize("language", ("en", "zh"))
def test_a_phone_never_scrolls_sideways(page, language):
    wide = "document.documentElement.scrollWidth"
    for setting in ({}, {"m": 32, "n": 32, "bm": 1, "bn": 1, "d": 8, "causal": 0}, {"m": 1, "n": 1, "d": 1}):
        page.open(PHONE, lang=language, **setting)
        page.run("Check.open()")
        page.type("#seed", "not a seed, and a long one too")
        steps = page.run("App.scene.walk.steps.length")
        for at in (0, 3, steps // 2, steps - 1):
            page.step(at)
            assert page.run(wide) == PHONE[0], (setting, at)
    for view in VIEWS[1:]:
        page.open(PHONE, lang=language, view=view, length=131072, batch=32, heads=128, direction="backward")
        assert page.run(wide) == PHONE[0], view


@pytest.mark.parametrize("language", ("en", "zh"))
def test_a_talk_is_large_and_fits_the_screen(page, language):
    page.open(TALK, lang=language)
    page.click("#talk")
    assert page.run("parseFloat(getComputedStyle(document.documentElement).fontSize)") >= 24
    bottom = "document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    for at in range(page.run("App.scene.walk.steps.length")):
        page.step(at)
        controls = page.run("document.querySelector('.transport').getBoundingClientRect().top")
        assert page.run(bottom, "#stage svg") <= controls and page.run(bottom, "#verdict dl") <= controls, at
    assert page.run("document.documentElement.scrollHeight") == TALK[1]


@pytest.mark.parametrize("scheme, ground", (("light", "rgb(251, 250, 246)"), ("dark", "rgb(21, 23, 27)")))
def test_contrast_is_at_least_aa(page, scheme, ground):
    for view, preset in itertools.product(VIEWS, ("presetCausal", "presetEmpty")):
        page.open(view=view)
        page.media(prefers_color_scheme=scheme)
        assert page.run("getComputedStyle(document.body).backgroundColor") == ground
        page.run("Check.open()")
        page.run("document.querySelector(arguments[0]).click()", f"[data-preset={preset}]")
        if view == "watch":
            page.type("#m", "0")  # an error message
            page.step(6)
        texts = page.run("Check.textContrast()")
        assert len(texts) > 25 and [entry for entry in texts if entry[0] < 4.5] == []
        assert [entry for entry in page.run("Check.drawnContrast()") if entry[0] < 3] == []


def test_the_theme_button_overrides_the_system(page):
    page.media(prefers_color_scheme="dark")
    assert page.text("#theme") == "Light"
    page.click("#theme")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 246)"
    assert page.text("#theme") == "Dark"


def test_reduced_motion_is_respected(page):
    duration = "parseFloat(getComputedStyle(document.querySelector('.cell')).transitionDuration)"
    assert page.run(duration) > 0
    page.media(prefers_reduced_motion="reduce")
    assert page.run(duration) == 0


def test_nothing_comes_from_elsewhere(page):
    loaded = page.driver.execute_cdp_cmd("Page.getResourceTree", {})["frameTree"]["resources"]
    assert len(loaded) >= 8 and all(one["url"].startswith(("file:", "data:")) for one in loaded)
    for path in FOLDER.iterdir():
        if path.suffix in (".html", ".css", ".js"):
            found = set(re.findall(r"https?://[^\s'\"%)]+", path.read_text()))
            assert found <= {"http://www.w3.org/2000/svg"}, path

"The explorer's numbers are those of lfdm: in a JavaScript engine, and in a browser where there is one."
import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from py_mini_racer import JSEvalException, MiniRacer
from scipy.special import erf, gammaln, ndtri

from lfdm.core import from_spec
from lfdm.data import DATASETS
from lfdm.evaluation import floor, floor_per_logsnr
from lfdm.explorer import (
    _asset,
    explorer_data,
    explorer_formulas,
    explorer_page,
    schedule_formulas,
    write_explorer,
)
from lfdm.lookup import code_bases, own_w
from lfdm.losses import DiffusionLoss
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS, implied_w, rising_intervals

SETS = ["cluster", "ring"]
# every option away from its default; a class without options is here by its name alone
SCHEDULES_MOVED = [
    "cosine(-9, 7.5)", "shifted_cosine(-11, 10, 0.7)", "linear(-4.5, 10.5, 0.05, 12)",
    "linear_logsnr(-8, 15)", "ve(-6.5, 9)", "edm_train(-8, 11, 1.1, 1.7)", "edm_sample(-7, 14, 4)",
    "rectified_flow(-9, 11, 3)", "logit_normal(-8, 7, -0.4, 0.8, 2)", "adaptive(-9, 8)",
    "laplace(-6, 9, 1, 0.8)", "cauchy(-9, 10, -1, 2)", "cosmap(-10, 9, 0.5)", "mode(-9, 10, -0.7, 2)",
    "beta(-9, 10, 1.4, 2.6, 0.7)", "ddpm", "ddpm(zero_snr=1)", "discrete"]
TARGETS_MOVED = ["x", "eps", "v", "score", "F(1.3)", "flow"]
WEIGHTINGS_MOVED = [
    "nelbo", "weighted", "rescaled", "simple", "snr", "snr_plus_one", "truncated_snr", "min_snr(2)",
    "soft_min_snr(9)", "debiased", "p2(0.4, 1.7)", "jit(0.2)", "cosmap_weight", "ddpm_vlb(posterior)", "sech",
    "exponential", "sigmoid(-1.5)", "edm(1, 1.9, 0.8)", "edm_monotonic(1, 1.9, 0.8)",
    "implied(rectified_flow, flow, min_snr)", "monotonic(edm)", "uncertainty(sech, -15, 15)"]

HELPERS = """
const atob = globalThis.atob || (text => {   // V8 alone has none
  const letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/';
  let out = '', bits = 0, n = 0;
  for (const c of text.replace(/=+$/, '')) {
    bits = bits << 6 | letters.indexOf(c); n += 6;
    if (n >= 8) { n -= 8; out += String.fromCharCode(bits >> n & 255); bits &= (1 << n) - 1; }
  }
  return out;
});"""
COMBINED = """
function combined(schedules, targets, weightings, n, factors) {   // w, and the factor, of all triples
  const made = weightings.map(text => makeWeighting(choose('weightings', text)));
  return schedules.map(text => {
    const s = makeSchedule(choose('schedules', text)), [low, high] = s.range;
    const some = s.levels && s.levels.filter((_, i) => i % Math.floor(1000 / n) === 3);
    const l = some || linspace(low + .01, high - .01, n);
    const triples = targets.map((target, i) => {
      const r = makeRatio(choose('targets', target), s);
      return made.map(weighting => {
        const loss = joined(s, r, weighting);
        return {w: l.map(loss.w), factor: factors && i % 2 ? l.map(loss.factor) : []};
      });
    });
    return {l, p: l.map(s.density), t: l.map(s.t), triples};
  });
}"""


class Engine:
    "The page's model, without the page."

    def __init__(self, code):
        self.context = MiniRacer()
        self.context.eval(code)

    def __call__(self, function, *args):
        call = f"{function}({','.join(map(json.dumps, args))})"
        return json.loads(self.context.eval(f"JSON.stringify({call})"))


@pytest.fixture(scope="module")
def made():
    return dict(data=explorer_data(SETS), formulas=explorer_formulas())


@pytest.fixture(scope="module")
def engine(made):
    data = f"const DATA = {json.dumps(made['data'])};"
    engine = Engine("\n".join([HELPERS, made["formulas"], data, _asset("model.js"), COMBINED, """
        const loss = (...words) => makeTriple(Object.fromEntries(['schedule', 'target', 'weighting']
            .map((word, i) => [word, choose(word + 's', words[i])])));
        const said = f => { try { f(); return ''; } catch (e) { return e.message; } };
        const tried = (...words) => said(() => loss(...words));"""]))
    return engine


def float64(values): return torch.tensor(values, dtype=torch.float64)


def off(found, right):
    "The largest relative difference."
    return ((float64(found) - right) / right).abs().max().item()


def all_of(registry, texts, kind): return [from_spec(registry, text, kind) for text in texts]


# --- the numbers

def test_what_javascript_lacks(engine):
    x = [i / 10 for i in range(-65, 66)]
    assert (float64(engine("(x => x.map(erf))", x)) - float64(erf(x))).abs().max() < 5e-15
    x = [0.05 + i / 3 for i in range(150)]
    assert (float64(engine("(x => x.map(lgamma))", x)) - float64(gammaln(x))).abs().max() < 1e-12
    p = [1e-300, 1e-12, 1e-6, *(i / 50 for i in range(1, 50)), 1 - 1e-6]
    assert (float64(engine("(x => x.map(ndtri))", p)) - float64(ndtri(p))).abs().max() < 1e-9


def test_the_lists_hold_every_class():
    word = lambda text: text.partition("(")[0]
    assert {*map(word, SCHEDULES_MOVED)} == {*SCHEDULES} - {"betas"}
    assert [*map(word, TARGETS_MOVED)] == [*TARGETS] and {*map(word, WEIGHTINGS_MOVED)} == {*WEIGHTINGS}


@pytest.mark.parametrize("moved", [False, True], ids=["default options", "other options"])
def test_w_factor_and_density_over_all_combinations(engine, made, moved):
    "Each triple's w(λ) is `implied_w`; with other options its factor, p(λ) and t(λ) too."
    schedules = SCHEDULES_MOVED if moved else list(made["data"]["schedules"])
    targets, weightings = (TARGETS_MOVED, WEIGHTINGS_MOVED) if moved else ([*TARGETS], [*WEIGHTINGS])
    found = engine("combined", schedules, targets, weightings, 9, moved)
    worst, count = 0., 0
    ys, ws = all_of(TARGETS, targets, "target"), all_of(WEIGHTINGS, weightings, "weighting")
    for s, row in zip(all_of(SCHEDULES, schedules, "schedule"), found):
        l = float64(row["l"])
        seen = slice(int((l < -50).sum()), None)   # pure noise stands at λ = -60 in the page
        l = l[seen]
        assert off(row["p"][seen], s.density(l)) < 1e-9
        assert (float64(row["t"][seen]) - s.t(l)).abs().max() < 1e-9
        for y, part in zip(ys, row["triples"]):
            for w, values in zip(ws, part):
                wrong = off(values["w"][seen], implied_w(l, s, y, w))
                if values["factor"]: wrong = max(wrong, off(values["factor"][seen], w.factor(l, s, y)))
                assert wrong < 1e-9, f"{s} × {y} × {w}: {wrong:.1e}"
                worst, count = max(worst, wrong), count + 1
    assert count == len(schedules) * len(targets) * len(weightings)
    print(f"{count} combinations, at most {worst:.1e} off")


LOSSES = [
    ("cosine", "eps", "weighted"), ("cosine", "v", "sigmoid(k=-1)"), ("linear", "x", "min_snr(gamma=3)"),
    ("rectified_flow(shift=3)", "flow", "weighted"), ("edm_train", "F", "edm"), ("mode", "flow", "jit"),
    ("beta", "flow", "weighted"), ("adaptive", "v", "edm_monotonic"), ("ddpm", "eps", "weighted"),
    ("ddpm", "x", "ddpm_vlb"), ("ddpm(zero_snr=1)", "v", "weighted"), ("discrete", "score", "nelbo")]


@pytest.mark.parametrize("words", LOSSES, ids=" ".join)
def test_floors_and_where_w_rises(engine, words):
    ours = DiffusionLoss(*words)
    chain = bool(ours.schedule.steps)
    for name in SETS[:1 if chain else 2]:
        value = engine("((set, ...words) => floorOf(loss(...words), set))", name, *words)
        assert math.isclose(value, floor(ours, DATASETS[name]()), rel_tol=1e-5), name
    l = [-5.3, -1.1, 0.4, 4.7]
    found = engine("((l, ...words) => l.map(x => loss(...words).w(x) * noiseError('ring', x)))", l, *words)
    assert off(found, floor_per_logsnr(ours, DATASETS["ring"](), float64(l))) < 1e-5
    if ours.schedule.ends_in_noise: return
    rising = engine("((...words) => risingIntervals(loss(...words)))", *words)
    right = rising_intervals(*words)
    step = (ours.schedule.logsnr_max - ours.schedule.logsnr_min) / 4000
    assert len(rising) == len(right)
    assert all(abs(a - b) < 1.01 * step for i, j in zip(rising, right) for a, b in zip(i, j))


def test_noise_error_at_any_level(engine):
    l = [-60., -30., *(k / 7 for k in range(-160, 161)), 25.]
    for name in SETS:
        right = DATASETS[name]().eps_floor(float64(l))
        assert off(engine("((set, l) => l.map(x => noiseError(set, x)))", name, l), right) < 1e-5


# --- words and refusals

REFUSED = [
    ("uncertainty", "cosine(-14, 10)"), ("uncertainty(sech, -9, 9)", "ve"), ("uncertainty", "adaptive"),
    ("edm_monotonic(mean=4.5, std=2.5)", "cosine"), ("edm_monotonic(2.4, 3, 2)", "edm_train"),
    ("sech", "linear(-12, 9)"), ("sech", "edm_train(-9.5, 9, 2.4, 1)"), ("sech", "laplace(-17, 9)"),
    ("sech", "logit_normal(-18)"), *((text, "adaptive") for text in WEIGHTINGS_MOVED)]


def test_what_lfdm_refuses_is_refused_in_its_words(engine):
    taken = 0
    for weighting, schedule in REFUSED:
        try: DiffusionLoss(schedule, "flow", weighting)
        except ValueError as e: said = str(e)
        else: said, taken = "", taken + 1
        assert engine("tried", schedule, "flow", weighting) == said, (schedule, weighting)
    assert 0 < taken < len(REFUSED) / 2


def test_words_are_spelled_as_lfdm_spells_them(engine):
    for text, right in (("min_snr(2)", "min_snr(gamma=2)"), ("sigmoid", "sigmoid"),
                        ("sigmoid(k=2)", "sigmoid"), ("p2(gamma=0.3333333333)", "p2(gamma=0.3333333333)"),
                        ("implied(schedule='linear', target=x)", "implied(schedule=linear, target=x)")):
        assert engine("(text => spec('weightings', choose('weightings', text)))", text) == right
    for value in (0., 5., -0.25, 1e-5, 123456789., 1 / 3, 1e6, 999999.5, math.inf):
        assert engine("(v => g(v ?? Infinity))", None if value == math.inf else value) == f"{value:g}"
    for bad in ("sigmoid(q=1)", "sigmoid(k=x)", "nothing", "implied(weighting=implied)", "sigmoid(k=1)(2)"):
        with pytest.raises(JSEvalException): engine("(text => choose('weightings', text))", bad)


# --- code bases, equals, somebody's own code

def test_every_option_set_of_a_code_base_is_in_the_page(engine):
    "By its triple, or as the curve of its own formula."
    rows = [(code, i, row.with_numbers()) for code, entry in code_bases().items()
            for i, row in enumerate(entry["rows"])]
    found = engine("""(() => Object.values(DATA.codes).flatMap(rows => rows.map(row => {
        const l = pointsFor(rowLoss(row));
        return {l, w: l.map(rowLoss(row).w)};
    })))""")
    assert len(found) == len(rows)
    for (code, i, row), values in zip(rows, found):
        if not values["l"]: continue
        l = float64(values["l"])
        if row.triple: right = implied_w(l, *row.triple)
        else:
            own_l, _, own = row.curve()
            order = own_l.argsort()
            right = own[order][torch.searchsorted(own_l[order], l - 1e-5)]
        assert off(values["w"], right) < 1e-5, (code, i)
    assert sum(bool(values["l"]) for values in found) > 225


def test_numbers_of_an_option_set_can_be_changed(engine):
    row = next(row for row in code_bases()["huggingface/diffusers"]["rows"] if "snr_gamma" in row.numbers)
    l = [-3.3, 0.2, 2.9]
    found = engine("""((i, l) => l.map(rowLoss(DATA.codes['huggingface/diffusers'][i], {snr_gamma: 2}).w))""",
                   code_bases()["huggingface/diffusers"]["rows"].index(row), l)
    assert off(found, implied_w(float64(l), *row.with_numbers(snr_gamma=2).triple)) < 1e-6


@pytest.mark.parametrize("words", [LOSSES[0], LOSSES[4], LOSSES[8]], ids=" ".join)
def test_equal_losses_are_equal(engine, words):
    "Each triple that is found is proportional in lfdm; and those that must be found are."
    found = engine("""((...words) => equalTriples(loss(...words))
        .map(t => [t.schedule.name, t.target.name, t.weighting.name]))""", *words)
    l = torch.linspace(-4.9, 5.1, 40, dtype=torch.float64)
    right = implied_w(l, *words)
    for other in found:
        ratio = implied_w(l, *other) / right
        assert ratio.max() / ratio.min() - 1 < 1e-6, other
    assert list(words) in found
    assert {(words[0], y, "simple") for y in TARGETS} <= set(map(tuple, found)) or words[2] != "weighted" or (
        words[1] != "eps")
    codes = engine("((...words) => equalCodes(loss(...words)))", *words)
    for code, i in codes:
        row = code_bases()[code]["rows"][i].with_numbers()
        if row.triple: ratio = implied_w(l, *row.triple) / right
        else:
            logsnr, _, w = row.curve()
            seen = logsnr.abs() < 4
            ratio = w[seen] / implied_w(logsnr[seen], *words)
        assert ratio.max() / ratio.min() - 1 < (1e-6 if row.triple else 1e-2), (code, i)
    assert codes


def test_own_code_gives_what_own_w_gives(engine):
    rows = [row.with_numbers() for e in code_bases().values() for row in e["rows"] if not row.T]
    texts = {"\n".join(f"{k} = {v}" for k, v in row.own.items()): row for row in rows}
    texts = {text: row for i, (text, row) in enumerate(texts.items()) if i % 5 == 0}
    for text, row in texts.items():
        found = engine("(text => { const own = makeOwn(text), l = own.points.filter(x => Math.abs(x) < 6);"
                       "return {l, w: l.map(own.w), p: l.map(own.p)}; })", text)
        logsnr, p, w = (q.numpy() for q in own_w(row.own))
        order = logsnr.argsort()
        for name, values in (("w", w), ("p", p)):
            right = torch.from_numpy(values[order]).log().numpy()
            at = float64(found["l"]).numpy()
            i = logsnr[order].searchsorted(at).clip(1, len(order) - 1)
            part = (at - logsnr[order][i - 1]) / (logsnr[order][i] - logsnr[order][i - 1])
            between = (1 - part) * right[i - 1] + part * right[i]
            away = abs(float64(found[name]).log().numpy() - between)
            assert sorted(away)[int(0.97 * len(away))] < 2e-3, (row.code, name)   # but for kinks and jumps
    assert len(texts) > 12


def test_own_code_is_read_as_arithmetic_and_never_run(engine):
    tried = "(text => said(() => makeOwn(text)))"
    good = "a = 1 - u\nb = u\ny = e - x\nweight = 2*min(a**2/b**2, 5)^-1 # note"
    assert engine(tried, good) == ""
    assert engine("(text => parsed(text)({u: 2}))", "-u**2 + 2**-1 * (3 - u) / 1e1") == -4 + 0.05
    for wrong, says in (("1 - alert(1)", "unknown function 'alert'"), ("u.constructor", "cannot read"),
                        ("1 - constructor", "unknown name 'constructor'"), ("(1 - u", "expected )"),
                        ("1 -", "cannot read"), ("0", "no levels")):
        assert says in engine(tried, good.replace("1 - u", wrong)), wrong
    assert "line for weight is missing" in engine(tried, good.replace("weight", "weigh"))
    assert "is no line such as" in engine(tried, "hello")


# --- the file

def test_the_page_is_one_file_that_asks_for_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr("lfdm.explorer.explorer_page", lambda: explorer_page(**made))
    page = write_explorer(tmp_path / "there" / "page.html").read_text()
    assert len(page.encode()) < 1_100_000
    kept = r"<script>// https://d3js.*?</script>\s*<script>// @observ.*?</script>"
    ours = re.sub(kept, "", page, flags=re.S)
    assert not re.findall(r"(?:src|href)\s*=|@import|\bfetch\(|XMLHttpRequest|\beval\(|new Function", ours)
    assert {"d3.min.js", "plot.umd.min.js"} <= set(re.findall(r"^(\S+): ", _asset("LICENSES.txt"), re.M))


def test_a_choice_of_ones_own_joins(monkeypatch):
    class Mine(WEIGHTINGS["min_snr"]):
        "min-SNR under another name."
        name = "mine"
    monkeypatch.setitem(WEIGHTINGS, "mine", Mine)
    assert '"mine": {value: (l, o) => Math.min(1, o.gamma*Math.exp(-l))}' in explorer_formulas()
    assert "slope" in schedule_formulas(SCHEDULES["cosine"])


BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
CHECK = """<script>
setTimeout(() => {   // when all is drawn
  const all = selector => [...document.querySelectorAll(selector)];
  const named = e => e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim();
  const told = e => document.getElementById(e.getAttribute('aria-describedby'))?.textContent.length > 20;
  const found = {
    numbers: combined(%s, 3, false), width: [document.documentElement.scrollWidth, innerWidth],
    nameless: all('input, select, textarea, button').filter(e => !named(e)).map(e => e.outerHTML),
    untold: all('svg[role=img]').filter(e => !told(e)).length, hash: location.hash};
  const shown = document.createElement('pre');
  document.body.append(Object.assign(shown, {id: 'found', textContent: JSON.stringify(found)}));
}, 2000);
</script>"""


def test_in_a_browser(engine, made, tmp_path):
    "The same numbers there, and the page shows what its address asks for, without a word on the console."
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser: pytest.skip("no chromium here: the explorer was not tried in a browser")
    choices = json.dumps(list(made["data"]["schedules"])), json.dumps([*TARGETS]), json.dumps([*WEIGHTINGS])
    check = f"<script>{COMBINED}</script>{CHECK % ','.join(choices)}</body>"
    page = explorer_page(**made).replace("</body>", check)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    address = (tmp_path / "page.html").as_uri() + (
        "#A=cosine;v;sigmoid(k=3)&B=code;huggingface/diffusers;10&C=adaptive;flow;min_snr(gamma=7)&floor=ring")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800",
               "--virtual-time-budget=9000", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path}", "--dump-dom")
    done = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=120)
    shown = done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    there = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)[1]))
    found = there["numbers"]
    assert there["width"][0] <= there["width"][1] < 600, "it scrolls sideways on a phone"
    assert not there["nameless"] and not there["untold"]
    assert there["hash"].startswith("#A=cosine;v;sigmoid(k=3)&B=code;huggingface/diffusers;10&C=adaptive")
    right = engine("combined", *map(json.loads, choices), 3, False)
    flat = lambda rows: float64([v for row in rows for part in row["triples"] for q in part for v in q["w"]])
    assert len(flat(found)) == len(flat(right)) and off(flat(found).tolist(), flat(right)) < 1e-12
    assert "DiffusionLoss('cosine', 'v', 'sigmoid(k=3)')" in shown and "Until September 2023" in shown
    lowest = floor(DiffusionLoss("cosine", "v", "sigmoid(k=3)"), DATASETS["ring"]())
    assert f"Floor on ring: {lowest:.4g}." in shown
    assert "It learns: shown as it starts." in shown
    assert "the adaptive schedule needs a weight w(λ)" in shown and "min_snr(gamma=7)" in shown
    assert {*re.findall(r'<figure id="(\w+)">', shown)} == {"weight", "factor", "density", "floor"}
    assert shown.count("<svg") >= 6 and shown.count("<math") >= 3

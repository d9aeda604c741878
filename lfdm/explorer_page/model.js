// What a loss is, from FORMULAS (printed by sympy from lfdm's functions) and DATA (computed by lfdm).
// No formula of a schedule, target or weighting stands here.
'use strict';

// --- what JavaScript lacks

function erf(x) {
  const y = Math.abs(x);
  if (y > 6) return Math.sign(x);
  if (y < 2.5) {
    // the series
    let term = y,
      sum = y;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
      term *= (-y * y) / n;
      sum += term / (2 * n + 1);
    }
    return ((Math.sign(x) * 2) / Math.sqrt(Math.PI)) * sum;
  }
  let tail = 0; // the continued fraction of 1 - erf
  for (let n = 60; n > 0; n--) tail = n / 2 / (y + tail);
  return Math.sign(x) * (1 - Math.exp(-y * y) / Math.sqrt(Math.PI) / (y + tail));
}

function lgamma(x) {
  // Stirling's series, far enough out
  let shift = 0;
  while (x < 12) shift += Math.log(x++);
  const r = 1 / (x * x);
  const series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r / 1188)))) / x;
  return (x - 0.5) * Math.log(x) - x + Math.log(2 * Math.PI) / 2 + series - shift;
}

function ndtri(p) {
  // the inverse of the normal distribution, by Newton's method on the log of its tail, from above the root
  if (p > 0.5) return -ndtri(1 - p);
  let x = Math.sqrt(-2 * Math.log(2 * p));
  for (let i = 0; i < 60; i++) {
    const tail = normalTail(x);
    const step = (Math.log(tail / p) * tail * Math.sqrt(2 * Math.PI)) / Math.exp((-x * x) / 2);
    x += step;
    if (Math.abs(step) < 1e-15 * Math.max(1, x)) break;
  }
  return -x;
}

function normalTail(x) {
  // 1 - Φ, of x ≥ 0
  const y = x / Math.SQRT2;
  if (y < 2.5) return (1 - erf(y)) / 2;
  let tail = 0;
  for (let n = 60; n > 0; n--) tail = n / 2 / (y + tail);
  return Math.exp(-y * y) / Math.sqrt(Math.PI) / (y + tail) / 2;
}

function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return Array.from(new Float64Array(bytes.buffer));
}

const linspace = (a, b, n) => Array.from({length: n}, (_, i) => a + ((b - a) * i) / (n - 1));

// --- words: 'sigmoid(k=3)' and back

function g(value, digits = 6) {
  // as Python's format(value, 'g')
  if (!isFinite(value)) return value > 0 ? 'inf' : '-inf';
  if (value === 0) return '0';
  const size = Math.floor(Math.log10(Math.abs(Number(value.toExponential(digits - 1)))));
  if (size >= -4 && size < digits) return String(Number(value.toPrecision(digits)));
  const [mantissa, exponent] = value.toExponential(digits - 1).split('e');
  const power = exponent.slice(1).padStart(2, '0');
  return `${Number(mantissa)}e${exponent[0]}${power}`;
}

const spelled = v => (typeof v !== 'number' ? v : Number(g(v)) === v ? g(v) : String(v));

function splitTop(text) {
  // at the commas outside of brackets
  const parts = [];
  let depth = 0,
    from = 0;
  for (let i = 0; i <= text.length; i++) {
    const c = text[i];
    if (c === '(') depth++;
    if (c === ')') depth--;
    if (i === text.length || (c === ',' && !depth)) {
      parts.push(text.slice(from, i).trim());
      from = i + 1;
    }
  }
  return parts.filter(Boolean);
}

function choose(group, text) {
  // {name, o}; throws an Error
  const known = DATA[group];
  const [, word, inner] = text.trim().match(/^([\w]+)(?:\((.*)\))?$/s) || [];
  if (known[text]) return {name: text, o: defaults(known[text])}; // chains have their whole text as a name
  if (!known[word]) throw Error(`unknown ${group.slice(0, -1)} '${text}'.`);
  const {options} = known[word],
    o = defaults(known[word]);
  splitTop(inner || '').forEach((part, i) => {
    const [, key, value] = part.match(/^(\w+)\s*=\s*(.*)$/s) || [, options[i]?.name, part];
    const option = options.find(q => q.name === key);
    if (!option) throw Error(`${word} has no option '${key}' here.`);
    const plain = value.replace(/^['"]|['"]$/g, '');
    if (option.words && !option.words.includes(plain))
      throw Error(`${key} of ${word} cannot be '${plain}' here.`);
    if (!option.words && !isFinite(Number(plain)))
      throw Error(`${key} of ${word} must be a number, not '${plain}'.`);
    o[key] = option.words ? plain : Number(plain);
  });
  return {name: word, o};
}

const defaults = entry => Object.fromEntries(entry.options.map(q => [q.name, q.default]));

function spec(group, {name, o}) {
  const given = DATA[group][name].options.filter(q => o[q.name] !== q.default);
  return given.length ? `${name}(${given.map(q => `${q.name}=${spelled(o[q.name])}`).join(', ')})` : name;
}

function repr({name, o}) {
  // of a weighting, as Python shows it
  const shown = DATA.weightings[name].shown.map(([key, value]) => {
    const own = o[key] ?? value;
    return `${key}=${typeof own === 'number' ? g(own) : own}`;
  });
  return `${DATA.weightings[name].type}(${shown.join(', ')})`;
}

const filled = (text, blanks) => text.replace(/\{(\w+)\}/g, (all, name) => blanks[name] ?? all);
const refuse = (name, blanks) => {
  throw Error(filled(DATA.messages[name], blanks));
};

// --- a schedule: its range, p(λ), λ′, t(λ), α and σ

function makeSchedule({name, o}) {
  const f = FORMULAS.schedules[name],
    {kind, spread} = DATA.schedules[name];
  const made = {name, alpha: l => f.alpha(l, o), sigma: l => f.sigma(l, o)};
  if (kind === 'levels') return Object.assign(made, chainOf(name));
  const [low, high] = (made.range = [o.logsnr_min, o.logsnr_max]);
  requireReach(name, o, f);
  if (kind === 'start') {
    // uniform in λ
    const p = spread / (high - low);
    return Object.assign(made, {density: () => p, dlogsnr: () => -1 / p, t: l => (high - l) / (high - low)});
  }
  const path = {formula: byFormula, path: byBisection, density: byIntegral}[kind](f, o);
  const slope = path.slope,
    first = path.time(high),
    last = path.time(low);
  return Object.assign(made, {
    dlogsnr: l => FORMULAS.rules.dlogsnr(slope(l), first, last),
    density: l => FORMULAS.rules.density(slope(l), first, last),
    t: l => FORMULAS.rules.time(path.time(l), first, last)
  });
}

function requireReach(name, o, f) {
  const low = o.logsnr_min,
    high = o.logsnr_max;
  if (!(low < high)) throw Error(`logsnr_min must be below logsnr_max, but ${low} >= ${high}.`);
  const lowest = f.lowest ? f.lowest(low, o) : -Infinity,
    highest = f.highest ? f.highest(high, o) : Infinity;
  if (low >= lowest && high <= highest) return;
  refuse('reach', {schedule: name, lowest: g(lowest), highest: g(highest), low: g(low), high: g(high)});
}

function byFormula(f, o) {
  return {time: l => f.inverse(l, o), slope: l => f.slope(l, o)};
}

function byBisection(f, o) {
  // of the path, which falls with u
  const time = l => {
    let low = 0,
      high = 1;
    for (let i = 0; i < 60; i++) {
      const u = (low + high) / 2;
      if (f.path(l, o, u) > l) low = u;
      else high = u;
    }
    return (low + high) / 2;
  };
  return {time, slope: l => f.path_slope(l, o, time(l))};
}

function byIntegral(f, o) {
  // of -1/λ′, from the clean end: Simpson's rule between the points of a grid
  const low = o.logsnr_min,
    high = o.logsnr_max,
    n = 4000,
    h = (high - low) / n;
  const p = l => -1 / f.slope(l, o),
    sums = [0];
  for (let i = 0; i < n; i++) {
    const l = high - i * h;
    sums.push(sums[i] + (h / 6) * (p(l) + 4 * p(l - h / 2) + p(l - h)));
  }
  const time = l => {
    const i = Math.min(n - 1, Math.max(0, Math.floor((high - l) / h))),
      from = high - i * h,
      d = from - l;
    return sums[i] + (d / 6) * (p(from) + 4 * p(from - d / 2) + p(l));
  };
  return {time, slope: l => f.slope(l, o)};
}

const CHAINS = {}; // unpacked once
function chainOf(name) {
  if (CHAINS[name]) return CHAINS[name];
  const {levels, slope, density} = DATA.chains[name];
  const l = unpacked(levels),
    D = unpacked(slope),
    p = unpacked(density);
  const T = l.length - 1;
  const cell = x => {
    // the i with λ_i ≤ x < λ_{i-1}, 1 to T
    let low = 0,
      high = T;
    const near = x + 9e-16 * Math.min(1e6, Math.max(1, Math.abs(x)));
    while (high - low > 1) {
      const m = (low + high) >> 1;
      if (l[m] <= near) high = m;
      else low = m;
    }
    return high;
  };
  return (CHAINS[name] = {
    steps: T,
    range: [l[T], l[0]],
    levels: l.slice(1).reverse(),
    density: x => (x < l[T] || x > l[0] ? 0 : p[cell(x) - 1]),
    dlogsnr: x => D[cell(x) - 1],
    t: x => cell(x) / T,
    before: x => l[cell(x) - 1],
    jump: x => l[cell(x) - 1] - l[cell(x)]
  });
}

// --- a weighting: its factor on the noise error

function makeWeighting({name, o}) {
  const f = FORMULAS.weightings[name],
    rules = FORMULAS.rules,
    {kind} = DATA.weightings[name];
  if (kind === 'g') return {eps: l => f.value(l, o)};
  if (kind === 'weighted') return {eps: (l, schedule, ratio) => rules.weighted(ratio)};
  if (kind === 'bound')
    return {
      eps: (l, s) =>
        s.steps && o.variance === 'beta'
          ? rules.chain_bound(s.steps, s.alpha(s.before(l)), s.alpha(l), s.jump(l))
          : rules.bound(s.dlogsnr(l))
    };
  if (kind === 'start') return makeWeighting({name: o.weighting, o: defaults(DATA.weightings[o.weighting])});
  const w = weightOf({name, o}, f, kind);
  return {w, eps: (l, schedule) => rules.of_w(schedule.dlogsnr(l), w(l))};
}

function weightOf({name, o}, f, kind) {
  // w(λ)
  const rules = FORMULAS.rules;
  if (kind === 'implied') {
    const {schedule, target, weighting} = o,
      plain = (group, word) => choose(group, word);
    const s = makeSchedule(plain('schedules', schedule)),
      r = makeRatio(plain('targets', target), s);
    const {eps} = makeWeighting(plain('weightings', weighting));
    return l => rules.implied(eps(l, s, r(l)), s.dlogsnr(l));
  }
  if (kind === 'monotonic') {
    const {w} = makeWeighting(choose('weightings', o.weighting)),
      peak = peakOf(w).at;
    return l => w(rules.monotonic(l, peak));
  }
  if (!f.before_peak) return l => f.value(l, o);
  const {at, height, second} = peakOf(l => f.before_peak(l, o));
  if (second) refuse('peaks', {...mapped(o, v => g(v)), highest: g(at, 4), second: g(second, 4)});
  const options = {...o, peak: at};
  return l => f.value(l, options);
}

const mapped = (o, change) => Object.fromEntries(Object.entries(o).map(([k, v]) => [k, change(v)]));

function peakOf(w) {
  // where w is highest, -∞ if it falls everywhere; `second`: a peak behind that
  const l = linspace(-40, 40, 16001),
    log = l.map(x => Math.log(w(x)));
  let best = 0;
  log.forEach((y, i) => {
    if (y > log[best]) best = i;
  });
  if (!best) return {at: -Infinity};
  const refine = i => {
    // golden section between the neighbours
    let [a, b] = [l[Math.max(0, i - 1)], l[Math.min(l.length - 1, i + 1)]];
    const k = (Math.sqrt(5) - 1) / 2;
    for (let n = 0; n < 60; n++) {
      const [c, d] = [b - k * (b - a), a + k * (b - a)];
      if (Math.log(w(c)) > Math.log(w(d))) b = d;
      else a = c;
    }
    return (a + b) / 2;
  };
  let last = best;
  for (let i = best + 1; i + 1 < l.length; i++)
    if (log[i] - log[i - 1] > 1e-11 && log[i + 1] <= log[i]) last = i;
  return {at: refine(best), second: last > best ? refine(last) : null};
}

// --- a target: r, where ‖ε - ε̂‖² = r ‖y - ŷ‖²

function makeRatio({name, o}, schedule) {
  const {ratio} = FORMULAS.targets[name];
  return l => ratio(schedule.alpha(l), schedule.sigma(l), o);
}

// --- a loss: functions of λ

function makeTriple({schedule, target, weighting}) {
  const s = makeSchedule(schedule),
    r = makeRatio(target, s),
    made = makeWeighting(weighting);
  requireFit(schedule, target, weighting);
  return joined(s, r, made);
}

function joined(s, r, made) {
  const {rules} = FORMULAS,
    eps = l => made.eps(l, s, r(l));
  return {
    range: s.range,
    levels: s.levels,
    steps: s.steps,
    p: s.density,
    t: s.t,
    eps,
    factor: l => rules.factor(eps(l), r(l)),
    w: l => rules.w(s.density(l), eps(l))
  };
}

function requireFit(schedule, target, weighting) {
  // in the library's order
  const {kind} = DATA.weightings[weighting.name],
    learns = DATA.schedules[schedule.name].kind === 'start';
  const words = {repr: repr(weighting), spec: spec('weightings', weighting), target: spec('targets', target)};
  if (kind === 'start') {
    const [from, to] = DATA.chains[schedule.name]
      ? chainOf(schedule.name).range
      : [schedule.o.logsnr_min, schedule.o.logsnr_max];
    const {logsnr_min: low, logsnr_max: high} = weighting.o;
    if (low > from || high < to)
      refuse('bins', {
        ...words,
        low: g(low),
        high: g(high),
        schedule: schedule.name.split('(')[0],
        from_: g(from),
        to: g(to)
      });
    if (learns) refuse('both', words);
  }
  if (learns && !['w', 'implied', 'monotonic'].includes(kind)) refuse('factor', words);
}

function makeCurve({logsnr, density, w}, remark) {
  // of a code base: interpolated in log w
  const at = values => l => {
    let i = logsnr.findIndex(x => x >= l);
    if (i < 0 || l < logsnr[0]) return NaN;
    i = Math.max(1, i);
    const part = (l - logsnr[i - 1]) / (logsnr[i] - logsnr[i - 1]);
    return Math.exp((1 - part) * Math.log(values[i - 1]) + part * Math.log(values[i]));
  };
  return {range: [logsnr[0], logsnr.at(-1)], points: logsnr, p: at(density), w: at(w), curve: true, remark};
}

// --- somebody's own code: a, b, y and weight as expressions in u

const OWN_FUNCTIONS = {
  sqrt: Math.sqrt,
  exp: Math.exp,
  log: Math.log,
  expm1: Math.expm1,
  log1p: Math.log1p,
  sin: Math.sin,
  cos: Math.cos,
  tan: Math.tan,
  atan: Math.atan,
  acos: Math.acos,
  cosh: Math.cosh,
  abs: Math.abs,
  min: Math.min,
  max: Math.max,
  sigmoid: x => 1 / (1 + Math.exp(-x)),
  logit: x => Math.log(x / (1 - x)),
  ndtri
};

function parsed(text) {
  // arithmetic, as a function of an object of names; nothing is ever evaluated as code
  const tokens =
    text.match(/\s*(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|\w+|\*\*|[-+*/^(),]|\S)/gi) || [];
  let i = 0;
  const next = () => (tokens[i] || '').trim();
  const take = wanted => {
    if (next() !== wanted)
      throw Error(`cannot read '${text.trim()}': expected ${wanted} before '${next() || 'its end'}'.`);
    i++;
  };
  const binary = (inner, signs) => () => {
    let left = inner();
    while (signs[next()]) {
      const f = signs[next()],
        before = left;
      i++;
      const right = inner();
      left = names => f(before(names), right(names));
    }
    return left;
  };
  const atom = () => {
    const token = next();
    i++;
    if (token === '(') {
      const inside = sum();
      take(')');
      return inside;
    }
    if (/^[\d.]/.test(token)) return () => Number(token);
    if (!/^\w+$/.test(token)) throw Error(`cannot read '${text.trim()}' at '${token || 'its end'}'.`);
    if (next() !== '(')
      return names => {
        if (Object.hasOwn(names, token)) return names[token];
        throw Error(`unknown name '${token}'. Known: ${Object.keys(names).join(', ')}.`);
      };
    if (!Object.hasOwn(OWN_FUNCTIONS, token)) {
      throw Error(`unknown function '${token}'. Known: ${Object.keys(OWN_FUNCTIONS).join(', ')}.`);
    }
    take('(');
    const args = [sum()];
    while (next() === ',') {
      i++;
      args.push(sum());
    }
    take(')');
    return names => OWN_FUNCTIONS[token](...args.map(f => f(names)));
  };
  const power = () => {
    const base = atom();
    if (next() !== '**' && next() !== '^') return base;
    i++;
    const exponent = sign();
    return names => base(names) ** exponent(names);
  };
  const sign = () => {
    if (next() === '-') {
      i++;
      const inner = sign();
      return names => -inner(names);
    }
    if (next() === '+') {
      i++;
      return sign();
    }
    return power();
  };
  const product = binary(sign, {'*': (a, b) => a * b, '/': (a, b) => a / b});
  const sum = binary(product, {'+': (a, b) => a + b, '-': (a, b) => a - b});
  const found = sum();
  if (i < tokens.length) throw Error(`cannot read '${text.trim()}' at '${next()}'.`);
  return found;
}

function definitions(text) {
  // lines 'a = cos(pi*u/2)', in turn
  const lines = text
    .split(/[\n;]/)
    .map(line => line.split('#')[0].trim())
    .filter(Boolean);
  return lines.map(line => {
    const [, name, expression] = line.match(/^(\w+)\s*=([^=].*)$/s) || [];
    if (!name) throw Error(`'${line}' is no line such as a = cos(pi*u/2).`);
    return [name, parsed(expression)];
  });
}

function makeOwn(text) {
  // the w(λ) of `own_w` in lfdm.lookup
  const lines = definitions(text),
    names = lines.map(([name]) => name);
  for (const name of ['a', 'b', 'y', 'weight']) {
    if (!names.includes(name)) throw Error(`a line for ${name} is missing.`);
  }
  const at = u => {
    const known = {pi: Math.PI, u};
    let y;
    for (const [name, f] of lines) {
      if (name === 'y') {
        y = f;
        continue;
      }
      known[name] = f(known);
      if ('a' in known && 'b' in known) known.snr = (known.a / known.b) ** 2;
    }
    return {...known, q: y({...known, x: 0, e: 1}), p: y({...known, x: 1, e: 0})};
  };
  const logsnr = u => {
    const {a, b} = at(u);
    return 2 * Math.log(Math.abs(a / b));
  };
  const found = [];
  for (let i = 1; i < 800; i++) {
    const u = i / 800,
      h = 2e-3 * Math.min(u, 1 - u),
      l = logsnr(u);
    const slope = (8 * (logsnr(u + h) - logsnr(u - h)) - logsnr(u + 2 * h) + logsnr(u - 2 * h)) / (12 * h);
    const {a, b, p, q, weight} = at(u),
      density = 1 / Math.abs(slope),
      error = q - (p * b) / a;
    const w = weight * error * error * density;
    if ([l, density, w].every(isFinite) && density > 0 && w > 0 && Math.abs(l) < 25)
      found.push([l, density, w]);
  }
  if (found.length < 20) throw Error('a and b give no levels λ = log(a²/b²) for u between 0 and 1.');
  found.sort((one, two) => one[0] - two[0]);
  const [l, density, w] = [0, 1, 2].map(k => found.map(row => row[k]));
  return makeCurve({logsnr: l, density, w});
}

// --- what is asked of a loss

function gridOf(loss, n = 601) {
  // λ, rising
  if (loss.levels) return loss.levels.filter(l => l > -25);
  return loss.points || linspace(...loss.range, n);
}

const TABLES = {};
function noiseError(set, l) {
  // of the best denoiser; log-linear beyond the table
  const {start, step, sets} = DATA.floors,
    table = (TABLES[set] ||= unpacked(sets[set])),
    n = table.length;
  const x = (l - start) / step,
    i = Math.max(1, Math.min(n - 3, Math.floor(x)));
  if (x < 0) return Math.exp(table[0] + x * (table[1] - table[0]));
  if (x > n - 1) return Math.exp(table[n - 1]);
  let sum = 0; // Lagrange, through four points
  for (let j = -1; j < 3; j++) {
    let part = table[i + j];
    for (let k = -1; k < 3; k++) if (k !== j) part *= (x - i - k) / (j - k);
    sum += part;
  }
  return Math.exp(sum);
}

function floorOf(loss, set) {
  // the smallest value of the loss
  if (loss.levels) {
    return loss.levels.reduce((sum, l) => sum + loss.eps(l) * noiseError(set, l), 0) / loss.steps;
  }
  const l = loss.points || linspace(...loss.range, 4001),
    y = l.map(x => loss.w(x) * noiseError(set, x));
  if (loss.points)
    return y.slice(1).reduce((sum, _, i) => sum + ((y[i] + y[i + 1]) / 2) * (l[i + 1] - l[i]), 0);
  const h = l[1] - l[0];
  return (h / 3) * y.reduce((sum, v, i) => sum + v * (i === 0 || i === 4000 ? 1 : i % 2 ? 4 : 2), 0);
}

function risingIntervals(loss) {
  const l = loss.levels || loss.points || linspace(...loss.range, 4001),
    log = l.map(x => Math.log(loss.w(x)));
  const limit = loss.points ? 1e-6 : 1e-11,
    found = [];
  for (let i = 1; i < l.length; i++) {
    if (!(log[i] - log[i - 1] > limit)) continue;
    if (found.length && found.at(-1)[1] === l[i - 1]) found.at(-1)[1] = l[i];
    else found.push([l[i - 1], l[i]]);
  }
  return found;
}

function sameUpTo(a, b, within) {
  // are two rows of numbers proportional?
  let low = Infinity,
    high = -Infinity;
  for (let i = 0; i < a.length; i++) {
    const ratio = Math.log(a[i] / b[i]);
    if (!(ratio < Infinity && ratio > -Infinity)) return false;
    low = Math.min(low, ratio);
    high = Math.max(high, ratio);
    if (high - low > within) return false;
  }
  return true;
}

function* defaultTriples(points) {
  // each that lfdm takes, with its p and w at the points
  const {rules} = FORMULAS,
    all = group => Object.keys(DATA[group]).map(name => choose(group, name));
  const fixed = all('weightings').filter(({name}) => DATA.weightings[name].kind !== 'start');
  const weightings = fixed.map(weighting => ({weighting, made: makeWeighting(weighting)}));
  for (const schedule of all('schedules')) {
    const s = makeSchedule(schedule),
      inside = points.every(l => l >= s.range[0] && l <= s.range[1]);
    if (!inside) continue;
    const p = points.map(s.density);
    for (const target of all('targets')) {
      const r = makeRatio(target, s),
        ratios = points.map(r);
      for (const {weighting, made} of weightings) {
        try {
          requireFit(schedule, target, weighting);
        } catch {
          continue;
        }
        yield {
          schedule,
          target,
          weighting,
          p,
          w: points.map((l, i) => rules.w(p[i], made.eps(l, s, ratios[i])))
        };
      }
    }
  }
}

function pointsFor(loss) {
  // λ where two losses are compared: 21 inside of ±7
  const [low, high] = [Math.max(-7, loss.range[0]), Math.min(7, loss.range[1])];
  if (high - low < 6) return [];
  if (!loss.points) return linspace(low + 0.013, high - 0.017, 21);
  const inside = loss.points.filter(l => l >= low && l <= high),
    step = Math.max(1, Math.floor(inside.length / 21));
  return inside.filter((_, i) => i % step === 0);
}

function equalTriples(loss) {
  // of those with default options; first those that also visit the levels as often
  const points = pointsFor(loss),
    [w, p] = [loss.w, loss.p].map(f => points.map(f));
  if (!points.length) return [];
  const within = loss.curve ? 2e-5 : 1e-7;
  const equal = [...defaultTriples(points)].filter(triple => sameUpTo(w, triple.w, within));
  for (const triple of equal) triple.visits = sameUpTo(p, triple.p, within);
  return equal.sort((one, two) => two.visits - one.visits);
}

function equalCodes(loss) {
  // [code, number of the row]
  const points = pointsFor(loss),
    found = [];
  if (!points.length) return found;
  const own = points.map(loss.w),
    within = loss.curve ? 2e-3 : 1e-7;
  for (const [code, rows] of Object.entries(DATA.codes))
    rows.forEach((row, i) => {
      const other = rowLoss(row);
      if (points[0] < other.range[0] || points.at(-1) > other.range[1]) return;
      if (sameUpTo(own, points.map(other.w), other.curve ? 2e-3 : within)) found.push([code, i]);
    });
  return found;
}

const ROWS = new Map(); // those at their own numbers, made once
function rowLoss(row, numbers) {
  if (!numbers && ROWS.has(row)) return ROWS.get(row);
  const made = row.triple ? makeTriple(rowTriple(row, numbers)) : makeCurve(row.curve);
  if (!numbers) ROWS.set(row, made);
  return made;
}

function rowTriple(row, numbers) {
  const values = {...row.numbers, ...numbers};
  const [schedule, target, weighting] = row.triple.map(text =>
    text.replace(/\{(\w+)\}/g, (_, k) => values[k]).replaceAll('--', '')
  );
  return {
    schedule: choose('schedules', schedule),
    target: choose('targets', target),
    weighting: choose('weightings', weighting)
  };
}

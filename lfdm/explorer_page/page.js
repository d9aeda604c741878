// The page: controls, figures, and the address that carries the choice. What a loss is stands in model.js.
'use strict';

const NAMES = ['A', 'B', 'C', 'D'];
const DASHES = [null, '7,4', '2,3', '10,3,2,3']; // each loss has its line style as well as its colour
const EXAMPLE = `s = u              # how a level is drawn from u, uniform on (0, 1)
a = 1 - s          # z = a x + b e
b = s
y = e - x          # what the network is compared with
weight = 1         # what multiplies its squared error`;
const HOW = {
  start: 'It learns: shown as it starts.',
  levels: 'Its levels were computed beforehand.',
  path: 't(λ) is found by bisection.',
  density: 't(λ) is found by integration.'
};
const KINDS = {triple: 'three choices', code: 'a code base', own: 'your own code'};
const state = {losses: [], set: Object.keys(DATA.floors.sets)[0], scaled: true};

// --- small things

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && key !== 'list') element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const FORMATS = {}; // made once: to make one takes longer than to use it
function read(value, digits = 3) {
  // a number to read
  if (!isFinite(value)) return value > 0 ? '∞' : value < 0 ? '-∞' : '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) {
    const [mantissa, power] = value.toExponential(1).split('e');
    return `${mantissa} · 10${superscript(Number(power))}`;
  }
  FORMATS[digits] ||= new Intl.NumberFormat('en', {maximumSignificantDigits: digits});
  return FORMATS[digits].format(value);
}

const superscript = n => String(n).replace(/./g, c => '⁰¹²³⁴⁵⁶⁷⁸⁹'[c] || '⁻');
const atLambda = l => (Math.abs(l) < 0.05 ? 0 : l).toFixed(1);
const typedText = text => text.split('`').map((part, i) => (i % 2 ? make('code', {}, part) : part));
const sentence = text => (text[1] === ' ' ? text : text[0].toUpperCase() + text.slice(1));
const typedBy = (row, numbers) => filled(row.typed, {...row.numbers, ...numbers});

async function copy(text, what) {
  const status = document.getElementById('status');
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = `${what} copied.`;
    return;
  } catch {
    /* not allowed */
  }
  const field = make('textarea', {value: text, readOnly: true});
  document.body.append(field);
  field.select();
  const done = document.execCommand('copy');
  field.remove();
  status.textContent = done ? `${what} copied.` : `Copy by hand: ${text}`;
}

// --- the choice: of one loss, and in the address

const fresh = {
  triple: () => ({
    kind: 'triple',
    schedule: choose('schedules', 'cosine'),
    target: choose('targets', 'eps'),
    weighting: choose('weightings', 'weighted')
  }),
  code: () => ({kind: 'code', code: Object.keys(DATA.codes)[0], row: 0, numbers: {}}),
  own: () => ({kind: 'own', text: EXAMPLE})
};

function written(loss) {
  // as in the address
  if (loss.kind === 'own')
    return `own;${loss.text
      .replace(/ *#.*/g, '')
      .trim()
      .split(/\s*\n\s*/)
      .join('\n')}`;
  if (loss.kind === 'code') {
    const numbers = Object.entries(loss.numbers).map(([k, v]) => `${k}=${v}`);
    return ['code', loss.code, loss.row + 1, ...numbers].join(';');
  }
  return [
    spec('schedules', loss.schedule),
    spec('targets', loss.target),
    spec('weightings', loss.weighting)
  ].join(';');
}

function loaded(text) {
  // throws an Error
  const parts = text.split(';');
  if (parts[0] === 'own') return {kind: 'own', text: text.slice(4)};
  if (parts[0] === 'code') {
    const [, code, row, ...numbers] = parts,
      rows = DATA.codes[code];
    if (!rows?.[row - 1]) throw Error(`no code base '${code}' with row ${row}.`);
    const known = numbers
      .map(part => part.split('='))
      .filter(([k, v]) => k in (rows[row - 1].numbers || {}) && isFinite(v));
    return {
      kind: 'code',
      code,
      row: row - 1,
      numbers: Object.fromEntries(known.map(([k, v]) => [k, Number(v)]))
    };
  }
  if (parts.length !== 3) throw Error(`'${text}' is not schedule;target;weighting.`);
  return {
    kind: 'triple',
    schedule: choose('schedules', parts[0]),
    target: choose('targets', parts[1]),
    weighting: choose('weightings', parts[2])
  };
}

const escaped = text => encodeURIComponent(text).replace(/%(3B|2C|2F|3A|3D)/g, decodeURIComponent);

function address() {
  const parts = state.losses.map((loss, i) => [NAMES[i], written(loss)]);
  parts.push(['floor', state.set]);
  if (!state.scaled) parts.push(['scale', 'as it is']);
  return '#' + parts.map(([k, v]) => `${k}=${escaped(v)}`).join('&');
}

function home() {
  // the window whose address is seen: that of the page around, where it may be touched
  try {
    if (window.parent.location.href) return window.parent;
  } catch {
    /* another's */
  }
  return window;
}

function readAddress() {
  const found = new Map(
    home()
      .location.hash.slice(1)
      .split('&')
      .filter(Boolean)
      .map(part => {
        const i = part.indexOf('=');
        try {
          return [part.slice(0, i), decodeURIComponent(part.slice(i + 1))];
        } catch {
          return ['', ''];
        }
      })
  );
  const problems = [];
  state.losses = NAMES.filter(name => found.has(name)).map(name => {
    try {
      return loaded(found.get(name));
    } catch (e) {
      problems.push(`${name}: ${e.message}`);
      return fresh.triple();
    }
  });
  if (!state.losses.length)
    state.losses = [fresh.triple(), {...fresh.triple(), target: choose('targets', 'v')}];
  if (found.get('floor') in DATA.floors.sets) state.set = found.get('floor');
  state.scaled = !found.has('scale');
  document.getElementById('status').textContent = problems.join(' ');
}

let current = '';
function writeAddress() {
  current = address();
  try {
    home().history.replaceState(null, '', current);
  } catch {
    /* a page without an address */
  }
}

// --- controls of one loss

let redraw = 0;
function changed() {
  // at most one drawing a frame
  cancelAnimationFrame(redraw);
  redraw = requestAnimationFrame(show);
}

function optionControl(option, choice, owner) {
  const {name, label, low, high, step, words} = option,
    title = make('span', {title: label}, name);
  const set = value => {
    choice.o[name] = value;
    changed();
  };
  if (words) {
    const menu = make('select', {}, ...words.map(w => make('option', {value: w}, w)));
    menu.value = choice.o[name];
    menu.onchange = () => set(menu.value);
    return make('label', {className: 'option'}, title, menu);
  }
  const says = `${name} of ${owner}${label ? `: ${label}` : ''}`;
  const field = make('input', {
    type: 'number',
    step: 'any',
    value: Number(g(choice.o[name])),
    'aria-label': says
  });
  const slider = make('input', {type: 'range', min: low, max: high, step, 'aria-label': `${says} (slider)`});
  slider.value = choice.o[name];
  slider.oninput = () => {
    field.value = slider.value;
    set(Number(slider.value));
  };
  field.oninput = () => {
    if (field.value === '' || !isFinite(field.value)) return;
    slider.value = field.value;
    set(Number(field.value));
  };
  return make('div', {className: 'option'}, title, slider, field);
}

function choiceControl(group, word, loss, rebuild) {
  const choice = loss[word],
    entry = DATA[group][choice.name];
  const menu = make('select', {}, ...Object.keys(DATA[group]).map(n => make('option', {value: n}, n)));
  menu.value = choice.name;
  menu.onchange = () => {
    loss[word] = choose(group, menu.value);
    rebuild(word);
  };
  menu.dataset.word = word;
  return [
    make(
      'label',
      {className: 'field'},
      word,
      menu,
      make('span', {className: 'about'}, [entry.about, HOW[entry.kind]].filter(Boolean).join(' '))
    ),
    ...entry.options.map(option => optionControl(option, choice, `the ${word}`))
  ];
}

function codeControls(loss, rebuild) {
  const codes = make(
    'select',
    {},
    ...Object.keys(DATA.codes)
      .sort((a, b) => a.localeCompare(b, 'en', {sensitivity: 'base'}))
      .map(n => make('option', {value: n}, n))
  );
  codes.value = loss.code;
  codes.dataset.word = 'code';
  codes.onchange = () => {
    Object.assign(loss, {code: codes.value, row: 0, numbers: {}});
    rebuild('code');
  };
  const rows = make(
    'select',
    {},
    ...DATA.codes[loss.code].map((row, i) =>
      make('option', {value: i}, `${i + 1}. ${typedBy(row).replaceAll('`', '')}`)
    )
  );
  rows.value = loss.row;
  rows.dataset.word = 'row';
  rows.onchange = () => {
    Object.assign(loss, {row: Number(rows.value), numbers: {}});
    rebuild('row');
  };
  const row = DATA.codes[loss.code][loss.row],
    numbers = row.triple ? Object.keys(row.numbers || {}) : [];
  const note =
    row.triple || !row.numbers
      ? null
      : make(
          'p',
          {className: 'note'},
          `Computed beforehand at ${Object.entries(row.numbers)
            .map(([k, v]) => `${k} = ${v}`)
            .join(', ')}.`
        );
  return [
    make('label', {className: 'field'}, 'code base', codes),
    make('label', {className: 'field'}, 'options', rows),
    make(
      'p',
      {className: 'note'},
      ...typedText(typedBy(row, loss.numbers)),
      row.remark ? `. ${sentence(row.remark)}.` : ''
    ),
    note,
    ...numbers.map(name => numberControl(name, loss, row)),
    editButton(loss, row)
  ];
}

function editButton(loss, row) {
  if (!row.own) return null;
  const button = make('button', {type: 'button'}, 'Edit its formula as your own code');
  button.onclick = () => {
    const text = Object.entries(row.own)
      .map(([name, expression]) => `${name} = ${expression}`)
      .join('\n');
    const i = state.losses.indexOf(loss);
    state.losses[i] = {kind: 'own', text};
    build();
    document.querySelector(`#loss-${NAMES[i]} textarea`).focus();
  };
  return button;
}

function numberControl(name, loss, row) {
  const field = make('input', {type: 'number', step: 'any', value: loss.numbers[name] ?? row.numbers[name]});
  field.oninput = () => {
    if (field.value === '' || !isFinite(field.value)) return;
    loss.numbers[name] = Number(field.value);
    changed();
  };
  return make('label', {className: 'field'}, name, field);
}

function ownControls(loss) {
  const text = make('textarea', {rows: 7, spellcheck: false, value: loss.text});
  text.oninput = () => {
    loss.text = text.value;
    changed();
  };
  return [
    make('label', {}, 'One line each for a, b, y and weight, in u', text),
    make(
      'p',
      {className: 'note'},
      'Your loop draws u from (0, 1), makes z = a x + b e, compares the network with '
        + 'y (in x and the noise e) and multiplies the squared error by weight. '
        + 'Other names may be defined on the way; snr is (a/b)². Functions: '
        + Object.keys(OWN_FUNCTIONS).join(', ')
        + '.'
    )
  ];
}

function card(loss, i) {
  const name = NAMES[i],
    body = make('div'),
    result = make('div', {className: 'result'});
  const rebuild = word => {
    body.replaceChildren(
      ...(loss.kind === 'own'
        ? ownControls(loss)
        : loss.kind === 'code'
          ? codeControls(loss, rebuild)
          : [
              ...choiceControl('schedules', 'schedule', loss, rebuild),
              ...choiceControl('targets', 'target', loss, rebuild),
              ...choiceControl('weightings', 'weighting', loss, rebuild)
            ]
      ).filter(Boolean)
    );
    if (word) body.querySelector(`[data-word=${word}]`)?.focus();
    changed();
  };
  const kinds = Object.entries(KINDS).map(([kind, text]) => {
    const radio = make('input', {
      type: 'radio',
      name: `kind${name}`,
      value: kind,
      checked: loss.kind === kind
    });
    radio.onchange = () => {
      for (const key of Object.keys(loss)) delete loss[key];
      Object.assign(loss, fresh[kind]());
      rebuild();
    };
    return make('label', {className: 'check'}, radio, text);
  });
  const remove = make('button', {type: 'button', className: 'remove'}, `Remove ${name}`);
  remove.onclick = () => {
    state.losses.splice(i, 1);
    build();
    document.getElementById('add').focus();
  };
  const stroke = `<svg width="34" height="10" aria-hidden="true"><line x1="0" x2="34" y1="5" y2="5"
    stroke="currentColor" stroke-width="3" stroke-dasharray="${DASHES[i] || ''}"/></svg>`;
  const legend = make('legend', {}, `Loss ${name}`);
  legend.insertAdjacentHTML('beforeend', stroke);
  rebuild();
  const set = make(
    'fieldset',
    {className: 'loss', id: `loss-${name}`},
    legend,
    state.losses.length > 1 ? remove : null,
    make(
      'div',
      {className: 'kinds', role: 'radiogroup', 'aria-label': `How loss ${name} is given`},
      ...kinds
    ),
    body,
    result
  );
  set.style.setProperty('--color', `var(--${name.toLowerCase()})`);
  return set;
}

// --- what comes of it

function computed(loss) {
  if (loss.kind === 'triple') return {...makeTriple(loss), words: loss, texts: textsOf(loss)};
  if (loss.kind === 'own') return makeOwn(loss.text);
  const row = DATA.codes[loss.code][loss.row],
    made = rowLoss(row, loss.numbers);
  return {...made, words: row.triple ? rowTriple(row, loss.numbers) : null, texts: rowTexts(row)};
}

function textsOf({schedule, target, weighting}) {
  // [what, {tex, mathml}]
  const {kind, ...weight} = DATA.weightings[weighting.name],
    p = DATA.schedules[schedule.name];
  const w =
    kind === 'weighted'
      ? DATA.targets[target.name]
      : kind === 'bound' && schedule.o.logsnr_min === undefined
        ? {}
        : weight;
  return [
    ['w', w],
    ['p', p]
  ].filter(([, text]) => text.mathml);
}

const rowTexts = row =>
  [
    ['w', row.w_text],
    ['named', row.named_text]
  ]
    .filter(([, i]) => i !== undefined)
    .map(([what, i]) => [what, DATA.texts[i]]);

const HEADS = {w: 'w(λ) = ', p: 'p(λ) = ', named: 'its name suggests w(λ) = '};

function formulaRow([what, {tex, mathml}]) {
  const shown = make('div', {});
  shown.innerHTML = `${HEADS[what]}<math displaystyle="true">${mathml}</math>`;
  const button = make('button', {type: 'button', 'aria-label': `Copy the TeX of ${what}(λ)`}, 'Copy TeX');
  button.onclick = () => copy(`${what === 'p' ? 'p' : 'w'}(\\lambda) = ${tex}`, 'TeX');
  return make('div', {className: 'row'}, shown, button);
}

const quoted = text => `'${text}'`;
function pythonOf({schedule, target, weighting}) {
  const words = [spec('schedules', schedule), spec('targets', target), spec('weightings', weighting)];
  return `DiffusionLoss(${words.map(quoted).join(', ')})`;
}

function pythonRow(words) {
  const text = pythonOf(words),
    button = make('button', {type: 'button', 'aria-label': 'Copy the Python call'}, 'Copy');
  button.onclick = () => copy(`from lfdm.losses import DiffusionLoss\n\nloss = ${text}`, 'Python');
  return make('div', {className: 'row'}, make('code', {}, text), button);
}

function calls([first]) {
  // of a curve: the triple that equals it
  const note = text => make('p', {className: 'note'}, text);
  if (!first) return [note('No triple with default options has this w(λ).')];
  return [
    note(
      first.visits ? 'The same w(λ), with the levels visited as often:' : 'The same w(λ), visited otherwise:'
    ),
    pythonRow(first)
  ];
}

function grouped(triples) {
  // lines to read: all targets, all schedules
  const targets = Object.keys(DATA.targets),
    lines = new Map(),
    all = new Set(triples.map(t => t.schedule.name));
  for (const weighting of new Set(triples.map(t => t.weighting.name))) {
    const mine = triples.filter(t => t.weighting.name === weighting),
      by = new Map();
    for (const t of mine) by.set(t.schedule.name, [...(by.get(t.schedule.name) || []), t.target.name]);
    const sets = new Map();
    for (const [schedule, list] of by) sets.set(list.join(), [...(sets.get(list.join()) || []), schedule]);
    for (const [list, schedules] of sets) {
      const every = schedules.length === all.size && all.size > 3;
      const what = list.split(',').length === targets.length ? 'any target' : list.replaceAll(',', ', ');
      lines.set(
        `${every ? 'any schedule of this range' : schedules.join(', ')} × ${what} × ${weighting}`,
        mine.length
      );
    }
  }
  return [...lines.keys()];
}

function equalDetails(loss, triples) {
  const lines = grouped(triples),
    codes = equalCodes(loss);
  const items = lines.map(line => make('li', {}, make('code', {}, line)));
  const of = (n, word) => `${n} ${word}${n === 1 ? '' : 's'}`;
  const row = ([code, i]) => make('li', {}, `${code}: `, ...typedText(typedBy(DATA.codes[code][i])));
  const found = make(
    'details',
    {},
    make(
      'summary',
      {},
      `The same w(λ) up to a constant: ${of(triples.length, 'triple')} `
        + `at default options, ${of(codes.length, 'option set')} of code bases`
    )
  );
  if (items.length) found.append(make('ul', {}, ...items));
  if (codes.length) found.append(make('ul', {}, ...codes.map(row)));
  return found;
}

function risesText(loss) {
  const up = risingIntervals(loss).filter(([a, b]) => b > -25);
  if (!up.length)
    return 'w(λ) falls with λ or is constant, everywhere: with data augmentation, the loss is a bound.';
  const some = up
    .slice(0, 3)
    .map(([a, b]) => `${atLambda(Math.max(a, -25))} to ${atLambda(b)}`)
    .join(', ');
  return `w(λ) rises from λ = ${some}${up.length > 3 ? ', …' : ''}: there the loss rewards a worse bound.`;
}

function resultOf(loss, i) {
  const box = document.querySelector(`#loss-${NAMES[i]} .result`);
  if (loss.error) {
    return box.replaceChildren(make('p', {className: 'wrong', role: 'alert'}, `Not possible: ${loss.error}`));
  }
  const range = loss.range.map(l => (l < -25 ? '-∞' : atLambda(l))).join(' to ');
  const constant = loss.curve ? ' (w(λ) has a constant of its own)' : '';
  const facts = [
    `λ from ${range}. Floor on ${state.set}: ${read(floorOf(loss, state.set), 4)}${constant}.`,
    risesText(loss)
  ];
  const kept = name => box.querySelector(`.${name}`) || make('div', {className: name});
  const [call, equal] = ['call', 'equal'].map(kept);
  if (loss.words) call.replaceChildren(pythonRow(loss.words));
  box.replaceChildren(
    call,
    ...(loss.texts || []).map(formulaRow),
    ...facts.map(text => make('p', {className: 'note'}, text)),
    equal
  );
}

function equalsOf(loss, i) {
  // a search through all triples and code bases: it waits until the sliders rest
  const box = document.querySelector(`#loss-${NAMES[i]} .result`);
  if (loss.error) return;
  const open = box.querySelector('.equal details')?.open,
    triples = equalTriples(loss);
  if (!loss.words) box.querySelector('.call').replaceChildren(...calls(triples));
  box.querySelector('.equal').replaceChildren(equalDetails(loss, triples));
  box.querySelector('.equal details').open = open ?? false;
}

// --- figures

const plainTick = v =>
  v >= 0.99e-6 && v < 1e7
    ? v.toLocaleString('en', {maximumSignificantDigits: 1, useGrouping: true})
    : `10${superscript(Math.round(Math.log10(v)))}`;

function chart(series, {log, x, y, domain, label, bars = []}) {
  const seen = series.flatMap(s => s.line).filter(p => isFinite(p.y) && (!log || p.y > 0));
  const high = Math.max(...seen.map(p => p.y), 1e-300),
    low = Math.min(...seen.map(p => p.y));
  const flat = log && high / low < 1.01,
    bottom = flat ? high / 10 : log ? Math.max(low, high * 1e-6) : 0;
  const width = Math.max(280, Math.min(640, cell()));
  const lines = series.map(s =>
    Plot.line(
      s.line.filter(p => isFinite(p.y) && (!log || p.y >= bottom * 0.999)),
      {
        x: 'x',
        y: 'y',
        stroke: s.color,
        strokeWidth: 2.2,
        strokeDasharray: s.dash,
        clip: true
      }
    )
  );
  const names = series.map((s, i) => {
    // each at a place of its own along its curve
    const inside = s.line.filter(p => p.y >= bottom && (!domain || (p.x >= domain[0] && p.x <= domain[1])));
    const at = inside[Math.floor(inside.length * [0.3, 0.55, 0.42, 0.68][i])];
    return Plot.text(at ? [at] : [], {
      x: 'x',
      y: 'y',
      text: () => s.name,
      fill: s.color,
      stroke: 'var(--ground)',
      strokeWidth: 5,
      fontWeight: 700,
      fontSize: 15,
      dy: -10
    });
  });
  const all = series.flatMap(s => s.line.map(p => ({...p, name: s.name}))).filter(p => p.y >= bottom);
  const tip = Plot.tip(
    all,
    Plot.pointer({
      x: 'x',
      y: 'y',
      fill: 'var(--ground)',
      stroke: 'var(--quiet)',
      title: p => `${p.name}: ${read(p.y)} at ${x.short} = ${read(p.x)}`
    })
  );
  const ticks = log
    ? d3.range(
        Math.ceil(Math.log10(bottom) - 1e-9),
        Math.floor(Math.log10(flat ? high * 10 : high) + 1e-9) + 1
      )
    : null;
  const every = ticks ? Math.ceil(ticks.length / 6) : 1;
  const few = ticks && ticks.length > 1;
  return Plot.plot({
    width,
    height: 280,
    marginLeft: 66,
    marginRight: 18,
    marginBottom: 44,
    marginTop: 30,
    ariaLabel: label,
    style: {background: 'none', color: 'var(--ink)', fontSize: '13px', overflow: 'visible'},
    x: {
      label: x.long,
      labelArrow: 'none',
      labelAnchor: 'center',
      domain,
      ticks: width < 420 ? 5 : 8,
      line: true
    },
    y: {
      label: y,
      labelArrow: 'none',
      type: log ? 'log' : 'linear',
      domain: [bottom, high * (flat ? 10 : log ? 1.4 : 1.05)],
      grid: true,
      ...(few
        ? {ticks: ticks.filter((_, i) => i % every === 0).map(k => 10 ** k), tickFormat: plainTick}
        : {ticks: 5, tickFormat: v => read(v)})
    },
    marks: [
      ...bars.map(({from, to, color, dash, i}) =>
        Plot.ruleY([bottom], {
          x1: from,
          x2: to,
          stroke: color,
          strokeWidth: 4,
          strokeDasharray: dash,
          dy: -4 - 7 * i
        })
      ),
      ...lines,
      ...names,
      tip
    ]
  });
}

const cell = () => {
  const width = document.getElementById('figures').clientWidth;
  return width > 990 ? (width - 24) / 2 : width;
};

function table(series, x, at) {
  const row = v =>
    make(
      'tr',
      {},
      make('th', {scope: 'row'}, x.tick(v)),
      ...series.map(s => make('td', {}, read(s.value(v))))
    );
  const head = make(
    'tr',
    {},
    make('th', {scope: 'col'}, x.short),
    ...series.map(s => make('th', {scope: 'col'}, s.name))
  );
  return make(
    'details',
    {},
    make('summary', {}, 'As a table'),
    make('table', {}, make('thead', {}, head), make('tbody', {}, ...at.map(row)))
  );
}

function figure(id, title, svg, sentences, tables) {
  const old = document.getElementById(id),
    open = old?.querySelector('details')?.open;
  if (open) tables.open = true;
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-labelledby', `${id}-title`);
  svg.setAttribute('aria-describedby', `${id}-says`);
  const made = make(
    'figure',
    {id},
    make('h2', {id: `${id}-title`}, title),
    svg,
    make(
      'figcaption',
      {},
      make('div', {id: `${id}-says`}, ...sentences.map(text => make('p', {}, text))),
      tables
    )
  );
  if (old) old.replaceWith(made);
  else document.getElementById('figures').append(made);
}

const LAMBDA = {short: 'λ', long: 'log-SNR λ (left: noise, right: data)', tick: v => v};
const TIME = {short: 't', long: 'time t (0: clean, 1: noise)', tick: v => read(v, 2)};

function told(series, says) {
  // a sentence for each curve; of one that equals an earlier one, which
  return series.map((s, i) => {
    const same = series
      .slice(0, i)
      .find(
        other =>
          other.line.length === s.line.length
          && s.line.every(
            (p, k) => Math.abs(p.x - other.line[k].x) < 1e-9 && Math.abs(p.y / other.line[k].y - 1) < 1e-6
          )
      );
    return `${s.name}: ${same ? `the same curve as ${same.name}.` : says(s)}`;
  });
}

function highest(points) {
  return points.reduce((best, p) => (p.y > best.y ? p : best));
}

function halfway(points) {
  // the x below which half of the area lies
  const area = [0];
  for (let i = 1; i < points.length; i++) {
    area.push(area[i - 1] + ((points[i].y + points[i - 1].y) / 2) * (points[i].x - points[i - 1].x));
  }
  return points[area.findIndex(a => a >= area.at(-1) / 2)].x;
}

let search = 0;
function show() {
  const losses = state.losses.map((loss, i) => {
    const style = {name: NAMES[i], color: `var(--${NAMES[i].toLowerCase()})`, dash: DASHES[i]};
    try {
      const made = {...computed(loss), ...style};
      made.grid = gridOf(made);
      if (!made.grid.every(l => isFinite(made.w(l))))
        throw Error('w(λ) is not finite: choose other options.');
      return made;
    } catch (e) {
      return {error: e.message, ...style};
    }
  });
  losses.forEach(resultOf);
  clearTimeout(search);
  search = setTimeout(() => {
    losses.forEach(equalsOf);
    fitFrame();
  }, 150);
  const good = losses.filter(loss => !loss.error);
  document.getElementById('figures').hidden = !good.length;
  if (good.length) draw(good);
  writeAddress();
  fitFrame();
}

function draw(losses) {
  const domain = [
    Math.min(...losses.map(s => Math.max(-25, s.range[0]))),
    Math.max(...losses.map(s => s.range[1]))
  ];
  const at = d3.range(Math.ceil(domain[0] / 2) * 2, domain[1] + 0.01, 2);
  const inside = (s, l) => l >= s.range[0] && l <= s.range[1];
  const series = (value, scale = () => 1) =>
    losses.map(s => {
      const k = scale(s),
        f = l => (inside(s, l) ? value(s, l) * k : NaN);
      return {...s, line: s.grid.map(l => ({x: l, y: value(s, l) * k})), value: f};
    });
  const scale = s => (state.scaled ? 1 / Math.max(...s.grid.map(s.w)) : 1);
  const called = state.scaled ? 'w(λ), highest = 1' : 'w(λ)';

  const weights = series((s, l) => s.w(l), scale);
  const rising = weights
    .map(s => [s, risingIntervals(s).filter(([, to]) => to > -25)])
    .filter(([, up]) => up.length);
  const bars = rising.flatMap(([s, up], i) =>
    up
      .slice(0, 20)
      .map(([from, to]) => ({from: Math.max(from, domain[0]), to, color: s.color, dash: s.dash, i}))
  );
  figure(
    'weight',
    'Weight w(λ) on the noise error',
    chart(weights, {log: true, x: LAMBDA, y: called, domain, label: 'Weight over log-SNR', bars}),
    [
      ...told(weights, s => `highest at λ = ${atLambda(highest(s.line).x)}. ${risesText(s)}`),
      ...(bars.length ? ['Bars at the bottom: where w(λ) rises.'] : [])
    ],
    table(weights, LAMBDA, at)
  );

  const timed = losses.filter(s => s.t);
  if (timed.length) drawFactor(timed);
  else document.getElementById('factor')?.remove();

  const visited = series((s, l) => s.p(l));
  figure(
    'density',
    'How often levels are visited: p(λ)',
    chart(visited, {x: LAMBDA, y: 'p(λ)', domain, label: 'Density of log-SNR'}),
    told(
      visited,
      s =>
        `half of the levels lie below λ = ${atLambda(halfway(s.line))}; the density is highest at `
        + `${atLambda(highest(s.line).x)}.`
    ),
    table(visited, LAMBDA, at)
  );

  const floors = series(
    (s, l) => s.w(l) * noiseError(state.set, l),
    s => (state.scaled ? 1 / floorOf(s, state.set) : 1)
  );
  figure(
    'floor',
    `Loss per λ at the floor of ${state.set}`,
    chart(floors, {
      x: LAMBDA,
      y: state.scaled ? 'share of the floor per unit of λ' : 'w(λ) times noise error',
      domain,
      label: 'Loss per unit of log-SNR'
    }),
    [
      ...told(
        floors,
        s =>
          `the floor is ${read(floorOf(s, state.set), 4)}, half of it below λ = `
          + `${atLambda(halfway(s.line))}.`
      ),
      'The noise error is that of the exact best denoiser: no network can do better.'
    ],
    table(floors, LAMBDA, at)
  );
}

function drawFactor(losses) {
  const factors = losses.map(s => {
    const line = s.grid.map(l => ({x: s.t(l), y: s.factor(l)})).sort((a, b) => a.x - b.x);
    const value = t => {
      // between two of the points
      const i = Math.max(
          1,
          line.findIndex(p => p.x >= t)
        ),
        [from, to] = [line[i - 1], line[i]];
      return from.y + ((to.y - from.y) * (t - from.x)) / (to.x - from.x || 1);
    };
    return {...s, line, value};
  });
  const says = told(factors, ({line}) => {
    const [first, last] = [line[0].y, line.at(-1).y],
      flat = line.every(p => Math.abs(p.y / first - 1) < 1e-9);
    return flat
      ? `${read(first)} at every t.`
      : `from ${read(first)} near t = 0 to ${read(last)} near t = 1.`;
  });
  figure(
    'factor',
    'Factor on the squared error of the target',
    chart(factors, {log: true, x: TIME, y: 'factor', domain: [0, 1], label: 'Factor over time'}),
    says,
    table(factors, TIME, d3.range(0.05, 1, 0.1))
  );
}

// --- theme, frame, start

function theme() {
  let dark = window.matchMedia('(prefers-color-scheme: dark)').matches;
  const around = home();
  if (around !== window) {
    const [r, g, b, a] = (getComputedStyle(around.document.body).backgroundColor.match(/[\d.]+/g) || []).map(
      Number
    );
    if (a !== 0 && b !== undefined) dark = r * 0.3 + g * 0.6 + b * 0.1 < 128;
  }
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
}

function fitFrame() {
  try {
    if (window.frameElement) window.frameElement.style.height = `${document.body.scrollHeight + 8}px`;
  } catch {
    /* another's */
  }
}

function build() {
  const box = document.getElementById('losses');
  box.replaceChildren(...state.losses.map(card));
  document.getElementById('add').disabled = state.losses.length === NAMES.length;
  document.getElementById('set').value = state.set;
  document.getElementById('scaled').checked = state.scaled;
  changed();
}

function start() {
  const set = document.getElementById('set'),
    scaled = document.getElementById('scaled');
  set.append(...Object.keys(DATA.floors.sets).map(name => make('option', {value: name}, name)));
  set.onchange = () => {
    state.set = set.value;
    changed();
  };
  scaled.onchange = () => {
    state.scaled = scaled.checked;
    changed();
  };
  document.getElementById('add').onclick = () => {
    state.losses.push(fresh.triple());
    build();
  };
  document.getElementById('link').onclick = () =>
    copy(home().location.href.split(/[?#]/)[0] + address(), 'Link');
  if (window.self !== window.top) document.body.classList.add('embedded');
  const around = home();
  around.addEventListener('hashchange', () => {
    if (around.location.hash !== current) {
      readAddress();
      build();
    }
  });
  const figures = document.getElementById('figures');
  let drawn = 0;
  new ResizeObserver(() => {
    if (figures.clientWidth === drawn) return;
    drawn = figures.clientWidth;
    changed();
  }).observe(figures);
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', theme);
  theme();
  if (around !== window) {
    const watch = new MutationObserver(theme);
    for (const element of [around.document.documentElement, around.document.body])
      watch.observe(element, {attributes: true});
  }
  document.addEventListener('toggle', fitFrame, true);
  readAddress();
  build();
}

start();

"Attempts to break nbs/train.ipynb: run from elsewhere, with misspelt and wrong parameters, a second time."

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tree import ROOT, cells

papermill = pytest.importorskip('papermill')

import torch  # noqa: E402
from papermill.cli import _resolve_type  # noqa: E402
from papermill.parameterize import parameterize_notebook  # noqa: E402

from lfdm.parameters import Parameters  # noqa: E402
from lfdm.runs import FILES, load_run  # noqa: E402

torch.set_num_threads(1)
NOTEBOOK = ROOT / 'nbs' / 'train.ipynb'
SMALL = dict(dataset='cluster', epochs=1, width=8, n_samples=200, sample_steps=4)


def call(folder, runs, *options, output='out.ipynb', env=None):
    "The command of the notebook's first lines, in some folder."
    outside = {k: v for k, v in os.environ.items() if k not in ('LFDM_RUNS', 'MPLBACKEND')}
    env = outside | {'OMP_NUM_THREADS': '1'} | ({'LFDM_RUNS': str(runs)} if runs else {}) | (env or {})
    command = [sys.executable, '-m', 'papermill', str(NOTEBOOK), str(output), '--no-progress-bar', *options]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def flags(**parameters): return [str(w) for k, v in parameters.items() for w in ('-p', k, v)]


def output_text(path):
    "All text that an executed notebook shows."
    found = []
    for cell in json.loads(path.read_text())['cells']:
        for o in cell.get('outputs', []):
            data = o.get('data', {})
            found += [
                ''.join(o.get('text', [])),
                ''.join(data.get('text/plain', [])),
                ''.join(data.get('text/markdown', [])),
                o.get('evalue', ''),
            ]
    return '\n'.join(found)


def listing(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "One execution from a folder outside the repository."
    folder = tmp_path_factory.mktemp('elsewhere')
    before = listing(ROOT / 'runs')
    result = call(folder, folder / 'runs', *flags(**SMALL))
    assert result.returncode == 0, result.stderr[-3000:]
    assert listing(ROOT / 'runs') == before, 'the repository was written to'
    return folder, result


def test_it_runs_from_another_folder(done):
    folder, result = done
    run, = (folder / 'runs' / 'train').iterdir()
    assert set(os.listdir(run)) == set(FILES) and load_run(run).parameters == Parameters(**SMALL)
    assert set(os.listdir(folder)) == {'runs', 'out.ipynb'}


def test_it_says_where_the_run_is(done):
    "the path that the last cell prints can be loaded from the folder of the call"
    folder, _ = done
    printed = re.findall(r'\S*/cluster-eps-weighted-cosine-s0-\w{8}\b', output_text(folder / 'out.ipynb'))
    assert printed and all(set(FILES) <= set(os.listdir(folder / p)) for p in printed)


def test_papermill_has_nothing_to_complain_of(done):
    _, result = done
    for word in ('Unable to parse', 'unknown parameter', 'Traceback', 'No cell with tag', 'Warning: '):
        assert word not in result.stderr, result.stderr


def test_every_cell_shows_what_it_should(done):
    out = json.loads((done[0] / 'out.ipynb').read_text())
    pictures = [o for c in out['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    text = output_text(done[0] / 'out.ipynb')
    assert len(pictures) == 4 and "epochs=1" in text and '| floor |' in text and 'nan' not in text.lower()
    assert all(o['output_type'] != 'error' for c in out['cells'] for o in c.get('outputs', []))


def test_the_parameters_tag_is_there_once():
    tagged = [
        source
        for source, cell in cells(NOTEBOOK, 'code')
        if 'parameters' in cell['metadata'].get('tags', [])
    ]
    assert len(tagged) == 1
    shown = {}
    exec(tagged[0], shown)
    shown.pop('__builtins__')
    assert shown.pop('study') == 'train'
    assert Parameters(**shown) == Parameters() and set(shown) == set(Parameters.__dataclass_fields__)


def test_again_from_the_repository_loads_and_a_misspelt_one_fails(done, tmp_path):
    "the two executions side by side, to save time"
    folder, _ = done
    from concurrent.futures import ThreadPoolExecutor
    run, = (folder / 'runs' / 'train').iterdir()
    stamp = {f: (run / f).stat().st_mtime_ns for f in FILES}
    with ThreadPoolExecutor() as pool:
        again = pool.submit(call, ROOT, folder / 'runs', *flags(**SMALL), output=tmp_path / 'again.ipynb')
        wrong = pool.submit(call, tmp_path, None, *flags(**SMALL | {'epoch': 5}), output='wrong.ipynb')
        again, wrong = again.result(), wrong.result()
    assert again.returncode == 0, again.stderr[-3000:]
    assert {f: (run / f).stat().st_mtime_ns for f in FILES} == stamp and os.listdir(
        folder / 'runs' / 'train'
    ) == [run.name]
    took = {
        ''.join(c['source']): c['metadata']['papermill']['duration']
        for c in json.loads((tmp_path / 'again.ipynb').read_text())['cells']
    }
    assert next(v for k, v in took.items() if 'make_run(' in k) < 5
    assert (
        wrong.returncode != 0
        and "ValueError: unknown parameter 'epoch'. Did you mean 'epochs'? Valid: 'dataset', "
        in wrong.stderr
    )
    assert set(os.listdir(tmp_path)) == {'again.ipynb', 'wrong.ipynb'}, 'work was begun'


# ---- what papermill makes of the command line, run up to the check of the parameters

def begin(options, **direct):
    "The notebook's first cells (names, check) with papermill's own conversions, without a kernel."
    nb = papermill.iorw.load_notebook_node(str(NOTEBOOK))
    words = shlex.split(options)
    given = {k: _resolve_type(v) for _, k, v in zip(*[iter(words)] * 3)} | direct
    nb = parameterize_notebook(nb, given)
    code = [c.source for c in nb.cells if c.cell_type == 'code']
    position = next(i for i, c in enumerate(code) if 'parameters_from(' in c)
    assert not any('make_run' in c for c in code[:position + 1]) and position <= 3 + bool(given)
    space = {
        '__name__': '__main__',
        'In': [''],
        'Out': {},
        '_ih': [''],
        'exit': exit,
        'get_ipython': lambda: None,
    }
    for source in code[:position + 1]: exec(source, space)
    return space['parameters']


@pytest.mark.parametrize(
    'options, expected',
    [
        ('-p target v', dict(target='v')),
        ('-p epochs 1e1 -p lr 1', dict(epochs=10, lr=1.0)),
        ('-p logsnr_min None -p logsnr_max 5', dict(logsnr_max=5.0)),
        ('-p logsnr_min -5', dict(logsnr_min=-5.0)),
        ('-p n_samples 1_000', dict(n_samples=1000)),
        ('', {}),
    ],
)
def test_what_a_user_types(options, expected): assert begin(options) == Parameters(**expected)


@pytest.mark.parametrize(
    'options, message',
    [
        ('-p epoch 5', "unknown parameter 'epoch'. Did you mean 'epochs'"),
        ('-p targt eps', "unknown parameter 'targt'. Did you mean 'target'"),
        ('-p learning_rate 1e-3', "unknown parameter 'learning_rate'. "),
        ('-p Target v', "unknown parameter 'Target'. Did you mean 'target'"),
        ('-p epoch None', "unknown parameter 'epoch'"),
        ('-p study ../x', "study must be a plain folder name, not '../x'"),
        ('-p epoch true', "unknown parameter 'epoch'"),
        ('-p target epsilon', "unknown target 'epsilon'. Did you mean 'eps'"),
        ('-p target true', 'unknown target'),
        ('-p target 1', 'unknown target 1'),
        ('-p target ""', "unknown target ''"),
        ('-p device gpu', "unknown device 'gpu'"),
        ('-p sampler None', 'unknown sampler None'),
        ('-p epochs ten', "epochs must be a whole number, not 'ten'"),
        ('-p epochs 2.5', 'epochs must be a whole number, not 2.5'),
        ('-p epochs true', 'epochs must'),
        ('-p epochs 0', 'epochs must be '),
        ('-p lr nan', 'lr must be a number, not nan'),
        ('-p lr inf', 'lr must'),
        ('-p lr -1', 'lr must'),
        ('-p lr fast', "lr must be a number, not 'fast'"),
        ('-p batch_size 1e6', 'batch_size 1000000 is larger than the data'),
        ('-p seed -1', 'seed must'),
        ('-p seed 1e400', 'seed must'),
        ('-p logsnr_min 5 -p logsnr_max 5', 'logsnr_min must be below logsnr_max'),
        ('-p logsnr_max -inf', 'logsnr_m'),
        ('-p schedule linear -p logsnr_min -12.9', 'linear schedule reaches'),
    ],
)
def test_what_a_careless_user_types(options, message):
    with pytest.raises(
        (ValueError, TypeError),
        match='^' + re.escape(message) if message[0] != 'l' or 'must' in message else re.escape(message),
    ):
        begin(options)


@pytest.mark.parametrize(
    'direct',
    [
        {'epochs': [5]},
        {'lr': {'a': 1}},
        {'target': ['v']},
        {'epochs': True},
        {'epoch': [1]},
        {'schedule': {}},
    ],
)
def test_what_a_parameter_file_may_hold(direct):
    with pytest.raises((ValueError, TypeError), match=next(iter(direct))): begin('', **direct)

"Attempts to break workflow/Snakefile: killed and failed jobs, grids that are none, a stand-in for SLURM."

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from filelock import FileLock

from lfdm.grids import grid
from lfdm.runs import FILES, folder_of, load_run, make_run
from lfdm.studies import NETWORKS
from lfdm.tasks import kind_of
from tree import ROOT, cells

pytest.importorskip('snakemake')
torch.set_num_threads(1)
TINY = dict(
    dataset='cluster',
    target=['x', 'v'],
    logsnr_min=-5.1,
    epochs=2,
    width=8,
    batch_size=10_000,
    lr=1e-5,
    sample_steps=2,
    n_samples=50,
)

# Runs a submitted job at once, and keeps what it was asked for.
SLURM = dict.fromkeys(('sacctmgr', 'sshare', 'scontrol', 'squeue', 'scancel', 'sinfo'), 'echo mine') | {
    'sbatch': 'printf "%s\\n" "$@" > $SLURM/asked; for last; do :; done; SLURM_JOB_ID=7 bash -c '
              '"${last#--wrap=}" > $SLURM/out 2>&1 && echo "7|COMPLETED" > $SLURM/state '
              '|| echo "7|FAILED" > $SLURM/state; echo 7',
    'sacct': 'cat $SLURM/state',
    'srun': 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Where Snakemake is called: not in the repository, and with a relative path of the runs."
    folder = tmp_path_factory.mktemp('workflow')
    (folder / 'bin').mkdir()
    for name, text in SLURM.items():
        (folder / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
        (folder / 'bin' / name).chmod(0o755)
    return folder


def call(folder, profile, *words, **config):
    "Snakemake with one of the profiles, on a grid; what it said."
    file = folder / f'{abs(hash(str(config)))}.yaml'
    file.write_text(yaml.safe_dump(config))
    env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')} | {
        'LFDM_RUNS': 'runs',
        'XDG_CACHE_HOME': str(folder / 'cache'),
        'SLURM': str(folder),
        'PATH': f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    command = [
        sys.executable,
        '-m',
        'snakemake',
        '--snakefile',
        ROOT / 'workflow/Snakefile',
        '--profile',
        ROOT / 'workflow/profiles' / profile,
        *(['--configfile', file] if config else []),
        *words,
    ]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def contents(folder):
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob('*'))
        if p.is_file()
    }


@pytest.fixture(scope='module')
def history(folder):
    """Three cells on this machine's two cores. Another process holds those that Snakemake starts first.

    One of them has a checkpoint. When that is free again, the cluster makes it.
    """
    good, bad, worse = grid(**TINY | {'target': ['x', 'v', 'eps']})
    root = folder / 'runs'
    stop = lambda phase, done, total: (_ for _ in ()).throw(KeyboardInterrupt) if done == 1 else None
    with pytest.raises(KeyboardInterrupt): make_run(bad, 'tiny', root, progress=stop)
    there, other = folder_of(bad, 'tiny', root), folder_of(worse, 'tiny', root)
    partial = there.with_name(f'.{there.name}.partial')
    before = contents(partial)
    assert 'checkpoint.safetensors' in before
    with FileLock(there.with_name(f'.{there.name}.lock')), FileLock(other.with_name(f'.{other.name}.lock')):
        first = call(folder, 'local', study='tiny', **TINY | {'target': ['x', 'v', 'eps']})
    state = contents(folder_of(good, 'tiny', root)), there.exists(), before == contents(partial)
    second = call(
        folder,
        'slurm',
        '--latency-wait',
        '5',
        '--slurm-init-seconds-before-status-checks',
        '1',
        '--default-resources',
        'slurm_partition=short',
        'slurm_account=mine',
        study='tiny',
        **TINY,
    )
    return first, state, second


def test_a_failed_job_does_not_lose_the_others(folder, history):
    (code, said), (finished, bad_exists, checkpoint_stays), _ = history
    assert code == 1 and said.count('RuntimeError: another process is making this run') == 2, said
    assert said.index('Error in rule train') < said.index('Finished jobid'), (
        'nothing was left to lose when the first failed'
    )
    assert set(finished) == set(FILES) and not bad_exists
    assert checkpoint_stays, 'the work of a failed job was deleted'


def test_the_cluster_makes_what_is_missing_and_only_that(folder, history):
    _, (finished, *_), (code, said) = history
    good, bad = grid(**TINY)
    assert code == 0, said + (folder / 'out').read_text()
    assert contents(folder_of(good, 'tiny', folder / 'runs')) == finished, 'a finished run was made again'
    assert said.count('submitted with SLURM jobid 7') == 1
    asked = (folder / 'asked').read_text()
    assert (
        '-p\nshort\n' in asked
        and '--cpus-per-task=1' in asked
        and '--mem\n3000\n' in asked
        and '-t\n120\n' in asked
    )
    for p in (good, bad):
        run = load_run(folder_of(p, 'tiny', folder / 'runs'))
        assert run.parameters == p, 'the command of a job lost a parameter'
        notebook = folder / 'runs' / 'tiny' / 'notebooks' / f'{p.slug()}.ipynb'
        assert all(
            o['output_type'] != 'error' for _, cell in cells(notebook, 'code') for o in cell['outputs']
        )


def both(f, *cases):
    "Two at a time, to save time."
    with ThreadPoolExecutor(2) as pool: return list(pool.map(f, cases))


def test_finished_runs_need_no_job(folder, history):
    "whoever made them, and whatever became of the workflow's own files"
    for f in (folder / 'runs' / 'tiny' / 'notebooks').iterdir(): f.unlink()
    for p in grid(**TINY): make_run(p, 'elsewhere', folder / 'runs')
    for code, said in both(
        lambda case: call(folder, case[0], study=case[1], **TINY), ('slurm', 'tiny'), ('local', 'elsewhere')
    ):
        assert code == 0 and 'Nothing to be done' in said, said


def test_a_deleted_run_is_made_again(folder):
    "though its notebook and its link are still there; and numbers may be words"
    axes = TINY | {'target': ['x']}
    p, = grid(**axes)
    links = folder / 'runs' / 'deleted' / 'notebooks'
    links.mkdir(parents=True)
    (links / f'{p.slug()}.ipynb').write_text('{}')
    (links / f'{p.slug()}.json').symlink_to(f'../{p.slug()}/summary.json')
    code, said = call(folder, 'local', '-n', study='deleted', **axes | {'lr': '1e-5', 'epochs': ['2']})
    assert code == 0 and 'Nothing to be done' not in said and p.slug() in said, said


BAD = [
    (dict(tagret=['x']), "unknown axis 'tagret'. Did you mean 'target'? Valid: 'study', 'dataset', "),
    (dict(studdy='x'), "unknown axis 'studdy'. Did you mean 'study'?"),
    (dict(dataset=['ring', 'rnig']), "unknown dataset 'rnig'. Did you mean 'ring'? Valid: 'cluster', "),
    (dict(seed=[]), "axis 'seed' of the grid is empty."),
    (dict(study='empty'), 'the grid is empty.'),
    (dict(seed=0, study='../x'), "study must be a plain folder name, not '../x'."),
]


def test_a_bad_grid_is_refused_before_any_job(folder):
    "and in a few lines"
    for (given, message), (code, said) in zip(BAD, both(lambda case: call(folder, 'local', **case[0]), *BAD)):
        assert code == 1 and message in said and len(said.splitlines()) < 8, f'{given}: {said}'
        assert 'rule train' not in said


def test_the_thesis_grid_is_that_of_its_study():
    "so that the study finds the runs"
    axes = yaml.safe_load((ROOT / 'workflow/thesis.yaml').read_text())
    assert axes.pop('study') == 'thesis'
    (source,) = [
        s for s, _ in cells(ROOT / 'nbs/experiments/thesis_runs.ipynb', 'code') if 'parameters = grid(' in s
    ]
    space = {
        'scale': 'full',
        'NETWORKS': NETWORKS,
        'grid': grid,
        'lookup': lambda registry, name, kind: registry[name],
        'Markdown': str,
    }
    exec(source, space)
    assert set(space['parameters']) == set(grid(**axes)) and len(grid(**axes)) == 96


# ---- a grid of images

IMAGES = dict(
    kind='images',
    dataset='templates(n_train=20, n_test=4)',
    network='small(width=4)',
    epochs=1,
    batch_size=10,
    n_samples=4,
    sample_steps=2,
    judged=2,
    target=['v'],
)


def test_a_grid_of_images_is_made(folder):
    "by the notebook of images, though content and options are no plain words; and loaded the next time"
    p, = grid(kind_of('images'), **{k: v for k, v in IMAGES.items() if k != 'kind'})
    code, said = call(folder, 'local', **IMAGES)
    assert code == 0, said + ''.join(
        f.read_text() for f in (folder / 'runs' / 'train_images' / 'notebooks').glob('*.log')
    )
    assert load_run(folder_of(p, 'train_images', folder / 'runs')).parameters == p


def test_grids_of_images_that_are_looked_at(folder):
    "what they would ask for; and bad ones are refused in a few lines"
    sets = 'digits', 'templates'
    code, said = call(
        folder,
        'local',
        '-n',
        study='other',
        dataset=list(sets),
        kind='images',
        flip=True,
        also=[dict(target='v', weighting='sigmoid', seed='1')],
    )
    assert code == 0 and int(re.search(r'^train +(\d+)$', said, re.M)[1]) == 4, said
    assert (
        'gpu=0' in said
        and 'mem_mb=8000' in said
        and 'runtime=1440' in said
        and '-sigmoid-cosine-s1-' in said
    )
    cases = (
        (dict(kind='image'), "unknown kind of run 'image'. Did you mean 'images'?"),
        (dict(kind='images', dataset='folder', path='nowhere'), "there is no folder 'nowhere'"),
        (dict(kind='images', seed=0, also=[dict(content='x')]), "unknown axis 'content'."),
    )
    for (given, message), (code, said) in zip(
        cases, both(lambda case: call(folder, 'local', **case[0]), *cases)
    ):
        assert code == 1 and message in said and len(said.splitlines()) < 8, f'{given}: {said}'


def test_the_grid_of_cifar10_is_that_of_its_study():
    "so that the study finds the runs; the images themselves need not be here"
    axes = yaml.safe_load((ROOT / 'workflow/cifar10.yaml').read_text())
    also, = axes.pop('also')
    assert (axes.pop('kind'), axes.pop('study')) == ('images', 'images')
    here = dict(content='3x32x32, 256 values, 00000000', device='cpu')
    typed = lambda axes: {k: float(v) if k == 'lr' else v for k, v in axes.items()} | here   # 2e-4 is a word
    of_file = [p for more in ({}, also) for p in grid(kind_of('images'), **typed(axes | more))]
    sources = [s for s, _ in cells(ROOT / 'nbs/experiments/images.ipynb', 'code')]
    space = dict(
        scale='full',
        dataset='cifar10',
        path=axes['path'],
        device=axes['device'],
        workers=1,
        grid=lambda kind, **axes: grid(kind, **axes | here),
        ImageParameters=kind_of('images'),
    )
    for first, last in (('DIGITS =', 'if (dataset'), ('TARGETS,', 'images, one')):
        source = next(s for s in sources if s.startswith(first))
        exec(source[:source.index(last)], space)
        space['size'] = space['SIZES']['cifar10', 'full']
    assert len(of_file) == 9 and set(of_file) == set(space['asked'])
    assert axes['device'] == 'cuda' and axes['path'] == 'data', 'what the head of the file says'


def test_the_page_shows_commands_that_work(tmp_path):
    "each snakemake line of the page, as a dry run where there is no SLURM; and how many runs that is"
    page = '\n'.join(
        s for name in ('cluster', 'gpus') for s, _ in cells(ROOT / f'nbs/guides/{name}.ipynb', 'markdown')
    )
    lines = sorted(
        {
            line.removesuffix(' -n')
            for line in page.splitlines()
            if line.startswith('snakemake ') and 'cifar10' not in line
        }
    )  # whose images are not here
    (tmp_path / 'my.yaml').write_text('study: mine\nseed: [0, 1]\n')
    (tmp_path / 'digits.yaml').write_text(re.search(r'`digits.yaml`:\n\n```\n(.*?)```', page, re.S)[1])
    (tmp_path / 'workflow').symlink_to(ROOT / 'workflow')
    env = os.environ | {'LFDM_RUNS': 'runs', 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    dry = lambda line: subprocess.run(
        [sys.executable, '-m', *shlex.split(line), '-n'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
    )
    runs = {}
    for line, done in zip(lines, both(dry, *lines)):
        assert done.returncode == 0, f'{line}: {done.stderr}'
        runs[line.split('/profiles/')[1]] = int(
            re.search(r'^train +(\d+)$', done.stdout + done.stderr, re.M)[1]
        )
    assert runs == {
        'local': 96,
        'slurm': 96,
        'local --configfile my.yaml': 2,
        'local --config seed=[0] target=[x,v] study=part': 16,
        'local --configfile digits.yaml': 2,
    }

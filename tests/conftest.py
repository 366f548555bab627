import csv
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny networks gain nothing from threads, and processes share the cores
os.environ['SCIKIT_LEARN_DATA'] = tempfile.mkdtemp()  # what is learnt here is not kept for the user's runs

import dcgan

data, np = dcgan.data, dcgan.np
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL_MNIST = os.path.join(ROOT, '..', 'shared', 'mnist')
needs_mnist = pytest.mark.skipif(not os.path.isdir(REAL_MNIST), reason='the real MNIST is not here')

TINY = dict(dataset='digits', ngf=4, ndf=4, nc=1, Z=8, lr=0.0002, head_start=0, lr_steady=12, batch_size=100, epochs=1,
            seed=3, display=False, coverage=False)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of 15 iterations an epoch; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**TINY, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def few(tiny, monkeypatch):
    """The same over so many images only, by default 115: 12 iterations an epoch, the last filled up from the start."""
    X, X_test, y, y_test = data.get_digits(labels=True)

    def settings(images=115, **changes):
        monkeypatch.setattr(data, 'get_digits', lambda labels: (X[:images], X_test, y[:images], y_test))
        return tiny(**{'batch_size': 10, **changes})

    return settings


def cases(names, table):
    """Parametrise a test with a table's values; its keys are their names."""
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


@pytest.fixture(autouse=True)
def usual_signals():
    """Signals have their usual effect, also if the tests run in the background, and have it again after a run."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
             signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    before = {signum: signal.signal(signum, what) for signum, what in usual.items()}
    yield
    after = {signum: signal.signal(signum, what) for signum, what in before.items()}
    assert after == usual


def python(*arguments, cwd=None, **env):
    """Run Python in a process of its own: status, stdout, stderr."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=cwd,
                          env={**os.environ, **env})
    return done.returncode, done.stdout, done.stderr


def room(size=resource.RLIM_INFINITY):
    """Let this process write no file larger than that, as with a quota or on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def ended(s):
    """Train, and return what a process would end with: its status, or one line."""
    with pytest.raises(SystemExit) as caught:
        dcgan.train(s)
    assert '\n' not in str(caught.value.code)
    return caught.value.code


def refused(call, *words):
    """What it raises has one line with all these words."""
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert '\n' not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


def before_steps(monkeypatch, actions):
    """Have a run in this process call actions[n] before its n-th step from now, the first being 1."""
    step, count = dcgan.train_step, itertools.count(1)

    def counted(*args):
        actions.get(next(count), lambda: None)()
        return step(*args)

    monkeypatch.setattr(dcgan, 'train_step', counted)


def watch_steps(monkeypatch, look):
    """The list in which, step by step, will be what `look` makes of the modules and of what `train_step` returns."""
    step, seen = dcgan.train_step, []

    def watched(*args):
        found = step(*args)
        seen.append(look(args[:3], *found))
        return found

    monkeypatch.setattr(dcgan, 'train_step', watched)
    return seen


def send(signum):
    """Raise a signal in the thread that trains, and wait until the main thread has handled it."""
    signal.raise_signal(signum)
    while not dcgan.stop.signum:
        time.sleep(0.001)


def train_and_stop(s, steps):
    """Train, and stop at the next line after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        before_steps(patch, {steps: lambda: send(signal.SIGTERM)})
        assert ended(s) == 143


def newest(out):
    """The folder of the newest run in `out`."""
    return max(filter(os.path.isdir, pathlib.Path(out).glob('*')), key=os.path.getmtime)


def rows(out):
    """The rows of the newest run's log.csv: {column: text}."""
    with open(newest(out) / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def read_state(folder):
    """What a run remembers in its state, and {name: array}."""
    with np.load(os.path.join(folder, 'state.npz')) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop('run'))), arrays


def state(out):
    """{name: bytes} of all arrays of the newest run's state."""
    return {name: array.tobytes() for name, array in read_state(newest(out))[1].items()}


def contents(folder):
    """{path: bytes} of the files in a folder and below it."""
    paths = (path for path in pathlib.Path(folder).rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

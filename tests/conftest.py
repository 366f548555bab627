import contextlib
import csv
import glob
import os
import signal
import subprocess
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny networks gain nothing from threads, and processes share the cores

import dcgan

mx, data = dcgan.mx, dcgan.data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL_MNIST = os.path.join(ROOT, '..', 'shared', 'mnist')
needs_mnist = pytest.mark.skipif(not os.path.isdir(REAL_MNIST), reason='the real MNIST is not here')

TINY = dict(dataset='digits', ngf=4, ndf=4, nc=1, Z=8, lr=0.0002, head_start=0, batch_size=100, epochs=1, seed=3,
            display=False, coverage=False)


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


@pytest.fixture
def child(tmp_path):
    """Start `train` with such settings in a process and session of its own.

    The process is killed at the end of the test, or when the test has hung for too long.
    """
    started = []

    def kill():
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(1800, kill)
    watchdog.start()

    def start(before='', env=(), stdout=subprocess.PIPE, **changes):
        settings = {**TINY, 'out': str(tmp_path / 'out'), **changes}
        code = f'import dcgan\nmx = dcgan.mx\n{before}\ndcgan.train(dcgan.Settings(**{settings!r}))'
        process = subprocess.Popen([sys.executable, '-c', code], stdout=stdout, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True, cwd=tmp_path,
                                   env={**os.environ, 'PYTHONPATH': ROOT, **dict(env)})
        started.append(process)
        return process

    yield start
    watchdog.cancel()
    kill()
    for process in started:
        if process.stdout and process.stdout.closed:
            process.stdout = None
        process.communicate()


def wait_for_line(process, start):
    """Read what a process prints, up to a line that starts so. Return that line."""
    for line in process.stdout:
        if line.startswith(start):
            return line
    return pytest.fail(f'ended without a line that starts with {start!r}: {process.stderr.read()}')


def stop_after(monkeypatch, steps):
    """Have a run in this process get SIGTERM in its `steps`-th step from now."""
    step, done = dcgan.train_step, []

    def counted(*args):
        done.append(0)
        if len(done) == steps:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(dcgan, 'train_step', counted)


def newest(out):
    """The folder of the newest run in `out`; a run's folder is that itself."""
    out = str(out)
    inside = [os.path.join(out, name) for name in os.listdir(out) if not name.startswith('sample')]
    return max(filter(os.path.isdir, inside), key=os.path.getmtime, default=out)


def rows(out):
    """The rows of the newest run's log.csv: {column: text}."""
    with open(os.path.join(newest(out), 'log.csv'), newline='') as file:
        return list(csv.DictReader(file))


def final_params(out):
    """{'G' or 'D': {name: array}} of the newest run's last .params."""
    last = {net: max(glob.glob(f'{glob.escape(newest(out))}/*_{net}_*.params')) for net in 'GD'}
    return {net: {name: array.asnumpy() for name, array in mx.nd.load(last[net]).items()} for net in 'GD'}


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[net].keys() == b[net].keys() and all(a[net][name].tobytes() == b[net][name].tobytes() for name in a[net])
        for net in a)

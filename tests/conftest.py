import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import dcgan  # noqa: E402  first of all: it prepares the environment for mxnet

REAL_MNIST = os.path.join(ROOT, '..', 'shared', 'mnist')
needs_mnist = pytest.mark.skipif(not os.path.isdir(REAL_MNIST), reason='the real MNIST is not here')

TINY = dict(dataset='digits', ngf=4, ndf=4, Z=8, batch_size=100, epochs=1, seed=3, display=False, coverage=False)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of 15 iterations an epoch; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**TINY, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def child(tmp_path):
    """Start `train` with such settings in a process of its own, in its own session; killed at the end, or when a test
    has hung for too long."""
    started = []

    def kill():
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(900, kill)
    watchdog.start()

    def start(before='', env=(), **changes):
        settings = {**TINY, 'out': str(tmp_path / 'out'), **changes}
        code = f'import dcgan\nmx = dcgan.mx\n{before}\ndcgan.train(dcgan.Settings(**{settings!r}))'
        process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True, cwd=tmp_path,
                                   env={**os.environ, 'PYTHONPATH': ROOT, **dict(env)})
        started.append(process)
        return process

    yield start
    watchdog.cancel()
    kill()
    for process in started:
        process.communicate()


def wait_for_line(process, start):
    """Read what a process prints up to a line that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return
    pytest.fail(f'ended without a line that starts with {start!r}: {process.stderr.read()}')


def stop_after(monkeypatch, steps):
    """Have a run in this process get SIGTERM in its `steps`-th step from now."""
    step, enter, done, stops = dcgan.train_step, dcgan.Stop.__enter__, [], []

    def counted(*args):
        done.append(0)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stops[0].signum:  # a thread is about to see it
                time.sleep(0.001)
        return step(*args)

    monkeypatch.setattr(dcgan.Stop, '__enter__', lambda self: stops.append(enter(self)) or self)
    monkeypatch.setattr(dcgan, 'train_step', counted)


def final_params(out):
    """{'G' or 'D': {name: array}} of the newest checkpoint in a folder."""
    manifest = dcgan.checkpoints(str(out))[0]
    return {net: dcgan.load_arrays(dcgan.whole(manifest, [f'_{net}_'])[f'_{net}_']) for net in 'GD'}


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[net].keys() == b[net].keys() and all(a[net][name].tobytes() == b[net][name].tobytes() for name in a[net])
        for net in a)

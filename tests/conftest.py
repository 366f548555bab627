import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import dcgan  # noqa: E402  first of all: it prepares the environment for mxnet

TINY = dict(dataset='digits', ngf=4, ndf=4, Z=8, batch_size=100, epochs=1, seed=3, display=False, coverage=False)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of 15 iterations an epoch; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**TINY, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def child(tmp_path):
    """Start `train` with such settings in a process of its own, in its own session; killed at the end."""
    started = []

    def start(before='', env=(), **changes):
        settings = {**TINY, 'out': str(tmp_path / 'out'), **changes}
        code = f'import dcgan\nmx = dcgan.mx\n{before}\ndcgan.train(dcgan.Settings(**{settings!r}))'
        process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True, cwd=tmp_path,
                                   env={**os.environ, 'PYTHONPATH': ROOT, **dict(env)})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def final_params(out):
    """{file name without stamp: {name: array}} of the newest epoch's parameters in a folder."""
    manifest = dcgan.checkpoints(str(out))[0]
    return {net: dcgan.load_arrays(dcgan.whole(manifest, [f'_{net}_'])[f'_{net}_']) for net in 'GD'}


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[net].keys() == b[net].keys() and all(a[net][name].tobytes() == b[net][name].tobytes() for name in a[net])
        for net in a)

"""Whether the program does on a GPU what it does on a CPU. Whoever has one runs this first, and gets a verdict:

    python -m pytest -q tests/test_gpu.py

With the environment variable GPU_STAND_IN=1 CPUs stand for two GPUs, so that these tests are tested themselves.
"""
import glob
import os

import data

import cv2
import numpy as np
import pytest
import textbook
from conftest import newest, read_state, train_and_stop

import dcgan

mx = data.mx

STAND_IN = os.environ.get('GPU_STAND_IN') == '1'
GPUS = [mx.cpu(1), mx.cpu(2)] if STAND_IN else [mx.gpu(i) for i in range(mx.context.num_gpus())][:2]
if not GPUS:
    pytest.skip('MXNet sees no GPU', allow_module_level=True)

number_of_gpus = pytest.mark.parametrize('gpus', range(1, len(GPUS) + 1))

# float32 as on the CPU, and the same algorithms in every run; set before CUDA begins
os.environ.update(NVIDIA_TF32_OVERRIDE='0', MXNET_ENFORCE_DETERMINISM='1', MXNET_CUDNN_AUTOTUNE_DEFAULT='0')

# How far what a GPU computes may be from what a CPU does by rounding alone. The last two come after Adam's first step,
# which is lr or -lr also where a gradient is nearly 0: weights changed by 1e-5 of their size change them by 0.001 and
# 0.05, and another pos_label by 0.07 and 0.11.
FIRST_STEP = {'the real images': 1e-6, 'the fakes': 1e-4, "D's answers to the fakes": 1e-4,
              "D's answers to the reals": 1e-4, "D's answers after its update": 0.01, 'diff': 0.08}


def first_step(s):
    """What a run makes of its first batch: arrays as in FIRST_STEP."""
    _, train_iter, _ = data.load_data(s)
    batch = train_iter.next()
    rand_iter = data.RandIter(s.batch_size, s.Z, mx.cpu(), train_iter.classes if s.conditional else None)
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data,
                                 class_names=train_iter.class_names)[:3]
    mx.random.seed(s.seed + 1)
    rbatch = rand_iter.next()  # on the CPU: a GPU draws other numbers
    rbatch = mx.io.DataBatch(*([array.as_in_context(s.ctx[0]) for array in arrays]
                               for arrays in (rbatch.data, rbatch.label)))
    labels = [mx.nd.full(s.batch_size, label, s.ctx[0]) for label in (0, 1, s.pos_label)]
    fakes, diff, answers = dcgan.train_step(*modules, rbatch, batch, *labels)
    return [array.asnumpy() for array in (batch.data[0], fakes, *answers, diff)]


def by_the_textbook(s):
    """The same by the textbook on the CPU."""
    X, _, y, _ = data.get_digits(labels=True)
    X = np.tile(X.astype(np.float32) / (255.0 / 2) - 1.0, (1, s.nc, 1, 1))
    record = []
    textbook.train(X, 1, s.ngf, s.ndf, s.nc, s.Z, s.batch_size, s.seed, s.lr, parts=len(s.ctx), d1_bias=s.d1_bias,
                   pos_label=s.pos_label, y=y if s.conditional else None, record=record)
    fakes, diff, *answers = record[0]
    return [X[:s.batch_size], fakes, *answers, diff]


@number_of_gpus
@pytest.mark.parametrize('nc, conditional', [(1, False), (3, False), (3, True)])
def test_the_first_step_is_that_of_a_cpu(few, nc, conditional, gpus):
    s = few(ctx=tuple(GPUS[:gpus]), batch_size=100, ngf=16, ndf=16, nc=nc, Z=100, conditional=conditional)
    for (name, tolerance), found, expected in zip(FIRST_STEP.items(), first_step(s), by_the_textbook(s)):
        distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert distance <= tolerance, f'{name}: off by {distance:.1e}; by rounding alone at most {tolerance:.0e}'


def last_state(s):
    return read_state(newest(s.out))[1]


def differing(a, b):
    """Which arrays of the same names differ, and by how much: a sentence, or nothing."""
    assert a.keys() == b.keys()
    far = {name: float(abs(a[name] - b[name]).max()) for name in a if a[name].tobytes() != b[name].tobytes()}
    return far and f'{len(far)} of {len(a)} arrays differ, {max(far, key=far.get)} by up to {max(far.values()):.1e}'


@number_of_gpus
def test_a_run_that_was_stopped_goes_on_to_the_same_end(few, tmp_path, gpus):
    whole, again, stopped = (few(epochs=2, ctx=tuple(GPUS[:gpus]), out=str(tmp_path / name))
                             for name in ('whole', 'again', 'stopped'))
    for s in whole, again:
        dcgan.train(s)
    apart = differing(last_state(whole), last_state(again))
    assert not apart, f'two whole runs of one seed are not the same, so this says nothing of a stop: {apart}'
    train_and_stop(stopped, 15)
    assert read_state(newest(stopped.out))[0]['iteration'] == 10
    dcgan.train(dcgan.dataclasses.replace(stopped, resume='latest'))
    apart = differing(last_state(whole), last_state(stopped))
    assert not apart, f'a run that was stopped and went on is another: {apart}'


def test_a_gpus_state_on_a_cpu_and_back(few):
    s = few(ctx=GPUS[0])
    dcgan.train(s)
    for epochs, ctx in ((2, mx.cpu()), (3, GPUS[0])):
        before = last_state(s)
        dcgan.train(dcgan.dataclasses.replace(s, epochs=epochs, ctx=ctx, resume='latest'))
        assert differing(before, last_state(s)), f'on {ctx} the run did not go on'
    assert len(glob.glob(f'{s.out}/*/*_G_*-000[012].params')) == 3


def test_samples_are_those_of_a_cpu(few):
    s = few(ctx=GPUS[0], conditional=True)
    dcgan.train(s)
    for ctx in GPUS[0], mx.cpu():
        dcgan.train(dcgan.dataclasses.replace(s, ctx=ctx, resume='latest', sample=30))
    for what in 'sample', 'walk':
        found, expected = (cv2.imread(path).astype(int) for path in glob.glob(f'{s.out}/*/{what}*.png'))
        distance = abs(found - expected).max()
        assert distance <= 2, f'{what}: {distance} of 255 from the same on a CPU'
        assert found.std() > 0

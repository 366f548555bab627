"""Whether the program does on a GPU what it does on a CPU. Whoever has one runs this first, and gets a verdict:

    python -m pytest -q tests/test_gpu.py

With the environment variable GPU_STAND_IN=1 CPUs stand for two GPUs, so that these tests are tested themselves.
"""
import csv
import glob
import json
import os
import subprocess
import sys
import time

import data

import cv2
import numpy as np
import pytest
import textbook
from conftest import ROOT, newest, read_state, train_and_stop

import dcgan

mx = data.mx

STAND_IN = os.environ.get('GPU_STAND_IN') == '1'
GPUS = [mx.cpu(1), mx.cpu(2)] if STAND_IN else [mx.gpu(i) for i in range(mx.context.num_gpus())][:2]
if not GPUS:
    pytest.skip('MXNet sees no GPU', allow_module_level=True)

number_of_gpus = pytest.mark.parametrize('gpus', range(1, len(GPUS) + 1))
# float32 as on the CPU; the same algorithms in every run
PRECISELY = {'NVIDIA_TF32_OVERRIDE': '0', 'MXNET_ENFORCE_DETERMINISM': '1', 'MXNET_CUDNN_AUTOTUNE_DEFAULT': '0'}


@pytest.fixture(autouse=True, scope='module')
def precisely():
    """Set it before CUDA begins."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PRECISELY.items():
            patch.setenv(name, value)
        yield


def make_settings(tmp_path, **changes):
    """Settings of a small run on the first GPU."""
    s = dict(dataset='digits', ngf=4, ndf=4, batch_size=100, epochs=1, ctx=GPUS[0], out=str(tmp_path / 'out'),
             display=False, coverage=False)
    return dcgan.Settings(**{**s, **changes})


# How far what a GPU computes may be from what a CPU does by rounding alone. The last two come after Adam's first step,
# which is lr or -lr also where a gradient is nearly 0: weights changed by 1e-5 of their size change them by 0.001 and
# 0.05, and another pos_label by 0.07 and 0.11.
FIRST_STEP = {'the real images': 1e-6, 'the fakes': 1e-4, "D's answers to the fakes": 1e-4,
              "D's answers to the reals": 1e-4, "D's answers after its update": 0.01, 'diff': 0.08}


def first_step(s):
    """What a run makes of its first batch: arrays as in FIRST_STEP."""
    _, train_iter, _ = data.load_data(s)
    batch = train_iter.next()
    classes = train_iter.classes if s.conditional else None
    rand_iter = data.RandIter(s.batch_size, s.Z, mx.cpu(), classes)
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data,
                                 class_names=train_iter.class_names)[:3]
    mx.random.seed(s.seed + 1)
    rbatch = rand_iter.next()  # on the CPU: a GPU draws other numbers
    rbatch = mx.io.DataBatch(*([array.as_in_context(s.ctx[0]) for array in arrays]
                               for arrays in (rbatch.data, rbatch.label)))
    labels = [mx.nd.full(s.batch_size, label, s.ctx[0]) for label in (0, 1, s.pos_label)]
    fakes, diff, answers = dcgan.train_step(*modules, rbatch, batch, *labels)
    arrays = batch.data[0], fakes, *answers, diff
    return dict(zip(FIRST_STEP, [array.asnumpy() for array in arrays]))


def by_the_textbook(s):
    """The same of MNIST's kind of images, by the textbook on the CPU."""
    X = np.tile(data.get_digits()[0].astype(np.float32) / (255.0 / 2) - 1.0, (1, s.nc, 1, 1))
    record = []
    textbook.train(X, 1, s.ngf, s.ndf, s.nc, s.Z, s.batch_size, s.seed, s.lr, parts=len(s.ctx), d1_bias=s.d1_bias,
                   pos_label=s.pos_label, record=record)
    fakes, diff, *answers = record[0]
    return dict(zip(FIRST_STEP, (X[:s.batch_size], fakes, *answers, diff)))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(120):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        picture = cv2.resize(np.random.RandomState(i).randint(0, 256, (5, 7, 3), np.uint8), (280, 256))
        cv2.imwrite(str(folder / str(i % 3) / f'{i}.png'), picture)
    return str(folder)


@number_of_gpus
@pytest.mark.parametrize('changes', [
    dict(nc=1), dict(nc=3), dict(conditional=True), dict(dataset='imagenet', augment=False)],
    ids=['nc 1', 'nc 3', 'conditional', 'photos'])
def test_the_first_step_is_that_of_a_cpu(tmp_path, pictures, changes, gpus):
    s = make_settings(tmp_path, ctx=tuple(GPUS[:gpus]), imgnet_path=pictures, ngf=16, ndf=16, **changes)
    found = first_step(s)
    if s.dataset == 'digits' and not s.conditional:
        expected = by_the_textbook(s)
    else:
        expected = first_step(dcgan.dataclasses.replace(s, ctx=(mx.cpu(0), mx.cpu(3))[:gpus]))
    for name, tolerance in FIRST_STEP.items():
        distance = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert distance <= tolerance, f'{name}: off by {distance:.1e}; by rounding alone at most {tolerance:.0e}'


def last_state(s):
    return read_state(newest(s.out))[1]


def differing(a, b):
    """Which arrays of the same names differ, and by how much: a sentence, or nothing."""
    assert a.keys() == b.keys()
    far = {name: float(abs(a[name] - b[name]).max()) for name in a if a[name].tobytes() != b[name].tobytes()}
    return far and f'{len(far)} of {len(a)} arrays differ, {max(far, key=far.get)} by up to {max(far.values()):.1e}'


@number_of_gpus
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path, gpus):
    whole, again, stopped = (make_settings(tmp_path / name, epochs=2, ctx=tuple(GPUS[:gpus]))
                             for name in ('whole', 'again', 'stopped'))
    for s in whole, again:
        dcgan.train(s)
    apart = differing(last_state(whole), last_state(again))
    assert not apart, f'two whole runs of one seed are not the same, so this says nothing of a stop: {apart}'
    train_and_stop(stopped, 22)
    assert glob.glob(f'{stopped.out}/*/state.npz'), 'stopped in epoch 1, it left no state'
    dcgan.train(dcgan.dataclasses.replace(stopped, resume='latest'))
    apart = differing(last_state(whole), last_state(stopped))
    assert not apart, f'a run that was stopped and went on is another: {apart}'


def test_a_gpus_state_on_a_cpu_and_back(tmp_path):
    s = make_settings(tmp_path)
    dcgan.train(s)
    for epochs, ctx in ((2, mx.cpu()), (3, GPUS[0])):
        before = last_state(s)
        dcgan.train(dcgan.dataclasses.replace(s, epochs=epochs, ctx=ctx, resume='latest'))
        assert differing(before, last_state(s)), f'on {ctx} the run did not go on'
    assert len(glob.glob(f'{s.out}/*/*_G_*-000[012].params')) == 3


def test_samples_are_those_of_a_cpu(tmp_path):
    s = make_settings(tmp_path, conditional=True)
    dcgan.train(s)
    for ctx in GPUS[0], mx.cpu():
        dcgan.train(dcgan.dataclasses.replace(s, ctx=ctx, resume='latest', sample=30))
    for what in 'sample', 'walk':
        found, expected = (cv2.imread(path).astype(int) for path in glob.glob(f'{s.out}/*/{what}*.png'))
        distance = abs(found - expected).max()
        assert distance <= 2, f'{what}: {distance} of 255 from the same on a CPU'
        assert found.std() > 0


def measure(out, width=64, copies=6, first=40, last=140):
    """Seconds of an iteration of a run from one of its lines to another, and of a step where the host never waits."""
    s = dcgan.Settings(ngf=width, ndf=width, epochs=1, ctx=GPUS[0], out=out, display=False, coverage=False)
    X, _, y, _ = data.get_digits(labels=True)
    X, y = np.tile(X, (copies, 1, 1, 1)), np.tile(y, copies)
    train_iter = data.PixelIter(X, y, s.batch_size, s.nc, GPUS[0])
    data.load_data = lambda *args: ('digits', train_iter, None)
    dcgan.train(s)
    with open(glob.glob(f'{out}/*/log.csv')[0], newline='') as file:
        seconds = {int(row['iteration']): float(row['seconds']) for row in csv.DictReader(file)}
    rand_iter = data.RandIter(s.batch_size, s.Z, GPUS[0])
    modules = dcgan.make_modules(dcgan.dataclasses.replace(s, ctx=(GPUS[0],)), train_iter.provide_data,
                                 rand_iter.provide_data)[:3]
    labels = [mx.nd.full(s.batch_size, label, GPUS[0]) for label in (0, 1, s.pos_label)]
    train_iter.reset()
    for step in range(last):
        if step == first:
            mx.nd.waitall()
            tic = time.monotonic()
        dcgan.train_step(*modules, rand_iter.next(), train_iter.next(), *labels)
    mx.nd.waitall()
    return (seconds[last] - seconds[first]) / (last - first), (time.monotonic() - tic) / (last - first)


def free_memory():
    return 0 if STAND_IN else mx.context.gpu_memory_info(GPUS[0].device_id)[0]


def test_memory_and_speed_at_the_defaults(tmp_path, capsys):
    """In a process of its own, as a person runs it, with what CUDA itself takes."""
    size = dict(width=4, copies=1, first=10, last=20) if STAND_IN else {}
    code = f'''
import contextlib, json, sys, test_gpu
with contextlib.redirect_stdout(sys.stderr):
    found = test_gpu.measure({str(tmp_path)!r}, **{size})
print(json.dumps(found), flush=True)
sys.stdin.read()'''
    env = {name: value for name, value in os.environ.items() if name not in PRECISELY}
    env['PYTHONPATH'] = f'{ROOT}:{os.path.join(ROOT, "tests")}'
    free = free_memory()
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=env)
    found = process.stdout.readline()
    used = free - free_memory()
    _, err = process.communicate()
    assert found, err
    of_run, of_step = json.loads(found)
    with capsys.disabled():
        print(f'\n{GPUS[0]}: {64 / of_run:.0f} images/s; it waits for its host {100 * (1 - of_step / of_run):.0f} % of '
              f'the time; takes {used / 1e9:.2f} GB of its memory')
    assert STAND_IN or used < 4e9

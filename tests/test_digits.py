"""Which digits there are: the count of an epoch and its warning, the conditional networks, and samples."""
import contextlib
import functools
import glob
import io
import os
import re
import shutil
import types

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
from conftest import TINY, contents, ended, newest, rows

import dcgan
import visual

replace = dcgan.dataclasses.replace
# labels, images, batch size: sets of ten classes, of two (with Fréchet distances), and of twenty
SETS = {'plain': (range(10), 115, 10), 'two': ((3, 7), 2000, 100), 'twenty': (range(20), 115, 10)}


def made_up(kind):
    """Images and labels of a set. A class is a white band."""
    labels, n, _ = SETS[kind]
    X = np.random.RandomState(0).randint(0, 60, (n, 1, 64, 64), np.uint8)
    y = np.resize(labels, n)
    for image, label in zip(X, y):
        image[0, 3 * label:3 * label + 3] = 255
    return X, y


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The settings of a finished run of two epochs over a set, 'plain' or conditional, and what it printed."""
    @functools.lru_cache(maxsize=None)
    def finished(kind):
        X, y = made_up(kind)
        s = dcgan.Settings(**{**TINY, 'out': str(tmp_path_factory.mktemp('out')), 'batch_size': SETS[kind][2],
                              'epochs': 2, 'coverage': True, 'conditional': kind != 'plain',
                              'lr': 0.01, 'lr_steady': 0})  # so that latents and classes make a difference
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, 'get_digits', lambda labels: (X, None, y, None))
            return s, printed(s)
    return finished


def printed(s, **changes):
    """Train or sample, and return what is printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dcgan.train(replace(s, **changes))
    return out.getvalue()


@pytest.fixture
def copied(run, tmp_path):
    """Settings for samples of a copy of a finished run, which needs no data."""
    def copy(kind, **changes):
        s, _ = run(kind)
        out = shutil.copytree(s.out, tmp_path / 'D_runs')  # 'D_' as in a file's name
        return replace(s, **{**dict(out=out, resume='latest', sample=5, dataset='imagenet'), **changes})
    return copy


def draw(s, net, epoch, latents, classes=None):
    """What the G in an epoch's .params makes, by MXNet's own loading and in one batch."""
    path, = glob.glob(f'{newest(s.out)}/*_{net}_*-{epoch:04d}.params')
    mod = mx.mod.Module.load(path[:-len('-0000.params')], epoch, data_names=('rand',), label_names=None)
    if classes is not None:
        num_classes = mod._arg_params['g1_weight'].shape[0] - s.Z
        latents = np.concatenate([latents, np.eye(num_classes)[classes]], axis=1)
    inputs = mx.nd.array(latents[:, :, None, None])
    mod.bind([('rand', inputs.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([inputs]), is_train=False)
    return mod.get_outputs()[0].asnumpy()


# ---------------------------------------------------------------- counts

@pytest.mark.parametrize('kind', SETS)
def test_the_lines_and_the_columns_of_an_epoch(run, kind):
    s, out = run(kind)
    names, fd = [str(label) for label in SETS[kind][0]], kind == 'two'
    measures = r'confidence: \d\.\d\d, KL: \d+\.\d{3}' + r', FD: \d+\.\d\d' * fd
    line = rf'^epoch: (\d) digits: \d+ of {len(names)}, shares:(?: \d+){{{len(names)}}} %, {measures}$'
    assert re.findall(line, out, re.M) == ['0', '1']
    assert len(re.findall(r'^epoch: \d digits as asked: \d+\.\d %, worst: \d+\.\d %$', out, re.M)) == 2 * s.conditional
    said = r'^FD: the Fréchet distance from real images, smaller is better; other real ones have \d'
    assert len(re.findall(said, out, re.M)) == fd
    last = out.splitlines()[-1]
    assert re.match(f'done; after epoch 1 {measures}; pictures and log: {newest(s.out)}/; ', last) and 'sample' in last
    assert out.index('iter: 10 ') < out.index('training a classifier')  # nothing waits for it before the first line
    counts = [row for row in rows(s.out) if row['kl']]
    assert [row['epoch'] for row in counts] == ['0', '1']
    for row in counts:
        assert np.isclose(sum(float(row[f'share_{name}']) for name in names), 1)
        assert row['digits'] and row['confidence'] and row['median'] and bool(row['fd']) == fd
        assert bool(row['asked']) == bool(row['asked_worst']) == s.conditional


def test_the_averaged_g_is_counted(run):
    """Over latents and, with the reals' shares, classes that are always the same."""
    s, _ = run('twenty')
    X, y = made_up('twenty')
    batches = zip(dcgan.fixed_latents(s.seed, 1000, s.Z).reshape(100, 10, s.Z), np.resize(y, (100, 10)))
    drawn = ((draw(s, 'Gmean', 1, latents, classes), classes) for latents, classes in batches)
    expected = data.Coverage(X, y, [str(label) for label in range(20)]).count(drawn)
    found = rows(s.out)[-1]
    assert all(np.isclose(float(found[name]), value, rtol=1e-4) for name, value in expected.items() if name != 'fd')


@pytest.mark.parametrize('course, best', [  # each epoch's Fréchet distance and confidence; the epoch it warns with
    ([(60, .1), (6, .8), (29, .3)], None), ([(None, .1), (None, .3)], None),  # the last one has never been good
    ([(9, .8), (5, .8), (26, .8)], 1), ([(None, .6), (None, .9), (None, .4)], 1)])
def test_a_collapse_is_told_with_the_epoch_to_go_back_to(few, monkeypatch, course, best):
    counts = [dict(fd=fd, confidence=confidence, median=2, digits=10, kl=0.01, **{f'share_{k}': .1 for k in range(10)})
              for fd, confidence in course]
    judge = types.SimpleNamespace(num_images=5, floor=1.0, classifier='', count=lambda batches: counts.pop(0))
    monkeypatch.setattr(data, 'Coverage', lambda *args: judge)
    warned = re.findall('^WARNING: .*', printed(few(batch_size=115, epochs=len(course), coverage=True)), re.M)
    assert len(warned) == (best is not None) and counts == []
    if warned:
        path = re.search("G has collapsed; .*resume = '(.*)'", warned[0])[1]
        assert os.path.isfile(path) and path.endswith(f'-{best:04d}.params') and '_G_' in path


@pytest.mark.parametrize('kind, classes, columns', [('plain', None, None), ('twenty', np.arange(10), 16)])
def test_the_mosaics_of_the_epochs_are_of_the_same_latents(run, kind, classes, columns):
    s, _ = run(kind)
    for epoch in range(2):
        images = draw(s, 'Gmean', epoch, dcgan.fixed_latents(s.seed, 10, s.Z), classes)
        assert np.array_equal(cv2.imread(f'{newest(s.out)}/gout-{epoch:04d}.png'), visual.tile(images, columns))


# ---------------------------------------------------------------- samples

def test_samples(copied):
    """Of whatever a run has; a name tells the epoch and the kind of G, and nothing is overwritten."""
    s = copied('plain', sample=25)
    folder = newest(s.out)
    path = {net: glob.glob(f'{folder}/*_{net}_*-0000.params')[0] for net in ('G', 'D', 'Gmean')}
    before = contents(folder)
    for resume, name, net, epoch in (
            ('latest', '0001', 'Gmean', 1), (str(folder), '0001_2', 'Gmean', 1), (path['Gmean'], '0000', 'Gmean', 0),
            (path['G'], '0000-weights', 'G', 0), (path['D'], '0000-weights_2', 'G', 0)):
        line = printed(s, resume=resume).splitlines()[-1]
        assert line.startswith('25 images of ') and line.endswith(
            f': {folder}/sample-{name}.png, one by one in {folder}/sample-{name}/; {folder}/walk-{name}.png')
        after = contents(folder)
        assert before.items() < after.items() and len(after) == len(before) + 25 + 2
        before = after
        expected = visual.tile(draw(s, net, epoch, dcgan.fixed_latents(s.seed, 25, s.Z)))
        found = cv2.imread(f'{folder}/sample-{name}.png')
        assert found.shape == (5 * 64, 5 * 64, 3) and np.abs(found.astype(int) - expected).max() <= 1
        assert np.array_equal(found[64:128, :64], cv2.imread(f'{folder}/sample-{name}/00005.png'))
    # a walk's row goes along an arc from a latent vector to the next, from which the next row goes on
    angles, points = np.linspace(0, np.pi / 2, 10)[:, None], dcgan.fixed_latents(s.seed, 7, s.Z)
    arcs = np.concatenate([np.cos(angles) * points[i] + np.sin(angles) * points[i + 1] for i in range(6)])
    expected = visual.tile(draw(s, 'Gmean', 1, arcs), 10)
    assert np.abs(cv2.imread(f'{folder}/walk-0001.png').astype(int) - expected).max() <= 1
    # without an average G itself serves, and without any it is one line
    for file in glob.glob(f'{folder}/*_Gmean_*.params'):
        os.remove(file)
    assert f'{folder}/sample-0001-weights.png' in printed(s)
    for file in glob.glob(f'{folder}/*_G_*.params'):
        os.remove(file)
    assert 'has no epoch' in ended(s)


@pytest.mark.parametrize('kind, digits, net, chosen', [
    ('twenty', '3, 12', 'D', [3, 12]), ('twenty', '12,', 'G', [12]), ('twenty', '512', 'Gmean', [5, 1, 2]),
    ('twenty', '', 'G', list(range(20))), ('two', '7', 'Gmean', [1])])
def test_the_digits_asked_for(copied, kind, digits, net, chosen):
    s = copied(kind, digits=digits)
    path, = glob.glob(f'{newest(s.out)}/*_{net}_*-0001.params')
    sample, walk = re.search(r': (\S+\.png), one by one in .*; (\S+\.png)', printed(s, resume=path)).groups()
    net, latents = net.replace('D', 'G'), dcgan.fixed_latents(s.seed, 7, s.Z)
    # each class has a column of the mosaic
    expected = visual.tile(draw(s, net, 1, latents[:5], np.resize(chosen, 5)), visual.columns_for(len(chosen)))
    assert np.abs(cv2.imread(sample).astype(int) - expected).max() <= 1
    # and each row of the walk has one class
    expected = visual.tile(draw(s, net, 1, latents[:6], np.resize(chosen, 6)), 1)
    assert np.abs(cv2.imread(walk)[:, :64].astype(int) - expected).max() <= 1


@pytest.mark.parametrize('kind, changes, words', [
    ('twenty', dict(digits='3, 21'), ["'3, 21'", "no '21'", '0, 1, 2, 3']),
    ('two', dict(digits='123'), ["'123'", "no '1'", '3, 7']),
    ('plain', dict(digits='7', conditional=True), ['not conditional']),
    ('plain', dict(resume='/etc/passwd'), ['/etc/passwd'])])
def test_samples_that_cannot_be_had(copied, kind, changes, words):
    line = ended(copied(kind, **changes))
    assert all(word in line for word in words)


def test_damaged_params(copied):
    """It is one line that names the file."""
    s = copied('plain')
    path, = glob.glob(f'{newest(s.out)}/*_Gmean_*-0001.params')
    for size in 1000, 0:
        os.truncate(path, size)
        assert path in ended(s)

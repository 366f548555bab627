"""Which digits there are: the count of an epoch and its warning, the conditional networks, and samples."""
import contextlib
import functools
import glob
import io
import os
import re
import shutil
import struct
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


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The settings of a finished run of two epochs over a made-up set, 'plain' or conditional, and what it printed."""
    @functools.lru_cache(maxsize=None)
    def finished(kind):
        labels, n, batch_size = SETS[kind]
        folder, rng = tmp_path_factory.mktemp('set'), np.random.RandomState(0)
        y = np.resize(labels, n).astype(np.uint8)
        X = rng.randint(0, 60, (n, 28, 28), dtype=np.uint8)
        X[np.arange(n), y] = 255  # a class is a white row
        for part in 'train', 't10k':
            (folder / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 0x803, *X.shape) + X.tobytes())
            (folder / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 0x801, n) + y.tobytes())
        s = dcgan.Settings(**{**TINY, 'dataset': 'mnist', 'mnist_path': str(folder), 'out': str(folder / 'out'),
                              'batch_size': batch_size, 'epochs': 2, 'coverage': True, 'conditional': kind != 'plain'})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SCIKIT_LEARN_DATA', str(folder / 'kept'))
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
    """Settings for samples of a finished run of that kind, a copy, which needs no data."""
    def copy(kind, **changes):
        out = str(tmp_path / 'D_runs')  # 'D_' as in a file's name
        s = replace(run(kind)[0], resume='latest', sample=5, mnist_path='nowhere', out=out)
        if not os.path.exists(s.out):
            shutil.copytree(run(kind)[0].out, s.out)
        return replace(s, **changes)
    return copy


def load(s, net, epoch, batch_size):
    """G out of an epoch's .params by MXNet's own loading."""
    path, = glob.glob(f'{newest(s.out)}/*_{net}_*-{epoch:04d}.params')
    mod = mx.mod.Module.load(path[:-len('-0000.params')], epoch, data_names=('rand',), label_names=None)
    mod.bind([('rand', (batch_size, mod._arg_params['g1_weight'].shape[0], 1, 1))], for_training=False)
    return mod


def forward(mod, inputs):
    mod.forward(mx.io.DataBatch([mx.nd.array(inputs.reshape(inputs.shape + (1, 1)))]), is_train=False)
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
    assert len(re.findall(r'^FD: the Fréchet distance from real images; other real ones have \d', out, re.M)) == fd
    last = out.splitlines()[-1]
    assert re.match(f'done; after epoch 1 {measures}; pictures and log: {newest(s.out)}/; ', last) and 'sample' in last
    assert out.index('iter: 10 ') < out.index('a classifier learns')  # nothing waits for it before the first line
    found = rows(s.out)
    assert list(found[0]) == ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'd_real', 'd_fake',
                              'd_fake_after', 'images_per_second', *(f'share_{name}' for name in names), 'digits', 'kl',
                              'confidence', 'fd', 'median', 'asked', 'asked_worst']
    counts = [row for row in found if row['kl']]
    last = max(int(row['iteration']) for row in found)
    assert [(row['epoch'], row['iteration']) for row in counts] == [('0', str(last)), ('1', str(last))]
    for row in counts:
        assert np.isclose(sum(float(row[f'share_{name}']) for name in names), 1)
        assert [bool(row[name]) for name in ('confidence', 'fd', 'median', 'asked', 'asked_worst')] == [
            True, fd, True, s.conditional, s.conditional]


@pytest.mark.parametrize('kind', ['plain', 'twenty'])
def test_the_averaged_g_is_counted(run, kind, tmp_path, monkeypatch):
    """Over latents and, with the reals' shares, classes that are always the same."""
    monkeypatch.setenv('SCIKIT_LEARN_DATA', str(tmp_path))
    s, _ = run(kind)
    X, _, y, _ = data.get_mnist(s.mnist_path, labels=True)
    coverage = data.Coverage(X, y, [str(label) for label in SETS[kind][0]])
    expected = coverage.count(dcgan.generate(load(s, 'Gmean', 1, 100), dcgan.fixed_latents(s.seed, 1000, s.Z),
                                             np.resize(y, 1000) if s.conditional else None))
    found = rows(s.out)[-1]
    assert all(np.isclose(float(found[name]), value, rtol=1e-4) for name, value in expected.items() if name != 'fd')


@pytest.mark.parametrize('course, best', [  # each epoch's Fréchet distance and confidence; the epoch it warns with
    ([(60, .1), (9, .7), (6, .8), (29, .3)], None), ([(60, .1), (60, .1), (70, .1)], None),  # it has never been good
    ([(None, .1), (None, .3)], None), ([(9, .8), (5, .8), (26, .8)], 1), ([(None, .6), (None, .9), (None, .4)], 1)])
def test_a_collapse_is_told_with_the_epoch_to_go_back_to(few, monkeypatch, course, best):
    counts = [dict(fd=fd, confidence=confidence, median=2, digits=10, kl=0.01, **{f'share_{k}': .1 for k in range(10)})
              for fd, confidence in course]
    judge = types.SimpleNamespace(num_images=5, floor=1.0, learned=True, count=lambda batches: counts.pop(0))
    monkeypatch.setattr(data, 'Coverage', lambda *args: judge)
    warned = re.findall('^WARNING: .*', printed(few(batch_size=115, epochs=len(course), coverage=True)), re.M)
    assert len(warned) == (best is not None) and counts == []
    if warned:
        path = re.search("G has collapsed; .*resume = '(.*)'", warned[0])[1]
        assert os.path.isfile(path) and path.endswith(f'-{best:04d}.params') and '_G_' in path


@pytest.mark.parametrize('kind', ['plain', 'twenty'])
def test_the_mosaics_of_the_epochs_are_of_the_same_latents(run, kind):
    s, _ = run(kind)
    latents = dcgan.fixed_latents(s.seed, 10, s.Z)
    for epoch in range(2):
        inputs = np.concatenate([latents, np.eye(20)[:10]], axis=1) if kind == 'twenty' else latents
        expected = visual.tile(forward(load(s, 'Gmean', epoch, 10), inputs), 16 if kind == 'twenty' else None)
        assert np.array_equal(cv2.imread(f'{newest(s.out)}/gout-{epoch:04d}.png'), expected)


# ---------------------------------------------------------------- samples

def test_samples(copied, monkeypatch):
    """Of whatever a run has; a name tells the epoch and the kind of G, and nothing is overwritten."""
    s, folder, seen, generate = copied('plain', sample=25), newest(copied('plain').out), [], dcgan.generate
    monkeypatch.setattr(dcgan, 'generate', lambda mod, latents, classes: seen.append(
        (mod.data_shapes[0].shape, latents)) or generate(mod, latents, classes))
    path = {net: glob.glob(f'{folder}/*_{net}_*-0000.params')[0] for net in ('G', 'D', 'Gmean')}
    before = contents(folder)
    for resume, name in (('latest', '0001'), (str(folder), '0001_2'), (path['G'], '0000-weights'),
                         (path['D'], '0000-weights_2'), (path['Gmean'], '0000')):
        line = printed(s, resume=resume).splitlines()[-1]
        assert line.startswith('25 images of ') and line.endswith(
            f': {folder}/sample-{name}.png, one by one in {folder}/sample-{name}/; {folder}/walk-{name}.png')
        after = contents(folder)
        assert {file: after[file] for file in before} == before
        assert set(after) - set(before) == {f'sample-{name}.png', f'walk-{name}.png',
                                            *(f'sample-{name}/{i:05d}.png' for i in range(25))}
        before = after
    assert after['sample-0001.png'] == after['sample-0001_2.png']
    assert len({after[f'sample-{name}.png'] for name in ('0001', '0000', '0000-weights')}) == 3
    # independently: MXNet's own loading, and one forward where the program makes batches
    for net, epoch, name in (('Gmean', 1, '0001'), ('G', 0, '0000-weights')):
        picture = visual.tile(forward(load(s, net, epoch, 25), dcgan.fixed_latents(s.seed, 25, s.Z)))
        found = cv2.imread(f'{folder}/sample-{name}.png')
        assert found.shape == (5 * 64, 5 * 64, 3) and np.abs(found.astype(int) - picture).max() <= 1
        assert np.array_equal(found[64:128, :64], cv2.imread(f'{folder}/sample-{name}/00005.png'))
    assert {shape for shape, _ in seen} == {(10, 8, 1, 1)}  # so that many samples take no more memory
    # the last image of a walk's row and the first of the next are of the same latent vector; between them is an arc
    walk = cv2.imread(f'{folder}/walk-0001.png').reshape(6, 64, 10, 64, 3).swapaxes(1, 2).astype(int)
    assert np.abs(walk[:-1, -1] - walk[1:, 0]).max() <= 1 and np.any(walk[0, 0] != walk[0, -1])
    a, b = dcgan.fixed_latents(s.seed, 7, s.Z)[:2]
    assert np.allclose(seen[1][1][4], np.cos(np.pi / 2 * 4 / 9) * a + np.sin(np.pi / 2 * 4 / 9) * b)
    # without an average G itself serves, and without any it is one line
    for gone in 'Gmean', 'G':
        for file in glob.glob(f'{folder}/*_{gone}_*.params'):
            os.remove(file)
        if gone == 'Gmean':
            assert f'{folder}/sample-0001-weights.png' in printed(s)
    assert 'has no epoch' in ended(s)


@pytest.mark.parametrize('kind, digits, net, chosen', [
    ('twenty', '3, 12', '', [3, 12]), ('twenty', '3 12', 'D', [3, 12]), ('twenty', '7', 'G', [7]),
    ('twenty', '12,', 'D', [12]), ('twenty', '512', 'Gmean', [5, 1, 2]), ('twenty', '', 'G', list(range(20))),
    ('two', '7', '', [1]), ('two', '', 'Gmean', [0, 1])])
def test_the_digits_asked_for(copied, monkeypatch, kind, digits, net, chosen):
    s, asked, generate = copied(kind, digits=digits), [], dcgan.generate
    monkeypatch.setattr(dcgan, 'generate', lambda mod, latents, classes: asked.append(list(classes)) or
                        generate(mod, latents, classes))
    path = glob.glob(f'{newest(s.out)}/*_{net}_*-0001.params')[0] if net else 'latest'
    sample = re.search(r': (\S+\.png), one', printed(s, resume=path))[1]
    assert [asked[0], asked[1][::10]] == [list(np.resize(chosen, n)) for n in (5, 6)]
    # as MXNet's own loading makes them; each class has a column
    one_hot = np.eye(len(SETS[kind][0]), dtype=np.float32)[asked[0]]
    images = forward(load(s, net.replace('D', 'G') or 'Gmean', 1, 5),
                     np.concatenate([dcgan.fixed_latents(s.seed, 5, s.Z), one_hot], axis=1))
    expected = visual.tile(images, visual.columns_for(len(chosen)))
    assert np.abs(cv2.imread(sample).astype(int) - expected).max() <= 1


@pytest.mark.parametrize('kind, changes, words', [
    ('twenty', dict(digits='3, 21'), ["'3, 21'", "no '21'", '0, 1, 2, 3']),
    ('two', dict(digits='123'), ["'123'", "no '1'", '3, 7']),
    ('plain', dict(digits='7', conditional=True), ['not conditional']),
    ('plain', dict(resume='nowhere'), ['nowhere']), ('plain', dict(resume='/etc/passwd'), ['/etc/passwd'])])
def test_samples_that_cannot_be_had(copied, kind, changes, words):
    line = ended(copied(kind, **changes))
    assert all(word in line for word in words)


def test_damaged_params(copied):
    """It is one line that names the file."""
    path, = glob.glob(f'{newest(copied("plain").out)}/*_Gmean_*-0001.params')
    for size in 1000, 0:
        os.truncate(path, size)
        assert path in ended(copied('plain'))

"""Which digits there are: the count of an epoch and its warnings, the conditional networks, and samples."""
import contextlib
import functools
import glob
import io
import os
import pathlib
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


@pytest.mark.parametrize('kind', SETS)
def test_the_lines_and_the_columns_of_an_epoch(run, kind):
    s, out = run(kind)
    names, fd = [str(label) for label in SETS[kind][0]], kind == 'two'
    line = (rf'^epoch: (\d) digits: \d+ of {len(names)}, shares:(?: \d+){{{len(names)}}} %, confidence: \d\.\d\d, '
            r'KL: \d+\.\d{3}' + r', FD: \d+\.\d\d' * fd + '$')
    assert re.findall(line, out, re.M) == ['0', '1']
    assert len(re.findall(r'^epoch: \d digits as asked: \d+\.\d %, worst: \d+\.\d %$', out, re.M)) == 2 * s.conditional
    assert len(re.findall(r'^FD: the Fréchet distance from real images; other real ones have \d', out, re.M)) == fd
    measures = ['confidence', 'fd', 'median', 'asked', 'asked_worst']
    found = rows(s.out)
    assert list(found[0]) == ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'images_per_second',
                              *(f'share_{name}' for name in names), 'digits', 'kl',
                              *measures, *(f'{name}_weights' for name in measures)]
    counts = [row for row in found if row['kl']]
    last = max(int(row['iteration']) for row in found)
    assert [(row['epoch'], row['iteration']) for row in counts] == [('0', str(last)), ('1', str(last))]
    for row in counts:
        assert np.isclose(sum(float(row[f'share_{name}']) for name in names), 1)
        for end in ('', '_weights'):
            assert [bool(row[name + end]) for name in measures] == [True, fd, True, s.conditional, s.conditional]


@pytest.mark.parametrize('kind', ['plain', 'twenty'])
def test_the_average_is_counted_and_g_beside_it(run, kind):
    """Over latents and, with the reals' shares, classes that are always the same."""
    s, _ = run(kind)
    X, _, y, _ = data.get_mnist(s.mnist_path, labels=True)
    coverage = data.Coverage(X, y, [str(label) for label in SETS[kind][0]])
    counts = [coverage.count(dcgan.generate(load(s, net, 1, 100), dcgan.fixed_latents(s.seed, 1000, s.Z),
                                            np.resize(y, 1000) if s.conditional else None)) for net in ('Gmean', 'G')]
    expected = {**counts[0], **{f'{name}_weights': counts[1][name] for name in ('confidence', 'median')}}
    found = rows(s.out)[-1]
    assert all(np.isclose(float(found[name]), value, rtol=1e-4) for name, value in expected.items() if name != 'fd')
    assert found['confidence'] != found['confidence_weights']


GREY, LOST = 'background turns grey', 'makes no digits'


@pytest.mark.parametrize('course, expected, best', [
    ([(127, 60, .1), (2, 9, .7), (3, 6, .8), (13, 29, .3)], [], None),
    ([(127, 60, .1), (100, 60, .1), (120, 70, .1)], [], None),  # early; it has never been good
    ([(127, None, .1), (100, None, .3)], [], None),
    ([(2, 9, .8), (14, 9, .8), (20, 9, .8)], [GREY], None),
    ([(2, 9, .8), (2, 9, .8, 14, 9, .8)], [GREY], None),  # the weights, of which the average comes late
    ([(2, 9, .8), (2, 5, .8), (2, 26, .8), (2, 50, .8)], [LOST], 1),
    ([(2, 5, .8), (2, 9, .8), (2, 6, .8, 2, 26, .8)], [LOST], 0),
    ([(2, None, .6), (2, None, .9), (2, None, .4), (2, None, .3)], [LOST], 1),
    ([(2, None, .6), (2, None, .9, 2, None, .4)], [LOST], 1),
    ([(2, 5, .9), (30, 50, .3)], [GREY, LOST], 0)])
def test_each_warning_comes_once_and_in_time(few, monkeypatch, course, expected, best):
    """`course`: each epoch's median pixel, Fréchet distance and confidence, of the average and, if others, of G."""
    counts = [dict(zip(('median', 'fd', 'confidence'), epoch[i:i + 3]), **{f'share_{k}': .1 for k in range(10)},
                   digits=10, kl=0.01) for epoch in course for i in (0, len(epoch) - 3)]
    judge = types.SimpleNamespace(num_images=5, floor=1.0, real_median=3, count=lambda batches: counts.pop(0))
    monkeypatch.setattr(data, 'Coverage', lambda *args: judge)
    s = few(batch_size=115, epochs=len(course), coverage=True)
    warned = [line for line in printed(s).splitlines() if line.startswith('WARNING')]
    assert len(warned) == len(expected) and all(words in line for words, line in zip(expected, warned)), warned
    if best is not None:
        path = re.search("resume = '(.*)'", warned[-1])[1]
        assert os.path.isfile(path) and path.endswith(f'-{best:04d}.params') and '_G_' in path
    assert counts == []


@pytest.mark.parametrize('kind', ['plain', 'twenty'])
def test_the_mosaics_of_the_epochs_are_of_the_same_latents(run, kind):
    s, _ = run(kind)
    classes, latents = np.arange(10), dcgan.fixed_latents(s.seed, 10, s.Z)
    for epoch in range(2):
        if kind == 'twenty':
            images = forward(load(s, 'Gmean', epoch, 10), np.concatenate([latents, np.eye(20)[classes]], axis=1))
            expected = visual.tile(visual.by_class(images, classes, 20, 1), 16)
        else:
            expected = visual.tile(forward(load(s, 'Gmean', epoch, 10), latents))
        assert np.array_equal(cv2.imread(f'{newest(s.out)}/gout-{epoch:04d}.png'), expected)


def test_samples(run, copied, monkeypatch):
    """Of whatever a run has; a name tells the epoch and the kind of G, and nothing is overwritten."""
    s, folder, seen, generate = copied('plain', sample=25), newest(copied('plain').out), [], dcgan.generate
    monkeypatch.setattr(dcgan, 'generate', lambda mod, latents, classes: seen.append(
        (mod.data_shapes[0].shape, latents)) or generate(mod, latents, classes))
    path = {net: glob.glob(f'{folder}/*_{net}_*-0000.params')[0] for net in ('G', 'D', 'Gmean')}
    before = contents(folder)
    for resume, name in (('latest', '0001'), (folder, '0001_2'), (f'{folder}/state-0002-000000.npz', '0001_3'),
                         (f'{folder}/state-0001-000000.npz', '0000'), (path['G'], '0000-weights'),
                         (path['D'], '0000-weights_2'), (path['Gmean'], '0000_2')):
        line = printed(s, resume=resume).splitlines()[-1]
        assert line.startswith('25 images of ') and line.endswith(
            f': {folder}/sample-{name}.png, one by one in {folder}/sample-{name}/; {folder}/walk-{name}.png')
        after = contents(folder)
        assert {file: after[file] for file in before} == before
        assert set(after) - set(before) == {f'sample-{name}.png', f'walk-{name}.png',
                                            *(f'sample-{name}/{i:05d}.png' for i in range(25))}
        before = after
    same = [f'sample-{name}.png' for name in ('0001', '0001_2', '0001_3')]
    assert len({after[name] for name in same}) == 1 and after['sample-0000.png'] == after['sample-0000_2.png']
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
    fifth = np.cos(np.pi / 2 * 4 / 9) * a + np.sin(np.pi / 2 * 4 / 9) * b
    assert np.allclose(seen[1][1][4], fifth)
    shutil.rmtree(f'{folder}/sample-0001')
    printed(s, seed=4)
    assert contents(folder)['sample-0001_4.png'] != after['sample-0001.png'] == contents(folder)['sample-0001.png']
    assert 'for sample only' in ended(replace(run('plain')[0], resume=path['Gmean'], out=s.out))


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


@pytest.mark.parametrize('kind, changes, code, words', [
    ('twenty', dict(digits='3, 21'), 'line', ["'3, 21'", "no '21'", '0, 1, 2, 3']),
    ('two', dict(digits='123'), 'line', ["'123'", "no '1'", '3, 7']),
    ('plain', dict(digits='7', conditional=True), 2, ['not conditional']),
    ('plain', dict(digits='7'), 2, ['without conditional'])])
def test_digits_that_cannot_be_had(copied, capsys, kind, changes, code, words):
    found = ended(copied(kind, **changes))
    line = found if code == 'line' else capsys.readouterr().err.strip()
    assert code in ('line', found) and '\n' not in line and all(word in line for word in words)


def test_a_folder_that_cannot_be_written(copied, monkeypatch):
    """A mounted data set, say: the images go to `out`."""
    s, mkdir = copied('plain'), pathlib.Path.mkdir
    folder = newest(s.out)

    def read_only(path, *args, **kwargs):
        if str(path).startswith(folder):
            raise OSError(30, 'Read-only file system', str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, 'mkdir', read_only)
    before = contents(folder)
    line = printed(s).splitlines()[-1]
    assert line.endswith(f': {s.out}/sample-0001.png, one by one in {s.out}/sample-0001/; {s.out}/walk-0001.png')
    assert contents(folder) == before and len(os.listdir(f'{s.out}/sample-0001')) == 5

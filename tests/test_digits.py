"""Which digits there are: the line of an epoch, the conditional networks, and images out of a checkpoint."""
import csv
import glob
import os

import data

import cv2
import numpy as np
import pytest

import dcgan
import visual

mx = dcgan.mx


@pytest.mark.parametrize('conditional', [False, True])
def test_the_line_and_the_columns_of_an_epoch(tiny, capsys, conditional):
    s = tiny(epochs=2, coverage=True, conditional=conditional)
    dcgan.train(s)
    lines = capsys.readouterr().out.splitlines()
    shares, asked = ([line for line in lines if word in line] for word in ('of 10, shares: ', 'digits as asked: '))
    assert len(shares) == 2 and len(asked) == 2 * conditional and all(len(line) <= 100 for line in shares)
    with open(f'{s.out}/latest/log.csv') as file:
        rows = [row for row in csv.DictReader(file) if row['kl']]
    assert [(row['epoch'], row['iteration'], bool(row['asked'])) for row in rows] == [
        ('0', '15', conditional), ('1', '15', conditional)]
    assert np.isclose(sum(float(rows[0][f'share_{digit}']) for digit in range(10)), 1)


# ---------------------------------------------------------------- conditional

def test_what_a_conditional_d_is_shown(tiny, monkeypatch):
    """Fakes and reals with ten constant maps, their digit's alone being ones; G gets the image's part of `diff`."""
    s = tiny(conditional=True, batch_size=50, nc=3, ctx=[mx.cpu()])
    X, _, y, _ = data.get_digits(labels=True)
    batches = data.PixelIter(X, y, 50, 3, conditional=True)
    latents = data.RandIter(50, s.Z, conditional=True)
    modules = dcgan.make_modules(s, batches.provide_data, latents.provide_data)
    seen, rbatch, batch = [], next(latents), next(batches)
    for mod in modules[1:]:
        monkeypatch.setattr(mod, 'forward', lambda b, is_train, f=mod.forward: seen.append(
            b.data[0].asnumpy()) or f(b, is_train=is_train))
    monkeypatch.setattr(modules[0], 'backward', lambda grads, f=modules[0].backward: seen.append(
        grads[0].asnumpy()) or f(grads))
    fakes, diff, _ = dcgan.train_step(*modules, rbatch, batch, mx.nd.zeros(50), mx.nd.ones(50))
    fake, real, again, gradient = seen
    digits = rbatch.label[0].asnumpy()
    for shown, expected in (fake, digits), (real, y[:50]), (again, digits):
        assert shown.shape == (50, 13, 64, 64)
        assert np.array_equal(shown[:, 3:], np.broadcast_to(np.eye(10)[expected][:, :, None, None], (50, 10, 64, 64)))
    assert np.array_equal(fake[:, :3], fakes.asnumpy()) and np.array_equal(again, fake)
    assert np.array_equal(rbatch.data[0].asnumpy()[:, s.Z:, 0, 0], np.eye(10)[digits])
    assert gradient.shape == (50, 3, 64, 64) and np.array_equal(gradient, diff.asnumpy())
    assert np.array_equal(gradient, modules[2].get_input_grads()[0].asnumpy()[:, :3])


# ---------------------------------------------------------------- images out of a checkpoint

def samples(s, **changes):
    dcgan.train(dcgan.dataclasses.replace(s, resume='latest', **changes))
    return {name: cv2.imread(os.path.join(s.out, 'latest', name)) for name in ('sample.png', 'walk.png')}


def test_samples(tiny, capsys):
    s = tiny(epochs=2)
    dcgan.train(s)
    # no data, another machine's folder: sampling needs neither
    first = samples(s, sample=30, dataset='mnist', mnist_path='nowhere')
    assert [line for line in capsys.readouterr().out.splitlines()][-1].startswith('30 images of ')
    single = [cv2.imread(os.path.join(s.out, 'latest', 'sample', f'{i:05d}.png')) for i in range(30)]
    assert len(os.listdir(os.path.join(s.out, 'latest', 'sample'))) == 30
    assert first['sample.png'].shape == (5 * 64, 6 * 64, 3) and first['walk.png'].shape == (6 * 64, 10 * 64, 3)
    assert np.array_equal(first['sample.png'][64:128, :64], single[6])
    again = samples(s, sample=30)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = samples(s, sample=30, seed=4)
    assert not np.array_equal(first['sample.png'], other['sample.png'])
    # independently: MXNet's own loading, the moving averages, NumPy's latents
    path = sorted(glob.glob(f'{s.out}/latest/*_G_*-0001.params'))[0]
    mod = mx.mod.Module.load(path[:-len('-0001.params')], 1, data_names=('rand',), label_names=None)
    mod.bind([('rand', (30, 8, 1, 1))], for_training=False)
    latent = np.random.RandomState(3).normal(size=(30, 8)).astype(np.float32)
    mod.forward(mx.io.DataBatch([mx.nd.array(latent.reshape(30, 8, 1, 1))]), is_train=False)
    assert np.array_equal(visual.tile(mod.get_outputs()[0].asnumpy()), first['sample.png'])


def test_many_samples_are_made_in_batches(tiny, monkeypatch):
    """So that their memory is that of a batch; the images are those of one forward."""
    s = tiny()
    dcgan.train(s)
    lengths, generate = [], dcgan.generate
    monkeypatch.setattr(dcgan, 'generate', lambda modG, latent, digits: lengths.append(len(latent)) or
                        generate(modG, latent, digits))
    picture = samples(s, sample=250)['sample.png']
    assert lengths == [100, 100, 50, 60]  # 60 are the walk's
    path, = glob.glob(f'{s.out}/latest/*_G_*-0000.params')
    mod = mx.mod.Module.load(path[:-len('-0000.params')], 0, data_names=('rand',), label_names=None)
    mod.bind([('rand', (250, 8, 1, 1))], for_training=False)
    latent = np.random.RandomState(3).normal(size=(250, 8)).astype(np.float32)
    mod.forward(mx.io.DataBatch([mx.nd.array(latent.reshape(250, 8, 1, 1))]), is_train=False)
    assert np.abs(visual.tile(mod.get_outputs()[0].asnumpy()).astype(int) - picture).max() <= 1


def test_fewer_samples_than_the_last_time(tiny):
    s = tiny()
    dcgan.train(s)
    samples(s, sample=9)
    samples(s, sample=5)
    assert len(os.listdir(os.path.join(s.out, 'latest', 'sample'))) == 5


def test_ctrl_c_while_samples_are_made(child):
    assert child().wait(timeout=300) == 0
    process = child(resume='latest', sample=9, before="""
dcgan.signal.signal(dcgan.signal.SIGINT, dcgan.signal.default_int_handler)  # a job in the background ignores it
dcgan.visual.save = lambda *args: dcgan.os.kill(dcgan.os.getpid(), dcgan.signal.SIGINT)""")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == ''


def test_the_walk_goes_through_its_points(tiny):
    """The last image of a row and the first of the next are of the same latent vector."""
    s = tiny()
    dcgan.train(s)
    walk = samples(s, sample=1)['walk.png'].reshape(6, 64, 10, 64, 3).swapaxes(1, 2)
    assert np.abs(walk[:-1, -1].astype(int) - walk[1:, 0]).max() <= 1
    assert np.any(walk[0, 0] != walk[0, -1])


def test_the_digits_asked_for(tiny, monkeypatch):
    s = tiny(conditional=True)
    dcgan.train(s)
    asked = []
    generate = dcgan.generate
    monkeypatch.setattr(dcgan, 'generate', lambda modG, latent, digits: asked.append(digits.tolist()) or
                        generate(modG, latent, digits))
    pictures = samples(s, sample=10, digits='5551234')
    assert asked[0] == [5, 5, 5, 1, 2, 3, 4, 5, 5, 5]
    assert asked[-1] == [d for d in (5, 5, 5, 1, 2, 3) for _ in range(10)]
    assert pictures['sample.png'].shape == (2 * 64, 7 * 64, 3)  # one digit a column


def test_the_mosaics_of_the_epochs_are_of_the_same_latents(tiny):
    s = tiny(epochs=2, check_point=True)
    dcgan.train(s)
    latent, digits = dcgan.fixed_latents(s, s.batch_size)
    for epoch in range(2):
        path, = glob.glob(f'{s.out}/latest/*_G_*-{epoch:04d}.params')
        mod = mx.mod.Module.load(path[:-len('-0000.params')], epoch, data_names=('rand',), label_names=None)
        mod.bind([('rand', (s.batch_size, 8, 1, 1))], for_training=False)
        expected = visual.tile(dcgan.generate(mod, latent, digits))
        assert np.array_equal(cv2.imread(f'{s.out}/latest/gout-{epoch:04d}.png'), expected)

"""A DCGAN that learns to draw digits: MXNet's Module API, one file to read from top to bottom.

Edit `Settings` below, run `python dcgan.py`, and watch: `gout` is what the generator G makes, `diff` the gradient
that teaches it, `data` the real images. One training step is `train_step`, numbered 1 to 8; a reader who stops after
`train_loop` has understood the program.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), the game and its loss; Radford et al. 2015,
"Unsupervised Representation Learning with Deep Convolutional GANs" (arXiv 1511.06434), the networks.
"""
import atexit
import contextlib
import csv
import dataclasses
import datetime
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zlib

import data  # before MXNet, which it prepares

import mxnet as mx
import numpy as np

import visual

# ---------------------------------------------------------------- settings: edit these


@dataclasses.dataclass
class Settings:
    # data
    dataset: str = 'mnist'         # 'mnist', 'digits' (8x8, comes with scikit-learn) or 'imagenet' (your own pictures)
    mnist_path: str = ''           # folder with files in MNIST's format; '': MNIST from OpenML, fetched once
    imgnet_path: str = 'photos'    # folder of pictures, or a .rec that holds some
    augment: bool = True           # pictures: a random crop, at random mirrored; False: the square in the middle
    fallback: str = 'digits'       # where MNIST cannot be fetched: 'digits', or '' to stop with an error
    # networks
    ndf: int = 64                  # filters in D's first layer; doubled three times
    ngf: int = 64                  # filters in G's last but one layer
    nc: int = 3                    # channels: 3 or 1
    Z: int = 100                   # size of the latent vector
    d1_bias: bool = True           # a bias in D's first layer, without which D sees no contrast; article: False
    conditional: bool = False      # tell G which digit to make, and D which it sees
    # optimisation
    batch_size: int = 64           # real images in a step, and as many fakes
    lr: float = 0.0002             # Adam's
    head_start: int = 500          # so many first iterations have lr 0.001; article: 0
    beta1: float = 0.5             # Adam's; DCGAN paper, section 4
    pos_label: float = 0.9         # of the reals, when D learns; article: 1.0
    average: float = 0.99          # decay of the mean of G's weights, by which mosaics and samples are made; 0: none
    epochs: int = 100              # passes over the training images
    seed: int = 1234               # same seed, same run; on the CPU to the last bit
    ctx: object = data.default_ctx()  # or mx.cpu(), mx.gpu(1); several GPUs: mx.gpu(0), mx.gpu(1)
    kvstore: str = 'device'        # several GPUs: 'device' or 'local'; several machines: 'dist_sync' (README)
    # output
    out: str = 'out'               # folder for the runs; each has a folder of its own in it
    check_point: bool = True       # save after every epoch, and when stopped
    resume: str = ''               # go on: 'latest' or a run's folder; begin a new run: a state-....npz or .params
    sample: int = 0                # with resume: make that many images and stop
    digits: str = ''               # with sample and conditional: which; '7', '0123' or '3, 12'; '': all
    coverage: bool = True          # after every epoch, count the digits among generated images (not for pictures)
    display: bool = True           # windows where there is a screen; pictures in the run's folder in any case
    monitor: int = 0               # print the networks' inner statistics every n batches
    plot: bool = False             # draw the networks as pictures, where graphviz's `dot` is installed


# settings that have to be the same where a run goes on from a state, and in all workers of a cluster
SAME_NETWORKS = ['dataset', 'ngf', 'ndf', 'nc', 'Z', 'd1_bias', 'conditional']              # else the weights do not fit
SAME_RUN = ['batch_size', 'lr', 'head_start', 'beta1', 'pos_label', 'seed', 'augment']      # else it is another run


# ---------------------------------------------------------------- checking them

class Misuse(ValueError):
    """What a person asks for makes no sense together; the exit status is 2."""


def check(s):
    """Raise ValueError for settings that cannot work, before any long work: one line each."""
    def must(right, name, rule, kind=ValueError):
        if not right:
            raise kind(f'{name} = {getattr(s, name)!r}: must be {rule}')

    kinds = {str: 'text in quotes', bool: 'True or False', int: 'a whole number', float: 'a number'}
    for field in dataclasses.fields(s):
        found = type(getattr(s, field.name))
        must(field.type in (object, found) or (field.type, found) == (float, int), field.name, kinds.get(field.type))
    for name in ('ndf', 'ngf', 'Z', 'batch_size', 'epochs'):
        must(1 <= getattr(s, name) < 1e9, name, '1 or more')
    for name in ('seed', 'head_start', 'sample', 'monitor'):
        must(0 <= getattr(s, name) < 1e9, name, '0 or more')
    must(s.ctx and all(isinstance(ctx, mx.Context) for ctx in s.ctx), 'ctx',
         'mx.cpu(), mx.gpu(0), or several: mx.gpu(0), mx.gpu(1)')
    must(s.batch_size % len(s.ctx) == 0, 'batch_size', f'a multiple of the {len(s.ctx)} devices')
    must(0 < s.lr < math.inf, 'lr', 'more than 0')
    must(0 <= s.beta1 < 1, 'beta1', '0 or more, and below 1')
    must(0 < s.pos_label <= 1, 'pos_label', 'more than 0, and at most 1')
    must(0 <= s.average < 1, 'average', '0 or more, and below 1')
    must(s.dataset in ('mnist', 'digits', 'imagenet'), 'dataset', "'mnist', 'digits' or 'imagenet'")
    must(s.fallback in ('digits', ''), 'fallback', "'digits' or ''")
    must(s.nc in (1, 3), 'nc', '3 or 1')
    must(s.kvstore in ('device', 'local', 'dist_sync'), 'kvstore', "'device', 'local' or 'dist_sync'")
    must(s.out, 'out', "the name of a folder, such as 'out'")
    must(s.sample or '_Gmean_' not in os.path.basename(s.resume), 'resume',
         'a run, a state, or the _G_....params beside it; the mean is for sample only')
    must(s.sample <= 100_000, 'sample', 'at most 100000 at a time; another seed makes others')
    must(s.resume or not s.sample, 'sample', "0, or resume 'latest', a run's folder or a file in it")
    must(s.conditional or not s.digits, 'digits', "'' without conditional = True, for G makes what it likes", Misuse)


def warn_of_no_effect(s):
    """Say where a setting that is not as it comes has no effect beside the others."""
    pictures = s.dataset == 'imagenet'
    for name, usual, has_effect, why in (
            ('mnist_path', '', s.dataset == 'mnist', f'dataset = {s.dataset!r}'),
            ('imgnet_path', 'photos', pictures, f'dataset = {s.dataset!r}'),
            ('augment', True, pictures, f'dataset = {s.dataset!r}'),
            ('fallback', 'digits', s.dataset == 'mnist' and not s.mnist_path, 'other data than MNIST from OpenML'),
            ('head_start', 500, s.lr < 0.001, f'lr = {s.lr}'),
            ('kvstore', 'device', s.kvstore == 'dist_sync' or len(s.ctx) > 1, 'one device'),
            ('digits', '', s.sample, 'sample = 0'),
            ('plot', False, shutil.which('dot'), "no graphviz: apt-get install graphviz")):
        if getattr(s, name) != usual and not has_effect:
            print(f'WARNING: {name} = {getattr(s, name)!r} has no effect with {why}')


# ---------------------------------------------------------------- the symbols

def make_dcgan_sym(ngf, ndf, nc, no_bias=True, fix_gamma=True, eps=1e-5 + 1e-12, d1_bias=False, classes=0):
    """Generator and discriminator for 64x64 images.

    Parameters: `ngf`, `ndf`, filters of the layer next to the image; `nc`, channels; `no_bias`, `fix_gamma`, `eps` go
    to the layers; `d1_bias`, a bias in D's first layer all the same; `classes`, of a conditional pair, else 0.
    Returns: `gout`, (batch, nc, 64, 64) in [-1, 1] out of `rand` (batch, Z (+ classes, one-hot), 1, 1); `dloss`,
    (batch, 1), D's probability that an image is real, out of `data` (batch, nc, 64, 64), `label` (batch,) and, with
    classes, `digit` (batch,), the image's class from 0 on.
    """
    deconv = functools.partial(mx.sym.Deconvolution, kernel=(4, 4), no_bias=no_bias)
    conv = functools.partial(mx.sym.Convolution, kernel=(4, 4), no_bias=no_bias)
    up = functools.partial(deconv, stride=(2, 2), pad=(1, 1))  # twice the height and width
    down = functools.partial(conv, stride=(2, 2), pad=(1, 1))  # half
    norm = functools.partial(mx.sym.BatchNorm, fix_gamma=fix_gamma, eps=eps)
    relu = functools.partial(mx.sym.Activation, act_type='relu')
    leaky = functools.partial(mx.sym.LeakyReLU, act_type='leaky', slope=0.2)

    x = mx.sym.Variable('rand')                                                          # Z        x  1 x  1
    x = relu(norm(deconv(x, num_filter=ngf * 8, name='g1'), name='gbn1'), name='gact1')  # ngf * 8  x  4 x  4
    x = relu(norm(up(x, num_filter=ngf * 4, name='g2'), name='gbn2'), name='gact2')      # ngf * 4  x  8 x  8
    x = relu(norm(up(x, num_filter=ngf * 2, name='g3'), name='gbn3'), name='gact3')      # ngf * 2  x 16 x 16
    x = relu(norm(up(x, num_filter=ngf, name='g4'), name='gbn4'), name='gact4')          # ngf      x 32 x 32
    x = up(x, num_filter=max(nc, 2), name='g5')                                          # nc       x 64 x 64
    if nc == 1:  # oneDNN cannot differentiate a deconvolution of one filter: two, of which the first is used
        x = mx.sym.slice_axis(x, axis=1, begin=0, end=1)
    gout = mx.sym.Activation(x, act_type='tanh', name='gact5')

    x = mx.sym.Variable('data')                                                          # nc       x 64 x 64
    # all else in D is the same for an image and for one of half its contrast: its BatchNorm scales each batch
    x = down(x, num_filter=ndf, name='d1', no_bias=no_bias and not d1_bias)
    x = leaky(x, name='dact1')                                                           # ndf      x 32 x 32
    x = leaky(norm(down(x, num_filter=ndf * 2, name='d2'), name='dbn2'), name='dact2')   # ndf * 2  x 16 x 16
    x = leaky(norm(down(x, num_filter=ndf * 4, name='d3'), name='dbn3'), name='dact3')   # ndf * 4  x  8 x  8
    x = leaky(norm(down(x, num_filter=ndf * 8, name='d4'), name='dbn4'), name='dact4')   # ndf * 8  x  4 x  4
    x = mx.sym.Flatten(conv(x, num_filter=max(classes, 1), name='d5'))                   # an answer, or one a class
    if classes:
        x = mx.sym.pick(x, mx.sym.Variable('digit'), keepdims=True)                      # that of the image's class
    dloss = mx.sym.LogisticRegressionOutput(x, mx.sym.Variable('label'), name='dloss')
    return gout, dloss


def print_network(s, title, mod, folder):
    """Print how many parameters a network has; with `plot`, draw it."""
    print(f'{title}: {sum(copies[0].size for copies in mod._exec_group.param_arrays):,} parameters')
    if s.plot and folder and shutil.which('dot'):
        shapes = dict(mod.data_shapes + (mod.label_shapes or []))
        mx.viz.plot_network(mod.symbol, shape=shapes, save_format='png').render(f'{folder}/net_{title}', cleanup=True)


# ---------------------------------------------------------------- the metrics

def facc(label, pred):
    """Share of images that D takes for what they are; label (batch,) 0 or 1, pred (batch, 1) in [0, 1]."""
    return ((pred.ravel() > 0.5) == label.ravel()).mean()


def fentropy(label, pred):
    """Mean binary cross-entropy in nats; arguments as in `facc`."""
    pred, label = pred.ravel(), label.ravel()
    return -(label * np.log(pred + 1e-12) + (1. - label) * np.log(1. - pred + 1e-12)).mean()


# ---------------------------------------------------------------- the modules

def make_modules(s, data_shapes, rand_shapes, kv='device', class_names=()):
    """G, D, and D's twin, which finds input gradients only, a tenth less work in step 7; with their optimisers.

    The twin shares D's parameters, moving averages and activations. Parameters: the shapes that the iterators provide;
    MXNet's key-value store, or its kind; the names of the classes, which go into G's symbol, and so on the disk.
    """
    gout, dloss = make_dcgan_sym(s.ngf, s.ndf, s.nc, d1_bias=s.d1_bias, classes=len(class_names) * s.conditional)
    if s.conditional:
        gout.get_internals()['rand']._set_attr(__classes__=json.dumps(list(class_names)))
    inputs = [desc[0] for desc in data_shapes]
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=list(s.ctx))
    modG.bind(rand_shapes)
    modD = mx.mod.Module(dloss, data_names=inputs, label_names=('label',), context=list(s.ctx))
    modD.bind(data_shapes, [('label', (s.batch_size,))], inputs_need_grad=bool(s.monitor))
    mx.random.seed(s.seed)
    for mod in (modG, modD):
        mod.init_params(mx.init.Normal(0.02))
        mod.init_optimizer(kv, 'adam', {'learning_rate': s.lr, 'beta1': s.beta1, 'wd': 0.})
    modDx = mx.mod.Module(dloss, data_names=inputs, label_names=('label',), context=list(s.ctx),
                          fixed_param_names=modD._param_names)
    modDx.bind(data_shapes, modD.label_shapes, inputs_need_grad=True, shared_module=modD)
    return modG, modD, modDx


class MeanG:
    """A running mean of G's weights and moving averages: what it makes is shown, for it is better than what G makes.

    Yazıcı et al. 2019, "The Unusual Effectiveness of Averaging in GAN Training" (arXiv 1806.04498). `mod` is G once
    more, bound for inference on the first device; training does not notice it.
    """

    def __init__(self, s, modG):
        self.decay, self.count = s.average, 0
        self.mod = mx.mod.Module(modG.symbol, data_names=('rand',), label_names=None, context=s.ctx[0])
        self.mod.bind(modG.data_shapes, for_training=False)
        self.mod.init_params(None, *modG.get_params())

    def update(self, modG):
        """Take in G's weights as they are now. At the beginning the mean forgets faster, for G changes fast."""
        mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        mine, its = self.mod._exec_group, modG._exec_group
        with mx.engine.bulk(64):
            for (mean,), copies in zip(mine.param_arrays + mine.aux_arrays, its.param_arrays + its.aux_arrays):
                mean[:] = copies[0] + decay * (mean - copies[0])


# ---------------------------------------------------------------- one step

def forward_backward(modD, images, label):
    """D sees images, of which it may know the class, with a label: forward, backward. Returns its answers, (batch, 1)."""
    modD.forward(mx.io.DataBatch(images, [label]), is_train=True)
    modD.backward()
    return modD.get_outputs()[0].copy()  # the next forward overwrites the original


def train_step(modG, modD, modDx, rbatch, batch, label0, label1, pos_label):
    """One update of D and one of G; only queued, nothing here waits for a device.

    Parameters: the modules, a latent batch, a real batch, the labels 0 and 1 and the reals' when D learns, (batch,).
    Returns: the fakes, (batch, nc, 64, 64); `diff`, of the same shape; and D's answers (batch, 1) to the fakes and
    to the reals before its update, and to the fakes after it.
    """
    # 1. G makes a batch of fakes from a latent batch.
    modG.forward(rbatch, is_train=True)
    fakes = modG.get_outputs()[0]
    shown = [fakes, *rbatch.label]  # to D; a conditional D knows which digit each should be
    # 2. The fakes get label 0.  3. D sees them; the gradients are kept, the weights not yet updated.
    answers_to_fakes = forward_backward(modD, shown, label0)
    kept = [[grad.copy() for grad in grads] for grads in modD._exec_group.grad_arrays]
    # 4. The real batch gets label 1, or nearly so (Salimans et al. 2016, arXiv 1606.03498, section 3.4); D sees it.
    answers_to_reals = forward_backward(modD, batch.data, pos_label)
    # 5. The fakes' gradients are added to the reals', and D is updated once with the sum.
    with mx.engine.bulk(64):  # on a GPU each operator waits for its stream; so they wait together
        for real_grads, fake_grads in zip(modD._exec_group.grad_arrays, kept):
            for real_grad, fake_grad in zip(real_grads, fake_grads):  # one a device
                real_grad += fake_grad
        modD.update()
    # 6. Now the fakes get label 1: what G wants D to say.  7. The updated D sees them again, down to its input.
    answers_after_update = forward_backward(modDx, shown, label1)
    diff = modDx.get_input_grads()[0]
    # 8. That gradient, `diff`, goes backward through G, and G is updated.
    modG.backward([diff])
    with mx.engine.bulk(64):
        modG.update()
    return fakes, diff, (answers_to_fakes, answers_to_reals, answers_after_update)


# ---------------------------------------------------------------- the loop

def train_loop(s, modules, mean, train_iter, rand_iter, run, coverage):
    """Train until `s.epochs` are done, or until a process of the run is asked to stop.

    Parameters: the settings; what `make_modules` returns; `MeanG`; the iterators over real and over latent batches;
    `Run`, which knows where to begin; `data.Coverage` or None.
    """
    labels = [mx.nd.full(s.batch_size, label, s.ctx[0]) for label in (0, 1, s.pos_label)]
    # of each layer's output and of `diff`: the root mean square
    monitor = mx.mon.Monitor(s.monitor or math.inf, pattern='(?!.*backward).*output|d1_backward_output0', sort=True)
    for mod in modules if s.monitor else ():
        mod.install_monitor(monitor)
    while run.epoch < s.epochs and not run.stopping:
        begin_epoch(s, run, train_iter, rand_iter)
        while run.iteration < run.num_batches and not run.stopping:
            for mod in modules[:2]:
                mod._optimizer.set_learning_rate(learning_rate(s, run))
            batch, rbatch = train_iter.next(), rand_iter.next()
            monitor.tic()
            fakes, diff, answers = train_step(*modules, rbatch, batch, *labels)
            for line in monitor.toc():
                print('Batch: {:7d} {:30s} {:s}'.format(*line))
            run.add(answers)
            if run.iteration % 10 == 0 or run.iteration == run.num_batches:
                run.print_line()
                mean.update(modules[0])
                if run.folder:
                    show(s, run, mean, fakes, diff, batch, rbatch)
                run.agree_to_stop()
        arrays = network_arrays(modules, mean)
        for name, array in arrays.items():
            run.check_finite(name, array)
        ended = run.iteration >= run.num_batches
        if ended:
            run.epoch, run.iteration = run.epoch + 1, 0
        run.save_state(arrays, modules[0]._optimizer.num_update, mean.count)
        if ended and run.folder and not run.stopping:
            finish_epoch(s, run, modules, mean, coverage, arrays)


def begin_epoch(s, run, train_iter, rand_iter):
    """Bring the random numbers and the iterators to where the run stands in its epoch."""
    mx.random.seed(s.seed + 1 + run.epoch + 1_000_003 * run.kv.rank)  # each worker has latents of its own
    train_iter.reset()
    done = min(run.iteration, run.num_batches)
    train_iter.skip(done)
    for _ in range(done):
        rand_iter.next()
    run.start_clock()  # pictures, counting and saving are no part of the speed


def learning_rate(s, run):
    """Adam's for the next step. A small one alone leaves G behind at the start; a large one ends in a collapse."""
    done = run.epoch * run.num_batches + run.iteration
    return max(s.lr, 0.001) if done < s.head_start else s.lr


def show(s, run, mean, fakes, diff, batch, rbatch):
    """Show the last step's fakes, their gradient, the real batch and the losses; in the first epoch also film G."""
    if run.epoch == 0 and run.iteration in (50, 100, 200, 400, 800):
        save_mosaic(s, run, mean, f'gout-0000-{run.iteration:05d}')
    if time.monotonic() < run.last_shown + 1 and run.iteration < run.num_batches:
        return  # nobody looks at more than one picture a second
    run.last_shown = time.monotonic()
    gradient = diff.asnumpy()
    gradient = (gradient - gradient.mean()) / (gradient.std() or 1)
    fake_classes = rbatch.label[0].asnumpy().astype(int) if s.conditional else None
    real_classes = batch.data[1].asnumpy().astype(int) if s.conditional else None
    for title, X, classes in (('gout', fakes.asnumpy(), fake_classes), ('diff', gradient, fake_classes),
                              ('data', batch.data[0].asnumpy(), real_classes)):
        visual.visual(title, X, run.folder, s.display, classes, len(run.class_names))
    iterations, G, D = np.transpose(run.losses)
    visual.show_picture('loss', visual.plot(iterations, {'entropy of G': G, 'entropy of D': D}), run.folder, s.display)


def save_mosaic(s, run, mean, title):
    """Write a mosaic of always the same latents."""
    n = min(s.batch_size, 256)
    classes = np.resize(np.arange(len(run.class_names)), n) if s.conditional else None
    images = np.concatenate(list(generate(mean.mod, fixed_latents(s.seed, n, s.Z), classes)))
    visual.visual(title, images, run.folder, False, classes, len(run.class_names))


def finish_epoch(s, run, modules, mean, coverage, arrays):
    """Leave what people want of the epoch that has ended, as far as it is not there yet: MXNet's own files, a mosaic,
    the film, and the count of the digits among generated images."""
    epoch = run.epoch - 1
    if s.check_point:
        run.save_params(epoch, modules, arrays)
    title = f'gout-{epoch:04d}'
    if not os.path.exists(os.path.join(run.folder, f'{title}.png')):
        save_mosaic(s, run, mean, title)
        visual.film(run.folder)
    if coverage and not run.counts(epoch):
        classes = coverage.y[:coverage.num_images] if s.conditional else None  # with the shares of the real ones
        latents = fixed_latents(s.seed, coverage.num_images, s.Z)
        rows = []
        for mod in (mean.mod, modules[0]):  # the mean is what is shown, but is late to tell where G is going
            images = generate(mod, latents, classes)
            size = mod.data_shapes[0].shape[0]
            asked = itertools.repeat(None) if classes is None else (classes[i:i + size] for i in itertools.count(0, size))
            rows.append(coverage.count(zip(images, asked)))
        print_count(s, run, epoch, coverage, *rows)


def print_count(s, run, epoch, coverage, row, row_of_weights):
    """Print and log the count of an epoch, and warn, once each, where G is being lost."""
    names = run.class_names
    shares = ' '.join(f'{100 * row[f"share_{name}"]:.0f}' for name in names)
    fd = '' if row['fd'] is None else f', FD: {row["fd"]:.2f}'
    print(f'epoch: {epoch} digits: {row["digits"]} of {len(names)}, shares: {shares} %, '
          f'confidence: {row["confidence"]:.2f}, KL: {row["kl"]:.3f}{fd}')
    if s.conditional:
        print(f'epoch: {epoch} digits as asked: {100 * row["asked"]:.1f} %, of the worst {100 * row["asked_worst"]:.1f} %')
    measures = ('fd', 'median', 'confidence', 'asked', 'asked_worst')
    weights = {f'{name}_weights': row_of_weights[name] for name in measures if name in row_of_weights}
    run.add_row(**{'epoch': epoch, 'iteration': run.num_batches, **row, **weights})
    if max(row['median'], weights['median_weights']) > coverage.real_median + 10:
        run.warn('grey', 'the background turns grey: set d1_bias = True, or a smaller lr')
    for name in ('fd', 'fd_weights') if row['fd'] is not None else ('confidence', 'confidence_weights'):
        course = run.course(name)  # {epoch: value}
        best = min(course, key=course.get) if row['fd'] is not None else max(course, key=course.get)
        lost = course[epoch] > 5 * course[best] if row['fd'] is not None else course[epoch] < 0.5 <= course[best]
        if lost:
            run.warn('lost', f"G makes no digits any more; epoch {best} was the best: set resume = "
                     f"'{run.params_path('G', best)}' and a smaller lr, or another seed")


# ---------------------------------------------------------------- a run, in memory and on disk

class Stop(io.TextIOBase):
    """Whether this process is asked to end its run: by a signal, by q, or by a pipe that nobody reads any more.

    It also stands for stdout while a run lasts, so that all that is printed goes through `write`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last one: Slurm's --signal
    signum = asked_at = 0  # the signal that asked, and when

    def __init__(self, stdout):
        self.stdout = stdout

    def handle(self, signum, frame=None):
        """Handle a signal: the first asks, a second one ends the process at once."""
        if self.signum in (0, signal.SIGPIPE):  # a pipe's reader may have got the same Ctrl-C
            self.signum, self.asked_at = signum, time.monotonic()
            self.write('stopping at the next line; once more: at once\n')
        elif time.monotonic() - self.asked_at > 0.5:  # `timeout` sends each signal twice
            os._exit(128 + signum)

    def write(self, text):
        """Print. A pipe without a reader, as after Ctrl-C with `| tee`, asks the run to end; a full disk does not."""
        try:
            if self.stdout is sys.__stdout__:  # past Python's buffer, which a signal may find in use
                os.write(self.stdout.fileno(), text.encode(errors='replace'))
            else:  # a notebook's, say
                self.stdout.write(text)
        except BrokenPipeError:
            self.signum = self.signum or signal.SIGPIPE
        except OSError:
            pass


class Run:
    """Where the training stands, the rows of its log, and its folder (README, "What you see").

    `folder` is None in all workers of a cluster but the first; `num_batches`: iterations of an epoch; `about`: what a
    state remembers, None where a run begins; `checksum`: of the data.
    """

    def __init__(self, s, folder, num_batches, class_names, checksum, kv, stop, about=None):
        self.s, self.folder, self.num_batches, self.kv, self.stop = s, folder, num_batches, kv, stop
        self.class_names, self.checksum = list(class_names), checksum
        about = about or dict(epoch=0, iteration=0, seconds=0, path='')
        self.epoch, self.iteration, self.saved = about['epoch'], about['iteration'], about['path']
        self.start = time.monotonic() - about['seconds']
        self.stopping = False        # whether the loop ends for a stop; in a cluster, whether all loops do
        self.answers = []            # D's, of the iterations since the last line
        self.warm = False            # whether a first step is done
        self.last_shown = -math.inf  # when the pictures were
        self.warned = set()
        self.columns = ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'images_per_second',
                        *(f'share_{name}' for name in class_names), 'digits', 'confidence', 'kl', 'fd', 'median',
                        'asked', 'asked_worst', 'confidence_weights', 'fd_weights', 'median_weights',
                        'asked_weights', 'asked_worst_weights']
        self.rows, self.losses, self.log_is_whole = [], [], False
        if folder and self.saved:
            self.read_log(os.path.join(os.path.dirname(self.saved), 'log.csv'))
        self.start_clock()

    def add(self, answers):
        """Count an iteration; `answers` is what `train_step` returns."""
        self.iteration += 1
        self.answers.append(answers)
        if not self.warm:  # the first step loads libraries and tries algorithms: the clock starts after it
            mx.nd.waitall()
            self.warm = True
            self.start_clock()

    def start_clock(self):
        """Measure the speed from now on."""
        self.tic, self.timed = time.monotonic(), self.iteration

    def print_line(self):
        """Print a line for the iterations since the last one, and append it to the log."""
        answers = mx.nd.concat(*itertools.chain(*self.answers), dim=0)  # one copy from the device for all of them
        to_fakes, to_reals, after_update = answers.asnumpy().reshape(len(self.answers), 3, -1).swapaxes(0, 1)
        label01, before_update = np.repeat([0., 1.], to_fakes.size), np.append(to_fakes, to_reals)
        mACC, mD = facc(label01, before_update), fentropy(label01, before_update)
        mG = fentropy(np.ones(after_update.size), after_update)
        self.check_finite('the loss', [mG, mD])
        timed = self.iteration - self.timed
        seconds = (time.monotonic() - self.tic) / timed if timed else math.nan  # of an iteration
        speed = self.s.batch_size * self.kv.num_workers / seconds
        left = ((self.s.epochs - self.epoch) * self.num_batches - self.iteration) * seconds
        left = datetime.timedelta(seconds=round(left)) if timed else '?'
        print(f"epoch: {self.epoch} iter: {self.iteration} metric: ('facc', {mACC:.2f}) ('fentropy', {mG:.2f}) "
              f"('fentropy', {mD:.2f}) {speed:.0f}/s, {left} left".replace('nan', '?'))
        self.losses.append((self.epoch * self.num_batches + self.iteration, float(mG), float(mD)))
        self.add_row(facc=mACC, fentropy_G=mG, fentropy_D=mD, images_per_second=speed)
        self.answers = []
        self.start_clock()

    def agree_to_stop(self):
        """Find out whether a process of the run is asked to stop: then all stop."""
        if visual.quit_pressed() and not self.stop.signum:
            self.stop.handle(signal.SIGINT)
        self.stopping = total(self.kv, self.stop.signum > 0) > 0

    def check_finite(self, name, array):
        """Raise ValueError where the numbers of a run are ruined."""
        if not np.isfinite(array).all():
            raise ValueError(f'{name} is not finite at epoch {self.epoch}, iteration {self.iteration} (or shortly '
                             f'before); last good state: {self.saved or "none"}; try a smaller lr')

    def warn(self, kind, message):
        """Print a warning, once a kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            print(f'WARNING: {message}')

    def read_log(self, path):
        """Take the rows of a log up to where the run stands; a log that cannot be read counts as none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, csv.Error), open(path, newline='') as file:
            for row in csv.DictReader(file):
                row = {name: row[name] for name in self.columns if row.get(name)}
                epoch, iteration = int(row['epoch']), int(row['iteration'])
                if (epoch, iteration) <= (self.epoch, self.iteration):
                    if 'facc' in row:
                        G, D = float(row['fentropy_G']), float(row['fentropy_D'])
                        self.losses.append((epoch * self.num_batches + iteration, G, D))
                    self.rows.append(row)

    def add_row(self, **row):
        """Append a row to the log. After a failure, and where a run begins or goes on, the log is written anew."""
        row = {'epoch': self.epoch, 'iteration': self.iteration, **row}
        row['seconds'] = round(time.monotonic() - self.start, 3)
        self.rows.append({name: str(row[name]) for name in self.columns if row.get(name) is not None})
        if not self.folder:
            return
        try:
            if self.log_is_whole:
                self.log_is_whole = False  # until the row is there
                with open(os.path.join(self.folder, 'log.csv'), 'r+', newline='') as file:
                    file.seek(0, os.SEEK_END)
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])
            else:
                with self.whole_file('log.csv', 'w') as file:
                    writer = csv.DictWriter(file, self.columns)
                    writer.writeheader()
                    writer.writerows(self.rows)
            self.log_is_whole = True
        except OSError as error:
            self.warn('log', f'{self.folder}/log.csv cannot be written ({error}); the run goes on')

    def course(self, name):
        """{epoch: value} of a measure of the counts."""
        return {int(row['epoch']): float(row[name]) for row in self.rows if row.get(name)}

    def counts(self, epoch):
        """Whether the digits of an epoch have been counted."""
        return epoch in self.course('kl')

    @contextlib.contextmanager
    def whole_file(self, name, mode='wb'):
        """A file to write in the run's folder. It gets its name when it is whole and on the disk; before, it is `tmp`."""
        os.makedirs(self.folder, exist_ok=True)  # somebody may have renamed it
        temporary = os.path.join(self.folder, 'tmp')
        with open(temporary, mode, newline=None if 'b' in mode else '') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(self.folder, name))

    def save_state(self, arrays, num_update, average_count):
        """Save what the run needs to go on, and keep the newest two states. `arrays`: of `network_arrays`.

        What fails is said, and does not end the run: the disk may have room again later.
        """
        if not self.folder or not self.s.check_point:
            return
        about = dict(epoch=self.epoch, iteration=self.iteration, num_update=num_update, average_count=average_count,
                     seconds=time.monotonic() - self.start, checksum=self.checksum, class_names=self.class_names,
                     settings=dict(vars(self.s), workers=self.kv.num_workers), names=list(arrays),
                     versions=dict(mxnet=mx.__version__, numpy=np.__version__, python=sys.version))
        name = f'state-{self.epoch:04d}-{self.iteration:06d}.npz'
        try:
            with self.whole_file(name) as file:
                np.savez(file, about=json.dumps(about, default=str), **arrays)
            self.saved = os.path.join(self.folder, name)
            for path in list_states(self.folder)[2:]:
                os.remove(path)
        except OSError as error:
            print(f'WARNING: {self.folder}/{name}: not all is saved: {error}; the run goes on')

    def params_path(self, net, epoch):
        """Where an epoch's parameters are: `net` is G, D, or Gmean."""
        stamp = os.path.basename(self.folder).replace(f'{self.s.dataset}_', '', 1)
        return os.path.join(self.folder, f'{self.s.dataset}_{net}_{stamp}-{epoch:04d}.params')

    def save_params(self, epoch, modules, arrays):
        """Write both networks, and G's mean, in MXNet's own format, under the published script's names."""
        nets = [('G', modules[0], ''), ('D', modules[1], '')]
        if self.s.average:
            nets.append(('Gmean', modules[0], '_average'))
        try:
            for net, mod, end in nets:
                name = os.path.basename(self.params_path(net, epoch))
                with self.whole_file(name[:-len('-0000.params')] + '-symbol.json') as file:
                    file.write(mod.symbol.tojson().encode())
                params = {f'arg:{name}': mx.nd.array(arrays[name + end]) for name in mod._param_names}
                params.update({f'aux:{name}': mx.nd.array(arrays[name + end]) for name in mod._aux_names})
                with self.whole_file(name) as file:
                    mx.nd.save(file.name, params)
                    mx.nd.load(file.name)  # MXNet does not notice every full disk
        except (OSError, ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes what it cannot read
            print(f'WARNING: {self.params_path(net, epoch)} is not saved: {data.last_line(error)}; the run goes on')


def network_arrays(modules, mean):
    """{name: NumPy array} of both networks, from their first device: parameters, moving averages, Adam's moments, and
    the mean of G."""
    mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
    arrays = {}
    for mod in modules[:2]:
        group, devices = mod._exec_group, len(mod._context)
        for name, copies in zip(mod._param_names + mod._aux_names, group.param_arrays + group.aux_arrays):
            arrays[name] = copies[0].asnumpy()
        for i, name in enumerate(mod._param_names):
            first, second = mod._updater.states[i * devices]
            arrays[f'{name}_mean'], arrays[f'{name}_var'] = first.asnumpy(), second.asnumpy()
    group = mean.mod._exec_group
    for name, (array,) in zip(mean.mod._param_names + mean.mod._aux_names, group.param_arrays + group.aux_arrays):
        arrays[f'{name}_average'] = array.asnumpy()
    return arrays


def new_folder(out, dataset):
    """Make a folder that no other run has."""
    name = stamp = os.path.join(out, f'{dataset}_{time.strftime("%Y_%m_%d-%H_%M")}')
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            os.makedirs(name)
            return name
        name = f'{stamp}_{number}'


def lock(folder, stack):
    """Keep other processes from training in a run's folder. The lock ends with this process, however that ends."""
    import fcntl  # not at the top: Windows, which data.py refuses, has none
    fd = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'{folder}: another process trains in this folder; stop it, or resume a copy') from None
    except OSError as error:
        print(f'WARNING: {folder} cannot be locked ({error}): let no other run use it')


def list_states(folder):
    """The paths of a run's states, newest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), 'state-*-*.npz'))
    return sorted(paths, key=lambda path: [int(n) for n in re.findall('[0-9]+', os.path.basename(path))], reverse=True)


def newest_run(out):
    """The folder in `out` that has the newest state. Raises ValueError where there is none."""
    paths = glob.glob(os.path.join(glob.escape(out), '*', 'state-*-*.npz'))
    if not paths:
        raise ValueError(f"resume = 'latest': no run in {out} has a state to go on from")
    return os.path.dirname(max(paths, key=os.path.getmtime))


def read_state(path):
    """What a state remembers of its run, with its `path`, and {name: array}.

    Raises OSError where the disk does not give it, and ValueError where it is damaged.
    """
    with open(path, 'rb') as file:
        content = io.BytesIO(file.read())
    try:
        with np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop('about')))
        if about['names'] != list(arrays):  # after a flipped bit in the archive's directory NumPy loads fewer
            raise ValueError('its arrays are not those that were saved')
        for name in ('epoch', 'iteration', 'num_update', 'average_count'):
            about[name] = int(about[name])
        return dict(about, path=path, settings=dict(about['settings']), seconds=float(about['seconds'])), arrays
    except Exception as error:  # NumPy and zipfile have a dozen kinds for a flipped bit
        raise ValueError(f'{path}: is damaged, or no state of this version ({data.last_line(error)})') from None


def find_state(path, rename=False):
    """The state in a file, or the newest in a run's folder that can be read, as `read_state` returns it.

    `rename`: call a damaged one otherwise, so that it does not count among the newest two.
    """
    if os.path.isfile(path):
        return read_state(path)
    for state in list_states(path):
        try:
            return read_state(state)
        except (ValueError, OSError) as error:
            print(f'WARNING: {data.last_line(error)}; taking the one before')
            if rename and isinstance(error, ValueError):
                with contextlib.suppress(OSError):
                    os.replace(state, f'{state}.damaged')
    raise ValueError(f"resume: {path} has no state to go on from; set 'latest', a run's folder or a file in it")


def read_params(path):
    """An epoch's .params of G and of D, as `read_state` returns a state, with Adam's step count at zero."""
    epoch = re.search('-([0-9]+).params$', path)
    folder, name = os.path.split(path)
    if not epoch or not re.search('_[GD]_', name):
        raise ValueError(f"resume: {path} is called neither ..._G_...-0003.params nor ..._D_...-0003.params")
    arrays = {}
    for net in 'GD':
        net_path = os.path.join(folder, re.sub('_[GD]_', f'_{net}_', name, count=1))
        try:
            arrays.update({key.split(':')[-1]: array.asnumpy() for key, array in mx.nd.load(net_path).items()})
        except (ValueError, AttributeError, mx.MXNetError) as error:
            raise ValueError(f'{net_path}: cannot be read ({data.last_line(error)})') from None
    print(f"beginning a new run from {path}: Adam's moments and step count begin at zero")
    return dict(epoch=int(epoch[1]) + 1, iteration=0, num_update=0, average_count=0, seconds=0, path=path), arrays


def restore(s, modules, mean, about, arrays, run):
    """Put modules into a state. Raises ValueError where it is of other networks or data; what else differs is said."""
    was = about.get('settings', {})
    now = dict(vars(s), workers=run.kv.num_workers)
    for name in SAME_NETWORKS:
        if was.get(name, now[name]) != now[name]:
            raise ValueError(f'{about["path"]}: trained with {name} = {was[name]!r}, now it is {now[name]!r}')
    if about.get('checksum', run.checksum) != run.checksum:
        if run.folder is None or os.path.dirname(about['path']) == run.folder:
            raise ValueError(f'{about["path"]}: trained with other data than there is now; to go on with these, begin a '
                             'new run: set resume to that file')
        print(f'WARNING: {about["path"]}: trained with other data than there is now')
    for name in (*SAME_RUN, 'workers'):
        if was.get(name, now[name]) != now[name]:
            print(f'WARNING: {name} was {was[name]!r} and is {now[name]!r}: it goes on, but is not the same run')
    for mod, end in ((modules[0], ''), (modules[1], ''), (mean.mod, '_average')):
        group = mod._exec_group
        for name, copies in zip(mod._param_names + mod._aux_names, group.param_arrays + group.aux_arrays):
            array = arrays.get(name + end, arrays.get(name))  # the mean of a run from .params begins at the weights
            if array is None or array.shape != copies[0].shape:
                raise ValueError(f'{about["path"]}: is of other networks: {name} does not fit the settings')
            for copy in copies:  # one a device
                copy[:] = array
    for mod in modules[:2]:
        for i, weight in enumerate(itertools.chain(*mod._exec_group.param_arrays)):
            name, zeros = mod._param_names[i // len(mod._context)], np.zeros(weight.shape, np.float32)
            moments = [mx.nd.array(arrays.get(name + end, zeros), weight.context) for end in ('_mean', '_var')]
            mod._updater.states[i], mod._updater.states_synced[i] = tuple(moments), True
        mod._optimizer.begin_num_update = mod._optimizer.num_update = about['num_update']  # for Adam's bias correction
    mean.count = about['average_count']


# ---------------------------------------------------------------- sampling

def fixed_latents(seed, n, Z):
    """(n, Z) latents, the same for the same seed. They come out of NumPy's stream, so that training does not notice."""
    return np.random.RandomState(seed).normal(size=(n, Z)).astype(np.float32)


def generate(modG, latents, classes=None):
    """Yield the images of (n, Z) latents and, for a conditional G, (n,) classes from 0 on, by the moving averages.

    A batch at a time: (batch, nc, 64, 64) in [-1, 1]; the last one is what is left.
    """
    n, (batch_size, num_inputs) = len(latents), modG.data_shapes[0].shape[:2]
    if classes is not None:
        one_hot = np.eye(num_inputs - latents.shape[1], dtype=np.float32)[classes]
        latents = np.concatenate([latents, one_hot], axis=1)
    for start in range(0, n, batch_size):
        batch = np.resize(latents[start:start + batch_size], (batch_size, num_inputs, 1, 1))
        modG.forward(mx.io.DataBatch([mx.nd.array(batch)], []), is_train=False)
        yield modG.get_outputs()[0].asnumpy()[:n - start]


def load_generator(s, path, size):
    """G for batches of that size, from an epoch's .params, a state, or the newest state of a run.

    Returns it, the names of its classes, and the end of the names under which its images are written.
    """
    if path.endswith('.params'):
        path = re.sub('_D_(?=[^/]*$)', '_G_', path)
        prefix, epoch = path[:-len('-0000.params')], path[-len('0000.params'):-len('.params')]
        try:
            symbol, arguments, averages = mx.model.load_checkpoint(prefix, int(epoch))
        except (ValueError, mx.MXNetError) as error:
            raise ValueError(f'{path}: cannot be read, or {prefix}-symbol.json ({data.last_line(error)})') from None
        class_names = json.loads(symbol.attr_dict().get('rand', {}).get('__classes__', '[]'))
        params, end = {**arguments, **averages}, epoch if '_Gmean_' in os.path.basename(path) else f'{epoch}-weights'
    else:
        about, arrays = find_state(path)
        was, path, iteration = about['settings'], about['path'], about['iteration']
        symbol, _ = make_dcgan_sym(was['ngf'], was['ndf'], was['nc'])
        class_names = about['class_names'] if was['conditional'] else []
        params = {name[:-len('_average')]: mx.nd.array(arrays[name]) for name in arrays if name.endswith('_average')}
        end = f'{about["epoch"]:04d}-{iteration:06d}' if iteration else f'{about["epoch"] - 1:04d}'
    modG = mx.mod.Module(symbol, data_names=('rand',), label_names=None, context=s.ctx[0])
    modG.bind([('rand', (size, params['g1_weight'].shape[0], 1, 1))], for_training=False)
    modG.init_params(None, params, params)
    return modG, class_names, path, end


def chosen_classes(s, class_names):
    """The positions of the classes that `digits` asks for among their names. Raises ValueError for one unknown."""
    names = [name.strip() for name in s.digits.split(',')] if ',' in s.digits else list(s.digits)
    if names and not class_names:
        raise Misuse(f'digits = {s.digits!r}: that run is not conditional, and its G makes what it likes')
    for name in names:
        if name not in class_names:
            raise ValueError(f'digits = {s.digits!r}: there is no {name!r}; there are {", ".join(class_names)}')
    return [class_names.index(name) for name in names or class_names]


def make_samples(s):
    """Write a mosaic, single images and a walk between latent points; nothing that is there is overwritten."""
    size = min(s.sample, s.batch_size)
    data.check_devices(dataclasses.replace(s, ctx=s.ctx[:1], batch_size=size))
    modG, class_names, path, end = load_generator(s, s.resume, size)
    chosen = chosen_classes(s, class_names)
    Z = modG.data_shapes[0].shape[1] - len(class_names)
    classes = np.resize(chosen, s.sample) if chosen else None
    try:
        folder = sample_folder(os.path.dirname(path), end)
    except OSError as error:
        print(f'WARNING: {os.path.dirname(path)} cannot be written ({error.strerror}): the images go to {s.out}')
        folder = sample_folder(s.out, end)
    mosaic = []
    for i, image in enumerate(itertools.chain.from_iterable(generate(modG, fixed_latents(s.seed, s.sample, Z), classes))):
        visual.save(os.path.join(folder, f'{i:05d}.png'), visual.tile(image[None]))
        mosaic += [image] if i < 256 else []
    columns = min(len(chosen), 16) or None
    visual.save(f'{folder}.png', visual.tile(np.stack(mosaic), columns))
    # DCGAN paper, section 6.1; along an arc, for between two Gaussian vectors a straight line passes too near to 0
    rows, steps = 6, 10
    points = fixed_latents(s.seed, rows + 1, Z)
    arc = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None]
    walk = np.concatenate([np.cos(arc) * a + np.sin(arc) * b for a, b in zip(points, points[1:])])
    images = generate(modG, walk, np.repeat(np.resize(chosen, rows), steps) if chosen else None)
    walk_path = os.path.join(os.path.dirname(folder), os.path.basename(folder).replace('sample', 'walk', 1) + '.png')
    visual.save(walk_path, visual.tile(np.concatenate(list(images)), steps))
    print(f'{s.sample} images of {path}: {folder}.png, one by one in {folder}/; {walk_path}')


def sample_folder(parent, end):
    """Make a folder for images that has not been there."""
    name = stamp = os.path.join(parent, f'sample-{end}')
    for number in itertools.count(2):
        if not os.path.exists(f'{name}.png'):
            with contextlib.suppress(FileExistsError):
                os.makedirs(name)
                return name
        name = f'{stamp}_{number}'


# ---------------------------------------------------------------- several machines

def join(s):
    """MXNet's key-value store: of this process alone, or with `dist_sync` of all that the DMLC_ variables name.

    In a scheduler and in a server this does not return. Where a process ends in an error, the launcher (mpirun, srun)
    has to end the others. Raises ValueError where a variable is wrong: MXNet would wait for ever.
    """
    if s.kvstore != 'dist_sync':
        if data.ROLE:
            raise ValueError(f"DMLC_ROLE={data.ROLE}, but kvstore = {s.kvstore!r}: set 'dist_sync', or unset it")
        return mx.kv.create('local')
    for name, right in (('ROLE', 'worker|server|scheduler'), ('PS_ROOT_URI', '.+'), ('PS_ROOT_PORT', '[0-9]+'),
                        ('NUM_WORKER', '[0-9]+'), ('NUM_SERVER', '[0-9]+')):
        value = os.environ.get(f'DMLC_{name}', '')
        if not re.fullmatch(right, value):
            raise ValueError(f'DMLC_{name}={value!r}: has to be {right} (README, "Several machines")')
    if data.ROLE != 'worker':
        for signum in Stop.SIGNALS:  # launchers send them to all; the workers decide
            signal.signal(signum, signal.SIG_IGN)
    gpus = sum(ctx.device_type == 'gpu' for ctx in s.ctx)
    kv = mx.kv.create('dist_device_sync' if gpus > 1 else 'dist_sync')  # waits here for the other processes
    if data.ROLE != 'worker':
        mx.kv.KVStoreServer(kv).run()  # until the workers are done
        sys.exit()
    atexit.register(leave_at_once)
    kv.init('number', mx.nd.zeros(1))
    return kv


def total(kv, number):
    """The sum of a number over the workers, known to all. It waits for the network, not for a device."""
    if kv.num_workers == 1:
        return number
    kv.push('number', mx.nd.array([number]))
    found = mx.nd.zeros(1)
    kv.pull('number', out=found)
    return int(found.asscalar())


def check_same(kv, *what):
    """Raise ValueError where this is not the same in all workers: MXNet does not hand the first worker's weights on."""
    mark = zlib.crc32(repr(what).encode()) % 2 ** 16  # the network has float32
    if total(kv, mark) != mark * kv.num_workers:
        raise ValueError('the workers have different settings, data or states: start the same dcgan.py everywhere, with '
                         'out one folder for all')


def leave(kv):
    """Leave together with the other workers; MXNet aborts where it is left to Python's own end."""
    kv._barrier()  # the first worker may still be counting digits, or saving
    mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
    kv.handle = mx.base.KVStoreHandle()
    atexit.unregister(leave_at_once)


def leave_at_once(status=1):
    """End after an error in a cluster, where MXNet's own end would wait for the others, or with a GPU."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


# ---------------------------------------------------------------- main

def run_training(s, stop, stack):
    """Train; the settings are checked, and errors are exceptions. What is to be closed at the end goes to `stack`."""
    kv = join(s)
    data.check_devices(s)
    if kv.rank:  # the first worker prints, shows and saves
        stack.enter_context(contextlib.redirect_stdout(None))
    folder = s.resume if os.path.isdir(s.resume) and not kv.rank else None
    if folder:
        lock(folder, stack)
    about = arrays = None
    try:
        if s.resume:
            about, arrays = read_params(s.resume) if s.resume.endswith('.params') else find_state(s.resume, bool(folder))
    except (ValueError, OSError):
        check_same(kv, os.getpid())  # the other workers wait at the next one
        raise
    print('settings:', *(f'{name}={value!r}' for name, value in vars(s).items()))
    print(f'device: {", ".join(map(str, s.ctx))}; {os.environ["OMP_NUM_THREADS"]} CPU threads')
    s.dataset, train_iter, labelled = data.load_data(s, kv.rank, kv.num_workers)
    same = [vars(s)[name] for name in [*SAME_NETWORKS, *SAME_RUN, 'epochs']]
    check_same(kv, same, train_iter.checksum, about and [about[name] for name in ('epoch', 'iteration', 'num_update')])
    num_batches = math.ceil(train_iter.num_data / s.batch_size)
    rand_iter = data.RandIter(s.batch_size, s.Z, s.ctx[0], train_iter.classes if s.conditional else None)
    modules = make_modules(s, train_iter.provide_data, rand_iter.provide_data,
                           kv if s.kvstore == 'dist_sync' else s.kvstore, train_iter.class_names)
    mean = MeanG(s, modules[0])
    if not folder and not kv.rank:
        folder = new_folder(s.out, s.dataset)
        lock(folder, stack)
    run = Run(s, folder, num_batches, train_iter.class_names, train_iter.checksum, kv, stop, about)
    if about:
        restore(s, modules, mean, about, arrays, run)
    for title, mod in zip('GD', modules):
        print_network(s, title, mod, folder)
    coverage = data.Coverage(*labelled) if s.coverage and labelled else None
    print(f'data: {s.dataset}, {num_batches} iterations an epoch; run: {folder}')
    if coverage and folder and coverage.floor is not None:
        print(f'FD, the Fréchet distance of {coverage.num_images} images from as many real ones: as many other real ones '
              f'have {coverage.floor:.2f}')
    print('metric: facc, fentropy of G, of D; then images/s, and the time left')
    if stop.signum:  # there is no reader
        sys.exit(128 + stop.signum)
    for signum in Stop.SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
            stack.callback(signal.signal, signum, signal.signal(signum, stop.handle))
    if about and folder and not run.iteration:  # a killed run may not have come so far
        finish_epoch(s, run, modules, mean, coverage, arrays if 'g1_weight_average' in arrays else
                     network_arrays(modules, mean))
    train_loop(s, modules, mean, train_iter, rand_iter, run, coverage)
    end = f'stopped in epoch {run.epoch} after iteration {run.iteration}' if run.stopping else 'done'
    how = "to go on: resume = 'latest'; images: resume = 'latest', sample = 64" if run.saved else 'nothing was saved'
    print(f'{end}: everything is in {folder}/; {how}')
    if s.kvstore == 'dist_sync':
        leave(kv)
    if stop.signum or run.stopping:
        sys.exit(128 + (stop.signum or signal.SIGTERM))


def train(settings):
    """Train as the settings say; with `sample`, make images instead.

    Raises SystemExit: with one line that says what is wrong and what to do; with 2, for what makes no sense together;
    or with 128 and the number of the signal that ended it: 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), 138 (SIGUSR1), 141
    (a pipe that nobody reads).
    """
    paths = {name: os.path.expanduser(os.fspath(value)) for name, value in vars(settings).items()
             if isinstance(value, os.PathLike) or name in ('out', 'mnist_path', 'imgnet_path', 'resume')}
    ctx = settings.ctx
    s = dataclasses.replace(settings, ctx=tuple(ctx) if isinstance(ctx, (list, tuple)) else (ctx,), **paths)
    stop = Stop(sys.stdout or io.StringIO())
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(visual.close)
            stack.enter_context(contextlib.redirect_stdout(stop))
            check(s)
            warn_of_no_effect(s)
            if s.resume:
                s.resume = newest_run(s.out) if s.resume == 'latest' else os.path.realpath(s.resume)
            if s.sample:
                make_samples(s)
            else:
                run_training(s, stop, stack)
    except (ValueError, OSError, mx.MXNetError) as error:
        line = f'dcgan.py: {data.last_line(error)}'
        if not isinstance(error, Misuse):
            sys.exit(line)
        print(line, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the loop and while samples are made; in the loop `Stop` takes it
        sys.exit(130)


def main():
    """What `python dcgan.py` does."""
    if sys.argv[1:]:
        print(f'dcgan.py: takes no arguments, such as {sys.argv[1]}: edit Settings in dcgan.py', file=sys.stderr)
        sys.exit(2)
    try:
        train(Settings())
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    if data.GPU_BUILD:  # MXNet may crash when a process that has used a GPU ends: all is on the disk by then
        leave_at_once(status)
    sys.exit(status)


if __name__ == '__main__':
    main()

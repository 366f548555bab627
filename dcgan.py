"""A DCGAN that learns to draw digits: MXNet's Module API, one file to read from top to bottom.

Edit `Settings` below, run `python dcgan.py`, and watch: `gout` is what the generator G makes, `diff` the gradient
that teaches it, `data` the real images. One training step is `train_step`, numbered 1 to 8; a reader who stops after
`train_loop` has understood the program.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), the game and its loss; Radford et al. 2015,
"Unsupervised Representation Learning with Deep Convolutional GANs" (arXiv 1511.06434), the networks.
"""
import atexit
import contextlib
import dataclasses
import datetime
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import time
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
    d1_bias: bool = True           # a bias in D's first layer, without which D sees no contrast; published: False
    conditional: bool = False      # tell G which digit to make, and D which it sees
    # optimisation
    batch_size: int = 64           # real images in a step, and as many fakes
    lr: float = 0.0002             # Adam's learning rate after the head start
    head_start: int = 500          # so many first iterations have lr 0.001; published: 0
    lr_steady: int = 5000          # not pictures: then G's lr halves in every quarter as many; 0, published: never
    beta1: float = 0.5             # Adam's; DCGAN paper, section 4
    pos_label: float = 0.9         # label of real images while D learns; published: 1.0
    average: float = 0.99          # decay of a mean of G's weights, which makes mosaics and samples; 0: G itself
    epochs: int = 100              # passes over the training images
    seed: int = 1234               # same seed, same run; on the CPU to the last bit
    ctx: object = data.default_ctx()  # or mx.cpu(), mx.gpu(1); several GPUs: mx.gpu(0), mx.gpu(1)
    kvstore: str = 'device'        # several GPUs: 'device' or 'local'; several machines: 'dist_sync' (README)
    # output
    out: str = 'out'               # folder for the runs; each has a folder of its own in it
    check_point: bool = True       # save after every epoch, and when stopped
    resume: str = ''               # 'latest' or a run's folder: go on; a state or .params in it: a new run from there
    sample: int = 0                # with resume: make that many images and stop
    digits: str = ''               # with sample and conditional: which; '7', '0123' or '3, 12'; '': all
    coverage: bool = True          # after every epoch, count the digits among generated images (not for pictures)
    display: bool = True           # windows where there is a screen; pictures in the run's folder in any case
    monitor: int = 0               # print the networks' inner statistics every n batches
    plot: bool = False             # draw the networks as pictures, where graphviz's `dot` is installed


# settings that have to be the same where a run goes on from a state, and in all workers of a cluster
SAME_NETWORKS = ['dataset', 'ngf', 'ndf', 'nc', 'Z', 'd1_bias', 'conditional']          # else the weights do not fit
SAME_RUN = ['batch_size', 'lr', 'head_start', 'lr_steady', 'beta1', 'pos_label', 'seed', 'augment']  # else another run


# ---------------------------------------------------------------- checking them

def misuse(message):
    """End with one line and status 2: what a person asks for makes no sense."""
    print(f'dcgan.py: {message}', file=sys.stderr)
    sys.exit(2)


def check(s):
    """Before any long work, raise ValueError for a setting that cannot work, and warn of settings without effect."""
    def must(right, name, rule):
        if not right:
            raise ValueError(f'{name} = {getattr(s, name)!r}: must be {rule}')

    kinds = {str: 'text in quotes', bool: 'True or False', int: 'a whole number', float: 'a number'}
    for field in dataclasses.fields(s):
        found = type(getattr(s, field.name))
        must(field.type in (object, found) or (field.type, found) == (float, int), field.name, kinds.get(field.type))
    for name in ('ndf', 'ngf', 'Z', 'batch_size', 'epochs'):
        must(1 <= getattr(s, name) < 10_000, name, '1 or more, and less than 10000')
    for name in ('seed', 'head_start', 'lr_steady', 'sample', 'monitor'):
        must(0 <= getattr(s, name) < 1e9, name, '0 or more')
    for name in ('beta1', 'average'):
        must(0 <= getattr(s, name) < 1, name, '0 or more, and below 1')
    must(s.ctx and all(isinstance(ctx, mx.Context) for ctx in s.ctx), 'ctx', 'mx.cpu(), mx.gpu(0) or several of them')
    must(s.batch_size % len(s.ctx) == 0, 'batch_size', f'a multiple of the {len(s.ctx)} devices')
    must(0 < s.lr < math.inf, 'lr', 'more than 0')
    must(0 < s.pos_label <= 1, 'pos_label', 'more than 0, and at most 1')
    for name, *choices in (('dataset', 'mnist', 'digits', 'imagenet'), ('fallback', 'digits', ''), ('nc', 3, 1),
                           ('kvstore', 'device', 'local', 'dist_sync')):
        must(getattr(s, name) in choices, name, ' or '.join(map(repr, choices)))
    must(s.out, 'out', "the name of a folder, such as 'out'")
    must(s.sample <= 100_000, 'sample', 'at most 100000 at a time; another seed makes others')
    must(s.resume or not s.sample, 'sample', "0, or resume 'latest', a run's folder or an epoch's .params")
    if s.digits and not s.conditional:
        misuse(f'digits = {s.digits!r}: without conditional = True G makes what it likes')
    pictures, several = s.dataset == 'imagenet', s.kvstore == 'dist_sync' or len(s.ctx) > 1
    for name, usual, has_effect, needs in (
            ('mnist_path', '', s.dataset == 'mnist', "dataset = 'mnist'"),
            ('fallback', 'digits', s.dataset == 'mnist' and not s.mnist_path, "dataset = 'mnist', mnist_path = ''"),
            ('imgnet_path', 'photos', pictures, "dataset = 'imagenet'"),
            ('augment', True, pictures, "dataset = 'imagenet'"),
            ('head_start', 500, s.lr < 0.001, 'lr below 0.001'),
            ('lr_steady', 5000, not pictures, "dataset = 'mnist' or 'digits'"),
            ('kvstore', 'device', several, 'several devices'),
            ('digits', '', s.sample, 'sample'),
            ('plot', False, shutil.which('dot'), 'graphviz installed')):
        if getattr(s, name) != usual and not has_effect:
            print(f'WARNING: {name} = {getattr(s, name)!r} has an effect only with {needs}')


# ---------------------------------------------------------------- the symbols

def make_dcgan_sym(ngf, ndf, nc, no_bias=True, fix_gamma=True, eps=1e-5 + 1e-12, d1_bias=False, classes=0):
    """Generator and discriminator for 64x64 images.

    Parameters: `ngf` and `ndf` are the filters of the layer next to the image, `nc` its channels. `no_bias`,
    `fix_gamma` and `eps` go to all layers; `d1_bias` gives D's first layer a bias all the same. A conditional pair has
    `classes`.
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
    # Without a bias here D gives an image and the same image at half its contrast the same answer: every layer after
    # this one scales along, and BatchNorm takes the scale away.
    x = down(x, num_filter=ndf, name='d1', no_bias=no_bias and not d1_bias)
    x = leaky(x, name='dact1')                                                           # ndf      x 32 x 32
    x = leaky(norm(down(x, num_filter=ndf * 2, name='d2'), name='dbn2'), name='dact2')   # ndf * 2  x 16 x 16
    x = leaky(norm(down(x, num_filter=ndf * 4, name='d3'), name='dbn3'), name='dact3')   # ndf * 4  x  8 x  8
    x = leaky(norm(down(x, num_filter=ndf * 8, name='d4'), name='dbn4'), name='dact4')   # ndf * 8  x  4 x  4
    x = mx.sym.Flatten(conv(x, num_filter=max(classes, 1), name='d5'))                   # a logit, or one a class
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
    """Make G and D with their optimisers, and a second module of D that computes only the gradient of its input.

    That one shares D's parameters, moving averages and activations, and makes step 7 a tenth cheaper. Parameters: what
    the iterators provide; MXNet's key-value store, or its kind; the names of the classes, which G's symbol keeps.
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
        for i, weight in enumerate(itertools.chain(*mod._exec_group.param_arrays)):  # each on each device
            # Adam's moments, which MXNet would make at the first step: a state has to find them
            mod._updater.states[i] = mod._optimizer.create_state(i, weight)
            mod._updater.states_synced[i] = True
    modDx = mx.mod.Module(dloss, data_names=inputs, label_names=('label',), context=list(s.ctx),
                          fixed_param_names=modD._param_names)
    modDx.bind(data_shapes, modD.label_shapes, inputs_need_grad=True, shared_module=modD)
    return modG, modD, modDx


def named_arrays(mod):
    """{name: its copy on each device} of a module's parameters, moving averages and, if it learns, Adam's moments."""
    group, devices = mod._exec_group, len(mod._context)
    arrays = dict(zip(mod._param_names + mod._aux_names, group.param_arrays + group.aux_arrays))
    for i, name in enumerate(mod._param_names if mod.optimizer_initialized else ()):
        moments = [mod._updater.states[i * devices + device] for device in range(devices)]
        arrays[f'{name}_mean'], arrays[f'{name}_var'] = zip(*moments)
    return arrays


class MeanG:
    """A running mean of G's weights and moving averages, in a G for inference alone: what it makes is better.

    Yazıcı et al. 2019, "The Unusual Effectiveness of Averaging in GAN Training" (arXiv 1806.04498).
    """

    def __init__(self, s, modG):
        self.decay, self.count = s.average, 0
        self.mod = mx.mod.Module(modG.symbol, data_names=('rand',), label_names=None, context=s.ctx[0])
        self.mod.bind(modG.data_shapes, for_training=False)
        self.mod.init_params(None, *modG.get_params())

    def update(self, modG):
        """Take in G's weights as they are now. At first, when G changes fast, the decay is smaller: 0.1, 0.18, ..."""
        mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        weights = named_arrays(modG)
        with mx.engine.bulk(64):
            for name, (mean,) in named_arrays(self.mod).items():
                mean[:] = weights[name][0] + decay * (mean - weights[name][0])


# ---------------------------------------------------------------- one step

def forward_backward(modD, images, label):
    """D sees images, and with them perhaps their classes: forward, backward. Returns its answers, (batch, 1)."""
    modD.forward(mx.io.DataBatch(images, [label]), is_train=True)
    modD.backward()
    return modD.get_outputs()[0].copy()  # the next forward overwrites the original


def train_step(modG, modD, modDx, rbatch, batch, label0, label1, label_real):
    """Update D once and G once. Everything is only queued; nothing here waits for a device.

    Parameters: the modules; a latent batch and a real one of the same size; (batch,) arrays of 0, 1 and `pos_label`.
    Returns: the fakes, (batch, nc, 64, 64); `diff`, of the same shape; and D's answers (batch, 1) to the fakes and
    to the reals before its update, and to the fakes after it.
    """
    # 1. G makes a batch of fakes from a latent batch.
    modG.forward(rbatch, is_train=True)
    fakes = modG.get_outputs()[0]
    fakes_for_D = [fakes, *rbatch.label]  # a conditional D knows which digit each should be
    # 2. The fakes get label 0.
    # 3. D sees them; the gradients are kept, the weights not yet updated.
    answers_to_fakes = forward_backward(modD, fakes_for_D, label0)
    kept = [[grad.copy() for grad in grads] for grads in modD._exec_group.grad_arrays]
    # 4. The real batch gets label 1, or nearly so (Salimans et al. 2016, arXiv 1606.03498, section 3.4); D sees it.
    answers_to_reals = forward_backward(modD, batch.data, label_real)
    # 5. The fakes' gradients are added to the reals', and D is updated once with the sum.
    with mx.engine.bulk(64):  # on a GPU each operator waits for its stream; so they wait together
        for real_grads, fake_grads in zip(modD._exec_group.grad_arrays, kept):
            for real_grad, fake_grad in zip(real_grads, fake_grads):  # one a device
                real_grad += fake_grad
        modD.update()
    # 6. Now the fakes get label 1: what G wants D to say.
    # 7. The updated D sees them again, down to its input.
    answers_after_update = forward_backward(modDx, fakes_for_D, label1)
    diff = modDx.get_input_grads()[0]
    # 8. That gradient, `diff`, goes backward through G, and G is updated.
    modG.backward([diff])
    with mx.engine.bulk(64):
        modG.update()
    return fakes, diff, (answers_to_fakes, answers_to_reals, answers_after_update)


# ---------------------------------------------------------------- the loop

def learning_rates(s, iteration):
    """Adam's learning rates of G and D in an iteration, counted from the first epoch's first, which is 0."""
    if iteration < s.head_start:  # `lr` alone shows noise for an epoch
        return max(s.lr, 0.001), max(s.lr, 0.001)
    if not s.lr_steady or s.dataset == 'imagenet':
        return s.lr, s.lr
    # At a steady lr G is lost some day. It keeps to what D teaches where it learns more slowly than D:
    # Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500).
    return s.lr * 0.5 ** max(0, 4 * iteration / s.lr_steady - 4), s.lr


def train_loop(s, modules, mean, train_iter, rand_iter, run, coverage):
    """Train until `s.epochs` are done or the run is asked to stop.

    `modules` are those of `train_step`, `mean` is what is shown of G, `run` knows where the training stands, keeps its
    log and saves it, `coverage` counts digits (or is None). What they do stands below and need not be known here.
    """
    labels = [mx.nd.full(s.batch_size, label, s.ctx[0]) for label in (0, 1, s.pos_label)]
    # prints the root mean square of each layer's output and of `diff`, or never
    monitor = mx.mon.Monitor(s.monitor or math.inf, pattern='(?!.*backward).*output|d1_backward_output0', sort=True)
    for mod in modules if s.monitor else ():
        mod.install_monitor(monitor)
    while run.epoch < s.epochs and not run.stopping:
        mx.random.seed(s.seed + 1 + run.epoch + 1_000_003 * run.kv.rank)  # each worker has latents of its own
        train_iter.reset()
        train_iter.skip(run.iteration)  # in a run that goes on inside an epoch: what has been used
        for _ in range(run.iteration):
            rand_iter.next()
        run.tic = time.monotonic()  # pictures, counting and saving are no part of the speed
        while run.iteration < run.num_batches and not run.stopping:
            for mod, lr in zip(modules, learning_rates(s, run.epoch * run.num_batches + run.iteration)):
                mod._optimizer.set_learning_rate(lr)
            batch, rbatch = train_iter.next(), rand_iter.next()
            monitor.tic()
            fakes, diff, answers = train_step(*modules, rbatch, batch, *labels)
            for line in monitor.toc():
                print('Batch: {:7d} {:30s} {:s}'.format(*line))
            run.iteration += 1
            run.answers.append(answers)
            if run.iteration % 10 == 0 or run.iteration == run.num_batches:
                run.print_line()
                mean.update(modules[0])
                if run.folder:
                    show_pictures(s, run, mean, fakes, diff, batch, rbatch)
                if visual.quit_pressed() and not run.stop.signum:
                    run.stop.ask(signal.SIGINT)
                run.stopping = total(run.kv, run.stop.signum > 0) > 0  # where one worker is asked, all stop
        arrays = network_arrays(modules, mean)
        for name, array in arrays.items():
            run.check_finite(name, array)
        if run.iteration >= run.num_batches:
            run.epoch, run.iteration = run.epoch + 1, 0
        save(s, run, modules, mean, arrays)  # first: a run that is killed while it counts has lost nothing
        if not run.stopping:
            finish_epoch(s, run, modules[0], mean, coverage)


def show_pictures(s, run, mean, fakes, diff, batch, rbatch):
    """Show the last step's fakes, their gradient, the real batch and the losses; in the first epoch also film G."""
    if run.epoch == 0 and run.iteration in (50, 100, 200, 400, 800):
        save_mosaic(s, run, mean, f'gout-0000-{run.iteration:05d}')
    if time.monotonic() < run.last_shown + 1 and run.iteration < run.num_batches:
        return  # nobody looks at more than one picture a second
    run.last_shown = time.monotonic()
    shown = dict(gout=[fakes, *rbatch.label], diff=[diff, *rbatch.label], data=batch.data)
    for title, arrays in shown.items():
        X, *classes = [array.asnumpy() for array in arrays]
        if title == 'diff':
            X = (X - X.mean()) / (X.std() or 1)
        visual.visual(title, X, run.folder, s.display, *classes, num_classes=len(run.class_names))
    lines = [row for row in run.rows if {'fentropy_G', 'fentropy_D'} <= row.keys()]
    iterations = np.array([row['epoch'] * run.num_batches + row['iteration'] for row in lines])
    curves = {f'entropy of {net}': np.array([row[f'fentropy_{net}'] for row in lines]) for net in 'GD'}
    visual.show_picture('loss', visual.plot(iterations, curves), run.folder, s.display)


def save_mosaic(s, run, mean, title):
    """Write a mosaic of always the same latents, a batch."""
    classes = np.resize(np.arange(len(run.class_names)), s.batch_size) if s.conditional else None
    images, _ = next(generate(mean.mod, fixed_latents(s.seed, s.batch_size, s.Z), classes))
    visual.visual(title, images, run.folder, False, classes, len(run.class_names))


def finish_epoch(s, run, modG, mean, coverage):
    """Make an epoch's mosaic, film and count of digits where they are missing, and warn where G is being lost."""
    epoch, names = run.epoch - 1, run.class_names
    if not run.folder:
        return
    if not (run.folder / f'gout-{epoch:04d}.png').exists():
        save_mosaic(s, run, mean, f'gout-{epoch:04d}')
    visual.film(run.folder)
    if not coverage or any(row['epoch'] == epoch and 'kl' in row for row in run.rows):
        return
    # a run that goes on has the first device's moving averages on all devices: the same here, so that both agree
    for copies in modG._exec_group.aux_arrays:
        for moving_average in copies[1:]:
            moving_average[:] = copies[0]
    latents = fixed_latents(s.seed, coverage.num_images, s.Z)
    classes = np.resize(coverage.y, len(latents)) if s.conditional else None  # with the shares of the real ones
    # the mean is what is shown, but it is late to tell where G is going: G itself is judged, too
    row, weights = (coverage.count(generate(mod, latents, classes)) for mod in (mean.mod, modG))
    shares = ' '.join(f'{100 * row[f"share_{name}"]:.0f}' for name in names)
    print(f'epoch: {epoch} digits: {row["digits"]} of {len(names)}, shares: {shares} %, '
          f'confidence: {row["confidence"]:.2f}, KL: {row["kl"]:.3f}' + (f', FD: {row["fd"]:.2f}' if row['fd'] else ''))
    if s.conditional:
        print(f'epoch: {epoch} digits as asked: {100 * row["asked"]:.1f} %, worst: {100 * row["asked_worst"]:.1f} %')
    row.update({f'{name}_weights': weights.get(name) for name in MEASURES})
    run.add_row(**{**row, 'epoch': epoch, 'iteration': run.num_batches})
    counts = [count for count in run.rows if count.keys() >= run.rows[-1].keys()]  # some may be cut, or without FD
    grey = coverage.real_median + 10
    if min(count['median'] for count in counts) <= grey < max(row['median'], row['median_weights']):
        visual.warn_once('grey', 'WARNING: the background turns grey: set d1_bias = True, or a smaller lr')
    if row['fd'] is None:
        best = max(counts, key=lambda count: count['confidence'])
        lost = min(row['confidence'], row['confidence_weights']) < 0.5 <= best['confidence']
    else:
        best = min(counts, key=lambda count: count['fd'])
        lost = row['fd'] > 5 * best['fd'] or row['fd_weights'] > 5 * best['fd_weights']
    if lost:
        visual.warn_once('lost', 'WARNING: G makes no digits any more: set a smaller lr or another seed, and resume = '
                                 f"'{run.params_path('G', best['epoch'])}', of the best epoch")


# ---------------------------------------------------------------- a run, in memory and on disk

MEASURES = ['confidence', 'fd', 'median', 'asked', 'asked_worst']  # of what the mean of G makes, and of what G makes


class Stop(io.TextIOBase):
    """Knows whether a signal, q, or a pipe that nobody reads asks the run to stop; stands for stdout while it lasts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last one: Slurm's --signal
    signum = asked_at = 0  # the signal that asked, and when

    def __init__(self, stdout):
        self.stdout = stdout

    def ask(self, signum, frame=None):
        """Handle a signal: the first asks, a second one ends the process at once."""
        if self.signum in (0, signal.SIGPIPE):  # a pipe's reader may have got the same Ctrl-C
            self.signum, self.asked_at = signum, time.monotonic()
            self.write('stopping at the next line; once more: at once, without saving\n')
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
    """Where the training stands, the rows of its log, and its folder (README, "The first minutes").

    `folder` is None in all workers of a cluster but the first; `about`: of a state, None where a run begins.
    """

    def __init__(self, s, folder, train_iter, kv, stop, about):
        self.s, self.folder, self.kv, self.stop = s, folder, kv, stop
        self.num_batches = math.ceil(train_iter.num_data / s.batch_size)  # iterations of an epoch
        self.class_names, self.checksum = train_iter.class_names, train_iter.checksum
        about = about or dict(epoch=0, iteration=0, seconds=0, path='')
        self.epoch, self.iteration, self.saved = about['epoch'], about['iteration'], about['path']
        self.start = time.monotonic() - about['seconds']
        self.stopping = False        # whether the loop ends for a stop; in a cluster, whether all loops do
        self.answers = []            # D's, of the iterations since the last line
        self.last_shown = -math.inf  # when the pictures were
        self.columns = ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'images_per_second',
                        *(f'share_{name}' for name in self.class_names), 'digits', 'kl',
                        *MEASURES, *(f'{name}_weights' for name in MEASURES)]
        self.rows, self.log_is_whole = [], False
        lines = []
        with contextlib.suppress(OSError):  # without it the log begins anew
            lines = self.saved.with_name('log.csv').read_text(errors='replace').splitlines() if self.saved else []
        for line in lines:
            cells = line.split(',')
            with contextlib.suppress(ValueError, KeyError):  # the header; a row that was damaged
                row = {name: float(cell) for name, cell in zip(self.columns, cells) if cell}
                row.update(epoch=int(cells[0]), iteration=int(cells[1]))
                stands_before = (row['epoch'], row['iteration']) <= (self.epoch, self.iteration)
                if stands_before and len(cells) == len(self.columns):  # else it was cut short
                    self.rows.append(row)

    def print_line(self):
        """Print a line for the iterations since the last one, and append it to the log."""
        answers = mx.nd.concat(*itertools.chain(*self.answers), dim=0)  # one copy from the device for all of them
        to_fakes, to_reals, after_update = answers.asnumpy().reshape(len(self.answers), 3, -1).swapaxes(0, 1)
        label01, before_update = np.repeat([0., 1.], to_fakes.size), np.append(to_fakes, to_reals)
        mACC, mD = facc(label01, before_update), fentropy(label01, before_update)
        mG = fentropy(np.ones(after_update.size), after_update)
        self.check_finite('the loss', [mG, mD])
        seconds = (time.monotonic() - self.tic) / len(self.answers)  # of an iteration
        speed = self.s.batch_size * self.kv.num_workers / seconds
        left = ((self.s.epochs - self.epoch) * self.num_batches - self.iteration) * seconds
        self.answers, self.tic = [], time.monotonic()
        print(f"epoch: {self.epoch} iter: {self.iteration} metric: ('facc', {mACC:.2f}) ('fentropy', {mG:.2f}) "
              f"('fentropy', {mD:.2f}) {speed:.0f}/s, {datetime.timedelta(seconds=round(left))} left")
        self.add_row(facc=mACC, fentropy_G=mG, fentropy_D=mD, images_per_second=speed)

    def check_finite(self, name, array):
        """Raise ValueError where the numbers of a run are ruined."""
        if not np.isfinite(array).all():
            raise ValueError(f'{name} is not finite at epoch {self.epoch}, iteration {self.iteration} (or shortly '
                             f'before); last good state: {self.saved or "none"}; try a smaller lr')

    def add_row(self, **row):
        """Append a row to the log. It is written anew where a run begins or goes on, and after a failure."""
        row = {'epoch': self.epoch, 'iteration': self.iteration, 'seconds': time.monotonic() - self.start, **row}
        self.rows.append({name: value for name, value in row.items() if value is not None})
        if not self.folder:
            return
        path = self.folder / 'log.csv'
        append = self.log_is_whole and path.exists()
        self.log_is_whole = False  # until the row is there
        lines = self.rows[-1:] if append else [dict(zip(self.columns, self.columns)), *self.rows]
        try:
            with path.open('ab') if append else whole_file(path) as file:
                for row in lines:
                    file.write(','.join(str(row.get(name, '')) for name in self.columns).encode() + b'\n')
            self.log_is_whole = True
        except OSError as error:
            visual.warn_once('log', f'WARNING: {path} cannot be written ({error}); the run goes on')

    def params_path(self, net, epoch):
        """Where an epoch's parameters are, under the published script's names; `net` is G, D, or Gmean."""
        stamp = self.folder.name.replace(f'{self.s.dataset}_', '', 1)
        return self.folder / f'{self.s.dataset}_{net}_{stamp}-{epoch:04d}.params'


@contextlib.contextmanager
def whole_file(path):
    """A file to write. It gets its name when it is whole and on the disk; before, it is `tmp` in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have renamed it
    with path.with_name('tmp').open('wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    path.with_name('tmp').replace(path)


def save(s, run, modules, mean, arrays):
    """Write a state, of which the newest two stay, and at an epoch's end the networks in MXNet's own format.

    What fails is said, and does not end the run: the disk may have room again later.
    """
    if not run.folder or not s.check_point:
        return
    about = dict(epoch=run.epoch, iteration=run.iteration, seconds=time.monotonic() - run.start,
                 num_update=modules[0]._optimizer.num_update, average_count=mean.count, checksum=run.checksum,
                 class_names=run.class_names if s.conditional else [], names=list(arrays),
                 settings=dict(vars(s), workers=run.kv.num_workers),
                 versions=dict(mxnet=mx.__version__, numpy=np.__version__, python=sys.version))
    path = run.folder / f'state-{run.epoch:04d}-{run.iteration:06d}.npz'
    try:
        with whole_file(path) as file:
            np.savez(file, about=json.dumps(about, default=str), **arrays)
        run.saved = path
        if run.iteration == 0:
            for net, mod, end in (('G', modules[0], ''), ('D', modules[1], ''), ('Gmean', mean.mod, '_average')):
                path = run.params_path(net, run.epoch - 1)
                if net != 'Gmean' or s.average:
                    save_params(path, mod, {name: arrays[name + end] for name in mod._param_names + mod._aux_names})
        for old in sorted(run.folder.glob('state-*-*.npz'))[:-2]:
            old.unlink()
    except (OSError, ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes what it cannot read
        print(f'WARNING: {path} is not saved: {data.last_line(error)}; the run goes on')


def save_params(path, mod, arrays):
    """Write a network in MXNet's own format: its symbol, and {name: NumPy array} of parameters and moving averages."""
    with whole_file(path.with_name(path.name[:-len('0000.params')] + 'symbol.json')) as file:
        file.write(mod.symbol.tojson().encode())
    kinds = {**dict.fromkeys(mod._param_names, 'arg'), **dict.fromkeys(mod._aux_names, 'aux')}
    with whole_file(path) as file:
        mx.nd.save(file.name, {f'{kinds[name]}:{name}': mx.nd.array(array) for name, array in arrays.items()})
        mx.nd.load(file.name)  # MXNet does not notice every full disk


def state_arrays(modules, mean):
    """`named_arrays` of both networks and of the mean of G: all that training changes."""
    average = {f'{name}_average': copies for name, copies in named_arrays(mean.mod).items()}
    return {**named_arrays(modules[0]), **named_arrays(modules[1]), **average}


def network_arrays(modules, mean):
    """{name: NumPy array} of the same, from the first device."""
    mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
    return {name: copies[0].asnumpy() for name, copies in state_arrays(modules, mean).items()}


def new_folder(path):
    """Make a new folder of that name, or with a number after it where the folder, or a picture of its name, exists."""
    for number in itertools.count(1):
        folder = path.with_name(f'{path.name}_{number}' if number > 1 else path.name)
        with contextlib.suppress(FileExistsError):
            if not folder.with_name(f'{folder.name}.png').exists():
                folder.mkdir(parents=True)
                return folder


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


def start_path(s):
    """What `resume` names; with 'latest' it is the run in `out` that saved last. Raises ValueError where none did."""
    if s.resume != 'latest':
        return pathlib.Path(s.resume)
    states = list(pathlib.Path(s.out).glob('*/state-*-*.npz'))
    if not states:
        raise ValueError(f"resume = 'latest': no run in {s.out} has a state to go on from")
    return max(states, key=os.path.getmtime).parent


def find_state(path, rename=False):
    """The newest state in a run's folder that can be read, or what is in a file: a state, or an epoch's .params.

    Returns what it remembers of its run, with its `path`, and {name: array}. Raises OSError where the disk does not
    give it, ValueError where there is none. `rename`: a damaged one, so that it does not count among the newest two.
    """
    path = pathlib.Path(path)
    for file in [path] if path.is_file() else sorted(path.glob('state-*-*.npz'), reverse=True):
        content = file.read_bytes()
        try:
            if file.suffix == '.params':
                return read_params(file)
            arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
            about = json.loads(str(arrays.pop('about')))
            for name in ('epoch', 'iteration', 'num_update', 'average_count', 'seconds'):
                about[name] = int(about[name])
            about['settings'].setdefault('lr_steady', 0)  # of a version that had none
            missing = {*SAME_NETWORKS, *SAME_RUN, 'workers'} - about['settings'].keys()
            # after a flipped bit in the archive's directory NumPy finds fewer arrays
            if about['names'] != list(arrays) or missing or 'class_names' not in about:
                raise ValueError('something is missing')
            return dict(about, path=file), arrays
        except Exception as error:  # NumPy, zipfile and MXNet have a dozen kinds for a flipped bit
            print(f'WARNING: {file}: is damaged, or not of this program ({data.last_line(error)})')
            if rename:
                file.replace(f'{file}.damaged')
    raise ValueError(f"resume: {path} has no state to go on from; set 'latest', a run's folder or a file in it")


def read_params(path):
    """What `find_state` returns, of an epoch's .params of G and D, or of the mean of G. Mean and Adam begin anew."""
    dataset, net, stamp, epoch = re.fullmatch('(.*?)_(Gmean|G|D)_(.*)-([0-9]+)', path.stem).groups()
    arrays = {}
    for other in ['Gmean'] if net == 'Gmean' else ['G', 'D']:
        file = path.with_name(f'{dataset}_{other}_{stamp}-{epoch}.params')
        if other == 'D' and not file.exists():
            continue  # samples need none
        for key, array in mx.nd.load(str(file)).items():
            name, array = key.split(':')[-1], array.asnumpy()
            arrays[name] = arrays[f'{name}_average'] = array
            arrays[f'{name}_mean'] = arrays[f'{name}_var'] = np.zeros_like(array)
    symbol = mx.sym.load(str(path.with_name(f'{dataset}_G_{stamp}-symbol.json')))
    class_names = json.loads(symbol.attr_dict().get('rand', {}).get('__classes__', '[]'))
    return dict(path=path, epoch=int(epoch) + 1, iteration=0, num_update=0, average_count=0, seconds=0,
                class_names=class_names), arrays


def restore(s, workers, checksum, modules, mean, about, arrays):
    """Put modules into a state. Raises ValueError where it is of other networks or data; what else differs is said."""
    now = dict(vars(s), workers=workers)
    was = about.get('settings', now)
    for name in SAME_NETWORKS:
        if was[name] != now[name]:
            raise ValueError(f'{about["path"]}: trained with {name} = {was[name]!r}, now it is {now[name]!r}')
    for name in (*SAME_RUN, 'workers'):
        if was[name] != now[name]:
            print(f'WARNING: {name} was {was[name]!r} and is {now[name]!r}: it goes on, but is not the same run')
    if about.get('checksum', checksum) != checksum:
        raise ValueError(f"{about['path']}: trained with other data; to go on with these, resume an epoch's .params")
    for name, copies in state_arrays(modules, mean).items():
        if name not in arrays or arrays[name].shape != copies[0].shape:
            raise ValueError(f'{about["path"]}: of other networks, or for sample only: {name} does not fit')
        for copy in copies:
            copy[:] = arrays[name]
    for mod in modules[:2]:  # for Adam's bias correction
        mod._optimizer.begin_num_update = mod._optimizer.num_update = about['num_update']
    mean.count = about['average_count']
    adam = '' if 'settings' in about else "; Adam's moments and step count begin at zero"
    print(f'going on from {about["path"]}: epoch {about["epoch"]}, iteration {about["iteration"]}{adam}')


# ---------------------------------------------------------------- sampling

def fixed_latents(seed, n, Z):
    """(n, Z) latents, the same for the same seed. They come out of NumPy's stream, so that training does not notice."""
    return np.random.RandomState(seed).normal(size=(n, Z)).astype(np.float32)


def generate(modG, latents, classes=None):
    """Make images of (n, Z) latents and, for a conditional G, (n,) classes from 0 on, by the moving averages.

    Yields a batch of images, (batch, nc, 64, 64) in [-1, 1], and its classes or None; the last one is what is left.
    """
    n, (batch_size, num_inputs) = len(latents), modG.data_shapes[0].shape[:2]
    if classes is not None:
        one_hot = np.eye(num_inputs - latents.shape[1], dtype=np.float32)[classes]
        latents = np.concatenate([latents, one_hot], axis=1)
    for start in range(0, n, batch_size):
        part = slice(start, start + batch_size)
        batch = mx.nd.array(np.resize(latents[part], (batch_size, num_inputs, 1, 1)))
        modG.forward(mx.io.DataBatch([batch], []), is_train=False)
        yield modG.get_outputs()[0].asnumpy()[:n - start], None if classes is None else classes[part]


def make_samples(s):
    """Write a mosaic, single images, and a walk between latent points, under names that are not there yet."""
    data.check_devices(dataclasses.replace(s, ctx=s.ctx[:1]))
    about, arrays = find_state(start_path(s))
    path, class_names = about['path'], about['class_names']
    params = {name[:-len('_average')]: mx.nd.array(arrays[name]) for name in arrays if name.endswith('_average')}
    if not {'g1_weight', 'g5_weight'} <= params.keys():
        raise ValueError(f'{path}: has no G')
    ngf, filters = params['g5_weight'].shape[:2]
    symbol, _ = make_dcgan_sym(ngf, 1, 3 if filters == 3 else 1)
    modG = mx.mod.Module(symbol, data_names=('rand',), label_names=None, context=s.ctx[0])
    modG.bind([('rand', (s.batch_size, params['g1_weight'].shape[0], 1, 1))], for_training=False)
    modG.init_params(None, params, params)
    digits = s.digits.strip()
    names = re.findall('[^, ]+', digits) if re.search('[, ]', digits) else list(digits)
    if names and not class_names:
        misuse(f'digits = {s.digits!r}: that run is not conditional, and its G makes what it likes')
    for name in names:
        if name not in class_names:
            raise ValueError(f'digits = {s.digits!r}: there is no {name!r}, but {", ".join(class_names)}')
    chosen = [class_names.index(name) for name in names or class_names]
    Z = modG.data_shapes[0].shape[1] - len(class_names)
    weights = '-weights' if path.suffix == '.params' and '_Gmean_' not in path.name else ''
    called = f'sample-{about["epoch"] - (about["iteration"] == 0):04d}{weights}'
    try:
        folder = new_folder(path.with_name(called))
    except OSError as error:
        print(f'WARNING: {path.parent} cannot be written ({error.strerror}): the images go to {s.out}')
        folder = new_folder(pathlib.Path(s.out, called))
    classes = np.resize(chosen, s.sample) if chosen else None
    shown, number = [], 0
    for images, _ in generate(modG, fixed_latents(s.seed, s.sample, Z), classes):
        shown = [*shown, *images][:256]
        for image in images:
            visual.save(folder / f'{number:05d}.png', visual.tile(image[None]))
            number += 1
    columns = visual.columns_for(len(chosen)) if chosen else None
    visual.save(f'{folder}.png', visual.tile(np.stack(shown), columns))
    # DCGAN paper, section 6.1; along an arc, for between two Gaussian vectors a straight line passes too near to 0
    rows, steps = 6, 10
    points = fixed_latents(s.seed, rows + 1, Z)
    arc = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None]
    walk = np.concatenate([np.cos(arc) * a + np.sin(arc) * b for a, b in zip(points, points[1:])])
    classes = np.repeat(np.resize(chosen, rows), steps) if chosen else None
    walk = np.concatenate([images for images, _ in generate(modG, walk, classes)])
    walk_path = folder.with_name(folder.name.replace('sample', 'walk') + '.png')
    visual.save(walk_path, visual.tile(walk, steps))
    print(f'{s.sample} images of {path}: {folder}.png, one by one in {folder}/; {walk_path}')


# ---------------------------------------------------------------- several machines

def join(s):
    """MXNet's key-value store: of this process alone, or with `dist_sync` of all that the DMLC_ variables name.

    A scheduler and a server end in here. Raises ValueError for a wrong variable, with which MXNet would wait for ever.
    """
    if s.kvstore != 'dist_sync':
        if data.ROLE:
            raise ValueError(f"DMLC_ROLE={data.ROLE}, but kvstore = {s.kvstore!r}: set 'dist_sync', or unset it")
        return mx.kv.create('local')
    for name, right in (('ROLE', 'worker|server|scheduler'), ('PS_ROOT_URI', '.+'), ('PS_ROOT_PORT', '[0-9]+'),
                        ('NUM_WORKER', '[0-9]+'), ('NUM_SERVER', '[0-9]+')):
        value = os.environ.get(f'DMLC_{name}', '')
        if not re.fullmatch(right, value):
            raise ValueError(f'DMLC_{name}={value!r}: has to be {right} (README)')
    os.environ.pop('PORT', None)  # of a container: each process would take it for its own, and so the scheduler's
    if data.ROLE != 'worker':
        for signum in Stop.SIGNALS:  # launchers send them to all; the workers decide
            signal.signal(signum, signal.SIG_IGN)
        mx.kv.KVStoreServer(mx.kv.create('dist_sync')).run()  # until the workers are done
        sys.exit(0)
    gpus = sum(ctx.device_type == 'gpu' for ctx in s.ctx)
    kv = mx.kv.create('dist_device_sync' if gpus > 1 else 'dist_sync')  # waits here for the other processes
    atexit.register(os._exit, 1)  # after an error, where MXNet's own end would wait for the other workers
    kv.init('number', mx.nd.zeros(1))
    return kv


def total(kv, number):
    """The sum of a number over the workers, known to all. It waits for the network, not for a device."""
    if kv.num_workers == 1:
        return number
    found = mx.nd.zeros(1)
    kv.pushpull('number', mx.nd.array([number]), out=found)
    return int(found.asscalar())


def check_same(kv, *what):
    """Raise ValueError where this is not the same in all workers: their weights would not be, either."""
    mark = zlib.crc32(repr(what).encode()) % 2 ** 16  # the network has float32
    if total(kv, mark) != mark * kv.num_workers:
        raise ValueError('the workers have different settings, data or states: all need the same dcgan.py and out')


# ---------------------------------------------------------------- main

def run_training(s, stop, stack):
    """Train; the settings are checked, and errors are exceptions. What is to be closed at the end goes to `stack`."""
    kv = join(s)
    data.check_devices(s)
    if kv.rank:  # the first worker prints, shows and saves
        stack.enter_context(contextlib.redirect_stdout(None))
    folder = about = arrays = None
    try:
        if s.resume:
            start = start_path(s)
            if start.is_dir() and not kv.rank:
                folder = start
                lock(folder, stack)
            about, arrays = find_state(start, rename=bool(folder))
    except (ValueError, OSError):
        check_same(kv, 'no state')  # the other workers wait at their next one
        raise
    print('settings:', *(f'{name}={value!r}' for name, value in vars(s).items()))
    print(f'device: {", ".join(map(str, s.ctx))}; {os.environ["OMP_NUM_THREADS"]} CPU threads')
    s.dataset, train_iter, labelled = data.load_data(s, kv.rank, kv.num_workers)
    check_same(kv, [vars(s)[name] for name in [*SAME_NETWORKS, *SAME_RUN, 'epochs']], train_iter.checksum,
               about and [about[name] for name in ('epoch', 'iteration', 'num_update')])
    rand_iter = data.RandIter(s.batch_size, s.Z, s.ctx[0], train_iter.classes if s.conditional else None)
    modules = make_modules(s, train_iter.provide_data, rand_iter.provide_data,
                           kv if s.kvstore == 'dist_sync' else s.kvstore, train_iter.class_names)
    mean = MeanG(s, modules[0])
    if about:
        restore(s, kv.num_workers, train_iter.checksum, modules, mean, about, arrays)
        if about['epoch'] >= s.epochs and not start.is_dir():
            raise ValueError(f'epochs = {s.epochs}: {about["epoch"]} are done in {about["path"]}; set more')
    coverage = data.Coverage(*labelled) if s.coverage and labelled and not kv.rank else None
    if not folder and not kv.rank:
        folder = new_folder(pathlib.Path(s.out, f'{s.dataset}_{time.strftime("%Y_%m_%d-%H_%M")}'))
        lock(folder, stack)
    run = Run(s, folder, train_iter, kv, stop, about)
    for title, mod in zip('GD', modules):
        print_network(s, title, mod, folder)
    print(f'data: {s.dataset}, {run.num_batches} iterations an epoch; run: {folder}')
    if coverage and coverage.floor:
        print(f'FD: the Fréchet distance from real images; other real ones have {coverage.floor:.2f}')
    print('metric: facc, fentropy of G, of D; then images/s, and the time left')
    for signum in Stop.SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
            stack.callback(signal.signal, signum, signal.signal(signum, stop.ask))
    if about and not run.iteration:  # a killed run may not have come to this
        save(s, run, modules, mean, network_arrays(modules, mean))
        finish_epoch(s, run, modules[0], mean, coverage)
    train_loop(s, modules, mean, train_iter, rand_iter, run, coverage)
    end = f'stopped in epoch {run.epoch} after iteration {run.iteration}' if run.stopping else 'done'
    how = "to go on: resume = 'latest'; images: resume = 'latest', sample = 64" if run.saved else 'nothing was saved'
    print(f'{end}: everything is in {folder}/; {how}')
    if s.kvstore == 'dist_sync':  # MXNet aborts where it is left to Python's own end
        kv._barrier()  # the first worker may still be counting digits, or saving
        mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
        kv.handle = mx.base.KVStoreHandle()
        atexit.unregister(os._exit)
    if stop.signum or run.stopping:
        sys.exit(128 + (stop.signum or signal.SIGTERM))


def train(settings):
    """Train as the settings say; with `sample`, make images instead.

    Raises SystemExit: with one line that says what is wrong and what to do; with 2, for what makes no sense; or with
    128 and the number of the signal that ended it: 130 (Ctrl-C), 143 (SIGTERM), 141 (a pipe that nobody reads), ...
    """
    s = dataclasses.replace(settings)
    for name in ('out', 'mnist_path', 'imgnet_path', 'resume'):
        if isinstance(getattr(s, name), (str, os.PathLike)):
            setattr(s, name, os.path.expanduser(getattr(s, name)))
    s.ctx = tuple(s.ctx) if isinstance(s.ctx, (list, tuple)) else (s.ctx,)
    stop = Stop(sys.stdout or io.StringIO())
    try:
        with contextlib.closing(visual), contextlib.redirect_stdout(stop), contextlib.ExitStack() as stack:
            check(s)
            if s.sample:
                make_samples(s)
            else:
                run_training(s, stop, stack)
    except (ValueError, OSError, mx.MXNetError) as error:
        sys.exit(f'dcgan.py: {data.last_line(error)}')
    except KeyboardInterrupt:  # before the loop and while samples are made; in the loop `Stop` takes it
        sys.exit(130)


def main():
    """What `python dcgan.py` does."""
    if sys.argv[1:]:
        misuse(f'{sys.argv[1]}: it takes no arguments; edit Settings in dcgan.py')
    status = 0
    try:
        train(Settings())
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr, flush=True)
        status = 1
    if data.GPU_BUILD:  # MXNet's own end may crash
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == '__main__':
    main()

"""A DCGAN that learns to draw digits, in MXNet's Module API: one file, to be read from top to bottom.

Edit `Settings`, run `python dcgan.py`, and watch: `gout` is what the generator G makes, `diff` the gradient that
teaches it, `data` the real images. One training step is `train_step`, numbered 1 to 8.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), the game and its loss; Radford et al. 2015,
"Unsupervised Representation Learning with Deep Convolutional GANs" (arXiv 1511.06434), the networks.
"""
import atexit
import contextlib
import csv
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for `python -I`, and `-m package.dcgan`
import data  # before MXNet, which it prepares

if not hasattr(data, 'RandIter'):
    sys.exit(f'dcgan.py: needs the data.py beside it, and found {data.__file__}: rename that, or move dcgan.py')
import mxnet as mx
import numpy as np

import visual

# ---------------------------------------------------------------- settings: edit these
# "published": as in the article's script, which this one follows (README)


@dataclasses.dataclass
class Settings:
    # data
    dataset: str = 'mnist'         # 'mnist', 'digits' (8x8, comes with scikit-learn) or 'imagenet' (your own pictures)
    mnist_path: str = ''           # folder with files in MNIST's format; '': MNIST from OpenML, fetched once
    imgnet_path: str = 'photos'    # folder of pictures, or a .rec that holds some
    augment: bool = True           # pictures: a random crop, at random mirrored; False: the square in the middle
    # networks
    ndf: int = 64                  # filters in D's first layer; doubled three times
    ngf: int = 64                  # filters in G's last but one layer
    nc: int = 3                    # channels: 3 or 1
    Z: int = 100                   # size of the latent vector
    d1_bias: bool = True           # a bias in D's first layer (why: make_dcgan_sym); published: False
    conditional: bool = False      # tell G which digit to make, and D which it sees
    # optimisation
    batch_size: int = 64           # real images in a step, and as many fakes
    lr: float = 0.0002             # Adam's learning rate after the head start
    head_start: int = 500          # so many iterations at first have lr 0.001, or lr if larger; published: 0
    lr_steady: int = 5000          # iterations at constant lr; after these G's lr halves every lr_steady / 4
                                   # (not for pictures; 0, published: never)
    beta1: float = 0.5             # Adam's; DCGAN paper, section 4
    pos_label: float = 0.9         # D's target for real images (one-sided label smoothing); published: 1.0
    average: float = 0.99          # decay of an average of G's weights, applied at every printed line
    epochs: int = 12               # passes over the training images; by then G's lr has fallen 32-fold; published: 100
    seed: int = 1234               # same seed, same run; on the CPU to the last bit
    ctx: object = data.default_ctx()  # or mx.cpu(), mx.gpu(1); several GPUs: (mx.gpu(0), mx.gpu(1))
    kvstore: str = 'device'        # several GPUs: 'device' or 'local'; several machines: 'dist_sync' (README)
    # output
    out: str = 'out'               # folder for the runs; each has a folder of its own in it
    check_point: bool = True       # save after every epoch, and when stopped
    resume: str = ''               # 'latest' or a run's folder: resume it; an epoch's .params: a new run from there
    sample: int = 0                # with resume: make that many images and stop
    digits: str = ''               # with sample and conditional: which; '7', '0123' or '3, 12'; '': all
    coverage: bool = True          # after every epoch, count the digits among generated images (not for pictures)
    display: bool = True           # windows if there is a screen; pictures in the run's folder in any case
    monitor: int = 0               # print the networks' inner statistics every n batches
    plot: bool = False             # draw the networks as pictures, if graphviz's `dot` is installed


# ---------------------------------------------------------------- checking them

def checked(settings):
    """A copy with Python's own numbers, `~` expanded and `ctx` a tuple. Raises ValueError if a setting cannot work."""
    s = dataclasses.replace(settings)

    def must(right, name, rule):
        if not right:
            raise ValueError(f'{name} = {getattr(s, name)!r}: must be {rule}')

    kinds = {str: 'text in quotes', bool: 'True or False', int: 'a whole number', float: 'a number'}
    for field in dataclasses.fields(s):
        name, kind, value = field.name, field.type, getattr(s, field.name)
        value = value.item() if isinstance(value, np.generic) else value
        value = os.path.expanduser(value) if isinstance(value, (str, os.PathLike)) else value
        setattr(s, name, value)
        must(kind in (object, type(value)) or (kind is float and type(value) is int), name, kinds.get(kind))
        must(kind is not str or value[:1] != '~', name, 'a full path: this user has no home')
    s.ctx = tuple(s.ctx) if isinstance(s.ctx, (list, tuple)) else (s.ctx,)
    for name in ('ndf', 'ngf', 'Z', 'batch_size', 'epochs'):
        must(1 <= getattr(s, name) < 10_000, name, '1 or more, and less than 10000')
    for name in ('seed', 'head_start', 'lr_steady', 'sample', 'monitor'):
        must(0 <= getattr(s, name) < 1e9, name, '0 or more')
    for name in ('beta1', 'average'):
        must(0 <= getattr(s, name) < 1, name, '0 or more, and below 1')
    must(0 < s.lr < math.inf, 'lr', 'more than 0')
    must(0 < s.pos_label <= 1, 'pos_label', 'more than 0, and at most 1')
    must(s.dataset in ('mnist', 'digits', 'imagenet'), 'dataset', "'mnist', 'digits' or 'imagenet'")
    must(s.nc in (1, 3), 'nc', '1 or 3')
    must(s.kvstore in ('device', 'local', 'dist_sync'), 'kvstore', "'device', 'local' or 'dist_sync'")
    must(s.ctx and all(isinstance(ctx, mx.Context) for ctx in s.ctx), 'ctx', 'mx.cpu(), mx.gpu(0) or several of them')
    must(s.batch_size % len(s.ctx) == 0, 'batch_size', f'a multiple of the {len(s.ctx)} devices')
    must(s.out, 'out', "the name of a folder, such as 'out'")
    must(s.resume or not s.sample, 'sample', "0, or resume 'latest', a run's folder or an epoch's .params")
    must(s.conditional or not s.digits, 'digits', "'' unless conditional = True")
    return s


# ---------------------------------------------------------------- the symbols

def make_dcgan_sym(ngf, ndf, nc, no_bias=True, fix_gamma=True, eps=1e-5 + 1e-12, d1_bias=False, classes=0):
    """Generator and discriminator for 64x64 images; `classes` is 0, or how many a conditional pair has.

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
    if nc == 1:  # oneDNN has no gradient of a deconvolution with one filter: make two, keep the first
        x = mx.sym.slice_axis(x, axis=1, begin=0, end=1)
    gout = mx.sym.Activation(x, act_type='tanh', name='gact5')

    x = mx.sym.Variable('data')                                                          # nc       x 64 x 64
    # Without a bias here D cannot see a batch's contrast: d1 and d2 scale with it, and dbn2 divides by that scale.
    x = down(x, num_filter=ndf, name='d1', no_bias=no_bias and not d1_bias)
    x = leaky(x, name='dact1')                                                           # ndf      x 32 x 32
    x = leaky(norm(down(x, num_filter=ndf * 2, name='d2'), name='dbn2'), name='dact2')   # ndf * 2  x 16 x 16
    x = leaky(norm(down(x, num_filter=ndf * 4, name='d3'), name='dbn3'), name='dact3')   # ndf * 4  x  8 x  8
    x = leaky(norm(down(x, num_filter=ndf * 8, name='d4'), name='dbn4'), name='dact4')   # ndf * 8  x  4 x  4
    x = mx.sym.Flatten(conv(x, num_filter=max(classes, 1), name='d5'))                   # a logit, or one per class
    if classes:
        x = mx.sym.pick(x, mx.sym.Variable('digit'), keepdims=True)                      # that of the image's class
    dloss = mx.sym.LogisticRegressionOutput(x, mx.sym.Variable('label'), name='dloss')
    return gout, dloss


def facc(label, pred):
    """Share of images that D judges rightly; label (batch,) 0 or 1, pred (batch, 1) in [0, 1]."""
    return ((pred.ravel() > 0.5) == label.ravel()).mean()


def fentropy(label, pred):
    """Mean binary cross-entropy in nats; arguments as in `facc`."""
    pred, label = pred.ravel(), label.ravel()
    return -(label * np.log(pred + 1e-12) + (1. - label) * np.log(1. - pred + 1e-12)).mean()


# ---------------------------------------------------------------- the modules

def make_modules(s, data_shapes, rand_shapes, kv='device', class_names=()):
    """Make G and D with their optimizers; a second D that shares the weights of the first; and the averaged G.

    The second D computes the gradient of its input alone, so step 7 costs less. The averaged G does not learn.
    """
    classes = len(class_names) if s.conditional else 0
    gout, dloss = make_dcgan_sym(s.ngf, s.ndf, s.nc, d1_bias=s.d1_bias, classes=classes)
    if s.conditional:  # samples will need the names
        gout.get_internals()['rand']._set_attr(__classes__=json.dumps(list(class_names)))
    label_shapes = [('label', (s.batch_size,))]
    make_D = functools.partial(mx.mod.Module, dloss, data_names=[desc[0] for desc in data_shapes],
                               label_names=('label',), context=list(s.ctx))
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=list(s.ctx))
    modG.bind(rand_shapes)
    modD = make_D()
    modD.bind(data_shapes, label_shapes, inputs_need_grad=bool(s.monitor))
    mx.random.seed(s.seed)
    for mod in (modG, modD):
        mod.init_params(mx.init.Normal(0.02))
        mod.init_optimizer(kv, 'adam', {'learning_rate': s.lr, 'beta1': s.beta1, 'wd': 0.})
        for i, weight in enumerate(itertools.chain(*mod._exec_group.param_arrays)):  # each weight on each device
            # make Adam's moments now, so that a run that resumes can fill them; MXNet would do it in the first step
            mod._updater.states[i] = mod._optimizer.create_state(i, weight)
            mod._updater.states_synced[i] = True
    modDx = make_D(fixed_param_names=modD._param_names)
    modDx.bind(data_shapes, label_shapes, inputs_need_grad=True, shared_module=modD)
    averaged_G = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=s.ctx[0])
    averaged_G.bind(rand_shapes, for_training=False)
    averaged_G.init_params(None, *modG.get_params())
    return modG, modD, modDx, averaged_G


def update_average(s, run, modules):
    """Take G's weights into their exponential moving average, which draws better than G itself.

    Yazıcı et al. 2019, "The Unusual Effectiveness of Averaging in GAN Training" (arXiv 1806.04498).
    """
    # at first, when G changes fast, the decay is smaller: 0.1, 0.18, ...
    decay = min(s.average, (1 + run.average_count) / (10 + run.average_count))
    run.average_count += 1
    arrays = arrays_of(modules)
    with mx.engine.bulk(64):  # as in `train_step`
        for name in arrays:
            if f'{name}_average' in arrays:
                weight, (average,) = arrays[name][0], arrays[f'{name}_average']
                average[:] = weight + decay * (average - weight)


def forward_backward(modD, inputs, label):
    """Run D forward and backward on [images] or [images, classes]. Returns its answers, (batch, 1)."""
    modD.forward(mx.io.DataBatch(inputs, [label]), is_train=True)
    modD.backward()
    return modD.get_outputs()[0].copy()  # the next forward overwrites the original


def train_step(modG, modD, modDx, latents, batch, label0, label1, label_real):
    """Update D once and G once. Everything is only queued; nothing here waits for a device.

    Parameters: the modules; a latent batch and a real one of the same size; (batch,) arrays of 0, 1 and `pos_label`.
    Returns: the fakes, (batch, nc, 64, 64); `diff`, of the same shape; and D's answers (batch, 1) to the fakes and
    to the reals before its update, and to the fakes after it.
    """
    # 1. G makes a batch of fakes from a latent batch.
    modG.forward(latents, is_train=True)
    fakes = modG.get_outputs()[0]
    fakes_for_D = [fakes, *latents.label]  # a conditional D knows which digit each should be
    # 2. The fakes get label 0.
    # 3. D sees them. The gradients are kept, the weights not yet updated.
    answers_to_fakes = forward_backward(modD, fakes_for_D, label0)
    kept = [[grad.copy() for grad in grads] for grads in modD._exec_group.grad_arrays]
    # 4. The real batch gets label 1, or nearly so (Salimans et al. 2016, arXiv 1606.03498, section 3.4); D sees it.
    answers_to_reals = forward_backward(modD, batch.data, label_real)
    # 5. The fakes' gradients are added to the reals', and D is updated once with the sum.
    with mx.engine.bulk(64):  # bulk the small operators: each would otherwise synchronise its CUDA stream
        for real_grads, fake_grads in zip(modD._exec_group.grad_arrays, kept):
            for real_grad, fake_grad in zip(real_grads, fake_grads):  # one per device
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
    return fakes, diff, [answers_to_fakes, answers_to_reals, answers_after_update]


# ---------------------------------------------------------------- the loop

def learning_rates(s, iteration):
    """Adam's learning rates of G and D; iterations count from 0, over all epochs."""
    if iteration < s.head_start:  # with `lr` alone G may show noise for epochs
        return max(s.lr, 0.001), max(s.lr, 0.001)
    if not s.lr_steady or s.dataset == 'imagenet':
        return s.lr, s.lr
    # At a constant lr G collapses sooner or later, so G slows down and D does not:
    # Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500).
    halvings = max(0, 4 * iteration / s.lr_steady - 4)  # one in every lr_steady / 4 iterations, after lr_steady
    return s.lr * 0.5 ** halvings, s.lr


@dataclasses.dataclass
class Run:
    """Where a run stands. `state.npz` holds this, and the arrays of the networks."""

    folder: pathlib.Path = None  # None: nothing is written, as in all workers of a cluster but the first
    epoch: int = 0
    iteration: int = 0           # how many of this epoch's are done
    seconds: float = 0.
    adam_count: int = 0          # Adam's updates so far, for its bias correction
    average_count: int = 0       # updates of the average of G's weights so far
    rows: list = dataclasses.field(default_factory=list)  # of log.csv
    saved_at: float = 0.         # in seconds since 1970
    unsaved: str = ''            # what the last save could not write
    rank: int = 0                # this worker's number in a cluster, of `workers`
    workers: int = 1
    num_batches: int = 0         # iterations of an epoch
    class_names: list = ()
    checksum: int = None         # of the training images and labels


class Stop:
    """Whether the run is asked to stop: by a signal, by q in a window, or because nobody reads what it prints."""

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last one: Slurm's --signal
    pool = ThreadPoolExecutor(1)  # one thread for all runs: MXNet keeps 5 MB for each

    def begin(self, obeys=True):
        """Forget what earlier runs were asked. obeys=False: go on until the launcher ends the process."""
        self.obeys, self.signum, self.heard_at = obeys, 0, math.inf

    def listen(self, work):
        """Call `work` in another thread: Python handles signals in the main one, and not while MXNet computes there."""
        if threading.current_thread() is not threading.main_thread():  # no other can have handlers
            return work()
        with contextlib.ExitStack() as stack:
            for signum in self.signals:
                if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                    stack.callback(signal.signal, signum, signal.signal(signum, self.handle))
            future = self.pool.submit(work)
            while wait([future], 0.1).not_done:  # a signal that the other thread got does not wake this one
                pass
            return future.result()

    def handle(self, signum, frame):
        """Handle a signal: the first one asks to stop, a later one ends the process at once."""
        if time.monotonic() > self.heard_at + 0.5:  # `timeout` sends each signal twice
            os._exit(128 + signum)
        if self.heard_at == math.inf:
            self.signum, self.heard_at = self.signum or signum, time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, b'stopping at the next line; a second signal stops at once, without saving\n')

    def asked(self):
        """Whether to stop now."""
        if visual.quit_pressed():
            self.signum = self.signum or signal.SIGINT
        return self.obeys and self.signum > 0


stop = Stop()


def say(text):
    """Print. If the reader has gone, as with `| head -3`, the run is asked to stop."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        stop.signum = stop.signum or signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes all that is printed later
    except OSError:  # a full disk, which does not end a run
        pass


def train_loop(s, run, modules, train_iter, rand_iter, coverage):
    """Train until `s.epochs` are done or the run is asked to stop."""
    modG, modD, modDx, averaged_G = modules
    labels = [mx.nd.full(s.batch_size, label, s.ctx[0]) for label in (0, 1, s.pos_label)]
    # prints the root mean square of each layer's output and of D's input gradient; with 0 it watches no module
    monitor = mx.mon.Monitor(max(s.monitor, 1), pattern='(?!.*backward).*output|d1_backward_output0', sort=True)
    if s.monitor:
        for mod in modules[:3]:
            mod.install_monitor(monitor)
    started, last_shown = time.monotonic() - run.seconds, -math.inf
    while run.epoch < s.epochs:
        mx.random.seed(s.seed + 1 + run.epoch + 1_000_003 * run.rank)  # each worker has latents of its own
        train_iter.begin_epoch(run.epoch, run.iteration)
        for _ in range(run.iteration):  # skip the latents that a resumed run has used
            rand_iter.next()
        answers, line_time = [], time.monotonic()
        while run.iteration < run.num_batches:
            for mod, lr in zip((modG, modD), learning_rates(s, run.epoch * run.num_batches + run.iteration)):
                mod._optimizer.set_learning_rate(lr)
            batch, latents = train_iter.next(), rand_iter.next()
            monitor.tic()
            fakes, diff, new_answers = train_step(modG, modD, modDx, latents, batch, *labels)
            for line in monitor.toc():
                say('Batch: {:7d} {:30s} {:s}'.format(*line))
            answers += new_answers
            run.iteration += 1
            if run.iteration % 10 and run.iteration < run.num_batches:
                continue
            # All else happens at a printed line; up to here nothing has waited for the device.
            answered = mx.nd.concat(*answers, dim=0).asnumpy().reshape(-1, 3, s.batch_size)  # one copy for all
            now = time.monotonic()
            run.seconds = now - started
            print_line(s, run, answered, now - line_time)
            answers, line_time = [], now
            update_average(s, run, modules)
            if run.epoch == 0 and run.iteration in (50, 100, 200, 400, 800):
                save_mosaic(s, run, averaged_G, f'gout-0000-{run.iteration:05d}')
            if now > last_shown + 1 or run.iteration == run.num_batches:  # at most once a second
                show_pictures(s, run, fakes, diff, batch, latents)
                last_shown = now
            if stop.asked():
                return save(s, run, modules, run.epoch)
        finish_epoch(s, run, modules, coverage)


def print_line(s, run, answered, seconds):
    """Print and log D's answers of the iterations since the last line, (n, 3, batch), as `train_step` returns them."""
    to_fakes, to_reals, after_update = answered.swapaxes(0, 1)
    label = np.repeat([0., 1.], to_fakes.size)
    before_update = np.append(to_fakes, to_reals)
    accuracy = facc(label, before_update)
    loss_G = fentropy(np.ones(after_update.size), after_update)
    loss_D = fentropy(label, before_update)
    if not np.isfinite(loss_G + loss_D):
        raise ValueError(f'the loss is not finite at epoch {run.epoch}, iteration {run.iteration}; set a smaller lr')
    seconds /= len(answered)  # per iteration
    speed = s.batch_size * run.workers / seconds
    left = ((s.epochs - run.epoch) * run.num_batches - run.iteration) * seconds
    say(f"epoch: {run.epoch} iter: {run.iteration} metric: ('facc', {accuracy:.2f}) ('fentropy', {loss_G:.2f}) "
        f"('fentropy', {loss_D:.2f}) {speed:.0f}/s, {datetime.timedelta(seconds=round(left))} left")
    log(run, epoch=run.epoch, iteration=run.iteration, facc=accuracy, fentropy_G=loss_G, fentropy_D=loss_D,
        d_real=float(to_reals.mean()), d_fake=float(to_fakes.mean()), d_fake_after=float(after_update.mean()),
        images_per_second=speed)


def log(run, **row):
    """Append a row to log.csv. The file is for people: the program never reads it."""
    run.rows.append(dict(row, seconds=run.seconds))
    write_log(run, 'a', run.rows[-1:])


def write_log(run, mode, rows):
    """Write rows to log.csv. With mode 'w' it begins anew."""
    columns = ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'd_real', 'd_fake', 'd_fake_after',
               'images_per_second', *(f'share_{name}' for name in run.class_names), 'digits', 'kl', 'confidence', 'fd',
               'median', 'asked', 'asked_worst']
    try:
        with open(run.folder / 'log.csv' if run.folder else os.devnull, mode) as file:
            writer = csv.DictWriter(file, columns, lineterminator='\n')
            if mode == 'w':
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        visual.warn_once('log', f'WARNING: {run.folder}/log.csv cannot be written ({error}); the run goes on')


def show_pictures(s, run, fakes, diff, batch, latents):
    """Show the last step's fakes, their gradient, the real images, and the losses so far."""
    for title, arrays in dict(gout=[fakes, *latents.label], diff=[diff, *latents.label], data=batch.data).items():
        X, *classes = [array.asnumpy() for array in arrays]
        if title == 'diff':
            X = (X - X.mean()) / (X.std() or 1)
        visual.visual(title, X, run.folder, s.display, *classes)
    lines = [row for row in run.rows if 'facc' in row]
    iterations = np.array([row['epoch'] * run.num_batches + row['iteration'] for row in lines])
    curves = {f'entropy of {net}': np.array([row[f'fentropy_{net}'] for row in lines]) for net in 'GD'}
    visual.show_picture('loss', visual.plot(iterations, curves), run.folder, s.display)


def save_mosaic(s, run, averaged_G, title):
    """Write a mosaic of a batch of fixed latents; if conditional, a class has a column."""
    num_classes = len(run.class_names) if s.conditional else 0
    classes = np.resize(np.arange(num_classes), s.batch_size) if s.conditional else None
    images, _ = next(generate(averaged_G, fixed_latents(s.seed, s.batch_size, s.Z), classes))
    visual.visual(title, images, run.folder, False, columns=visual.columns_for(num_classes))


def finish_epoch(s, run, modules, coverage):
    """Save first, so that a run killed later loses nothing. Then draw and judge what the averaged G makes."""
    epoch = run.epoch
    run.epoch, run.iteration = epoch + 1, 0
    save(s, run, modules, epoch)
    save_mosaic(s, run, modules[3], f'gout-{epoch:04d}')
    visual.film(run.folder)
    if coverage:
        judge(s, run, modules[3], coverage, epoch)
        save(s, run, modules, epoch)  # once more, with the count in the log


def judge(s, run, averaged_G, coverage, epoch):
    """Count the digits among what the averaged G makes, and warn if G has collapsed."""
    first = coverage.classifier is None
    if first:
        say('training a classifier of the real images, which judges the generated ones (a minute; then it is kept) ...')
    latents = fixed_latents(s.seed, coverage.num_images, s.Z)
    classes = np.resize(coverage.y, len(latents)) if s.conditional else None  # as frequent as in the real images
    row = coverage.count(generate(averaged_G, latents, classes))
    log(run, **row, epoch=epoch, iteration=run.num_batches)
    if first and row['fd']:
        say(f'FD: the Fréchet distance from real images, smaller is better; other real ones have {coverage.floor:.2f}')
    shares = ' '.join(f'{100 * row[f"share_{name}"]:.0f}' for name in run.class_names)
    say(f'epoch: {epoch} digits: {row["digits"]} of {len(run.class_names)}, shares: {shares} %, {measures(row)}')
    if s.conditional:
        say(f'epoch: {epoch} digits as asked: {100 * row["asked"]:.1f} %, worst: {100 * row["asked_worst"]:.1f} %')
    counts = [count for count in run.rows if 'kl' in count]
    if row['fd']:
        best = min(counts, key=lambda count: count['fd'])
        collapsed = row['fd'] > 5 * best['fd']
    else:
        best = max(counts, key=lambda count: count['confidence'])
        collapsed = row['confidence'] < 0.5 <= best['confidence']
    if collapsed:
        path = find_params(run.folder, epoch=best['epoch'])
        say('WARNING: G has collapsed; begin again with a smaller lr or another seed'
            + (f", or from the best epoch: resume = '{path}'" if path else ''))


def measures(row):
    """A count's figures in words; with few images there is no Fréchet distance."""
    fd = f', FD: {row["fd"]:.2f}' if row['fd'] else ''
    return f'confidence: {row["confidence"]:.2f}, KL: {row["kl"]:.3f}{fd}'


def summary(s, run):
    """How the run ended, what came out, and what can be done with it. Raises OSError if the last save failed."""
    end = f'stopped in epoch {run.epoch} after iteration {run.iteration}' if stop.asked() else 'done'
    counts = [row for row in run.rows if 'kl' in row]
    if counts:
        end += f'; after epoch {counts[-1]["epoch"]} {measures(counts[-1])}'
    end += f'; pictures and log: {run.folder}/'
    if run.unsaved:
        raise OSError(f'{end}; NOT SAVED: {run.unsaved}')
    if not s.check_point:
        return f'{end}; nothing was saved'
    more = "to resume: resume = 'latest'" if stop.asked() else "to train on: resume = 'latest' and more epochs"
    return f"{end}; {more}; samples: resume = 'latest', sample = 64"


# ---------------------------------------------------------------- a run on disk

def arrays_of(modules):
    """{name: [its copy on each device]} of all that training changes: weights, moving averages, Adam's moments."""
    mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
    modG, modD, _, averaged_G = modules
    arrays = {}
    for mod, suffix in (modG, ''), (modD, ''), (averaged_G, '_average'):
        group = mod._exec_group
        for name, copies in zip(mod._param_names + mod._aux_names, group.param_arrays + group.aux_arrays):
            arrays[name + suffix] = copies
    for mod in (modG, modD):
        devices = len(mod._context)
        for i, name in enumerate(mod._param_names):
            moments = [mod._updater.states[i * devices + device] for device in range(devices)]
            arrays[f'{name}_mean'], arrays[f'{name}_var'] = zip(*moments)
    return arrays


def save(s, run, modules, epoch):
    """Save the state, and the networks under an epoch's number, each whole or not at all. What fails is a warning."""
    if not s.check_point:
        return
    modG, modD, _, averaged_G = modules
    arrays = {name: copies[0].asnumpy() for name, copies in arrays_of(modules).items()}  # of the first device
    run.adam_count, run.saved_at, run.unsaved = modG._optimizer.num_update, time.time(), ''
    about = dict(vars(run), settings=vars(s), versions=[mx.__version__, np.__version__, sys.version])
    target = run.folder / 'state.npz'
    try:
        with visual.replacing(target) as path, open(path, 'wb') as file:
            np.savez(file, run=json.dumps(about, default=str), **arrays)
            file.flush()
            os.fsync(file.fileno())
        for net, mod, suffix in ('G', modG, ''), ('D', modD, ''), ('Gmean', averaged_G, '_average'):
            if net == 'Gmean' and not s.average:
                continue  # it is G itself
            # the published script's names
            stamp = run.folder.name.replace(f'{s.dataset}_', '', 1)
            target = run.folder / f'{s.dataset}_{net}_{stamp}-symbol.json'
            with visual.replacing(target) as path:
                mod.symbol.save(path)
            target = run.folder / f'{s.dataset}_{net}_{stamp}-{epoch:04d}.params'
            kinds = {**dict.fromkeys(mod._param_names, 'arg'), **dict.fromkeys(mod._aux_names, 'aux')}
            with visual.replacing(target) as path:
                mx.nd.save(path, {f'{kinds[name]}:{name}': mx.nd.array(arrays[name + suffix]) for name in kinds})
                mx.nd.load(path)  # MXNet does not notice every full disk
    except (OSError, ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes what it cannot read
        run.unsaved = f'{target} ({data.last_line(error)})'
        say(f'WARNING: not saved: {run.unsaved}; the run goes on')


def find_run(s):
    """The folder or the epoch's .params that `resume` names; 'latest': the run in `out` that was saved last."""
    if s.resume != 'latest':
        return pathlib.Path(s.resume)
    saved_at = {}
    for path in pathlib.Path(s.out).glob('*/state.npz'):
        saved_at[path.parent] = os.path.getmtime(path)  # only for a damaged state: copying a file changes its time
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            saved_at[path.parent] = json.loads(str(file['run']))['saved_at']
    if not saved_at:
        raise ValueError(f"resume = 'latest': no run in {s.out} has a state.npz; set a run's folder or .params")
    return max(saved_at, key=saved_at.get)


def find_params(folder, net='G', epoch=None):
    """The .params of a network in a run's folder, of an epoch or the newest; None if there is none."""
    found = {int(path.stem[-4:]): path for path in folder.glob('*.params')
             if re.fullmatch(f'[a-z]+_{net}_.+-[0-9]{{4}}', path.stem)}
    return found.get(max(found, default=None) if epoch is None else epoch)


def read_state(folder):
    """The run in a folder as it was saved, its settings, and {name: array}. Raises ValueError."""
    try:
        with np.load(folder / 'state.npz', allow_pickle=False) as file:
            arrays = dict(file)
        saved = json.loads(str(arrays.pop('run')))
        settings, _ = saved.pop('settings'), saved.pop('versions')
        return Run(**{**saved, 'folder': folder}), settings, arrays
    except Exception as error:  # NumPy, zipfile and json have a dozen kinds for a damaged file
        raise ValueError(f'{folder}/state.npz: {data.last_line(error)}{instead(folder)}') from None


def instead(folder):
    """What to do if a run cannot be resumed."""
    path = find_params(folder)
    if path:
        return f"; to begin a new run with the newest epoch's networks: resume = '{path}'"
    return "; set resume to 'latest', a run's folder or an epoch's .params"


def read_epoch(path):
    """What `read_state` returns, out of an epoch's .params. Adam and the average begin anew."""
    _, class_names, G, moving_G = load_network(path, 'G')
    _, _, D, moving_D = load_network(path, 'D')
    arrays = {name: array.asnumpy() for name, array in {**G, **moving_G, **D, **moving_D}.items()}
    arrays.update({f'{name}_average': arrays[name] for name in [*G, *moving_G]})
    arrays.update({f'{name}_{moment}': 0 * arrays[name] for name in [*G, *D] for moment in ('mean', 'var')})
    settings = dict(ngf=G['g5_weight'].shape[0], ndf=D['d1_weight'].shape[0], nc=D['d1_weight'].shape[1],
                    Z=G['g1_weight'].shape[0] - len(class_names), d1_bias='d1_bias' in D, conditional=bool(class_names))
    return Run(epoch=int(path.stem[-4:]) + 1), settings, arrays


def load_network(path, net):
    """Symbol, class names (of a conditional G), parameters, moving averages: of `net`, in the epoch of `path`."""
    found = re.fullmatch('([a-z]+)_(?:Gmean|G|D)_(.+)-([0-9]{4})', path.stem)
    if not found:
        raise ValueError(f"{path}: not an epoch's .params, such as mnist_G_2026_11_26-13_39-0000.params")
    dataset, stamp, epoch = found.groups()
    try:
        symbol, *arrays = mx.model.load_checkpoint(str(path.with_name(f'{dataset}_{net}_{stamp}')), int(epoch))
    except (ValueError, mx.MXNetError) as error:
        raise ValueError(f'{path}: damaged ({data.last_line(error)}); set an earlier epoch') from None
    return symbol, json.loads(symbol.attr_dict().get('rand', {}).get('__classes__', '[]')), *arrays


def begin_run(s):
    """A new run, or the one that `resume` names, and its {name: array}. Raises ValueError if it cannot be resumed."""
    if not s.resume:
        return Run(), {}
    path = find_run(s)
    is_epoch = path.suffix == '.params'
    run, settings, arrays = read_epoch(path) if is_epoch else read_state(path)
    if is_epoch and run.epoch >= s.epochs:
        raise ValueError(f'epochs = {s.epochs}: {path} has had {run.epoch} already; set more')
    for name in ('ngf', 'ndf', 'nc', 'Z', 'd1_bias', 'conditional'):
        if settings[name] != getattr(s, name):
            raise ValueError(f'{path}: trained with {name} = {settings[name]}, now it is {getattr(s, name)}')
    note = '; Adam and the average of G begin anew' if is_epoch else ''
    say(f'resuming {path}: epoch {run.epoch}, iteration {run.iteration}{note}')
    for name in ('batch_size', 'lr', 'head_start', 'lr_steady', 'beta1', 'pos_label', 'seed', 'augment'):
        if settings.get(name, getattr(s, name)) != getattr(s, name):
            say(f'WARNING: {name} was {settings[name]!r}: the run resumes, but is not the same run')
    return run, arrays


def restore(run, modules, arrays, checksum):
    """Put saved arrays into the networks. Raises ValueError if they are of other images or networks."""
    where, hint = (run.folder, instead(run.folder)) if run.folder else ('resume', '')
    if run.checksum not in (None, checksum):
        raise ValueError(f'{where}: trained with other images{hint}')
    targets = arrays_of(modules)
    shapes = {name: copies[0].shape for name, copies in targets.items()}
    for name in [*shapes, *arrays]:
        if name not in arrays or arrays[name].shape != shapes.get(name):
            raise ValueError(f'{where}: {name} is missing or of other networks{hint}')
    for name, copies in targets.items():
        for copy in copies:
            copy[:] = arrays[name]
    for mod in modules[:2]:
        mod._optimizer.begin_num_update = mod._optimizer.num_update = run.adam_count


def new_folder(path):
    """Make a folder of that name, or with a number after it if there is one of that name."""
    for number in itertools.count(1):
        folder = path.with_name(f'{path.name}_{number}' if number > 1 else path.name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


# ---------------------------------------------------------------- sampling

def fixed_latents(seed, n, Z):
    """(n, Z) latents, the same for the same seed, from a generator of their own: training does not notice."""
    return np.random.RandomState(seed).normal(size=(n, Z)).astype(np.float32)


def generate(modG, latents, classes=None):
    """Make images of (n, Z) latents and, for a conditional G, (n,) classes from 0 on.

    Yields images, (batch, nc, 64, 64) in [-1, 1], and their classes or None; the last batch may be smaller.
    """
    batch_size, num_inputs = modG.data_shapes[0].shape[:2]
    if classes is not None:
        one_hot = np.eye(num_inputs - latents.shape[1], dtype=np.float32)[classes]
        latents = np.concatenate([latents, one_hot], axis=1)
    for start in range(0, len(latents), batch_size):
        part = slice(start, start + batch_size)
        batch = mx.nd.array(np.resize(latents[part], (batch_size, num_inputs, 1, 1)))  # filled up by repeating
        modG.forward(mx.io.DataBatch([batch], []), is_train=False)
        yield modG.get_outputs()[0].asnumpy()[:len(latents[part])], None if classes is None else classes[part]


def choose(digits, class_names):
    """The positions of the classes that `digits` names; all of them if it names none. Raises ValueError."""
    digits = digits.strip()
    wanted = re.findall('[^, ]+' if ',' in digits or ' ' in digits else '.', digits)  # '3, 12' is two, '0123' four
    for name in wanted:
        if name not in class_names:
            raise ValueError(f'digits = {digits!r}: there is no {name!r}; that run has '
                             f'{", ".join(class_names) or "no classes, for it is not conditional"}')
    return [class_names.index(name) for name in wanted or class_names]


def make_samples(s):
    """Write images by a saved G, a mosaic of them, and a walk between latents; never over older ones."""
    data.check_devices(dataclasses.replace(s, ctx=s.ctx[:1]))
    path = found = find_run(s)
    if found.suffix != '.params':
        path = find_params(found, 'Gmean') or find_params(found, 'G')
        if not path:
            raise ValueError(f"{found}: has no epoch's .params; set 'latest', a run's folder or an epoch's .params")
    net = 'Gmean' if '_Gmean_' in path.name else 'G'
    symbol, class_names, *arrays = load_network(path, net)
    num_inputs = arrays[0]['g1_weight'].shape[0]
    G = mx.mod.Module(symbol, data_names=('rand',), label_names=None, context=s.ctx[0])
    G.bind([('rand', (s.batch_size, num_inputs, 1, 1))], for_training=False)
    G.init_params(None, *arrays)
    chosen = choose(s.digits, class_names)
    Z = num_inputs - len(class_names)

    folder = new_folder(path.with_name(f'sample-{path.stem[-4:]}' + ('-weights' if net == 'G' else '')))
    classes = np.resize(chosen, s.sample) if chosen else None
    images = (image for batch, _ in generate(G, fixed_latents(s.seed, s.sample, Z), classes) for image in batch)
    shown = []
    for number, image in enumerate(images):
        visual.save(folder / f'{number:05d}.png', visual.tile(image[None]))
        if number < 256:
            shown.append(image)
    visual.save(f'{folder}.png', visual.tile(np.stack(shown), visual.columns_for(len(chosen))))

    # DCGAN paper, section 6.1; along an arc, because a straight line between two Gaussian vectors passes too near to 0
    rows, steps = 6, 10
    points = fixed_latents(s.seed, rows + 1, Z)
    arc = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None]
    latents = np.concatenate([np.cos(arc) * a + np.sin(arc) * b for a, b in zip(points, points[1:])])
    classes = np.repeat(np.resize(chosen, rows), steps) if chosen else None
    images = np.concatenate([batch for batch, _ in generate(G, latents, classes)])
    walk = folder.with_name(folder.name.replace('sample', 'walk') + '.png')
    visual.save(walk, visual.tile(images, steps))
    say(f'{s.sample} images of {path}: {folder}.png, one by one in {folder}/; {walk}')


# ---------------------------------------------------------------- several machines

def join(s):
    """Make MXNet's key-value store, for a cluster or for this process alone. A scheduler or server does not return.

    Synchronous training gives all workers the same weights, so the first one decides: it prints, judges, saves and
    stops. The launcher then ends the others.
    """
    if s.kvstore != 'dist_sync':
        return mx.kv.create('local')  # its rank is 0, of 1 worker
    for name in ('DMLC_ROLE', 'DMLC_PS_ROOT_URI', 'DMLC_PS_ROOT_PORT', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER'):
        value = os.environ.get(name, '')
        numeric = name.endswith(('PORT', 'WORKER', 'SERVER'))
        if not value or (numeric and not value.isdigit()):  # MXNet would wait for ever
            raise ValueError(f"kvstore = 'dist_sync', and in the environment {name}={value!r}; README says what to set")
    os.environ.pop('PORT', None)  # some containers set it, and MXNet would give this port to every process
    if data.ROLE != 'worker':
        for signum in stop.signals:  # launchers send them to all
            signal.signal(signum, signal.SIG_IGN)
        mx.kv.KVStoreServer(mx.kv.create('dist_sync')).run()  # until the workers are done
        sys.exit(0)
    gpus = sum(ctx.device_type == 'gpu' for ctx in s.ctx)
    kv = mx.kv.create('dist_device_sync' if gpus > 1 else 'dist_sync')  # waits here for the other processes
    # MXNet's shutdown waits for the other workers, so after an error or a stop the process ends before. (A run
    # that is done clears the handle. This reference keeps `kv` alive, for its destructor would wait, too.)
    atexit.register(lambda: os._exit(1) if kv.handle else None)
    return kv


# ---------------------------------------------------------------- main

def run_training(s, stack):
    """Train. What must be undone at the end is put on `stack`."""
    kv = join(s)
    data.check_devices(s)
    stop.begin(obeys=kv.rank == 0)
    if kv.rank:  # further workers say and write nothing
        stack.enter_context(contextlib.redirect_stdout(None))
        s.check_point = False
    say('settings: ' + ' '.join(f'{name}={value!r}' for name, value in vars(s).items()))
    say(f'device: {", ".join(map(str, s.ctx))}; {os.environ["OMP_NUM_THREADS"]} CPU threads')
    run, arrays = begin_run(s)
    os.makedirs(run.folder or s.out, exist_ok=True)
    tempfile.TemporaryFile(dir=run.folder or s.out).close()  # raises OSError now, not at the first picture

    s.dataset, train_iter, labelled = data.load_data(s, kv.rank, kv.num_workers)
    rand_iter = data.RandIter(s.batch_size, s.Z, s.ctx[0], train_iter.classes if s.conditional else None)
    modules = make_modules(s, train_iter.provide_data, rand_iter.provide_data,
                           kv if s.kvstore == 'dist_sync' else s.kvstore, train_iter.class_names)
    coverage = data.Coverage(*labelled) if s.coverage and labelled and kv.rank == 0 else None
    if arrays:
        restore(run, modules, arrays, train_iter.checksum)
    run.rank, run.workers = kv.rank, kv.num_workers
    run.num_batches = math.ceil(train_iter.num_data / s.batch_size)
    run.class_names, run.checksum = train_iter.class_names, train_iter.checksum
    if kv.rank:
        run.folder = None
    elif not run.folder:
        run.folder = new_folder(pathlib.Path(s.out, f'{s.dataset}_{time.strftime("%Y_%m_%d-%H_%M")}'))
    write_log(run, 'w', run.rows)
    for title, mod in zip('GD', modules[:2]):
        print_network(s, run, title, mod)
    say(f'data: {s.dataset}, {run.num_batches} iterations an epoch; run: {run.folder}')
    say('metric: facc, fentropy of G, of D; then images/s, and the time left')

    def work():
        train_loop(s, run, modules, train_iter, rand_iter, coverage)
        say(summary(s, run))
        if s.kvstore == 'dist_sync' and not stop.asked():  # leave the cluster: else MXNet aborts when Python ends
            kv._barrier()  # the first worker may still be counting digits, or saving
            mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
            kv.handle = mx.base.KVStoreHandle()

    stop.listen(work)


def print_network(s, run, title, mod):
    """Print how many parameters a network has; with `plot`, draw it."""
    say(f'{title}: {sum(copies[0].size for copies in mod._exec_group.param_arrays):,} parameters')
    if s.plot and run.folder and shutil.which('dot'):
        shapes = dict(mod.data_shapes + (mod.label_shapes or []))
        drawing = mx.viz.plot_network(mod.symbol, shape=shapes, save_format='png')
        drawing.render(f'{run.folder}/net_{title}', cleanup=True)


def train(settings):
    """Train as the settings say; with `sample`, make images instead.

    Raises SystemExit: with one line that says what is wrong, or with 128 plus the number of the signal that ended it:
    130 (Ctrl-C), 143 (SIGTERM), 141 (a pipe that nobody reads), ... In any thread but the main one, where nobody
    sees SystemExit, it raises RuntimeError instead.
    """
    stop.begin()
    try:
        s = checked(settings)
        with contextlib.closing(visual), contextlib.ExitStack() as stack:  # calls visual.close() at the end
            if s.sample:
                make_samples(s)
            else:
                run_training(s, stack)
        end = 128 + stop.signum if stop.asked() else 0
    except KeyboardInterrupt:  # before the loop, and while samples are made
        end = 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # MXNet raises RuntimeErrors
        end = f'dcgan.py: {data.last_line(error)}'
    if end:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(end)
        sys.exit(end)


def main():
    """What `python dcgan.py` does."""
    if sys.argv[1:]:
        sys.exit('dcgan.py: takes no arguments; edit Settings in dcgan.py')
    sys.stdout.reconfigure(errors='backslashreplace')  # for names of files that this locale cannot print
    status = 0
    try:
        train(Settings())
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # MXNet's shutdown may crash on a GPU or without memory, and wait for other workers in a cluster


if __name__ == '__main__':
    main()

"""A DCGAN that learns to draw digits: MXNet's Module API, one file to read from top to bottom.

Edit `Settings` below, run `python dcgan.py`, and watch: `gout` is what the generator G makes, `diff` the gradient
that teaches it, `data` the real images. One training step is `train_step`, numbered 1 to 8; a reader who stops after
`train_loop` has understood the program.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), the game and its loss; Radford et al. 2015,
"Unsupervised Representation Learning with Deep Convolutional GANs" (arXiv 1511.06434), the networks.
"""
import contextlib
import ctypes
import dataclasses
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
import threading
import time
import traceback
import zlib

import data  # before MXNet, which it prepares

import mxnet as mx
import numpy as np

import visual

# ---------------------------------------------------------------- settings: edit these


def allow_lists(cls):
    """Let a dataclass have a list as its `ctx`: `ctx: object = [mx.gpu(0), mx.gpu(1)]`."""
    if isinstance(cls.ctx, list):
        cls.ctx = dataclasses.field(default_factory=cls.ctx.copy)
    return cls


@dataclasses.dataclass
@allow_lists
class Settings:
    # data
    dataset: str = 'mnist'         # 'mnist', 'digits' (8x8, comes with scikit-learn) or 'imagenet' (your own .rec)
    mnist_path: str = ''           # folder with MNIST's four IDX files; '': OpenML, fetched once
    imgnet_path: str = 'train.rec' # what im2rec.py made of a folder of photos
    fallback: str = 'digits'       # where MNIST cannot be fetched: 'digits', or '' to stop with an error
    # networks
    ndf: int = 64                  # filters in D's first layer; doubled three times
    ngf: int = 64                  # filters in G's last but one layer
    nc: int = 1                    # channels: 1 for grey data, 3 for imagenet; grey data can also have 3
    Z: int = 100                   # size of the latent vector
    conditional: bool = False      # tell G which digit to make, and D which it sees
    # optimisation
    batch_size: int = 64           # real images in a step, and as many fakes
    lr: float = 0                  # Adam's; 0: 0.04 / width, at most 0.001 (README, "Healthy or not"); article: 0.0002
    beta1: float = 0.5             # Adam's; DCGAN paper, section 4
    epochs: int = 100              # passes over the training images
    seed: int = 1234               # same seed, same run; on the CPU to the last bit
    ctx: object = data.default_ctx()  # or mx.cpu(), mx.gpu(1), [mx.gpu(0), mx.gpu(1)]
    kvstore: str = 'device'        # several GPUs: 'device' or 'local'; several machines: 'dist_sync' (README)
    # output
    out: str = 'out'               # folder for the runs; each has a folder of its own in it
    check_point: bool = True       # save after every epoch, and when stopped
    resume: str = ''               # go on: 'latest' or a run's folder; begin a new run: a state-....npz
    sample: int = 0                # with resume: make that many images and stop
    digits: str = '0123456789'     # with conditional: the digits that sample makes
    coverage: bool = True          # after every epoch, count the digits among 1,000 images (not for imagenet)
    display: bool = True           # windows where there is a screen; pictures in the run's folder in any case
    monitor: int = 0               # print the networks' inner statistics every n batches
    plot: bool = False             # draw the networks as pictures, where graphviz's `dot` is installed


# settings that have to be the same where a run goes on from a state, and in all workers of a cluster
SAME_NETWORKS = ['dataset', 'ngf', 'ndf', 'nc', 'Z', 'conditional']  # else the weights do not fit
SAME_RUN = ['batch_size', 'lr', 'beta1', 'seed']                     # else it goes on as another run


# ---------------------------------------------------------------- checking them

def check(s):
    """Raise ValueError for settings that cannot work, before any long work: one line each."""
    kinds = {str: 'text in quotes', bool: 'True or False', int: 'a whole number', float: 'a number'}
    for field in dataclasses.fields(s):
        kind, value = field.type, getattr(s, field.name)
        if kind in kinds and type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f'{field.name} = {value!r}: must be {kinds[kind]}')
    photos = s.dataset == 'imagenet'
    for name, right, rule in (
            ('ctx', s.ctx and all(isinstance(ctx, mx.Context) for ctx in s.ctx),
             'mx.cpu(), mx.gpu(0), or a list such as [mx.gpu(0), mx.gpu(1)]'),
            *((name, 1 <= vars(s)[name] < 1e9, '1 or more') for name in ('ndf', 'ngf', 'Z', 'batch_size', 'epochs')),
            *((name, 0 <= vars(s)[name] < 1e9, '0 or more') for name in ('seed', 'sample', 'monitor')),
            ('lr', 0 <= s.lr < math.inf, '0 or more'),
            ('beta1', 0 <= s.beta1 < 1, '0 or more, and below 1'),
            ('dataset', s.dataset in ('mnist', 'digits', 'imagenet'), "'mnist', 'digits' or 'imagenet'"),
            ('fallback', s.fallback in ('digits', ''), "'digits' or ''"),
            ('nc', s.nc == 3 or s.nc == 1 and not photos, '1 or 3; for photos set nc = 3'),
            ('conditional', not (s.conditional and photos), 'False for photos, which have no digits'),
            ('batch_size', s.ctx and s.batch_size % len(s.ctx) == 0, f'a multiple of the {len(s.ctx)} devices'),
            ('kvstore', s.kvstore in ('device', 'local', 'dist_sync'), "'device', 'local' or 'dist_sync'"),
            ('out', s.out, "the name of a folder, such as 'out'"),
            ('resume', s.sample or not s.resume.endswith('.params'), "a run or a state; .params are for sample only"),
            ('sample', s.sample <= 100_000, 'at most 100000 at a time; another seed makes others'),
            ('sample', s.resume or not s.sample, "0, or resume 'latest', a run's folder or a file in it"),
            ('digits', s.digits.isdigit() and s.digits.isascii(), 'digits, such as 0123456789')):
        if not right:
            raise ValueError(f'{name} = {vars(s)[name]!r}: must be {rule}')


# ---------------------------------------------------------------- the symbols

def make_dcgan_sym(ngf, ndf, nc, no_bias=True, fix_gamma=True, eps=1e-5 + 1e-12):
    """Generator and discriminator for 64x64 images.

    Parameters: `ngf`, `ndf`, filters of the layer next to the image; `nc`, channels; the others go to the layers.
    Returns: `gout`, (batch, nc, 64, 64) in [-1, 1] out of `rand` (batch, Z, 1, 1); `dloss`, (batch, 1), D's
    probability that an image is real, out of `data` (batch, nc, 64, 64) and `label` (batch,).
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
    x = leaky(down(x, num_filter=ndf, name='d1'), name='dact1')                          # ndf      x 32 x 32
    x = leaky(norm(down(x, num_filter=ndf * 2, name='d2'), name='dbn2'), name='dact2')   # ndf * 2  x 16 x 16
    x = leaky(norm(down(x, num_filter=ndf * 4, name='d3'), name='dbn3'), name='dact3')   # ndf * 4  x  8 x  8
    x = leaky(norm(down(x, num_filter=ndf * 8, name='d4'), name='dbn4'), name='dact4')   # ndf * 8  x  4 x  4
    x = mx.sym.Flatten(conv(x, num_filter=1, name='d5'))                                 # 1
    dloss = mx.sym.LogisticRegressionOutput(x, mx.sym.Variable('label'), name='dloss')
    return gout, dloss


def print_network(s, title, mod, folder):
    """Print a line a layer: its output's shape, and how many parameters it has, with those of its BatchNorm."""
    inputs = dict(mod.data_shapes + (mod.label_shapes or []))
    internals = mod.symbol.get_internals()
    shapes = dict(zip(internals.list_outputs(), internals.infer_shape(**inputs)[1]))
    sizes = {name: math.prod(shapes[name]) for name in mod._param_names}
    print(f'{title}: {sum(sizes.values()):,} parameters')
    net = title.lower()
    for i in range(1, 6):
        size = sum(size for name, size in sizes.items() if name.startswith((f'{net}{i}_', f'{net}bn{i}_')))
        print(f'  {net}{i} {str(shapes[f"{net}{i}_output"]):20}{size:12,}')
    if s.plot and folder and shutil.which('dot'):
        mx.viz.plot_network(mod.symbol, shape=inputs, save_format='png').render(f'{folder}/net_{title}', cleanup=True)


# ---------------------------------------------------------------- the metrics

def facc(label, pred):
    """Share of images that D takes for what they are; label (batch,) 0 or 1, pred (batch, 1) in [0, 1]."""
    return ((pred.ravel() > 0.5) == label.ravel()).mean()


def fentropy(label, pred):
    """Mean binary cross-entropy in nats; arguments as in `facc`."""
    pred, label = pred.ravel(), label.ravel()
    return -(label * np.log(pred + 1e-12) + (1. - label) * np.log(1. - pred + 1e-12)).mean()


# ---------------------------------------------------------------- the modules

def learning_rate(s):
    """Adam's: `lr`, or where it is 0 by the rule that tests/study.py found."""
    return s.lr or min(0.001, 0.04 / max(s.ngf, s.ndf))


def make_modules(s, data_shapes, rand_shapes, kv=None):
    """G, D, and D's twin, which finds input gradients only, a tenth less work in step 7; with their optimisers.

    The twin shares D's parameters, moving averages and activations.
    """
    gout, dloss = make_dcgan_sym(s.ngf, s.ndf, s.nc)
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=s.ctx)
    modG.bind(rand_shapes)
    modD = mx.mod.Module(dloss, label_names=('label',), context=s.ctx)
    modD.bind(data_shapes, [('label', (s.batch_size,))], inputs_need_grad=bool(s.monitor))
    mx.random.seed(s.seed)
    for mod in (modG, modD):
        mod.init_params(mx.init.Normal(0.02))
        mod.init_optimizer(kv or s.kvstore, 'adam', {'learning_rate': learning_rate(s), 'beta1': s.beta1, 'wd': 0.})
        # MXNet makes Adam's moments at the first update; a run that is resumed needs them before
        for i, weight in enumerate(itertools.chain(*mod._exec_group.param_arrays)):
            mod._updater.states[i] = mod._optimizer.create_state(i, weight)
            mod._updater.states_synced[i] = True
    modDx = mx.mod.Module(dloss, label_names=('label',), context=s.ctx, fixed_param_names=modD._param_names)
    modDx.bind(data_shapes, modD.label_shapes, inputs_need_grad=True, shared_module=modD)
    return modG, modD, modDx


# ---------------------------------------------------------------- one step

def forward_backward(modD, images, label):
    """D sees images with a label: forward, backward. Returns its answers, (batch, 1)."""
    modD.forward(mx.io.DataBatch([images], [label]), is_train=True)
    modD.backward()
    return modD.get_outputs()[0].copy()  # the next forward overwrites the original


def train_step(modG, modD, modDx, rbatch, batch, label0, label1):
    """One update of D and one of G; only queued, nothing here waits for a device.

    Parameters: the modules, a latent batch, a real batch, and the labels 0 and 1, (batch,) each.
    Returns: the fakes, (batch, nc, 64, 64); `diff`, of the same shape; and D's answers (batch, 1) to the fakes and
    to the reals before its update, and to the fakes after it.
    """
    # 1. G makes a batch of fakes from a latent batch.
    modG.forward(rbatch, is_train=True)
    fakes = modG.get_outputs()[0].copy()  # the next forward may be for a mosaic
    shown = fakes  # to D
    if rbatch.label:  # a conditional D sees, too, which digit each of the fakes should be
        shown = mx.nd.concat(fakes, data.one_hot_maps(rbatch.label[0], fakes.shape[2]), dim=1)
    # 2. The fakes get label 0.  3. D sees them; the gradients are kept, the weights not yet updated.
    answers_to_fakes = forward_backward(modD, shown, label0)
    kept = [[grad.copy() for grad in grads] for grads in modD._exec_group.grad_arrays]
    # 4. The real batch gets label 1; D sees it.
    answers_to_reals = forward_backward(modD, batch.data[0], label1)
    # 5. The fakes' gradients are added to the reals', and D is updated once with the sum.
    with mx.engine.bulk(64):  # on a GPU each operator waits for its stream; so they wait together
        for real_grads, fake_grads in zip(modD._exec_group.grad_arrays, kept):
            for real_grad, fake_grad in zip(real_grads, fake_grads):  # one a device
                real_grad += fake_grad
        modD.update()
    # 6. Now the fakes get label 1: what G wants D to say.  7. The updated D sees them again, down to its input.
    answers_after_update = forward_backward(modDx, shown, label1)
    diff = modDx.get_input_grads()[0]
    if rbatch.label:  # without the digits' maps
        diff = diff.slice_axis(axis=1, begin=0, end=fakes.shape[1])
    # 8. That gradient, `diff`, goes backward through G, and G is updated.
    modG.backward([diff])
    with mx.engine.bulk(64):
        modG.update()
    return fakes, diff, (answers_to_fakes, answers_to_reals, answers_after_update)


# ---------------------------------------------------------------- the loop

def train_loop(s, modules, train_iter, rand_iter, run, coverage, stop):
    """Train until `s.epochs` are done, or until a process of the run is asked to stop.

    Parameters: the settings; what `make_modules` returns; the iterators over real and over latent batches; `Run`, which
    knows where to begin; `data.Coverage` or None; `Stop`.
    Raises ValueError where a loss or a parameter is not finite.
    """
    label0, label1 = mx.nd.zeros(s.batch_size, s.ctx[0]), mx.nd.ones(s.batch_size, s.ctx[0])
    # of each layer's output and of `diff`: the root mean square
    monitor = mx.mon.Monitor(s.monitor or math.inf, pattern='(?!.*backward).*output|d1_backward_output0', sort=True)
    for mod in modules if s.monitor else ():
        mod.install_monitor(monitor)
    while run.epoch < s.epochs and not stop.agreed:
        for batch, rbatch in epoch_batches(s, run, train_iter, rand_iter, stop):
            monitor.tic()
            fakes, diff, answers = train_step(*modules, rbatch, batch, label0, label1)
            for line in monitor.toc():
                print('Batch: {:7d} {:30s} {:s}'.format(*line))
            run.add(answers, pictures=(fakes, diff, batch, rbatch))
            if run.iteration % 10 == 0:
                run.print_line()
                if run.folder and time.monotonic() > run.last_shown + 1:  # nobody looks at more than one a second
                    show_pictures(s, run)
            if run.folder and run.epoch == 0 and run.iteration in (50, 100, 200, 400, 800):  # for the film
                save_mosaic(s, run, modules[0], f'gout-0000-{run.iteration:05d}')
        if not stop.agreed:
            run.print_line()  # of the last iterations, fewer than ten
            if run.folder:
                finish_epoch(s, run, modules, coverage)
            run.epoch, run.iteration, run.num_batches = run.epoch + 1, 0, run.iteration
        run.save_state(modules)
        run.start_clock()  # pictures, counting and saving are no part of the speed


def epoch_batches(s, run, train_iter, rand_iter, stop):
    """Yield the real and the latent batches of an epoch, from where the run stands in it, until each worker has seen
    its share of the images, or one is asked to stop."""
    mx.random.seed(s.seed + 1 + run.epoch + 1_000_003 * run.cluster.rank)  # each worker has latents of its own
    train_iter.reset()
    for _ in range(run.iteration):
        rand_iter.next()
        train_iter.iter_next()  # goes on without making the batch
    done = False
    while True:
        batch = next(train_iter, None)
        done = done or batch is None
        num_done, num_stopping = run.cluster.vote(done, stop.asked())
        stop.agreed = num_stopping > 0
        if stop.agreed or num_done == run.cluster.workers:
            return
        if batch is None:  # this worker's share is done, another's is not
            train_iter.reset()
            batch = next(train_iter)
        yield batch, rand_iter.next()


def show_pictures(s, run):
    """Show the fakes, their gradient, the real batch and the losses; of a conditional run with a digit a column."""
    fakes, diff, batch, rbatch = run.pictures
    diff = diff.asnumpy()
    diff = (diff - diff.mean()) / (diff.std() or 1)
    reals = batch.data[0].slice_axis(axis=1, begin=0, end=s.nc).asnumpy()
    for title, X, labels in (('gout', fakes.asnumpy(), rbatch.label), ('diff', diff, rbatch.label),
                             ('data', reals, batch.label)):
        visual.visual(title, X, run.folder, s.display, labels[0].asnumpy().astype(int) if s.conditional else None)
    iterations, G, D = np.reshape(run.losses, (-1, 3)).T
    visual.show_picture('loss', visual.plot(iterations, {'entropy of G': G, 'entropy of D': D}), run.folder, s.display)
    run.last_shown = time.monotonic()


def save_mosaic(s, run, modG, title):
    """Write a mosaic of always the same latents."""
    latent, digits = fixed_latents(s, s.batch_size)
    visual.visual(title, generate(modG, latent, digits), run.folder, False, digits)


def finish_epoch(s, run, modules, coverage):
    """Leave the pictures, a mosaic, the film, the count of digits among 1,000 images, and MXNet's own files."""
    arrays = run.snapshot(modules)  # first: nothing is made of weights that are not finite
    if run.pictures:  # none where a run goes on at the end of an epoch
        show_pictures(s, run)
    save_mosaic(s, run, modules[0], f'gout-{run.epoch:04d}')
    visual.film(run.folder)
    if coverage:
        latent, digits = fixed_latents(s, 1000)
        row = coverage.count(generate(modules[0], latent, digits), digits)
        shares = ' '.join(f'{100 * row[f"share_{digit}"]:.0f}' for digit in range(10))
        print(f'epoch: {run.epoch} digits: {row["digits"]} of 10, shares: {shares} %, '
              f'confidence: {row["confidence"]:.2f}, KL: {row["kl"]:.3f}')
        if s.conditional:
            print(f'epoch: {run.epoch} digits as asked: {100 * row["asked"]:.0f} %, of the worst '
                  f'{100 * row["asked_worst"]:.0f} %')
        run.write_row(**row)
    if s.check_point:
        run.save_params(modules, arrays)


class Stop(io.TextIOBase):
    """Whether the run is asked to end: by Ctrl-C, SIGTERM, SIGHUP (a lost terminal), q, or a pipe without a reader.

    It also stands for stdout, so that all that is printed goes through `write`.
    """

    signum = asked_at = 0  # the signal that asked, and when
    agreed = False         # whether the loop ends for it; in a cluster, whether all loops do

    def __init__(self, stdout):
        self.stdout = stdout

    def asked(self):
        if visual.quit_pressed() and not self.signum:
            self.handle(signal.SIGINT, None)
        return self.signum > 0

    def handle(self, signum, frame):
        """Handle a signal: the first asks, a second one ends the process at once."""
        if self.signum in (0, signal.SIGPIPE):  # a pipe's reader may have got the same Ctrl-C
            self.signum, self.asked_at = signum, time.monotonic()
            self.write('stopping after the steps in flight; once more: at once\n')
        elif time.monotonic() - self.asked_at > 0.5:  # `timeout` sends each signal twice
            os._exit(128 + signum)

    def write(self, text):
        """Print. A pipe without a reader, as after Ctrl-C with `| tee`, asks the run to end; a full disk does not."""
        try:
            if self.stdout is sys.__stdout__:  # past Python's buffer, which would fail again at the end
                os.write(self.stdout.fileno(), text.encode(errors='replace'))
            else:  # a notebook's, say
                self.stdout.write(text)
        except BrokenPipeError:
            self.signum = self.signum or signal.SIGPIPE
        except OSError:
            pass


# ---------------------------------------------------------------- a run, in memory and on disk

class Run:
    """Where the training stands, its metrics since the last line, and its folder (README, "What you see").

    `folder` is None in all workers of a cluster but the first. `about` is what a state remembers of its run, None where
    one begins.
    """

    FIELDS = ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'images_per_second',
              *(f'share_{digit}' for digit in range(10)), 'digits', 'confidence', 'kl', 'asked', 'asked_worst']

    def __init__(self, s, folder, num_batches, cluster, about=None):
        self.s, self.folder, self.num_batches, self.cluster = s, folder, num_batches, cluster
        about = about or dict(epoch=0, iteration=0, num_update=0, seconds=0, metrics=[], losses=[], log_size=0)
        self.epoch, self.iteration = about['epoch'], about['iteration']
        self.num_update = about['num_update']  # iterations of all epochs: what Adam's bias correction counts
        self.metrics = about['metrics']        # mACC, mG, mD of each iteration since the last line
        self.answers = []                      # D's, of the iterations that `metrics` does not have yet
        self.losses = about['losses']          # of each line its num_update, and the entropies of G and D
        self.pictures, self.last_shown = None, -math.inf
        self.warm = False                      # whether a first step is done
        self.start = time.monotonic() - about['seconds']
        self.won_by_D = 0                      # iterations in a row in which D has won; at 200 that is said, once
        self.saved = about.get('path')
        self.start_clock()
        if folder:
            for leftover in glob.glob(os.path.join(glob.escape(folder), '*.tmp*')):  # of a run that was killed
                with contextlib.suppress(OSError):
                    os.remove(leftover)
            self.log, self.log_size = os.path.join(folder, 'log.csv'), about['log_size']
            open(self.log, 'a').close()

    def add(self, answers, pictures=None):
        """Count an iteration; `answers` is what `train_step` returns, `pictures` what `show_pictures` shows."""
        self.iteration, self.num_update, self.pictures = self.iteration + 1, self.num_update + 1, pictures
        self.answers.append(answers)
        if not self.warm:  # the first step loads libraries and tries algorithms: the clock starts after it
            mx.nd.waitall()
            self.warm = True
            self.start_clock()

    def start_clock(self):
        """Measure the speed from now on."""
        self.tic, self.timed_from = time.monotonic(), self.num_update

    def update_metrics(self):
        """Bring the metrics up to date, with one copy from the device for all iterations since the last time."""
        if self.answers:
            answers = mx.nd.concat(*itertools.chain(*self.answers), dim=0).asnumpy().reshape(len(self.answers), 3, -1)
            label1, label01 = np.ones(self.s.batch_size), np.repeat([0., 1.], self.s.batch_size)
            for answer in answers:  # to the fakes and to the reals, and to the fakes after the update
                mACC, mG, mD = facc(label01, answer[:2]), fentropy(label1, answer[2]), fentropy(label01, answer[:2])
                self.metrics.append([float(mACC), float(mG), float(mD)])
            self.answers = []
            self.check_finite('the loss', self.metrics)

    def check_finite(self, what, array):
        """Raise ValueError where the numbers of a run are ruined."""
        if not np.isfinite(array).all():
            saved = f'the last good state is {self.saved}' if self.saved else 'nothing was saved before'
            where = f'epoch {self.epoch}, iteration {self.iteration} (or shortly before)'
            raise ValueError(f'{what} is not finite at {where}; {saved}; try a smaller lr')

    def print_line(self):
        """Print a line for the iterations since the last one, append it to the log, and begin anew."""
        self.update_metrics()
        if not self.metrics:
            return
        mACC, mG, mD = np.mean(self.metrics, axis=0)
        timed = self.num_update - self.timed_from
        seconds = (time.monotonic() - self.tic) / timed if timed else math.nan  # of an iteration
        left = max(self.num_batches - self.iteration, 0) * seconds  # NaN stays NaN
        run_left = left + (self.s.epochs - 1 - self.epoch) * self.num_batches * seconds
        speed = self.s.batch_size * self.cluster.workers / seconds
        print(f"epoch: {self.epoch} iter: {self.iteration} metric: ('facc', {mACC:.2f}) ('fentropy', {mG:.2f}) "
              f"('fentropy', {mD:.2f}) {speed:.0f}/s {span(left)} {span(run_left)}".replace('nan', '?'))
        if self.folder:
            self.write_row(facc=mACC, fentropy_G=mG, fentropy_D=mD, images_per_second=speed)
        if self.won_by_D < 200:
            self.won_by_D = self.won_by_D + len(self.metrics) if mD < 0.01 and mG > 6 else 0
            if self.won_by_D >= 200:
                print('WARNING: D has told all fakes for 200 iterations, and G learns nothing: stop; set a larger lr')
        self.losses += [self.num_update, float(mG), float(mD)]
        self.metrics = []
        self.start_clock()

    def write_row(self, **row):
        """Append a row to the log, in place of rows after `log_size`, which a killed run wrote after its last state.

        A full disk is said, and does not end the run.
        """
        row.update(epoch=self.epoch, iteration=self.iteration, seconds=round(time.monotonic() - self.start, 3))
        try:
            with open(self.log, 'a') as file:
                if file.truncate(min(self.log_size, os.path.getsize(self.log))) == 0:
                    file.write(','.join(self.FIELDS) + '\n')
                file.write(','.join(str(row.get(name, '')) for name in self.FIELDS) + '\n')
            self.log_size = os.path.getsize(self.log)
        except OSError as error:
            print(f'WARNING: {self.log} cannot be written ({error}); the run goes on')

    def snapshot(self, modules):
        """{name: (devices, ...) NumPy array}: what the run needs of the modules to go on; all of it is finite."""
        mx.nd.waitall()  # else BatchNorm's moving averages may be read before they are written
        arrays = {}
        for name, copies in device_arrays(modules).items():
            devices = len(copies) if 'moving' in name else 1  # each has its own averages; all else is the same
            arrays[name] = np.stack([copy.asnumpy() for copy in copies[:devices]])
            self.check_finite(name, arrays[name])
        return arrays

    def save_state(self, modules):
        """Save what the run needs to go on, and keep the newest two states."""
        if not self.folder or not self.s.check_point:
            return
        self.update_metrics()
        arrays = self.snapshot(modules)
        about = dict(epoch=self.epoch, iteration=self.iteration, num_update=self.num_update, metrics=self.metrics,
                     losses=self.losses, seconds=time.monotonic() - self.start, log_size=self.log_size,
                     settings=dict(vars(self.s), workers=self.cluster.workers),
                     shapes={name: array.shape for name, array in arrays.items()},
                     versions=dict(mxnet=mx.__version__, numpy=np.__version__, python=sys.version))
        path = os.path.join(self.folder, f'state-{self.epoch:04d}-{self.iteration:05d}.npz')
        with written_whole(path, '') as temporary, open(temporary, 'wb') as file:
            np.savez(file, about=json.dumps(about, default=str), **arrays)
        if os.path.exists(path):
            self.saved = path
            for old in list_states(self.folder)[2:]:
                with contextlib.suppress(OSError):
                    os.remove(old)

    def save_params(self, modules, arrays):
        """Write both networks in MXNet's own format, under the published script's names; `arrays`: `snapshot`'s."""
        stamp = os.path.basename(self.folder).replace(f'{self.s.dataset}_', '', 1)
        for net, mod in zip('GD', modules):
            prefix = os.path.join(self.folder, f'{self.s.dataset}_{net}_{stamp}')
            params = [{name: mx.nd.array(arrays[name][0]) for name in names}
                      for names in (mod._param_names, mod._aux_names)]
            with written_whole(prefix, '-symbol.json', f'-{self.epoch:04d}.params') as temporary:
                mx.model.save_checkpoint(temporary, self.epoch, mod.symbol, *params)
                mx.model.load_checkpoint(temporary, self.epoch)  # MXNet does not notice every full disk


def span(seconds):
    """13m for 790: at most three characters and a unit; ? where nothing is known (NaN)."""
    for unit, size in (('s', 1), ('m', 60), ('h', 3600), ('d', 86400)):
        if seconds < 100 * size or unit == 'd':
            return f'{seconds / size:.0f}{unit}' if seconds >= 0 else '?'


def device_arrays(modules):
    """{name: its copy on each device} of both networks' parameters, Adam's moments of them, and moving averages."""
    arrays = {}
    for mod in modules[:2]:
        devices = len(mod._context)
        arrays.update(zip(mod._aux_names, mod._exec_group.aux_arrays))
        for i, (name, copies) in enumerate(zip(mod._param_names, mod._exec_group.param_arrays)):
            means, variances = zip(*(mod._updater.states[i * devices + k] for k in range(devices)))
            arrays.update({name: copies, f'{name}_mean': means, f'{name}_var': variances})
    return arrays


@contextlib.contextmanager
def written_whole(prefix, *ends):
    """Yield a prefix to write files under, then rename them: all of these `ends`, whole, or none. A failure is said."""
    temporary = f'{prefix}.tmp'
    try:
        yield temporary
        for end in ends:
            with open(temporary + end, 'rb') as file:
                os.fsync(file.fileno())
        for end in ends:
            os.replace(temporary + end, prefix + end)
    except (OSError, ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes what it cannot read
        print(f'WARNING: {prefix}{ends[-1]} is not saved: {data.last_line(error)}')
        for end in ends:
            with contextlib.suppress(OSError):
                os.remove(temporary + end)


def new_folder(out, dataset):
    """Make a folder that no other run has, and let `latest` point to it."""
    name = stamp = f'{dataset}_{time.strftime("%Y_%m_%d-%H_%M")}'
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            os.makedirs(os.path.join(out, name))
            break
        name = f'{stamp}_{number}'
    folder = os.path.join(out, name)
    try:
        os.symlink(name, f'{folder}.tmp')
        os.replace(f'{folder}.tmp', os.path.join(out, 'latest'))
    except OSError as error:
        print(f"WARNING: {out}/latest cannot point to {folder} ({error}); to go on, set resume to the folder")
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


def list_states(folder):
    """The paths of a run's states, newest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), 'state-*-*.npz'))
    return sorted(paths, key=lambda path: [int(n) for n in re.findall('[0-9]+', os.path.basename(path))], reverse=True)


def read_state(path):
    """What a state remembers of its run, with its `path`, and {name: array}. Raises ValueError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = dict(json.loads(str(arrays.pop('about'))), path=path)
        if 'losses' not in about:  # as older versions saved it
            raise ValueError('another version of the program has saved it')
        if about['shapes'] != {name: list(a.shape) for name, a in arrays.items() if a.dtype == np.float32}:
            raise ValueError('its arrays are not those that were saved')
        return about, arrays
    except Exception as error:  # NumPy and zipfile have a dozen kinds for a flipped bit
        raise ValueError(f'{path}: is damaged, or no state of a run ({data.last_line(error)})') from None


def find_state(path):
    """The state in a file, or the newest in a run's folder that can be read, as `read_state` returns it."""
    if os.path.isfile(path):
        return read_state(path)
    for state in list_states(path):
        try:
            return read_state(state)
        except ValueError as error:
            print(f'{error}; taking the one before')
    raise ValueError(f"resume: {path} has no state to go on from; set 'latest', a run's folder or a state-....npz")


def restore(s, modules, about, arrays, workers):
    """Put modules into a state. Device k takes the moving averages of device k modulo the number that saved some.

    Raises ValueError where the state is of other networks or data; what else has changed is said.
    """
    was, now = about['settings'], dict(vars(s), workers=workers)
    for name in SAME_NETWORKS:
        if was[name] != now[name]:
            raise ValueError(f'{about["path"]}: trained with {name} = {was[name]!r}, now it is {now[name]!r}')
    for name in (*SAME_RUN, 'workers'):
        if was[name] != now[name]:
            print(f'WARNING: {name} was {was[name]!r} and is {now[name]}: it goes on, but is not the same run')
    for name, copies in device_arrays(modules).items():
        for k, copy in enumerate(copies):
            copy[:] = arrays[name][k % len(arrays[name])]
    for mod in modules[:2]:  # from here on Adam's bias correction counts
        mod._optimizer.begin_num_update = mod._optimizer.num_update = about['num_update']


# ---------------------------------------------------------------- sampling

def fixed_latents(s, n):
    """(n, Z) latents, and for a conditional G n digits, else None: the same for the same seed.

    They come out of NumPy's stream, so that training does not notice.
    """
    latent = np.random.RandomState(s.seed).normal(size=(n, s.Z)).astype(np.float32)
    digits = np.resize([int(digit) for digit in (s.digits if s.sample else '0123456789')], n)
    return latent, digits if s.conditional else None


def generate(modG, latent, digits=None):
    """(n, Z) latents, and for a conditional G n digits -> (n, nc, 64, 64) in [-1, 1], by the moving averages."""
    n, batch_size = len(latent), modG.data_shapes[0].shape[0]
    if digits is not None:
        latent = np.concatenate([latent, np.eye(10, dtype=np.float32)[digits]], axis=1)
    full = np.resize(latent, (-(-n // batch_size) * batch_size, latent.shape[1], 1, 1))
    return modG.predict(mx.io.NDArrayIter({'rand': full}, batch_size=batch_size)).asnumpy()[:n]


def load_generator(s, path, size):
    """G for batches of that size, from a run's newest state, a state, or an epoch's .params; and the file's path."""
    if path.endswith('.params'):
        params = {name.split(':')[-1]: array for name, array in mx.nd.load(path).items()}
    else:
        about, arrays = find_state(path)
        path = about['path']
        params = {name: mx.nd.array(copies[0]) for name, copies in arrays.items()}
    gout, _ = make_dcgan_sym(s.ngf, s.ndf, s.nc)
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=s.ctx[0])
    modG.bind(data.RandIter(size, s.Z, conditional=s.conditional).provide_data, for_training=False)
    try:
        modG.init_params(None, params, params)
    except RuntimeError:  # a name is missing, or an array has another shape
        wanted = f'ngf = {s.ngf}, nc = {s.nc}, Z = {s.Z}, conditional = {s.conditional}'
        raise ValueError(f'{path}: is no G of these settings: {wanted}') from None
    return modG, path


def make_samples(s):
    """Write `sample.png`, the single images and `walk.png` into the run's folder."""
    size = min(s.sample, s.batch_size)
    data.check_devices(dataclasses.replace(s, ctx=s.ctx[:1], batch_size=size))
    modG, path = load_generator(s, s.resume, size)
    out = os.path.dirname(path)
    folder = os.path.join(out, 'sample')
    os.makedirs(folder, exist_ok=True)
    for old in glob.glob(os.path.join(glob.escape(folder), '[0-9]' * 5 + '.png')):
        os.remove(old)
    latent, digits = fixed_latents(s, s.sample)
    mosaic = []
    for start in range(0, s.sample, size):  # a batch at a time: many take no more memory than few
        part = slice(start, start + size)
        images = generate(modG, latent[part], digits[part] if s.conditional else None)
        mosaic.extend(images[:1024 - len(mosaic)])
        for i, image in enumerate(images, start):
            visual.save(os.path.join(folder, f'{i:05d}.png'), visual.tile(image[None]))
    columns = len(s.digits) if s.conditional else None
    visual.save(os.path.join(out, 'sample.png'), visual.tile(np.stack(mosaic), columns))
    # DCGAN paper, section 6.1; along an arc, for between two Gaussian vectors a straight line passes too near to 0
    rows, steps = 6, 10
    points, digits = fixed_latents(s, rows + 1)
    arc = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None]
    walk = np.concatenate([np.cos(arc) * a + np.sin(arc) * b for a, b in zip(points, points[1:])])
    images = generate(modG, walk, None if digits is None else np.repeat(digits[:rows], steps))
    visual.save(os.path.join(out, 'walk.png'), visual.tile(images, steps))
    print(f'{s.sample} images of {path}: {out}/sample.png, one by one in {folder}/; {out}/walk.png')


# ---------------------------------------------------------------- several machines

DEAD = 15   # seconds without a heartbeat after which a process counts as dead
ALONE = 60  # seconds to wait for the other processes at the start and at the end


class Cluster:
    """The processes of a run: this one alone, or with `kvstore = 'dist_sync'` those that the DMLC_ variables name.

    In a scheduler and in a server this does not return. Raises ValueError where a variable is wrong, or where the
    workers' settings would give them different weights: MXNet does not hand the first worker's to the others.
    """

    kv, rank, workers = None, 0, 1  # `kv`: MXNet's key-value store

    def __init__(self, s):
        if s.kvstore != 'dist_sync':
            if data.ROLE:
                raise ValueError(f"DMLC_ROLE={data.ROLE}, but kvstore = {s.kvstore!r}: set 'dist_sync', or unset it")
            return
        for name, right in (('ROLE', 'worker|server|scheduler'), ('PS_ROOT_URI', '.+'), ('PS_ROOT_PORT', '[0-9]+'),
                            ('NUM_WORKER', '[0-9]+'), ('NUM_SERVER', '[0-9]+')):
            value = os.environ.get(f'DMLC_{name}', '')
            if not re.fullmatch(right, value):
                raise ValueError(f'DMLC_{name}={value!r}: has to be {right} (README, "Several machines")')
        self.closing = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        gpus = sum(ctx.device_type == 'gpu' for ctx in s.ctx)
        self.kv = mx.kv.create('dist_device_sync' if gpus > 1 else 'dist_sync')  # a worker waits here for the others
        if data.ROLE != 'worker':
            mx.kv.KVStoreServer(self.kv).run()  # until the workers are done
            sys.exit()
        self.kv.init('vote', mx.nd.zeros(2))
        self.rank, self.workers = self.kv.rank, self.kv.num_workers
        mark = zlib.crc32(repr([vars(s)[name] for name in SAME_NETWORKS + SAME_RUN]).encode())
        if not self.agree(mark, mark >> 16):
            raise ValueError('the workers have different settings: start the same dcgan.py everywhere')

    def watch(self):
        """End this process when another one dies: the scheduler hears every heartbeat, the others the scheduler's."""
        dead, late = ctypes.c_int(), time.monotonic() + ALONE
        while not self.closing.wait(2):
            with contextlib.suppress(mx.MXNetError):  # ps-lite has no rank to tell before the cluster is complete
                if self.kv and self.kv.rank >= 0:
                    late = math.inf
                    mx.base._LIB.MXKVStoreGetNumDeadNode(self.kv.handle, 7, ctypes.byref(dead), DEAD)
            if dead.value:
                give_up(f'a process of the cluster has died (no heartbeat for {DEAD} s); start all again, '
                        "resume = 'latest'")
            if time.monotonic() > late:
                give_up(f'the cluster is not complete after {ALONE} s: do all its processes run, with the same DMLC_ '
                        'variables?')

    def vote(self, *numbers):
        """The sum of each of two numbers over the workers, known to all. It waits for the network, not for a device."""
        if not self.kv:
            return numbers
        self.kv.push('vote', mx.nd.array(numbers))
        total = mx.nd.zeros(2)
        self.kv.pull('vote', out=total)
        return total.asnumpy().astype(int)

    def agree(self, *numbers):
        """Whether all workers have the same two numbers; the last 16 bits are compared, for votes are float32."""
        mine = [int(number) % 2 ** 16 for number in numbers]
        return list(self.vote(*mine)) == [number * self.workers for number in mine]

    def agreed_state(self, path):
        """What `find_state` returns. Raises ValueError where the workers do not all find the same state."""
        if not self.kv:
            return find_state(path)
        about, arrays = dict(num_update=-1, seconds=-1), None
        with contextlib.suppress(ValueError):  # a worker that finds none votes, too: the others wait for it
            about, arrays = find_state(path)
        if not self.agree(about['num_update'], about['seconds']) or not arrays:
            raise ValueError(f'{path}: not all workers find the same state; out must be one folder for all of them')
        return about, arrays

    def leave(self):
        """Leave together with the other workers; MXNet aborts where it is left to Python's own end."""
        if self.kv:
            self.kv._barrier()  # the first worker may still be counting digits, or saving
            self.closing.set()
            self.watcher.join()
            late = threading.Timer(ALONE, give_up, [f'the other workers have not ended within {ALONE} s'])
            late.start()
            mx.base.check_call(mx.base._LIB.MXKVStoreFree(self.kv.handle))
            self.kv.handle = mx.base.KVStoreHandle()
            late.cancel()


def give_up(message):
    """End with one line that says why. A process of a cluster ends at once: MXNet's own end would wait for others."""
    if not data.ROLE:
        sys.exit(f'dcgan.py: {message}')
    print(f'dcgan.py: {message}', file=sys.stderr, flush=True)
    os._exit(1)


# ---------------------------------------------------------------- main

def run_training(s, stop, stack):
    """Train; the settings are checked, and errors are exceptions. What is to be closed at the end goes to `stack`."""
    cluster = Cluster(s)
    data.check_devices(s)
    if cluster.rank:  # the first worker prints, shows and saves
        stack.enter_context(contextlib.redirect_stdout(None))
    folder = s.resume if os.path.isdir(s.resume) and not cluster.rank else None
    if folder:
        lock(folder, stack)
    about, arrays = cluster.agreed_state(s.resume) if s.resume else (None, None)
    s.lr = s.lr or (about['settings']['lr'] if about else learning_rate(s))
    print('settings:', *(f'{name}={value!r}' for name, value in vars(s).items()))
    print(f'device: {", ".join(map(str, s.ctx))}; {os.environ["OMP_NUM_THREADS"]} CPU threads')
    s.dataset, train_iter, labelled = data.load_data(s, cluster.rank, cluster.workers)
    rand_iter = data.RandIter(s.batch_size, s.Z, s.ctx[0], s.conditional)
    modules = make_modules(s, train_iter.provide_data, rand_iter.provide_data, cluster.kv)
    if about:
        restore(s, modules, about, arrays, cluster.workers)
    if not folder and not cluster.rank:
        folder = new_folder(s.out, s.dataset)
        lock(folder, stack)
        if about:  # a new run that begins from another one's state takes that one's log along
            with contextlib.suppress(OSError):
                shutil.copy(os.path.join(os.path.dirname(s.resume), 'log.csv'), folder)
    run = Run(s, folder, getattr(train_iter, 'num_data', math.nan) / s.batch_size, cluster, about)
    for title, mod in zip('GD', modules):
        print_network(s, title, mod, folder)
    print(f'data: {s.dataset}; run: {folder}')
    print('metric: facc, fentropy of G, of D; then images/s; time left in the epoch, in the run')
    coverage = data.Coverage(*labelled) if s.coverage and labelled else None
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores it
            stack.callback(signal.signal, signum, signal.signal(signum, stop.handle))
    train_loop(s, modules, train_iter, rand_iter, run, coverage, stop)
    if stop.agreed:
        kept = f"last state: {run.saved}; to go on: resume = 'latest'" if run.saved else 'nothing was saved'
        print(f'stopped in epoch {run.epoch} after iteration {run.iteration}; {kept}')
    else:
        more = "; more: raise epochs, resume = 'latest'; images: sample = 64, resume = 'latest'" if run.saved else ''
        print(f'done: everything is in {folder}/{more}')
    cluster.leave()
    if stop.agreed:
        sys.exit(128 + (stop.signum or signal.SIGTERM))


def train(settings):
    """Train as the settings say; with `sample`, make images instead.

    Raises SystemExit: with one line that says what is wrong and what to do, or with 128 and the number of the signal
    that ended it: 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), 141 (a pipe that nobody reads).
    """
    paths = {name: os.fspath(value) for name, value in vars(settings).items() if isinstance(value, os.PathLike)}
    ctx = settings.ctx
    s = dataclasses.replace(settings, ctx=list(ctx) if isinstance(ctx, (list, tuple)) else [ctx], **paths)
    stop = Stop(sys.stdout or io.StringIO())
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(visual.close)
            stack.enter_context(contextlib.redirect_stdout(stop))
            check(s)
            if s.resume:  # a run is called like its folder, not like a link to it
                s.resume = os.path.realpath(os.path.join(s.out, 'latest') if s.resume == 'latest' else s.resume)
            if s.sample:
                make_samples(s)
            else:
                run_training(s, stop, stack)
    except (ValueError, OSError, mx.MXNetError) as error:
        give_up(data.last_line(error))
    except KeyboardInterrupt:  # before the loop and while samples are made; in the loop `Stop` takes it
        (os._exit if data.ROLE else sys.exit)(130)
    except Exception:  # a mistake in the program: a process of a cluster ends at once, as in `give_up`
        if not data.ROLE:
            raise
        traceback.print_exc()
        os._exit(1)


if __name__ == '__main__':
    train(Settings())

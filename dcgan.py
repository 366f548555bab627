"""A DCGAN that learns to draw digits: MXNet's Module API, one file to read from top to bottom.

Edit `Settings` below, run `python dcgan.py`, and watch: `gout` is what the generator G makes, `diff` the gradient
that teaches it, `data` the real images. One training step is `train_step`, numbered 1 to 8; who stops reading after
`train_loop` has understood the program.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), the game and its loss; Radford et al. 2015,
"Unsupervised Representation Learning with Deep Convolutional GANs" (arXiv 1511.06434), the networks.
"""
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

# ---------------------------------------------------------------- preparing MXNet: before it is imported

if not (3, 8) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f'dcgan.py: Python {platform.python_version()}: MXNet needs NumPy 1, which Python 3.8 to 3.12 have; '
             'the README has a line that brings a Python 3.12 along')
try:
    import cv2
    import joblib
    import numpy as np
    if int(np.__version__.split('.')[0]) >= 2:
        sys.exit(f"dcgan.py: NumPy {np.__version__} is too new for MXNet: pip install 'numpy<2'")
    np.bool = bool  # NumPy 1.24 took this alias away; MXNet reads it once, at import
    # MXNet assumes hyper-threads and halves the processors it sees
    os.environ.setdefault('OMP_NUM_THREADS', str(joblib.cpu_count(only_physical_cores=True)))
    # with several devices the optimiser's state stays in this process, so that it can be saved
    os.environ['MXNET_UPDATE_ON_KVSTORE'] = '0'
    os.environ.setdefault('PS_HEARTBEAT_INTERVAL', '2')  # seconds; ps-lite's default is none
    os.environ.setdefault('MXNET_SUBGRAPH_VERBOSE', '0')  # a line on stderr for each network
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # mxnet-cu112 asks for CUDA's libraries by name; PyPI's packages put them where the loader does not look
        importlib.metadata.version('mxnet-cu112')
        for name in ('cudart.so.11.0', 'nvrtc.so.11.2', 'cublasLt.so.11', 'cublas.so.11', 'cufft.so.10',
                     'curand.so.10', 'cusolver.so.11', 'cudnn.so.8', 'nccl.so.2', 'nvToolsExt.so.1'):
            for folder in getattr(importlib.util.find_spec('nvidia'), 'submodule_search_locations', ()):
                for path in glob.glob(f'{folder}/*/lib/lib{name}'):
                    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    # in a parameter server `import mxnet` would serve and never return: connect() does that, and watches
    role = os.environ.pop('DMLC_ROLE', None)
    import mxnet as mx
    if role:
        os.environ['DMLC_ROLE'] = role
    import data
    import visual
except (ImportError, OSError) as error:
    cure = next((cure for symptom, cure in {
        'libcuda.so.1': 'no NVIDIA driver; install it, or MXNet for the CPU: pip install -r tests/requirements.txt',
        'libGL.so.1': "OpenCV's windows need it: apt-get install libgl1, or pip install opencv-python-headless",
        'libgomp': 'MXNet needs it: apt-get install libgomp1',
        'libg': 'OpenCV needs it: apt-get install libglib2.0-0',
        'libcu': 'pip install -r requirements.txt brings the CUDA libraries along',
        'libn': 'pip install -r requirements.txt brings the CUDA libraries along',
    }.items() if symptom in str(error)),
        'pip install -r requirements.txt (NVIDIA GPU) or tests/requirements.txt (any other machine)')
    sys.exit(f'dcgan.py: {error}: {cure}')


def default_ctx():
    """GPU 0 where there is a GPU, else the CPU."""
    try:
        return mx.gpu(0) if mx.context.num_gpus() else mx.cpu()
    except mx.MXNetError as error:
        print(f'WARNING: the GPU cannot be used ({last_line(error)}); training on the CPU')
        return mx.cpu()


def last_line(error):
    """What an error says, without MXNet's C++ stack trace."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def editable(cls):
    """A dataclass in which a default may also be a list: `ctx: object = [mx.gpu(0), mx.gpu(1)]`."""
    for name, value in list(vars(cls).items()):
        if isinstance(value, list):
            setattr(cls, name, dataclasses.field(default_factory=value.copy))
    return dataclasses.dataclass(cls)


# ---------------------------------------------------------------- settings: edit these

@editable
class Settings:
    # data
    dataset: str = 'mnist'         # 'mnist', 'digits' (8x8, comes with scikit-learn) or 'imagenet' (your own .rec)
    mnist_path: str = ''           # folder with MNIST's four IDX files; '': OpenML, fetched once
    imgnet_path: str = 'train.rec' # what im2rec.py made of a folder of photos
    fallback: str = 'digits'       # where MNIST cannot be fetched: 'digits', or '' to stop with an error
    # networks
    ndf: int = 64                  # filters in D's first layer; doubled three times
    ngf: int = 64                  # filters in G's last but one layer
    # channels: 1 for grey data, 3 for imagenet. Grey data also trains with 3, but D then knows the fakes by their
    # colour: grey noise for a thousand iterations, and only four or five of the ten digits after that
    nc: int = 1
    Z: int = 100                   # size of the latent vector
    conditional: bool = False      # tell G which digit to make, and D which it sees
    # optimisation
    batch_size: int = 64           # real images in a step, and as many fakes
    lr: float = 0.0002             # Adam's; both networks
    beta1: float = 0.5             # Adam's; DCGAN paper, section 4
    epochs: int = 100              # passes over the training images
    seed: int = 1234               # same seed, same run; on the CPU to the last bit
    ctx: object = default_ctx()    # or mx.cpu(), mx.gpu(1), [mx.gpu(0), mx.gpu(1)]
    kvstore: str = 'device'        # several GPUs: 'device' or 'local'; several machines: 'dist_sync' (README)
    # output
    out: str = 'out'               # folder for pictures, checkpoints and the .csv
    check_point: bool = True       # save after every epoch, and when stopped
    resume: str = ''               # go on from 'latest', a folder or a .json; with imagenet not to the last bit
    sample: int = 0                # with resume: make that many images and stop
    digits: str = '0123456789'     # with conditional: the digits that sample makes
    coverage: bool = True          # after every epoch, count the digits among 1,000 images (not for imagenet)
    display: bool = True           # windows where there is a screen; pictures in `out` in any case
    monitor: int = 0               # print the networks' inner statistics every n batches
    plot: bool = False             # draw the networks to `out`, where graphviz's `dot` is installed


def check(s):
    """Raise ValueError for settings that cannot work: before any long work, one line each."""
    for field in dataclasses.fields(s):
        value, right = getattr(s, field.name), {str: 'text in quotes', bool: 'True or False'}.get(field.type)
        if right and type(value) is not field.type:
            raise ValueError(f'{field.name} = {value!r}: must be {right}')
    for name in ('ndf', 'ngf', 'nc', 'Z', 'batch_size', 'epochs', 'seed', 'sample', 'monitor'):
        value, least = getattr(s, name), int(name not in ('seed', 'sample', 'monitor'))
        if type(value) is not int or not least <= value < 2 ** 30:
            raise ValueError(f'{name} = {value!r}: must be a whole number, {least} or more')
    if s.sample > 100_000:
        raise ValueError(f'sample = {s.sample}: at most 100000 at a time; another seed makes others')
    for name, values in {'dataset': ('mnist', 'digits', 'imagenet'), 'fallback': ('digits', ''), 'nc': (1, 3),
                         'kvstore': ('device', 'local', 'dist_sync')}.items():
        if getattr(s, name) not in values:
            raise ValueError(f'{name} = {getattr(s, name)!r}: must be one of {", ".join(map(repr, values))}')
    for name, top, right in ('lr', math.inf, '0 or more'), ('beta1', 1, '0 or more, below 1'):
        value = getattr(s, name)
        if type(value) not in (int, float) or not 0 <= value < top:
            raise ValueError(f'{name} = {value!r}: must be a number, {right}')
    if s.dataset == 'imagenet' and s.nc != 3:
        raise ValueError('nc = 1: photos have three channels; set nc = 3')
    if s.dataset == 'imagenet' and s.conditional:
        raise ValueError("conditional = True: photos have no digits; set it to False, or dataset to 'mnist'")
    if not s.ctx or not all(isinstance(ctx, mx.Context) for ctx in s.ctx):
        raise ValueError(f'ctx = {s.ctx}: must be mx.cpu(), mx.gpu(0), or a list such as [mx.gpu(0), mx.gpu(1)]')
    if s.batch_size % len(s.ctx):
        raise ValueError(f'batch_size = {s.batch_size}: {len(s.ctx)} devices cannot share it equally')
    if s.sample and not s.resume:
        raise ValueError("sample needs a checkpoint: set resume to 'latest' or to a checkpoint's .json")
    if not (s.digits.isdigit() and s.digits.isascii()):
        raise ValueError(f'digits = {s.digits!r}: must be digits, such as 0123456789')
    for ctx in s.ctx:  # one operation on each device, for MXNet finds out late and says it at length
        try:
            gpus = mx.context.num_gpus() if ctx.device_type == 'gpu' else math.inf
            if ctx.device_id >= gpus:
                raise ValueError(f'ctx = {ctx}: no such GPU ({gpus} found); set ctx to mx.cpu() or another mx.gpu(n)')
            mx.nd.ones(1, ctx).asnumpy()
        except mx.MXNetError as error:
            reason = last_line(error)
            if 'no kernel image' in reason:
                reason += '; mxnet-cu112 has code for compute capability 5.0 to 8.9 only, Maxwell to Ada'
            raise ValueError(f'ctx = {ctx}: {reason}; set ctx = mx.cpu() to train without it') from None


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


# ---------------------------------------------------------------- the metrics

def facc(label, pred):
    """Share of images that D takes for what they are; label (batch,) 0 or 1, pred (batch, 1) in [0, 1]."""
    return ((pred.ravel() > 0.5) == label.ravel()).mean()


def fentropy(label, pred):
    """Mean binary cross-entropy in nats; arguments as in `facc`."""
    pred, label = pred.ravel(), label.ravel()
    return -(label * np.log(pred + 1e-12) + (1. - label) * np.log(1. - pred + 1e-12)).mean()


class Coverage(mx.metric.EvalMetric):
    """Which digits are among the generated ones, by a classifier of the real ones (fitted at first use).

    `X` (n, 1, 64, 64) uint8 and `y` (n,) are the real training images and digits. `update` takes generated images,
    (n, nc, 64, 64) in [-1, 1], and as labels the digits asked for, if any. `get` gives the ten digits' shares; how
    many are there (at least 1 %); the classifier's mean confidence; the Kullback-Leibler divergence of the shares
    from the real ones, in nats; and of the digits asked for the share that was made, over all and of the worst.
    """

    def __init__(self, X, y):
        self.X, self.y, self.classifier = X, y, None
        super().__init__('coverage')

    @staticmethod
    def features(X):
        """(n, nc, 64, 64) in 0..255 -> (n, 256) float32 in [-1, 1]: 16x16 pixels of the first channel."""
        small = [cv2.resize(x[0], (16, 16), interpolation=cv2.INTER_AREA).ravel() for x in X]
        return np.stack(small).astype(np.float32) / 127.5 - 1

    def classify(self, X):
        """(n, nc, 64, 64) in 0..255 -> (n, 10) probabilities."""
        if self.classifier is None:
            import warnings
            from sklearn.neural_network import MLPClassifier
            passes = max(12, 100_000 // len(self.X))
            self.classifier = MLPClassifier((256,), batch_size=min(128, len(self.X)), max_iter=passes, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that it could go on learning
                self.classifier.fit(self.features(self.X), self.y)
        return self.classifier.predict_proba(self.features(X))

    def reset(self):
        self.counts, self.asked, self.made = np.zeros((3, 10))
        self.confidence = self.num_inst = 0

    def update(self, labels, preds):
        for i, images in enumerate(preds):
            probability = self.classify((images + 1) * 127.5)
            digits = probability.argmax(axis=1)
            self.num_inst += len(digits)
            self.counts += np.bincount(digits, minlength=10)
            self.confidence += probability.max(axis=1).sum()
            if labels:
                self.asked += np.bincount(labels[i], minlength=10)
                self.made += np.bincount(digits[digits == labels[i]], minlength=10)

    def get(self):
        from scipy.stats import entropy
        shares = self.counts / self.num_inst
        values = {f'share_{digit}': share for digit, share in enumerate(shares)}
        values['digits'] = int((shares >= 0.01).sum())
        values['confidence'] = self.confidence / self.num_inst
        values['kl'] = entropy(shares, np.bincount(self.y, minlength=10))
        if self.asked.any():
            values['asked'] = self.made.sum() / self.asked.sum()
            values['asked_worst'] = (self.made / self.asked).min()
        return list(values), list(values.values())


# ---------------------------------------------------------------- the modules

def make_modules(s, data_shapes, rand_shapes, kv=None):
    """G, D, and D's twin that only finds input gradients; bound, initialised, with their optimisers.

    The twin shares D's parameters, moving averages and activations, and skips D's weight gradients: a tenth of the
    step's work, which the step would throw away.
    """
    gout, dloss = make_dcgan_sym(s.ngf, s.ndf, s.nc)
    names = dict(data_names=('data',), label_names=('label',), context=s.ctx)
    label_shapes = [('label', (s.batch_size,))]
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=s.ctx)
    modG.bind(rand_shapes)
    modD = mx.mod.Module(dloss, **names)
    modD.bind(data_shapes, label_shapes, inputs_need_grad=bool(s.monitor))
    mx.random.seed(s.seed)
    for mod in (modG, modD):
        mod.init_params(mx.init.Normal(0.02))
        mod.init_optimizer(kv or s.kvstore, 'adam', {'learning_rate': s.lr, 'beta1': s.beta1, 'wd': 0.})
        # MXNet makes Adam's state at the first update; a checkpoint needs it before
        for i, weight in enumerate(itertools.chain(*mod._exec_group.param_arrays)):
            mod._updater.states[i] = mod._optimizer.create_state(i, weight)
            mod._updater.states_synced[i] = True
    if s.monitor:  # it would print the gradients that the twins skip, uninitialised: D does all of the work
        return modG, modD, modD
    modDx = mx.mod.Module(dloss, fixed_param_names=modD._param_names, **names)
    modDx.bind(data_shapes, label_shapes, inputs_need_grad=True, shared_module=modD)
    return modG, modD, modDx


# ---------------------------------------------------------------- one step

def train_step(modG, modD, modDx, rbatch, batch, label0, label1):
    """One update of D and one of G; only queued, nothing here waits for a device.

    Parameters: a latent batch, a real batch, and the labels 0 and 1, (batch,) each.
    Returns: the fakes, (batch, nc, 64, 64); `diff`, of the same shape; and D's answers (batch, 1) to the fakes and
    to the reals before its update, and to the fakes after it.
    """
    def discriminate(mod, images, label):
        mod.forward(mx.io.DataBatch([images], [label]), is_train=True)
        mod.backward()
        return mod.get_outputs()[0].copy()  # the next forward overwrites the original

    # 1. G makes a batch of fakes from a latent batch.
    modG.forward(rbatch, is_train=True)
    fakes = modG.get_outputs()[0]
    nc, shown = fakes.shape[1], fakes
    if rbatch.label:  # conditional: D is shown which digit each one should be
        shown = mx.nd.concat(fakes, data.one_hot_maps(rbatch.label[0], fakes.shape[2]), dim=1)
    # 2. The fakes get label 0.  3. D sees them; the gradients are kept, the weights not yet updated.
    fake_answer = discriminate(modD, shown, label0)
    kept = [[grad.copy() for grad in grads] for grads in modD._exec_group.grad_arrays]
    # 4. The real batch gets label 1; D sees it.
    real_answer = discriminate(modD, batch.data[0], label1)
    # 5. The fakes' gradients are added to the reals', and D is updated once with the sum.
    for real_grads, fake_grads in zip(modD._exec_group.grad_arrays, kept):
        for real_grad, fake_grad in zip(real_grads, fake_grads):  # one a device
            real_grad += fake_grad
    modD.update()
    # 6. Now the fakes get label 1: what G wants D to say.  7. The updated D sees them again, down to its input.
    answer = discriminate(modDx, shown, label1)
    diff = modDx.get_input_grads()[0]
    if rbatch.label:
        diff = diff.slice_axis(axis=1, begin=0, end=nc)
    # 8. That gradient, `diff`, goes backward through G, and G is updated.
    modG.backward([diff])
    modG.update()
    return fakes, diff, (fake_answer, real_answer, answer)


# ---------------------------------------------------------------- the loop

def train_loop(s, modules, train_iter, rand_iter, start, kv, log, coverage, stop):
    """Train until `s.epochs` are done, or until `stop` says so.

    Parameters
    ----------
    modules : what `make_modules` returns
    start : what `restore` returns, or (0, 0, ()): the epoch to begin in, its iterations that are done, and each
        metric's sum and count since the last line
    kv : the key-value store, where several machines train, or None
    log : `Log`, where this process is the one that prints, shows and saves, or None
    coverage : `Coverage`, or None
    stop : `Stop`

    Returns the (epoch, iteration) after which it was stopped, or None. Raises ValueError where a loss is not finite.
    """
    rank, workers = (kv.rank, kv.num_workers) if kv else (0, 1)
    mACC, mG, mD = metrics = [mx.metric.CustomMetric(f) for f in (facc, fentropy, fentropy)]
    label0, label1 = (f((s.batch_size,), ctx=s.ctx[0]) for f in (mx.nd.zeros, mx.nd.ones))
    num_batches = -(-train_iter.num_data // s.batch_size) if hasattr(train_iter, 'num_data') else None
    monitor = log and s.monitor and mx.mon.Monitor(s.monitor, lambda x: mx.nd.norm(x) / math.sqrt(x.size),
                                           pattern='.*output|d1_backward_data', sort=True)
    if monitor:
        logging.basicConfig(format='%(message)s', level=logging.INFO, stream=sys.stdout)
        for mod in modules[:2]:
            mod.install_monitor(monitor)

    def diverged(what):
        return ValueError(f'{what}; last good checkpoint: {log and log.saved}; try a smaller lr')

    def update_metrics():
        """Catch up with the answers of the iterations since the last line."""
        for iteration, (fake_answer, real_answer, answer) in answers:
            for metric in (mACC, mD):
                metric.update([label0, label1], [fake_answer, real_answer])
            mG.update([label1], [answer])
            if not math.isfinite(mD.get()[1] + mG.get()[1]):
                raise diverged(f'the loss is not finite at epoch {epoch}, iteration {iteration}')
        answers.clear()

    first, resumed, sums = start
    for epoch in range(first, s.epochs):
        # the workers of a cluster draw from streams of their own
        mx.random.seed(s.seed + 1 + epoch + 1_000_003 * rank)
        train_iter.reset()
        t = 0
        while t < resumed and train_iter.iter_next():  # within the epoch: the same draws, the same place in the data
            rand_iter.next()
            t += 1
        for metric in metrics:
            metric.reset()
        for metric, (sum_metric, num_inst) in zip(metrics, sums):
            metric.sum_metric, metric.num_inst = sum_metric, num_inst
        answers, done, every, tic, line_t = [], False, min(10, num_batches or 10), time.monotonic(), t
        while True:
            batch = next(train_iter, None)
            done = done or batch is None
            finished, stopping = vote(kv, done, stop.signum)
            if stopping or finished == workers:
                break
            if batch is None:  # this worker's share is done, another's is not
                train_iter.reset()
                batch = next(train_iter)
            t += 1
            if monitor:
                monitor.tic()
            rbatch = rand_iter.next()
            fakes, diff, answer = train_step(*modules, rbatch, batch, label0, label1)
            answers.append((t, answer))
            if monitor:
                monitor.toc_print()
            if t % every == 0 and log:
                update_metrics()
                seconds = (time.monotonic() - tic) / (t - line_t)
                rate = s.batch_size * workers / seconds
                epoch_left = num_batches and (num_batches - t) * seconds
                run_left = num_batches and epoch_left + (s.epochs - 1 - epoch) * num_batches * seconds
                named = ' '.join(f"('{name}', {value:.2f})" for name, value in (mACC.get(), mG.get(), mD.get()))
                print(f'epoch: {epoch} iter: {t} metric: {named} {rate:.0f}/s '
                      f'{span(epoch_left)} {span(run_left)}')
                log.write(epoch=epoch, iteration=t, seconds=time.monotonic() - tic, facc=mACC.get()[1],
                          fentropy_G=mG.get()[1], fentropy_D=mD.get()[1], images_per_second=rate)
                tic, line_t = time.monotonic(), t  # before the pictures: their time counts
                show(s, fakes.asnumpy(), diff.asnumpy(), batch.data[0].asnumpy()[:, :s.nc], rbatch.label, batch.label)
                visual.show('loss', visual.plot(*log.curves(num_batches)), s.out, s.display)
                if visual.quit_pressed():
                    os.kill(os.getpid(), signal.SIGINT)
                for metric in metrics:
                    metric.reset()
        update_metrics()
        if log:
            mx.nd.waitall()  # BatchNorm's moving averages are else read before they are written
            for name, copies in itertools.chain(*(params(mod).items() for mod in modules[:2])):
                if not np.isfinite(copies[0].asnumpy()).all():  # ruined by the last step, whose loss was fine
                    raise diverged(f'{name} is not finite after epoch {epoch}, iteration {t}')
            if not stopping:
                finish_epoch(s, modules[0], log, coverage, epoch, t)
            if s.check_point:
                sums = [(metric.sum_metric, metric.num_inst) for metric in metrics]
                save(s, modules, log, epoch, t, sums, complete=not stopping)
        if stopping:
            return epoch, t
        num_batches, resumed, sums = t, 0, ()
    return None


def show(s, fakes, diff, real, fake_digits, real_digits):
    """The three pictures; of a conditional G with a digit a column."""
    diff = (diff - diff.mean()) / (diff.std() or 1)
    for title, X, digits in ('gout', fakes, fake_digits), ('diff', diff, fake_digits), ('data', real, real_digits):
        if s.conditional:
            X = by_digit(X, digits[0].asnumpy().astype(int))
        visual.visual(title, X, s.out, s.display, 10 if s.conditional else None)


def by_digit(X, digits):
    """(n, c, h, w) images -> as many rows of ten as n fills, digit d in column d; black where one is missing."""
    rows = np.full((-(-len(X) // 10), 10) + X.shape[1:], -1, X.dtype)
    for digit in range(10):
        column = X[digits == digit][:len(rows)]
        rows[:len(column), digit] = column
    return rows.reshape((-1,) + X.shape[1:])


def span(seconds):
    """13m for 790: at most three characters and a unit; ? for None."""
    for unit, size in (('s', 1), ('m', 60), ('h', 3600), ('d', 86400)):
        if seconds is not None and (seconds < 100 * size or unit == 'd'):
            return f'{seconds / size:.0f}{unit}'
    return '?'


class Stop:
    """Ctrl-C and SIGTERM: the first asks the loop to end (`signum` is set), a second ends the process at once.

    A thread reads them from a pipe that Python's C code writes to, for a Python handler only runs once MXNet's
    call returns, which may be ten steps later.
    """

    def __enter__(self):
        self.signum = 0
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.handlers = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self.listen, args=(read_end,), daemon=True).start()
        return self

    def listen(self, read_end):
        with open(read_end, 'rb', buffering=0) as pipe:
            for byte in iter(lambda: pipe.read(1), b''):
                if byte[0] in self.handlers and not self.signum:
                    self.signum, first = byte[0], time.monotonic()
                    with contextlib.suppress(OSError):  # Ctrl-C also ends what stdout may be piped to
                        print('stopping after the steps in flight; once more: at once')
                elif byte[0] in self.handlers and time.monotonic() - first > 0.5:  # `timeout` sends each one twice
                    os._exit(128 + byte[0])

    def __exit__(self, *_):
        for n, handler in self.handlers.items():
            signal.signal(n, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write_end)


# ---------------------------------------------------------------- the log, and checkpoints

SCRATCH = '.saving-'  # how the names of temporary folders in `out` begin


@contextlib.contextmanager
def alone_in(out):
    """Keep other processes from training in the same folder: pictures and checkpoints would overwrite each other's."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, '.lock'), 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'{out}: another process trains in this folder; stop it, or set another out') from None
        except OSError as error:
            print(f'WARNING: {out} cannot be locked ({error}): let no other run use it')
        for leftover in glob.glob(os.path.join(glob.escape(out), f'{SCRATCH}*')):
            shutil.rmtree(leftover)  # of a run that was killed within a save
        yield


class Log:
    """The run's .csv, one row for each printed line, and the stamp in the names of the run's files.

    A new run takes a stamp that nobody has; a resumed one goes on with its own, unless it begins before the run's
    newest checkpoint or in another folder: then it is a new run, and nothing of the old one is overwritten.
    """

    FIELDS = ['epoch', 'iteration', 'seconds', 'facc', 'fentropy_G', 'fentropy_D', 'images_per_second',
              *(f'share_{digit}' for digit in range(10)), 'digits', 'confidence', 'kl', 'asked', 'asked_worst']

    def __init__(self, out, dataset, checkpoint=None, workers=1):
        self.out, self.dataset, self.workers, self.saved = out, dataset, workers, checkpoint and checkpoint['path']
        self.losses, self.seconds = [], 0
        self.stamp = self.pick_stamp(checkpoint)
        path = self.path(self.stamp)
        self.file = open(path + '.tmp', 'w', newline='')
        self.writer = csv.DictWriter(self.file, self.FIELDS, extrasaction='ignore')
        self.writer.writeheader()
        for row in self.read(checkpoint) if checkpoint else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a row that no run wrote so is left out
                if (int(row['epoch']), int(row['iteration'])) <= (checkpoint['epoch'], checkpoint['iteration']):
                    self.note(row)
                    self.writer.writerow(row)
        self.file.flush()
        os.replace(path + '.tmp', path)

    def path(self, stamp):
        return os.path.join(self.out, f'{self.dataset}_{stamp}.csv')

    def pick_stamp(self, checkpoint):
        if checkpoint:
            home = os.path.dirname(checkpoint['path']) or '.'
            newest = next(iter(checkpoints(home, (self.dataset, checkpoint['stamp']))), checkpoint)
            if os.path.samefile(home, self.out) and newest['saved'] == checkpoint['saved']:
                return checkpoint['stamp']
        stamp = time.strftime('%Y_%m_%d-%H_%M')
        return next(name for name in [stamp, *(f'{stamp}_{n}' for n in range(2, 1000))]
                    if not os.path.exists(self.path(name)))

    def read(self, checkpoint):
        """The rows of a checkpoint's run, as far as its .csv can be read."""
        path = os.path.join(os.path.dirname(checkpoint['path']), os.path.basename(self.path(checkpoint['stamp'])))
        rows = []
        with contextlib.suppress(OSError, csv.Error):
            with open(path, newline='', errors='replace') as file:
                rows.extend(row for row in csv.DictReader(file) if None not in row.values())  # a full disk cuts rows
        return rows

    def note(self, row):
        """Remember what the curves need. Raises ValueError or TypeError where a value is missing."""
        if row.get('fentropy_G', '') != '':
            values = [float(row[name]) for name in ('epoch', 'iteration', 'fentropy_G', 'fentropy_D', 'seconds')]
            self.seconds = values.pop()
            self.losses.append(values)

    def curves(self, num_batches):
        """What `visual.plot` draws: the iterations since the start of the run, and the entropies there."""
        epoch, iteration, G, D = np.array(self.losses).T
        return epoch * max(num_batches or 0, iteration.max()) + iteration, {'G': G, 'D': D}

    def write(self, **row):
        """Append a row; `seconds` counts from the row before. A full disk is said, and does not end the run."""
        if 'seconds' in row:
            row['seconds'] = round(self.seconds + row['seconds'], 3)
            self.note(row)
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:
            print(f'WARNING: the .csv cannot be written: {error}; the run goes on')

    def close(self):
        with contextlib.suppress(OSError):  # said by `write`
            self.file.close()


def params(mod):
    """{name: each device's copy} of a network's parameters and the first device's moving averages, named as MXNet's
    own checkpoints name them."""
    group = mod._exec_group
    return {**{f'arg:{name}': copies for name, copies in zip(mod._param_names, group.param_arrays)},
            **{f'aux:{name}': copies[:1] for name, copies in zip(mod._aux_names, group.aux_arrays)}}


def optimizer_state(net, mod):
    """{name: each device's copy} of Adam's step count and moments, and of the other devices' moving averages."""
    num_ctx = len(mod._context)
    arrays = {f'{net}.count': [mx.nd.array([mod._optimizer.num_update], dtype='int64')]}
    for i, name in enumerate(mod._param_names):
        moments = zip(*(mod._updater.states[i * num_ctx + k] for k in range(num_ctx)))
        arrays[f'{net}.mean.{name}'], arrays[f'{net}.var.{name}'] = moments
    for name, copies in zip(mod._aux_names, mod._exec_group.aux_arrays):
        arrays.update({f'{net}.{k}.{name}': [copies[k]] for k in range(1, num_ctx)})
    return arrays


def save(s, modules, log, epoch, iteration, sums, complete):
    """Save the run as it is after `iteration` of `epoch`: whole, or not at all.

    Every file is written to a temporary folder, read back, flushed to disk and then renamed; the manifest, which has
    the others' hashes, comes last, and without it the rest does not count. Where this fails (a full disk), one line
    says so and the next save tries again.
    """
    tag = log.stamp if complete else f'{log.stamp}-iter{iteration}'
    files, state = {}, {}
    for net, mod in zip('GD', modules):
        arrays = {name: copies[0] for name, copies in params(mod).items()}
        files[f'{log.dataset}_{net}_{tag}-symbol.json'] = mod.symbol.save
        files[f'{log.dataset}_{net}_{tag}-{epoch:04d}.params'] = functools.partial(mx.nd.save, data=arrays)
        state.update({name: copies[0] for name, copies in optimizer_state(net, mod).items()})
    files[f'{log.dataset}_{tag}-{epoch:04d}.states'] = functools.partial(mx.nd.save, data=state)
    saved = max([time.time(), *(other['saved'] + 0.001 for other in checkpoints(log.out))])  # clocks may be set back
    manifest = {'dataset': log.dataset, 'stamp': log.stamp, 'epoch': epoch, 'iteration': iteration, 'metrics': sums,
                'complete': complete, 'saved': saved, 'settings': vars(s), 'workers': log.workers, 'files': {},
                'versions': {'mxnet': mx.__version__, 'numpy': np.__version__, 'python': platform.python_version()}}

    def write_manifest(path):
        with open(path, 'w') as file:
            json.dump(manifest, file, indent=1, default=str)

    files[f'{log.dataset}_{tag}-{epoch:04d}.json'] = write_manifest
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=log.out) as scratch:
            for name, write in files.items():
                path = os.path.join(scratch, name)
                write(path)
                if not name.endswith('.json'):
                    load_arrays(path)
                flush(path)
                manifest['files'][name] = sha256(path)
            for name in files:
                os.replace(os.path.join(scratch, name), os.path.join(log.out, name))
        flush(log.out)
    except (OSError, ValueError, mx.MXNetError) as error:
        print(f'WARNING: checkpoint of epoch {epoch} not saved: {last_line(error)}')
    else:
        log.saved = os.path.join(log.out, name)
        prune(log)


def flush(path):
    """Make sure that a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def prune(log):
    """Keep the optimiser's state of this run's newest two checkpoints only, and none from within a finished epoch."""
    mine = checkpoints(log.out, (log.dataset, log.stamp))
    newest = [manifest for manifest in mine if manifest['complete'] or not mine[0]['complete']][:2]
    for manifest in mine:
        for name in [os.path.basename(manifest['path']), *manifest['files']]:
            if manifest not in newest and (name.endswith('.states') or not manifest['complete']):
                with contextlib.suppress(OSError):  # it may stay
                    os.remove(os.path.join(log.out, name))


def read_manifest(path):
    """A checkpoint's manifest, plus its `path`; raises ValueError where it is none. Does not look at the files."""
    try:
        if os.path.getsize(path) > 1 << 20:
            raise ValueError('too large')
        with open(path, 'rb') as file:
            manifest = json.load(file)
        kinds = {'dataset': str, 'stamp': str, 'epoch': int, 'iteration': int, 'metrics': list, 'complete': bool,
                 'saved': float, 'settings': dict, 'workers': int, 'files': dict}
        for key, kind in kinds.items():
            if type(manifest[key]) is not kind:
                raise ValueError(f'{key} is wrong')
        names = [manifest['dataset'], manifest['stamp'], *manifest['files']]
        if not all(name.isprintable() and os.path.basename(name) == name for name in names):
            raise ValueError('a name is wrong')
        if min(manifest['epoch'], manifest['iteration']) < 0 or not math.isfinite(manifest['saved']):
            raise ValueError('a number is wrong')
        manifest['metrics'] = [(float(total), float(count)) for total, count in manifest['metrics']]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: no manifest of a checkpoint ({last_line(error)})') from None
    return {**manifest, 'path': path}


def checkpoints(folder, run=None, say=False):
    """The manifests in a folder, or of one run (dataset, stamp) there, newest first; with `say`, also a line for each
    that is missing or wrong."""
    found, folder = [], glob.escape(folder)
    paths = set(glob.glob(f'{folder}/*-[0-9][0-9][0-9][0-9]*.json'))
    for path in glob.glob(f'{folder}/*_G_*-[0-9][0-9][0-9][0-9]*.params'):
        paths.add('_'.join(path[:-len('.params')].rsplit('_G_', 1)) + '.json')
    for path in paths:
        try:
            found.append(read_manifest(path))
        except (ValueError, OSError) as error:
            if say:
                print(f'{last_line(error)}: the checkpoint does not count')
    found = [manifest for manifest in found if run in (None, (manifest['dataset'], manifest['stamp']))]
    return sorted(found, key=lambda manifest: manifest['saved'], reverse=True)


def find_checkpoint(resume, out, kinds=('_G_', '_D_', '.states')):
    """The manifest that `resume` means ('latest', a folder or a .json), its files of those kinds hashed and whole."""
    if resume == 'latest' or os.path.isdir(resume):
        folder = out if resume == 'latest' else resume
        for manifest in checkpoints(folder, say=True):
            try:
                return whole(manifest, kinds)
            except ValueError as error:
                print(f'{error}; taking the one before')
        raise ValueError(f'resume = {resume!r}: no whole checkpoint in {folder}; empty it to start anew')
    if not resume.endswith('.json') or not os.path.isfile(resume):
        raise ValueError(f"resume = {resume!r}: must be 'latest', a folder or a checkpoint's .json")
    return whole(read_manifest(resume), kinds)


def whole(manifest, kinds):
    """The manifest, if each kind of file is there with the hash that it should have."""
    for kind in kinds:
        names = [name for name in manifest['files'] if kind in name and name.endswith(('.params', '.states'))]
        if len(names) != 1:
            raise ValueError(f'{manifest["path"]}: names no file {kind}')
        path = os.path.join(os.path.dirname(manifest['path']), names[0])
        if not os.path.isfile(path):
            raise ValueError(f'{path}: is missing, the checkpoint does not count (the state of Adam is kept for '
                             'the newest two; sample works without it)')
        if sha256(path) != manifest['files'][names[0]]:
            raise ValueError(f'{path}: is damaged, the checkpoint does not count')
        manifest[kind] = path
    return manifest


def fits(s, dataset, checkpoint, workers=1):
    """Raise ValueError where a checkpoint is of other networks or data; say where it is of another run."""
    was, now = {**checkpoint['settings'], 'workers': checkpoint['workers']}, {**vars(s), 'workers': workers}
    for name in ('ngf', 'ndf', 'nc', 'Z', 'conditional'):
        if was.get(name) != now[name]:
            raise ValueError(f'{checkpoint["path"]}: made with {name} = {was.get(name)!r}, the settings say '
                             f'{now[name]}')
    for name in ('batch_size', 'lr', 'beta1', 'seed', 'workers') if not s.sample else ():
        if was.get(name) != now[name]:
            print(f'WARNING: {name} was {was.get(name)!r} and is {now[name]}: the run goes on, but is not the same run')
    if dataset not in ('', checkpoint['dataset']):
        raise ValueError(f'{checkpoint["path"]}: trained on {checkpoint["dataset"]}, the data is {dataset}')


def load_arrays(path):
    """What `mx.nd.save` wrote, as {name: NumPy array}; raises ValueError where it is anything else.

    MXNet's own reader believes every length in the file (ndarray.cc, `NDArray::Load`); this one checks first.
    """
    with open(path, 'rb') as file:
        content = file.read()
    offset, arrays = 0, []

    def take(layout):
        nonlocal offset
        values = struct.unpack_from('<' + layout, content, offset)
        offset += struct.calcsize('<' + layout)
        return values

    try:
        magic, _, count = take('QQQ')
        if magic != 0x112:
            raise ValueError('wrong magic number')
        for _ in range(count):
            magic, storage, ndim = take('IiI')
            if magic != 0xF993fac9 or storage:
                raise ValueError('not an array')
            shape = take(f'{ndim}Q')
            dtype = np.dtype(('f4', 'f8', 'f2', 'u1', 'i4', 'i1', 'i8')[take('iii')[2]])
            arrays.append(np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape))
            offset += arrays[-1].nbytes
        names = [take(f'{take("Q")[0]}s')[0].decode() for _ in range(take('Q')[0])]
        if len(names) != count or len(set(names)) != count or offset != len(content):
            raise ValueError('names and arrays do not match')
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f'{path}: not a whole file of MXNet arrays ({last_line(error)})') from None
    return dict(zip(names, arrays))


def load_into(path, targets):
    """Fill `targets`, {name: list of NDArrays}, from a file that must have just these names and shapes."""
    arrays = load_arrays(path)
    expected = {(name, copies[0].shape) for name, copies in targets.items()}
    found = {(name, array.shape) for name, array in arrays.items()}
    if expected != found:
        raise ValueError(f'{path}: does not fit these networks and devices ({min(expected ^ found)[0]})')
    for name, copies in targets.items():
        for copy in copies:
            copy[:] = arrays[name]


def restore(modules, checkpoint):
    """Put modules into the state that a checkpoint holds; returns where `train_loop` is to start."""
    state = {}
    for net, mod in zip('GD', modules):
        load_into(checkpoint[f'_{net}_'], params(mod))
        state.update(optimizer_state(net, mod))
    load_into(checkpoint['.states'], state)
    for net, mod in zip('GD', modules):
        # from here on Adam's bias correction counts
        mod._optimizer.begin_num_update = mod._optimizer.num_update = int(state[f'{net}.count'][0].asscalar())
    if checkpoint['complete']:
        return checkpoint['epoch'] + 1, 0, ()
    return checkpoint['epoch'], checkpoint['iteration'], checkpoint['metrics']


# ---------------------------------------------------------------- sampling

def fixed_latents(s, n):
    """(n, Z) latents, and for a conditional G n digits, else None: the same for the same seed; out of NumPy's stream,
    so that training does not notice."""
    wanted = s.digits if s.sample else '0123456789'
    return (np.random.RandomState(s.seed).normal(size=(n, s.Z)).astype(np.float32),
            np.resize([int(digit) for digit in wanted], n) if s.conditional else None)


def generate(modG, latent, digits=None):
    """(n, Z) latents, and for a conditional G n digits -> (n, nc, 64, 64) in [-1, 1], by the moving averages."""
    n, batch_size = len(latent), modG.data_shapes[0].shape[0]
    if digits is not None:
        latent = np.concatenate([latent, np.eye(10, dtype=np.float32)[digits]], axis=1)
    full = np.resize(latent, (-(-n // batch_size) * batch_size, latent.shape[1], 1, 1))
    return modG.predict(mx.io.NDArrayIter({'rand': full}, batch_size=batch_size)).asnumpy()[:n]


def finish_epoch(s, modG, log, coverage, epoch, iteration):
    """At the end of an epoch: a mosaic of always the same latents, and the coverage of 1,000 generated images."""
    latent, digits = fixed_latents(s, s.batch_size)
    images = generate(modG, latent, digits)
    visual.visual(f'gout-{epoch:04d}', images, s.out, False, 10 if s.conditional else None)
    if coverage:
        latent, digits = fixed_latents(s, 1000)
        coverage.reset()
        coverage.update([digits] if s.conditional else [], [generate(modG, latent, digits)])
        row = dict(coverage.get_name_value())
        shares = ' '.join(f'{100 * row[f"share_{digit}"]:.0f}' for digit in range(10))
        print(f'epoch: {epoch} digits: {row["digits"]} of 10, shares: {shares} %, confidence: {row["confidence"]:.2f}, '
              f'KL: {row["kl"]:.3f}')
        if s.conditional:
            print(f'epoch: {epoch} digits as asked: {100 * row["asked"]:.0f} %, of the worst '
                  f'{100 * row["asked_worst"]:.0f} %')
        log.write(epoch=epoch, iteration=iteration, **row)


def make_samples(s):
    """Write `sample.png`, the single images and `walk.png` to `out`, from the checkpoint's G; needs no data."""
    checkpoint = find_checkpoint(s.resume, s.out, kinds=('_G_',))
    fits(s, '', checkpoint)
    gout, _ = make_dcgan_sym(s.ngf, s.ndf, s.nc)
    modG = mx.mod.Module(gout, data_names=('rand',), label_names=None, context=s.ctx[0])
    batch_size = min(s.sample, s.batch_size)
    modG.bind(data.RandIter(batch_size, s.Z, conditional=s.conditional).provide_data, for_training=False)
    modG.init_params()
    load_into(checkpoint['_G_'], params(modG))
    folder = os.path.join(s.out, 'sample')
    os.makedirs(folder, exist_ok=True)
    latent, digits = fixed_latents(s, s.sample)
    images = generate(modG, latent, digits)
    visual.save(os.path.join(s.out, 'sample.png'), visual.tile(images, len(s.digits) if s.conditional else None))
    for old in glob.glob(os.path.join(glob.escape(folder), '[0-9]' * 5 + '.png')):
        os.remove(old)
    for i, image in enumerate(images):
        visual.save(os.path.join(folder, f'{i:05d}.png'), visual.tile(image[None]))
    # DCGAN paper, section 6.1; along an arc, for between two Gaussian vectors a straight line passes too near to 0
    rows, steps = 6, 10
    points, digits = fixed_latents(s, rows + 1)
    arc = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None]
    walk = np.concatenate([np.cos(arc) * a + np.sin(arc) * b for a, b in zip(points, points[1:])])
    images = generate(modG, walk, digits if digits is None else np.repeat(digits[:rows], steps))
    visual.save(os.path.join(s.out, 'walk.png'), visual.tile(images, steps))
    print(f'{s.sample} images of {checkpoint["path"]}: {s.out}/sample.png, one by one in {folder}/; {s.out}/walk.png')


# ---------------------------------------------------------------- several machines

DEAD = 15  # seconds without a heartbeat after which a process counts as dead
ALONE = 60  # seconds to wait for the other processes at the start


def connect(s):
    """The dist_sync key-value store, once every process of the cluster is there; None for a single machine."""
    if 'dist' not in s.kvstore:
        if role:
            raise ValueError(f"kvstore = {s.kvstore!r}, but DMLC_ROLE={role} is set: kvstore must be 'dist_sync', or "
                             'the variable unset')
        return None
    for name in ('DMLC_ROLE', 'DMLC_PS_ROOT_URI', 'DMLC_PS_ROOT_PORT', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER'):
        value = os.environ.get(name, '')
        if not value or ('PORT' in name or 'NUM' in name) and not value.isdigit():
            raise ValueError(f"{name}={value!r}: kvstore = 'dist_sync' needs it (README, several machines)")
    if role not in ('worker', 'server', 'scheduler'):
        raise ValueError(f'DMLC_ROLE={role!r}: must be worker, server or scheduler')
    alone = threading.Timer(ALONE, give_up, [f'the cluster is not complete after {ALONE} s: are the scheduler at '
                            f'{os.environ["DMLC_PS_ROOT_URI"]}:{os.environ["DMLC_PS_ROOT_PORT"]}, '
                            f'{os.environ["DMLC_NUM_SERVER"]} server(s) and {os.environ["DMLC_NUM_WORKER"]} '
                            'worker(s) running, with the same DMLC_ variables?'])
    alone.daemon = True
    alone.start()
    kv = mx.kv.create('dist_sync')  # a worker waits here for all the others
    kv.closing = threading.Event()
    kv.watcher = threading.Thread(target=watch, args=(kv, alone), daemon=True)
    kv.watcher.start()
    if role == 'worker':
        alone.cancel()
        kv.init('vote', mx.nd.zeros(2))
    else:
        from mxnet.kvstore.kvstore_server import KVStoreServer
        KVStoreServer(kv).run()  # until the workers are done
        sys.exit()
    return kv


def disconnect(kv):
    """Leave the cluster together with the other workers; MXNet aborts where it is left to Python's own end."""
    kv._barrier()  # the first worker may still be counting digits, or saving
    kv.closing.set()
    kv.watcher.join()
    late = threading.Timer(ALONE, give_up, [f'the other workers have not ended within {ALONE} s'])
    late.start()
    mx.base.check_call(mx.base._LIB.MXKVStoreFree(kv.handle))
    kv.handle = mx.base.KVStoreHandle()
    late.cancel()


def watch(kv, alone):
    """End this process when another one dies: the scheduler hears every heartbeat, the others the scheduler's."""
    dead = ctypes.c_int()
    while not dead.value:
        if kv.closing.wait(2):
            return
        with contextlib.suppress(mx.MXNetError):  # ps-lite has no rank to tell before the cluster is complete
            kv.rank
            alone.cancel()
            mx.base._LIB.MXKVStoreGetNumDeadNode(kv.handle, 7, ctypes.byref(dead), DEAD)
    give_up(f'a process of the cluster has died (no heartbeat for {DEAD} s); start all again, resume = \'latest\'')


def give_up(message):
    """End this process now: MXNet's own end would wait for the others."""
    print(f'dcgan.py: {message}', file=sys.stderr, flush=True)
    os._exit(1)


def vote(kv, *flags):
    """The sum of each flag over the workers, known to all of them. Waits for the network, not for a device: the
    steps that are queued go on meanwhile."""
    if not kv:
        return flags
    kv.push('vote', mx.nd.array(flags))
    total = mx.nd.zeros(len(flags))
    kv.pull('vote', out=total)
    return total.asnumpy().astype(int)


# ---------------------------------------------------------------- main

def load_data(s, rank=0, workers=1):
    """The data's name, the iterator over this worker's share, and what `Coverage` needs of it, or None."""
    if s.dataset == 'imagenet':
        shape = (3, data.SIZE, data.SIZE)
        return s.dataset, data.ImagenetIter(s.imgnet_path, s.batch_size, shape, s.ctx[0], workers, rank), None
    name = s.dataset
    if name == 'mnist':
        try:
            X, _, y, _ = data.get_mnist(s.mnist_path, labels=True)
        except OSError as error:
            if s.mnist_path or not s.fallback or workers > 1:  # several may not each decide on other data
                raise
            print(f"WARNING: {error}. Training on scikit-learn's 8x8 digits instead")
            name = 'digits'
    if name == 'digits':
        X, _, y, _ = data.get_digits(labels=True)
    share = len(X) // workers
    if s.batch_size > share:
        raise ValueError(f'batch_size = {s.batch_size}: larger than the data, {share} images a worker')
    mine = slice(rank * share, (rank + 1) * share)
    return name, data.PixelIter(X[mine], y[mine], s.batch_size, s.nc, s.ctx[0], s.conditional), (X, y)


def print_networks(s, modules):
    """A table of each network's layers; with `plot` also a picture."""
    for net, mod in zip('GD', modules):
        shapes = dict([*mod.data_shapes, *(mod.label_shapes or ())])
        mx.viz.print_summary(mod.symbol, shapes)
        if s.plot and shutil.which('dot'):
            picture = mx.viz.plot_network(mod.symbol, shape=shapes, save_format='png')
            try:
                picture.render(os.path.join(s.out, f'net_{net}'), cleanup=True)
            except subprocess.CalledProcessError as error:
                print(f'WARNING: no picture of {net}: {error}')


def run(s, stop):
    """Train, with errors as exceptions; `s` is checked."""
    kv = connect(s)
    rank, workers = (kv.rank, kv.num_workers) if kv else (0, 1)
    head = rank == 0  # the one that prints, shows and saves
    with contextlib.ExitStack() as stack:
        if head:
            print('settings:', *(f'{name}={value!r}' for name, value in vars(s).items()))
            print(f'device: {", ".join(map(str, s.ctx))}; {os.environ["OMP_NUM_THREADS"]} CPU threads')
            stack.enter_context(alone_in(s.out))
        else:
            stack.enter_context(contextlib.redirect_stdout(None))
        checkpoint = find_checkpoint(s.resume, s.out) if s.resume else None
        dataset, train_iter, real = load_data(s, rank, workers)
        if checkpoint:
            fits(s, dataset, checkpoint, workers)
        rand_iter = data.RandIter(s.batch_size, s.Z, s.ctx[0], s.conditional)
        modules = make_modules(s, train_iter.provide_data, rand_iter.provide_data, kv)
        start = restore(modules, checkpoint) if checkpoint else (0, 0, ())
        log = coverage = None
        if head:
            log = stack.enter_context(contextlib.closing(Log(s.out, dataset, checkpoint, workers)))
            coverage = Coverage(*real) if s.coverage and real else None
            print_networks(s, modules)
            print(f'data: {dataset}; run: {log.path(log.stamp)}')
            print('metric: facc, fentropy of G, of D; then images/s; time left in the epoch, in the run')
        stopped = train_loop(s, modules, train_iter, rand_iter, start, kv, log, coverage, stop)
    if head and stopped:
        kept = f"last checkpoint: {log.saved}; to go on: resume = 'latest'" if log.saved else 'nothing was saved'
        print(f'stopped in epoch {stopped[0]} after iteration {stopped[1]}; {kept}')
    elif head:
        more = "; more: raise epochs, resume = 'latest'; images: sample = 64, resume = 'latest'" if log.saved else ''
        print(f'done: everything is in {s.out}/{more}')
    if kv:
        disconnect(kv)
    if stopped:
        sys.exit(128 + (stop.signum or signal.SIGTERM))


def train(settings):
    """Train as the settings say; with `sample`, make images instead.

    Raises SystemExit: with one line that says what is wrong and what to do, or with 130 (Ctrl-C) or 143 (SIGTERM).
    """
    paths = {name: os.fspath(value) for name, value in vars(settings).items() if isinstance(value, os.PathLike)}
    ctx = settings.ctx
    s = dataclasses.replace(settings, ctx=list(ctx) if isinstance(ctx, (list, tuple)) else [ctx], **paths)
    with contextlib.suppress(AttributeError):  # not every stdout is a file
        sys.stdout.reconfigure(line_buffering=True)
    try:
        check(s)
        if s.sample:
            return make_samples(s)
        with Stop() as stop:
            run(s, stop)
    except (ValueError, OSError, mx.MXNetError) as error:
        if role:  # the end of a worker would wait for the others
            give_up(last_line(error))
        sys.exit(f'dcgan.py: {last_line(error)}')
    except KeyboardInterrupt:  # while samples are made: elsewhere `Stop` takes it
        sys.exit(130)


if __name__ == '__main__':
    train(Settings())

"""How fast the program is, and beside what: one command without arguments, about twenty minutes, tables on stdout.

    python tests/benchmark.py                                       # the README says in what environment

Whatever is measured runs in a process of its own (this file again, with a function's name), one after another and
interleaved, so that a slow minute of the machine is not one candidate's alone. Leave the machine alone meanwhile.
One table or one figure alone, and of another version of the program (a folder with its dcgan.py):

    python tests/benchmark.py host_costs                            # or: compare 2 (cores)
    CHECKOUT=../other python tests/benchmark.py program 64 64 30    # batch, width, iterations: steps/s, the last line

The tables, with figures of the first version from a faster machine than the README's (two cores; (a) 153 images/s):

- The README explains (a) to (d): this program, the textbook loop twice, PyTorch. Beside them stand products of two
  2048x2048 float32 matrices: (e) by OpenBLAS, from NumPy and from MXNet, 251 GFLOP/s; (f) by oneDNN, which also
  computes the convolutions, 486 GFLOP/s. OpenBLAS may know fewer vector instructions than oneDNN.
- To compare with these, (a) is counted in GFLOP: 2.24 an image, from the shapes of the layers. A step goes through a
  network eleven times. D is passed forward three times, backward to its weights twice and to its input three times;
  G once each. A multiply-add is two operations; nothing else is counted. 153 images/s are 343 GFLOP/s.
- Other batches at width 64, images/s: 16: 132, 32: 153, 64: 153, 128: 159, 256: 155.
- Other widths (ngf = ndf) at batch 64, images/s: 16: 1195, 32: 461, 64: 153, 128: 41.
- What the host costs: networks of width 1, where hardly anything is left to compute. A GPU computes the networks; the
  rest stays with the host, and while the host makes a line and its pictures the GPU waits.
- Memory: the second module of step 7 costs 3 MB.
- Several machines, here a server and the workers on two cores: one worker 133 images/s, two with a thread each 144.
  A worker sends 25 MB of gradients a step and receives as many. The batch per worker from which on a server's link
  takes less time than a GPU of 5,000 images/s, with as many servers as workers (else times workers / servers):

      network       smallest batch
      1 Gbit/s      1,015
      10 Gbit/s     102
      25 Gbit/s     41
"""
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.environ.get('CHECKOUT') or os.path.dirname(HERE), HERE]

REPETITIONS = 5
ITERATIONS = 30         # of the program: a line every ten; what comes before the first is warm-up
TEXTBOOK_STEPS = 6, 15  # with MXNet's own threads, with all cores
TORCH_STEPS = 8
PRODUCTS, SIZE = 12, 2048  # how many, and rows and columns of each matrix
BATCH, WIDTH, NC, Z = 64, 64, 1, 100  # the program's defaults
BATCHES, WIDTHS, FEW, MORE = (16, 32, 64, 128, 256), (16, 32, 64, 128), 20, 40  # iterations: of large ones, of small
CLUSTER_ITERATIONS = 20
LINE = 10               # iterations from a printed line to the next
EPOCH = 670             # iterations for `host`: 140 epochs have 9,380 lines, which MNIST has after 100
WARM_UP, LINES = 2, 20  # lines: before the measured ones, measured
HOST_REPETITIONS = 3
TIMEOUT = 600  # seconds for any one process
GPU, NETWORKS = 5000, (1, 10, 25)  # images/s; Gbit/s
# milliseconds, `host_costs` of the version before (commit 135f12a, NumPy 1.26), a few minutes after the figures of the
# version that the README describes: a step and a tenth of a line 23.0 after 100 lines, 22.6 after 9,380
BEFORE = {
    'a step': 22.4, 'queueing a step, processor time': 1.7,
    'a step and a tenth of a line after 100 lines': 26.9, 'a line with pictures after 100 lines': 37.2,
    'a line with pictures after 100 lines, processor time': 35.5,
    'a step and a tenth of a line after 9,380 lines': 29.0, 'a line with pictures after 9,380 lines': 57.0,
    'a line with pictures after 9,380 lines, processor time': 54.6}


# ---------------------------------------------------------------- what runs in a process of its own

def digits(n, scale):
    """(n, 8 * scale, 8 * scale) pixels, 0..16: scikit-learn's digits, enlarged and repeated."""
    from sklearn.datasets import load_digits
    return np.kron(np.resize(load_digits().images, (n, 8, 8)), np.ones((1, scale, scale)))


def images(n):
    """(n, 1, 64, 64) float32 in [-1, 1]."""
    return (digits(n, 8)[:, None] / 8 - 1).astype(np.float32)


def write_mnist(folder, n):
    """MNIST's four files with n training images: as many batches as wanted, in one epoch."""
    pixels = np.resize(np.pad(digits(1797, 3) * 15, ((0, 0), (2, 2), (2, 2))).astype(np.uint8), (n, 28, 28))
    for part, count in (('train', n), ('t10k', 1)):
        with open(os.path.join(folder, f'{part}-images-idx3-ubyte'), 'wb') as file:
            file.write(struct.pack('>4I', 0x803, count, 28, 28) + pixels[:count].tobytes())
        with open(os.path.join(folder, f'{part}-labels-idx1-ubyte'), 'wb') as file:
            file.write(struct.pack('>2I', 0x801, count) + bytes(count))


def on_digits(folder, iterations, workers=1, **settings):
    """The settings of a run on the CPU with as many iterations an epoch and no work at its end but a picture."""
    import dcgan
    write_mnist(folder, settings.get('batch_size', BATCH) * iterations * workers)
    return dcgan.Settings(**{**dict(
        dataset='mnist', mnist_path=folder, out=os.path.join(folder, 'out'), batch_size=BATCH, nc=NC, Z=Z, epochs=1,
        ctx=dcgan.mx.cpu(), display=False, coverage=False, check_point=False), **settings})


def program(batch_size, width, iterations, workers=0):
    """Steps/s of the program's own loop from the first line to the last, everything that it does there included.

    `iterations`: a multiple of ten; `workers`: of a cluster, which the environment describes.
    """
    import dcgan
    step, times = dcgan.train_step, []

    def timed_step(*args):
        if len(times) in (LINE, iterations):
            dcgan.mx.nd.waitall()  # at both ends of what is measured no work is left in the queue
        times.append(time.perf_counter())
        return step(*args)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(dcgan, 'train_step', timed_step):
        dcgan.train(on_digits(  # and one iteration more, which begins when the last line is done
            folder, iterations + 1, max(1, workers), batch_size=batch_size, ngf=width, ndf=width,
            kvstore='dist_sync' if workers else 'device'))
    return (iterations - LINE) / (times[iterations] - times[LINE])


def bare():
    """Milliseconds of a step of networks of width 1, and of this thread's processor time for its call, which only
    queues it; for each ten steps."""
    import dcgan
    data = dcgan.data
    s = dcgan.Settings(ctx=[dcgan.mx.cpu()], ngf=1, ndf=1, nc=NC, Z=Z, batch_size=BATCH)
    pixels = (digits(LINE * BATCH, 8)[:, None] * 15).astype(np.uint8)
    train_iter = data.PixelIter(pixels, np.zeros(len(pixels)), BATCH, NC, s.ctx[0])
    rand_iter = data.RandIter(BATCH, Z, s.ctx[0])
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data)
    labels, steps = [f(BATCH) for f in (dcgan.mx.nd.zeros, dcgan.mx.nd.ones)], []
    for _ in range(WARM_UP + LINES):
        began, queueing = time.perf_counter(), 0
        train_iter.reset()
        for batch in train_iter:
            rbatch = rand_iter.next()
            call = time.thread_time()
            dcgan.train_step(*modules, rbatch, batch, *labels)
            queueing += time.thread_time() - call
        dcgan.mx.nd.waitall()
        steps.append((1000 * (time.perf_counter() - began) / LINE, 1000 * queueing / LINE))
    return steps[WARM_UP:]


class Clock:
    """Stands in for `train_step` in a run that is to be measured after as many lines.

    The lines before are the loop's own, but without steps (all have the first one's results) and without pictures:
    with them they would take hours. `marks`: at the first step after each measured line the time, then so far the
    seconds outside of the steps, this thread's processor seconds there, and the mosaics.
    """

    def __init__(self, lines, step, tile, waitall):
        self.step, self.tile, self.waitall = step, tile, waitall
        self.first, self.last = LINE * lines, LINE * (lines + WARM_UP + LINES)  # the calls that are steps
        self.calls = self.mosaics = 0
        self.outside, self.end = np.zeros(2), self.now()
        self.marks, self.skipping = [], contextlib.ExitStack()

    @staticmethod
    def now():
        return np.array([time.perf_counter(), time.thread_time()])

    def __call__(self, *args):
        now = self.now()
        self.outside += now - self.end
        if self.calls == self.first:
            self.skipping.close()
        if self.first + LINE * WARM_UP <= self.calls <= self.last and self.calls % LINE == 0:
            self.marks.append((now[0], *self.outside, self.mosaics))
        if self.calls == 0 or self.first <= self.calls < self.last:
            self.result = self.step(*args)
        if self.calls in (0, self.last):
            self.skip(*args[3:5])
        self.calls += 1
        if self.calls % LINE == 0:
            self.waitall()  # what follows is the line, which would wait for the steps
        self.end = self.now()
        return self.result

    def skip(self, latents, batch):
        """Until `skipping` is closed have no pictures and always the same batches."""
        from dcgan import data, visual

        def small(*args, **kwargs):
            return np.zeros((1, 1, 3), np.uint8)

        for place, name, function in ((visual, 'tile', small), (visual, 'plot', small),
                                      (data.PixelIter, 'getdata', lambda _: batch.data),
                                      (data.RandIter, 'next', lambda _: latents)):
            self.skipping.enter_context(mock.patch.object(place, name, function))

    def count_tile(self, *args, **kwargs):
        self.mosaics += 1
        return self.tile(*args, **kwargs)


def host(lines):
    """What the program's loop does beside the steps of networks of width 1, after as many lines: for each ten
    iterations and their line, the milliseconds, those outside of the steps, this thread's processor time in these, and
    whether there were pictures."""
    import dcgan
    visual = dcgan.visual
    clock = Clock(lines, dcgan.train_step, visual.tile, dcgan.mx.nd.waitall)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(dcgan, 'train_step', clock), \
            mock.patch.object(visual, 'tile', clock.count_tile):
        dcgan.train(on_digits(folder, EPOCH, ngf=1, ndf=1, epochs=lines * LINE // EPOCH + 1))
        (log,) = set(map(os.path.realpath, glob.glob(f'{folder}/out/**/*.csv', recursive=True)))
        with open(log) as file:
            if len(file.readlines()) <= lines + WARM_UP + LINES:
                raise RuntimeError('the log is shorter than it should be')
    return [(1000 * total, 1000 * outside, 1000 * busy, bool(mosaics))
            for total, outside, busy, mosaics in np.diff(clock.marks, axis=0).tolist()]


def textbook(steps):
    """Steps/s of the tests' textbook loop."""
    import textbook as loop
    X, times = images(BATCH * (steps + 3)), []

    class Images:
        def __getitem__(self, rows):  # once a step, when the one before has ended
            times.append(time.perf_counter())
            return X[rows]

    loop.train(Images(), steps + 3, WIDTH, WIDTH, NC, Z, BATCH, seed=1)
    return steps / (times[-1] - times[2])  # two to warm up


def pytorch(layout, cores, steps):
    """Steps/s of the DCGAN of pytorch/examples (dcgan/main.py) with the program's sizes."""
    import torch
    from torch import nn
    torch.set_num_threads(cores)
    torch.manual_seed(1)
    memory_format = getattr(torch, layout)
    up = [nn.ConvTranspose2d(Z, WIDTH * 8, 4, 1, 0, bias=False)]
    down = [nn.Conv2d(NC, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for k in (1, 2, 4):
        down += [nn.Conv2d(WIDTH * k, WIDTH * k * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(WIDTH * k * 2),
                 nn.LeakyReLU(0.2, inplace=True)]
    for k in (8, 4, 2, 1):
        up += [nn.BatchNorm2d(WIDTH * k), nn.ReLU(inplace=True),
               nn.ConvTranspose2d(WIDTH * k, WIDTH * k // 2 if k > 1 else NC, 4, 2, 1, bias=False)]
    netG = nn.Sequential(*up, nn.Tanh())
    netD = nn.Sequential(*down, nn.Conv2d(WIDTH * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid(), nn.Flatten(0))
    for layer in [*netG, *netD]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    netG, netD = netG.to(memory_format=memory_format), netD.to(memory_format=memory_format)
    adamG, adamD = (torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999)) for net in (netG, netD))
    loss, zeros, ones = nn.BCELoss(), torch.zeros(BATCH), torch.ones(BATCH)
    X = torch.from_numpy(images(BATCH * 4)).split(BATCH)
    for step in range(-3, steps):  # three to warm up
        if step == 0:
            start = time.perf_counter()
        real = X[step % 4].contiguous(memory_format=memory_format)
        # (1) update D: log(D(x)) + log(1 - D(G(z)))
        netD.zero_grad()
        answer = netD(real)
        loss_real = loss(answer, ones)
        loss_real.backward()
        seen = [answer.mean().item()]
        fake = netG(torch.randn(BATCH, Z, 1, 1))
        answer = netD(fake.detach())
        loss_fake = loss(answer, zeros)
        loss_fake.backward()
        seen += [answer.mean().item(), (loss_real + loss_fake).item()]
        adamD.step()
        # (2) update G: log(D(G(z)))
        netG.zero_grad()
        answer = netD(fake)
        loss_G = loss(answer, ones)
        loss_G.backward()
        seen += [answer.mean().item(), loss_G.item()]
        adamG.step()
        if not all(map(math.isfinite, seen)):
            raise ValueError(f'PyTorch: not finite: {seen}')
    return steps / (time.perf_counter() - start)


def product(function):
    """Matrix products/s of two SIZE x SIZE float32 matrices; the median one's."""
    a, b = np.random.RandomState(1).uniform(-1, 1, (2, SIZE, SIZE)).astype(np.float32)
    c, seconds = np.empty_like(a), []
    if function != 'numpy.dot':
        from dcgan import mx
        a, b, c = map(mx.nd.array, (a, b, a))
    for _ in range(2 + PRODUCTS):
        start = time.perf_counter()
        if function == 'numpy.dot':
            np.dot(a, b, out=c)
        elif function == 'mx.nd.dot':
            mx.nd.dot(a, b, out=c).wait_to_read()
        else:
            mx.nd.FullyConnected(a, b, num_hidden=SIZE, no_bias=True, out=c).wait_to_read()
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[2:])


def memory(twin):
    """Peak MB of a process that trains with the program's step; without the twin, D itself is used in step 7."""
    import dcgan
    data = dcgan.data
    mx, s, rand_iter = dcgan.mx, dcgan.Settings(ctx=[dcgan.mx.cpu()]), data.RandIter(BATCH, Z)
    data_shapes, label_shapes = [('data', (BATCH, NC, 64, 64))], [('label', (BATCH,))]
    if twin:
        modules = dcgan.make_modules(s, data_shapes, rand_iter.provide_data)
    else:
        gout, dloss = dcgan.make_dcgan_sym(WIDTH, WIDTH, NC)
        modG = mx.mod.Module(gout, data_names=('rand',), label_names=None)
        modG.bind(rand_iter.provide_data)
        modD = mx.mod.Module(dloss, data_names=('data',), label_names=('label',))
        modD.bind(data_shapes, label_shapes, inputs_need_grad=True)
        for mod in (modG, modD):
            mod.init_params(mx.init.Normal(0.02))
            mod.init_optimizer(s.kvstore, 'adam', {'learning_rate': s.lr, 'beta1': s.beta1, 'wd': 0.})
        modules = modG, modD, modD
    batch, label0, label1 = mx.io.DataBatch([mx.nd.array(images(BATCH))]), mx.nd.zeros(BATCH), mx.nd.ones(BATCH)
    for _ in range(5):
        dcgan.train_step(*modules, rand_iter.next(), batch, label0, label1)
        mx.nd.waitall()  # else the arrays of the steps in the queue count, and their number is chance
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sizes():
    """Bytes of G's and of D's parameters, which is also what their gradients have."""
    import dcgan
    inputs = {'rand': (BATCH, Z, 1, 1), 'data': (BATCH, NC, 64, 64), 'label': (BATCH,)}
    totals = []
    for symbol in dcgan.make_dcgan_sym(WIDTH, WIDTH, NC):
        names = symbol.list_arguments()
        shapes, _, _ = symbol.infer_shape(**{name: inputs[name] for name in names if name in inputs})
        totals.append(sum(4 * math.prod(shape) for name, shape in zip(names, shapes) if name not in inputs))
    return totals


# ---------------------------------------------------------------- starting them

def start(function, *args, **env):
    """Start a process that calls a function of this file, with `env` added to the environment; for `result`."""
    print(f'{time.strftime("%H:%M:%S")} {function}{args} {env or ""}', file=sys.stderr, flush=True)
    # each candidate finds its own number of threads, unless `env` has it
    inherited = {name: value for name, value in os.environ.items()
                 if name != 'OMP_NUM_THREADS' and not name.startswith('DMLC_')}
    out, err = tempfile.TemporaryFile('w+'), tempfile.TemporaryFile('w+')
    command = [sys.executable, os.path.abspath(__file__), function, *map(json.dumps, args)]
    return subprocess.Popen(command, env={**inherited, **env}, stdout=out, stderr=err, start_new_session=True), out, err


def result(child, seconds=TIMEOUT):
    """What the function returned. Raises RuntimeError with the last line of its error, or where it takes too long."""
    process, out, err = child
    try:
        status = process.wait(max(0, seconds))
        for file in (out, err):
            file.seek(0)
        if status:
            raise RuntimeError((err.read().strip().splitlines() or [f'exit status {status}'])[-1])
        return json.loads(out.read().splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise RuntimeError(f'not done after {seconds:.0f} s') from None
    finally:
        kill(process)


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session, and whoever is in it
    process.wait()


def cluster(workers, cores):
    """Steps/s of a scheduler, a server and workers on the loopback interface, the cores shared among the workers."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    roles = {'DMLC_PS_ROOT_URI': '127.0.0.1', 'DMLC_PS_ROOT_PORT': str(port), 'DMLC_INTERFACE': 'lo',
             'DMLC_NUM_WORKER': str(workers), 'DMLC_NUM_SERVER': '1'}
    args, children = ('program', BATCH, WIDTH, CLUSTER_ITERATIONS, workers), []
    try:
        for role in ('scheduler', 'server'):
            children.append(start(*args, **roles, DMLC_ROLE=role))
        threads = str(max(1, cores // workers))
        for _ in range(workers):
            children.append(start(*args, **roles, DMLC_ROLE='worker', OMP_NUM_THREADS=threads))
        end = time.monotonic() + TIMEOUT
        return min(result(child, end - time.monotonic()) for child in children[2:])
    finally:
        for process, _, _ in children:
            kill(process)


# ---------------------------------------------------------------- the tables

def machine(cores):
    """One line: processor, cores used, vector width, versions."""
    info = {}
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        info = dict(map(str.strip, line.split(':', 1)) for line in file if ':' in line)
    flags = info.get('flags', '').split()
    bits = next((bits for flag, bits in (('avx512f', 512), ('avx2', 256), ('sse2', 128)) if flag in flags), '?')
    versions = []
    for name in ('mxnet', 'torch', 'numpy'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f'{name} {importlib.metadata.version(name)}')
    return (f'{info.get("model name") or platform.processor() or platform.machine()}, {cores} physical cores used, '
            f'vectors of {bits} bits; Python {platform.python_version()}, {", ".join(versions)}')


def table(header, rows):
    """Print rows, sequences of strings, as a Markdown table; numbers to the right."""
    print('| ' + ' | '.join(header) + ' |')
    print('| --- |' + ' ---: |' * (len(header) - 1))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    print(flush=True)


def macs(first, width, last):
    """Multiply-adds of one image's way through G (from its input's channels to its output's), or, backwards, D."""
    channels = [first, width * 8, width * 4, width * 2, width, last]
    return sum(16 * a * b * side ** 2 for a, b, side in zip(channels, channels[1:], (1, 4, 8, 16, 32)))


def compare(cores):
    """The program beside the textbook loop, PyTorch and a matrix product; returns its images/s."""
    all_cores = {'OMP_NUM_THREADS': str(cores)}
    mxnets_own = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // 2))}  # what it takes by itself (src/engine/openmp.cc)
    candidates = {
        '(a) this program': (('program', BATCH, WIDTH, ITERATIONS), {}),
        "(b) textbook loop, MXNet's own number of threads": (('textbook', TEXTBOOK_STEPS[0]), mxnets_own),
        '(c) textbook loop, all physical cores': (('textbook', TEXTBOOK_STEPS[1]), all_cores),
        '(d) PyTorch': (('pytorch', 'contiguous_format', cores, TORCH_STEPS), {}),
        '(d) PyTorch, channels last': (('pytorch', 'channels_last', cores, TORCH_STEPS), {}),
        '(e) matrix product, numpy.dot': (('product', 'numpy.dot'), all_cores),
        '(e) matrix product, mx.nd.dot': (('product', 'mx.nd.dot'), all_cores),
        # by oneDNN, as the convolutions; the others are OpenBLAS's, which may know fewer vector instructions
        '(f) matrix product, mx.nd.FullyConnected': (('product', 'mx.nd.FullyConnected'), all_cores)}
    if not importlib.util.find_spec('torch'):
        print('PyTorch is not installed: (d) is left out.\n')
        candidates = {name: call for name, call in candidates.items() if name[:3] != '(d)'}
    rates = {name: [] for name in candidates}
    for _ in range(REPETITIONS):
        for name, (args, env) in candidates.items():
            unit = BATCH if name[1] in 'abcd' else 2 * SIZE ** 3 / 1e9
            rates[name].append(unit * result(start(*args, **env)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = {letter: max(rate for name, rate in medians.items() if name[1] == letter)
            for letter in {name[1] for name in medians}}
    # a unit is once through a network, forward, or backward to the input, or to the weights. D: forward three times,
    # backward to the weights twice and to the input three times; G: one of each
    flops = 2 * (8 * macs(1, WIDTH, NC) + 3 * macs(Z, WIDTH, NC))
    for letter in 'ef':
        best[letter] *= 1e9 / flops  # images/s at that rate
    table(['batch 64, width 64, float32', 'median', 'least .. most', ''], [
        (name, f'{medians[name]:.1f}', f'{min(values):.1f} .. {max(values):.1f}',
         'images/s' if name[1] in 'abcd' else 'GFLOP/s') for name, values in rates.items()])
    bars = {'b': ('(a) / (b)', '1.9'), 'c': ('(a) / (c)', '1.08'), 'd': ('(a) / best of (d)', '1.15'),
            'e': (f'(a), with {flops / 1e9:.2f} GFLOP an image, / best of (e)', '0.95'),
            'f': ('the same / (f)', '')}
    table(['ratio of medians', '', 'at least'], [
        (text, f'{best["a"] / best[letter]:.2f}', bar) for letter, (text, bar) in bars.items() if letter in best])
    return best['a']


def scaling(rate):
    """The program's images/s with other batches and widths; `rate` is the default's."""
    cells = []
    for batch, width in [(batch, WIDTH) for batch in BATCHES] + [(BATCH, width) for width in WIDTHS]:
        if (batch, width) == (BATCH, WIDTH):
            cells.append(f'{rate:.0f}')
        else:
            iterations = FEW if batch * width > BATCH * WIDTH else MORE
            cells.append(f'{batch * result(start("program", batch, width, iterations)):.0f}')
    table(['batch, at width 64', *map(str, BATCHES)], [('images/s', *cells[:len(BATCHES)])])
    table(['width (ndf = ngf), at batch 64', *map(str, WIDTHS)], [('images/s', *cells[len(BATCHES):])])


def host_costs():
    """What the host does for each step and each line, beside the version before."""
    calls = {'': ('bare',), ' after 100 lines': ('host', 100), ' after 9,380 lines': ('host', 9380)}
    runs = {name: [] for name in calls}
    for _ in range(HOST_REPETITIONS):
        for name, call in calls.items():
            runs[name].append(result(start(*call, OMP_NUM_THREADS='1')))
    figures = {'a step': [statistics.median(step for step, _ in run) for run in runs['']],
               'queueing a step, processor time': [statistics.median(call for _, call in run) for run in runs.pop('')]}
    for name, these in runs.items():
        figures[f'a step and a tenth of a line{name}'] = [
            statistics.mean(total for total, _, _, _ in run) / LINE for run in these]
        for drawn, which in (False, 'without'), (True, 'with'):
            lines = [[line for line in run if line[3] == drawn] for run in these]
            for column, kind in (1, ''), (2, ', processor time'):
                figures[f'a line {which} pictures{name}{kind}'] = [
                    statistics.median(line[column] for line in run) for run in lines if run]
    table(['networks of width 1, one thread; milliseconds', f'median of {HOST_REPETITIONS}', 'least .. most',
           'version before'], [
        (name, f'{statistics.median(ms):.1f}' if ms else 'none', f'{min(ms):.1f} .. {max(ms):.1f}' if ms else '',
         str(BEFORE.get(name, 'none'))) for name, ms in figures.items()])


def twin_memory():
    """What the module for input gradients costs."""
    peaks = [[result(start('memory', twin)) for twin in (False, True)] for _ in range(3)]
    without, with_twin = map(statistics.median, zip(*peaks))
    table(['peak memory, MB', 'D itself in step 7', 'with the input-gradient module', 'difference'],
          [('median of 3', f'{without:.0f}', f'{with_twin:.0f}', f'{with_twin - without:+.0f}')])


def clusters(cores):
    """Several machines: bytes, this machine's loopback, and what a network must be able to do."""
    G, D = result(start('sizes'))
    P = G + D
    print(f'dist_sync: each worker sends {P / 1e6:.1f} MB of gradients a step and receives as much '
          f'(G {G / 1e6:.1f}, D {D / 1e6:.1f}).\n')
    rows = []
    for workers in (1, 2):
        try:
            rate = cluster(workers, cores)
            rows.append((str(workers), str(max(1, cores // workers)), f'{rate:.2f}', f'{rate * BATCH * workers:.0f}'))
        except RuntimeError as error:
            rows.append((str(workers), str(max(1, cores // workers)), f'failed: {error}', ''))
    table(['workers (and a server) on this machine', 'threads each', 'steps/s', 'images/s together'], rows)
    # A server of S takes in and gives out W / S * P bytes a step for W workers, which compute for batch / (images/s)
    # seconds; at V bytes/s that is the longer one where V < W / S * P * (images/s) / batch. Little of it overlaps (step
    # 7 needs the updated D, the next step 1 the updated G): a step takes up to twice as long as on one machine there,
    # and with ten times that batch a tenth longer.
    table(['network', f'smallest batch per worker at {GPU:,} images/s, with as many servers as workers'], [
        (f'{V} Gbit/s', f'{math.ceil(8e-9 * P * GPU / V):,}') for V in NETWORKS])


def main():
    if len(sys.argv) > 1:  # a child, or one table
        function, *args = sys.argv[1:]
        found = globals()[function](*map(json.loads, args))
        if found is not None:
            print(json.dumps(found))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the finally clauses
    import joblib
    cores = joblib.cpu_count(only_physical_cores=True)
    print(machine(cores) + '\n', flush=True)
    scaling(compare(cores))
    host_costs()
    twin_memory()
    clusters(cores)


if __name__ == '__main__':
    main()

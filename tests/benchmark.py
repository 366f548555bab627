"""How fast the program is, and beside what: one command without arguments, about seven minutes, tables on stdout.

    python tests/benchmark.py              # tests/README.md says in what environment, and what the figures mean

Whatever is measured runs in a process of its own (this file again, with a function's name), one after another and
interleaved, so that a slow minute of the machine is not one candidate's alone. Leave the machine alone meanwhile.
One table or one figure alone, and of another version of the program (a folder with its dcgan.py):

    python tests/benchmark.py host_costs
    CHECKOUT=../other python tests/benchmark.py program 64 64 30    # batch, width, iterations: steps/s is the last line
"""
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
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

REPETITIONS = 3
ITERATIONS = 30           # of the program: a line every ten; what comes before the first is warm-up
TEXTBOOK_STEPS = 4, 8     # with MXNet's own threads, with all cores
TORCH_STEPS = 8
BATCH, WIDTH, NC, Z = 64, 64, 3, 100  # the program's defaults
LINE = 10                 # iterations from a printed line to the next
EPOCH = 670               # iterations for `host`: 140 epochs have 9,380 lines, which MNIST has after 100
WARM_UP, LINES = 2, 20    # lines: before the measured ones, measured
TIMEOUT = 600             # seconds for any one process


# ---------------------------------------------------------------- what runs in a process of its own

def digits(n, scale):
    """(n, 8 * scale, 8 * scale) pixels, 0..16: scikit-learn's digits, enlarged and repeated."""
    from sklearn.datasets import load_digits
    return np.kron(np.resize(load_digits().images, (n, 8, 8)), np.ones((1, scale, scale)))


def images(n):
    """(n, NC, 64, 64) float32 in [-1, 1]."""
    return np.repeat((digits(n, 8)[:, None] / 8 - 1).astype(np.float32), NC, axis=1)


def write_mnist(folder, n):
    """MNIST's four files with n training images: as many batches as wanted, in one epoch."""
    pixels = np.resize(np.pad(digits(1797, 3) * 15, ((0, 0), (2, 2), (2, 2))).astype(np.uint8), (n, 28, 28))
    for part, count in (('train', n), ('t10k', 1)):
        with open(os.path.join(folder, f'{part}-images-idx3-ubyte'), 'wb') as file:
            file.write(struct.pack('>4I', 0x803, count, 28, 28) + pixels[:count].tobytes())
        with open(os.path.join(folder, f'{part}-labels-idx1-ubyte'), 'wb') as file:
            file.write(struct.pack('>2I', 0x801, count) + bytes(count))


def settings_on_digits(folder, iterations, **settings):
    """Of a run on the CPU with as many iterations an epoch and no work at its end but a picture."""
    import dcgan
    write_mnist(folder, settings.get('batch_size', BATCH) * iterations)
    return dcgan.Settings(**{**dict(
        dataset='mnist', mnist_path=folder, out=os.path.join(folder, 'out'), batch_size=BATCH, nc=NC, Z=Z, epochs=1,
        ctx=dcgan.mx.cpu(), display=False, coverage=False, check_point=False), **settings})


def program(batch_size, width, iterations, averages=True):
    """Steps/s of the program's own loop from the first line to the last, everything that it does there included, and
    milliseconds of an update of the averages alone.

    `iterations`: a multiple of ten; `averages` False: they are not updated (with `average = 0` they are, by the
    weights themselves).
    """
    import dcgan
    step, update, waitall = dcgan.train_step, dcgan.update_average, dcgan.mx.nd.waitall
    times, updates = [], []

    def timed_step(*args):
        if len(times) in (LINE, iterations):
            waitall()  # at both ends of what is measured no work is left in the queue
        times.append(time.perf_counter())
        return step(*args)

    def timed_update(*args):
        if averages:
            waitall()  # as the update itself does first
            start = time.perf_counter()
            update(*args)
            waitall()
            updates.append(1000 * (time.perf_counter() - start))

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(dcgan, 'train_step', timed_step), \
            mock.patch.object(dcgan, 'update_average', timed_update):
        # one iteration more, which begins when the last line is done
        dcgan.train(settings_on_digits(folder, iterations + 1, batch_size=batch_size, ngf=width, ndf=width))
    return (iterations - LINE) / (times[iterations] - times[LINE]), statistics.median(updates or [0])


def bare():
    """Milliseconds of a step of networks of width 1, and of this thread's processor time for its call, which only
    queues it; for each ten steps."""
    import dcgan
    data, mx = dcgan.data, dcgan.mx
    s = dcgan.Settings(ctx=(mx.cpu(),), ngf=1, ndf=1, nc=NC, Z=Z, batch_size=BATCH)
    pixels = (digits(LINE * BATCH, 8)[:, None] * 15).astype(np.uint8)
    train_iter = data.PixelIter(pixels, np.zeros(len(pixels)), BATCH, NC, s.ctx[0])
    rand_iter = data.RandIter(BATCH, Z, s.ctx[0])
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data)[:3]
    labels, steps = [mx.nd.full(BATCH, label) for label in (0, 1, s.pos_label)], []
    for _ in range(WARM_UP + LINES):
        began, queueing = time.perf_counter(), 0
        train_iter.reset()
        for batch in train_iter:
            rbatch = rand_iter.next()
            call = time.thread_time()
            dcgan.train_step(*modules, rbatch, batch, *labels)
            queueing += time.thread_time() - call
        mx.nd.waitall()
        steps.append((1000 * (time.perf_counter() - began) / LINE, 1000 * queueing / LINE))
    return steps[WARM_UP:]


class Clock:
    """Stands in for `train_step` in a run that is to be measured after as many lines.

    The lines before are the loop's own, but without steps (all have the first one's results), without pictures and
    averages: with them they would take hours. `marks`: at the first step after each measured line the time, then so far
    the seconds outside of the steps, this thread's processor seconds there, and the mosaics.
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
        """Until `skipping` is closed have no pictures and no averages, and always the same batches."""
        import dcgan
        data, visual = dcgan.data, dcgan.visual

        def small(*args, **kwargs):
            return np.zeros((1, 1, 3), np.uint8)

        for place, name, function in ((visual, 'tile', small), (visual, 'plot', small),
                                      (dcgan, 'update_average', lambda *_: None),
                                      (data.PixelIter, 'next', lambda _: batch),
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
        dcgan.train(settings_on_digits(folder, EPOCH, ngf=1, ndf=1, epochs=lines * LINE // EPOCH + 1))
        (log,) = glob.glob(f'{folder}/out/*/log.csv')
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
        def __len__(self):
            return len(X)

        def __getitem__(self, rows):  # once a step, when the one before has ended
            times.append(time.perf_counter())
            return X[rows]

    loop.train(Images(), steps + 3, WIDTH, WIDTH, NC, Z, BATCH, seed=1, d1_bias=True, pos_label=0.9)
    return steps / (times[-1] - times[2])  # two to warm up


def pytorch(cores, steps, memory_format):
    """Steps/s of the DCGAN of pytorch/examples (dcgan/main.py) with the program's sizes, in a torch.memory_format."""
    import torch
    from torch import nn
    torch.set_num_threads(cores)
    torch.manual_seed(1)
    memory_format = getattr(torch, memory_format)
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


# ---------------------------------------------------------------- starting them

def measure(function, *args, **env):
    """What a function of this file returns in a process with `env` added to the environment.

    Raises RuntimeError with the last line of its error, subprocess.TimeoutExpired where it takes too long.
    """
    print(f'{time.strftime("%H:%M:%S")} {function}{args} {env or ""}', file=sys.stderr, flush=True)
    # each candidate finds its own number of threads, unless `env` has it
    inherited = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    command = [sys.executable, os.path.abspath(__file__), function, *map(json.dumps, args)]
    done = subprocess.run(command, env={**inherited, **env}, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1])
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the tables

def machine(cores):
    """One line: processor, cores used, oneDNN's instruction set, versions."""
    info = {}
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        info = dict(map(str.strip, line.split(':', 1)) for line in file if ':' in line)
    code = 'import data; data.mx.nd.Convolution(*map(data.mx.nd.ones, [(1, 1, 8, 8), (1, 1, 3, 3)]), no_bias=True, ' \
           'num_filter=1, kernel=(3, 3)).asnumpy()'
    verbose = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'DNNL_VERBOSE': '1'}, cwd=sys.path[0],
                             capture_output=True, text=True).stdout
    isa = re.search('cpu,isa:(.*)', verbose)
    versions = []
    for name in ('mxnet', 'torch', 'numpy'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f'{name} {importlib.metadata.version(name)}')
    return (f'{info.get("model name") or platform.processor() or platform.machine()}, {cores} physical cores used, '
            f'oneDNN uses {isa[1] if isa else "no ISA that it tells"}; Python {platform.python_version()}, '
            f'{", ".join(versions)}')


def table(header, rows):
    """Print rows, sequences of strings, as a Markdown table; numbers to the right."""
    print('| ' + ' | '.join(header) + ' |')
    print('| --- |' + ' ---: |' * (len(header) - 1))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    print(flush=True)


def compare(cores):
    """The program beside itself without averages, the textbook loop, and PyTorch."""
    all_cores = {'OMP_NUM_THREADS': str(cores)}
    mxnets_own = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // 2))}  # what it takes by itself (src/engine/openmp.cc)
    candidates = {
        '(a) this program': (('program', BATCH, WIDTH, ITERATIONS), {}),
        '(a) without the averages': (('program', BATCH, WIDTH, ITERATIONS, False), {}),
        "(b) textbook loop, MXNet's own number of threads": (('textbook', TEXTBOOK_STEPS[0]), mxnets_own),
        '(c) textbook loop, all physical cores': (('textbook', TEXTBOOK_STEPS[1]), all_cores),
        '(d) PyTorch': (('pytorch', cores, TORCH_STEPS, 'contiguous_format'), {}),
        '(e) PyTorch, channels last': (('pytorch', cores, TORCH_STEPS, 'channels_last'), {})}
    if not importlib.util.find_spec('torch'):
        print('PyTorch is not installed: it is left out.\n')
        candidates = {name: call for name, call in candidates.items() if 'PyTorch' not in name}
    rates, updates = {name: [] for name in candidates}, []
    for _ in range(REPETITIONS):
        for name, (args, env) in candidates.items():
            rate = measure(*args, **env)
            if args[0] == 'program':
                rate, update = rate
                updates += [update] if update else []
            rates[name].append(BATCH * rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    program = medians['(a) this program']
    table([f'batch {BATCH}, width {WIDTH}, {NC} channels, float32; images/s', 'median', 'least .. most',
           '(a) is faster by'], [
        (name, f'{medians[name]:.1f}', f'{min(values):.1f} .. {max(values):.1f}', f'{program / medians[name]:.2f}')
        for name, values in rates.items()])
    update = statistics.median(updates)
    print(f'An update of the averages, once in ten iterations, takes {update:.1f} ms, '
          f'{100 * update * program / BATCH / LINE / 1000:.2f} % of the time.\n', flush=True)


def host_costs():
    """What the host does for each step and each line."""
    calls = {'': ('bare',), ' after 100 lines': ('host', 100), ' after 9,380 lines': ('host', 9380)}
    runs = {name: [] for name in calls}
    for _ in range(REPETITIONS):
        for name, call in calls.items():
            runs[name].append(measure(*call, OMP_NUM_THREADS='1'))
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
    table(['networks of width 1, one thread; milliseconds', 'median', 'least .. most'], [
        (name, f'{statistics.median(ms):.1f}' if ms else 'none', f'{min(ms):.1f} .. {max(ms):.1f}' if ms else '')
        for name, ms in figures.items()])


def main():
    if len(sys.argv) > 1:  # a child, or one table
        function, *args = sys.argv[1:]
        found = globals()[function](*map(json.loads, args))
        if found is not None:
            print(json.dumps(found))
        return
    import joblib
    cores = joblib.cpu_count(only_physical_cores=True)
    print(machine(cores) + '\n', flush=True)
    compare(cores)
    host_costs()


if __name__ == '__main__':
    main()

"""The training step as `dcgan.train_step` numbers it, written naively: the judge of the program's.

D itself is used in step 7, with everything it can compute; every step ends before the next begins. Several devices
are several networks with the same weights, each with its part of the batch.
"""
import itertools

import data  # noqa: F401  it prepares MXNet

import mxnet as mx
import numpy as np

import dcgan


def train(X, steps, ngf, ndf, nc, Z, batch_size, seed, lr=0.0002, beta1=0.5, epochs=1, parts=1,
          d1_bias=False, pos_label=1., head_start=0, lr_steady=0, y=None, record=None):
    """Train for epochs of so many steps on float images X (n, nc, 64, 64). `d1_bias`, `pos_label`, `head_start` and
    `lr_steady` are the published script's. Conditional with `y` (n,), the images' classes from 0 on.

    Returns {name: array}, the parameters and (the first part's) moving averages of both networks, and for each step
    the metrics' (facc, fentropy of G, of D). `record`: a list that gets of each step the fakes, `diff`, and D's answers
    to the fakes, to the reals, and to the fakes after its update.
    """
    classes = 0 if y is None else max(y) + 1
    gout, dloss = dcgan.make_dcgan_sym(ngf, ndf, nc, d1_bias=d1_bias, classes=classes)
    size = batch_size // parts
    inputs = [('data', (size, nc, 64, 64)), ('digit', (size,))][:1 if y is None else 2]
    mx.random.seed(seed)
    modsG, modsD = [], []
    for mods, symbol, names, shapes, labels in (
            (modsG, gout, dict(data_names=('rand',), label_names=None), [('rand', (size, Z + classes, 1, 1))], None),
            (modsD, dloss, dict(data_names=[name for name, _ in inputs], label_names=('label',)), inputs,
             [('label', (size,))])):
        for part in range(parts):
            mod = mx.mod.Module(symbol, **names)
            mod.bind(shapes, labels, inputs_need_grad=True)
            if part == 0:
                mod.init_params(mx.init.Normal(0.02))
            else:
                mod.set_params(*mods[0].get_params())
            mod.init_optimizer(optimizer='adam', optimizer_params={
                'learning_rate': lr, 'wd': 0., 'beta1': beta1, 'rescale_grad': 1 / batch_size})
            mods.append(mod)

    def split(array):
        return [array[part * size:(part + 1) * size] for part in range(parts)]

    def discriminate(images, digits, label):
        for mod, half, half_digits in zip(modsD, images, split(digits)):
            mod.forward(mx.io.DataBatch([half, half_digits][:len(inputs)], [mx.nd.full((size,), label)]), is_train=True)
            mod.backward()
        mx.nd.waitall()
        pred = np.concatenate([mod.get_outputs()[0].asnumpy() for mod in modsD])
        labels = np.full(batch_size, float(label > 0))
        return dcgan.facc(labels, pred), dcgan.fentropy(labels, pred), pred

    def gradients(mod):
        return [grads[0] for grads in mod._exec_group.grad_arrays]

    def update(mods):
        for grads in zip(*map(gradients, mods)) if parts > 1 else ():
            total = sum(grads[1:], grads[0].copy())
            for grad in grads:
                grad[:] = total
        for mod in mods:
            mod.update()
        mx.nd.waitall()

    metrics = []
    for epoch, t in itertools.product(range(epochs), range(steps)):
        if t == 0:
            mx.random.seed(seed + 1 + epoch)
        done = epoch * steps + t
        quarters = max(0, done - lr_steady) / (lr_steady / 4) if lr_steady else 0
        for mods, rate in (modsG, lr / 2 ** quarters), (modsD, lr):
            for mod in mods:
                mod._optimizer.set_learning_rate(0.001 if done < head_start else rate)
        latent = mx.random.normal(0, 1.0, shape=(batch_size, Z, 1, 1))
        numbers = np.arange(t * batch_size, (t + 1) * batch_size) % len(X)
        real = mx.nd.array(X[numbers])
        fake_digits = real_digits = mx.nd.zeros(batch_size)
        if y is not None:
            drawn = y[mx.nd.random.randint(0, len(y), shape=(batch_size,)).asnumpy()]
            latent = mx.nd.array(np.concatenate([latent.asnumpy(), np.eye(classes)[drawn][:, :, None, None]], axis=1))
            fake_digits, real_digits = mx.nd.array(drawn), mx.nd.array(y[numbers])
        # 1
        for mod, half in zip(modsG, split(latent)):
            mod.forward(mx.io.DataBatch([half], []), is_train=True)
        mx.nd.waitall()
        fakes = [mod.get_outputs()[0].copy() for mod in modsG]
        # 2, 3
        facc_fake, entropy_fake, to_fakes = discriminate(fakes, fake_digits, 0)
        kept = [[grad.copy() for grad in gradients(mod)] for mod in modsD]
        # 4
        facc_real, entropy_real, to_reals = discriminate(split(real), real_digits, pos_label)
        # 5
        for mod, others in zip(modsD, kept):
            for grad, other in zip(gradients(mod), others):
                grad += other
        update(modsD)
        # 6, 7
        _, entropy, after_update = discriminate(fakes, fake_digits, 1)
        diffs = [mod.get_input_grads()[0].copy() for mod in modsD]
        # 8
        for mod, diff in zip(modsG, diffs):
            mod.backward([diff])
        mx.nd.waitall()
        update(modsG)
        metrics.append(((facc_fake + facc_real) / 2, entropy, (entropy_fake + entropy_real) / 2))
        if record is not None:
            images = (np.concatenate([part.asnumpy() for part in parts]) for parts in (fakes, diffs))
            record.append((*images, to_fakes, to_reals, after_update))
    arrays = {}
    for mod in (modsG[0], modsD[0]):
        executor = mod._exec_group.execs[0]
        arrays.update({name: executor.arg_dict[name].asnumpy() for name in mod._param_names})
        arrays.update({name: executor.aux_dict[name].asnumpy() for name in mod._aux_names})
    return arrays, metrics

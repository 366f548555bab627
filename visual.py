"""From arrays to pictures: mosaics, curves and a film, on disk and, where there is a screen, in windows.

The windows belong to a child process that shows the files as they change: OpenCV ends a process that has no screen, or
loses it, without an exception.
"""
import glob
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np

TITLES = ('gout', 'diff', 'data', 'loss')  # the windows, in the order of their places
QUIT = ord('q')       # the viewer's exit status after that key
MOST_IMAGES = 256     # of a mosaic that is shown
FILM_BYTES = 3_000_000
_viewers = {}    # folder: the child process that shows its pictures, or None where there is no screen
_warned = set()  # the kinds of warning that have been printed


# ---------------------------------------------------------------- mosaics

def tile(X, columns=None):
    """A mosaic of images, row by row.

    `X` is float (n, 1 or 3, height, width), RGB, [-1, 1]; what is beyond is clipped, NaN is black. `columns`: images in
    a row; default: as many as make the mosaic square. The last row is padded with black.
    Returns uint8 (rows * height, columns * width, 3), BGR.
    """
    n, c, h, w = X.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    images = np.zeros((n + -n % columns, c, h, w), np.uint8)
    images[:n] = np.rint((np.minimum(np.fmax(X, -1), 1) + 1) * 127.5)  # fmax takes -1 for NaN
    mosaic = images.reshape(-1, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    return cv2.cvtColor(mosaic, cv2.COLOR_RGB2BGR if c == 3 else cv2.COLOR_GRAY2BGR)


def columns_for(num_classes):
    """How many columns a table of so many classes has: one each, several each where they are few, at most sixteen."""
    return min(num_classes * max(1, 8 // num_classes), 16)


def by_class(X, classes, num_classes, rows=None):
    """A table of images with a class in each column, which `tile(table, columns_for(num_classes))` draws.

    `X` is float (n, c, height, width), `classes` (n,) integers below num_classes. Class k is in column k % 16 of block
    k // 16; few classes have several columns each, in turn. A block has `rows` rows, by default what the n images fill;
    what finds no place in them is left out. Returns (places, c, height, width) of X's dtype, row by row, -1 where there
    is no image.
    """
    columns = columns_for(num_classes)
    repeats = max(1, columns // num_classes)
    rows = rows or -(-len(X) // (num_classes * repeats))
    table = np.full((-(-num_classes // columns), rows, columns) + X.shape[1:], -1, X.dtype)
    for k in range(num_classes):
        block, column = divmod(k, columns)
        for i, image in enumerate(X[classes == k][:rows * repeats]):
            table[block, i // repeats, column + num_classes * (i % repeats)] = image
    return table.reshape((-1,) + X.shape[1:])


def visual(title, X, out='out', display=True, classes=None, num_classes=0):
    """Show images as a mosaic with `show_picture`: `tile`'s X, with `classes` (n,) as a table of `by_class`.

    At most 256 images are shown: the first ones, and of up to 256 classes the first ones of each, as many of each.
    """
    if classes is None or num_classes > MOST_IMAGES:
        picture = tile(X[:MOST_IMAGES])
    else:
        columns = columns_for(num_classes)
        shown = max(num_classes, columns)  # in a row of all blocks
        picture = tile(by_class(X, classes, num_classes, min(-(-len(X) // shown), MOST_IMAGES // shown)), columns)
    show_picture(title, picture, out, display)


def show_picture(title, picture, out='out', display=True):
    """Write a BGR picture to `<out>/<title>.png`, and show it in a window if one can open. What fails is said once."""
    try:
        os.makedirs(out, exist_ok=True)
        save(os.path.join(out, f'{title}.png'), picture)
        if display and out not in _viewers:
            _viewers[out] = _start_viewer(out)
        if display and (_viewers[out] is None or _viewers[out].poll() not in (None, 0, QUIT)):
            why = f'{sys.executable} {__file__} {out}'
            warn_once('window', f'no window can be shown here (why: {why}); the pictures are in {out}')
    except OSError as error:
        warn_once('write', f'WARNING: no picture can be written or shown ({error}); the run goes on')


def save(path, picture):
    """Write a picture as PNG, whole or not at all. Raises OSError."""
    _write(path, cv2.imencode('.png', picture)[1])


def _write(path, content):
    with open(f'{path}.tmp', 'wb') as file:
        file.write(content)
    os.replace(f'{path}.tmp', path)


def film(out):
    """Join the mosaics `gout-*.png` of a folder, in the order of their names, to `film.webp` of at most 3 MB.

    It has up to 25 frames, evenly chosen, none damaged or of another size than the newest. What fails is said once.
    """
    paths = sorted(glob.glob(os.path.join(glob.escape(out), 'gout-*.png')))
    if not paths:
        return
    try:
        for most_frames in (25, 13, 7, 3):  # a second of work for 25 of 512x512
            chosen = np.unique(np.linspace(0, len(paths) - 1, most_frames).astype(int))
            frames = [frame for frame in (cv2.imread(paths[i]) for i in chosen) if frame is not None]
            animation = cv2.Animation()
            animation.frames = [frame for frame in frames if frame.shape == frames[-1].shape]
            animation.durations = [400] * (len(animation.frames) - 1) + [2500]  # milliseconds
            ok, encoded = cv2.imencodeanimation('.webp', animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
            if ok and len(encoded) <= FILM_BYTES:  # not ok: a side of more than 16,383 pixels
                _write(os.path.join(out, 'film.webp'), encoded)
                return
        raise OSError('its pictures are too large')
    except (OSError, AttributeError, cv2.error) as error:  # a full disk, an OpenCV without animations
        warn_once('film', f'WARNING: {out}/film.webp cannot be written ({str(error).strip()}); the run goes on')


# ---------------------------------------------------------------- curves

LEFT, RIGHT, TOP, BOTTOM = 50, 610, 35, 435  # the axes in a picture of 640x480 pixels
COLOURS = np.array([(0, 94, 213), (178, 114, 0), (115, 158, 0)])  # BGR; colour-blind eyes can tell them apart


def plot(iterations, curves):
    """A line chart of losses, 640x480, BGR: each value in a pale colour, their moving mean in a strong one.

    `iterations` (n,): where the values were taken, ascending; n is 1 or more. `curves`: {name: (n,) values}, at most
    three; what is not finite is left out.
    """
    picture = np.full((480, 640, 3), 255, np.uint8)
    peaks = [np.percentile(v[np.isfinite(v)], 99) for v in curves.values() if np.isfinite(v).any()]
    y_limit = 1.1 * max([0.5, *peaks])  # a rare peak is cut off, for it would flatten all the rest
    x_scale, y_scale = (RIGHT - LEFT) / iterations[-1], (BOTTOM - TOP) / y_limit
    for value in _ticks(y_limit):
        y = int(BOTTOM - value * y_scale)
        cv2.line(picture, (LEFT, y), (RIGHT, y), (225, 225, 225))
        _text(picture, f'{value:,.10g}', LEFT / 2, y + 5)
    for value in _ticks(iterations[-1]):
        x = int(LEFT + value * x_scale)
        cv2.line(picture, (x, BOTTOM), (x, BOTTOM + 4), (0, 0, 0))
        _text(picture, f'{value:,.10g}', x, BOTTOM + 18)
    _text(picture, 'iterations', (LEFT + RIGHT) / 2, 472)
    points = []  # of each curve: (2, how many are finite), where they lie in the picture
    for colour, values in zip(COLOURS, curves.values()):
        x, y = LEFT + iterations * x_scale, BOTTOM - np.clip(values * y_scale, 0, BOTTOM - TOP)
        points.append(np.array([x, y])[:, np.isfinite(values)])
        _curve(picture, points[-1], 255 - (255 - colour) / 3, 1)
    n = max(1, len(iterations) // 50)
    for i, name in enumerate(curves):  # the strong lines come above all the pale ones
        total = np.cumsum(np.pad(points[i], ((0, 0), (1, 0))), axis=1)
        means = (total[:, n:] - total[:, :-n]) / n  # of n neighbours
        _curve(picture, means, COLOURS[i], 2)
        _text(picture, name, LEFT + 60 + 130 * i, TOP - 12, COLOURS[i].tolist())
        for x, y in np.rint(means[:, -1:].T).astype(int).tolist():  # a dot, so that a single value shows as well
            cv2.circle(picture, (x, y), 3, COLOURS[i].tolist(), -1, cv2.LINE_AA)
    cv2.rectangle(picture, (LEFT, TOP), (RIGHT, BOTTOM), (0, 0, 0))
    return picture


def _curve(picture, points, colour, thickness):
    """Draw a line through points, (2, how many), from left to right; no more than there are columns of pixels."""
    every = 1 + points.shape[1] // (RIGHT - LEFT)
    points = np.rint(points[:, ::every]).astype(np.int32).T
    cv2.polylines(picture, [points.reshape(-1, 1, 2)], False, colour.tolist(), thickness, cv2.LINE_AA)


def _ticks(limit):
    """Round values from 0 to the limit, at most seven."""
    step = 10 ** np.floor(np.log10(limit))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if limit / (step * factor) <= 6)
    return np.arange(0, limit + step / 1000, step)


def _text(picture, string, x, y, colour=(0, 0, 0)):
    """Write a string whose middle is at x, as far as it stays within the picture."""
    font = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    width = cv2.getTextSize(string, *font, 1)[0][0]
    cv2.putText(picture, string, (int(min(x - width / 2, 640 - width)), int(y)), *font, colour, 1, cv2.LINE_AA)


# ---------------------------------------------------------------- windows

def quit_pressed():
    """Whether q was pressed in a window."""
    return any(viewer and viewer.poll() == QUIT for viewer in _viewers.values())


def close():
    """Close the windows. The next picture opens new ones."""
    for viewer in filter(None, _viewers.values()):
        viewer.kill()
        viewer.wait()
    _viewers.clear()
    _warned.clear()


def warn_once(kind, message):
    """Print a message, unless one of its kind has been printed since the last `close`; the training uses it, too."""
    if kind not in _warned:
        _warned.add(kind)
        print(message, flush=True)


def _start_viewer(out):
    """Start the child process with a folder's windows, if there is a screen, and wait until the first one is open."""
    if sys.platform.startswith('linux') and not os.environ.get('DISPLAY'):
        return None  # with WAYLAND_DISPLAY alone as well: OpenCV's windows need X or XWayland
    viewer = subprocess.Popen([sys.executable, __file__, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # Ctrl-C in the terminal is for the training alone
    if not viewer.stdout.read(1):  # a byte, or the end
        viewer.wait()
    return viewer


def _view(out):
    """Show the four pictures, and each again when its file changes, until q is pressed or the training has ended."""
    signal.alarm(20)  # a screen that does not answer by then counts as none
    os.environ['QT_QPA_PLATFORM'] = 'xcb'  # OpenCV brings no other; desktops ask for Wayland's
    parent, started = os.getppid(), time.monotonic()
    opened = {}  # title: when its window opened
    shown = {}   # title: the time of the file that its window shows, and how many seconds it was open when it was drawn
    while os.getppid() == parent:
        for title in TITLES:
            path = os.path.join(out, f'{title}.png')
            try:
                changed, now = os.stat(path).st_mtime_ns, time.monotonic()
                closed = title in shown and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1
            except OSError:  # no picture yet, or its folder has been renamed
                continue
            except cv2.error:  # a person has closed the last window, and Qt has ended
                sys.exit(0)
            # drawn anew in each second, for a window that was moved or covered may have stayed blank
            state = changed, int(now - opened.get(title, now))
            picture = None if closed or state == shown.get(title) else cv2.imread(path)
            if picture is None:
                continue
            if title not in shown:
                cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
                opened[title] = time.monotonic()
            elif shown[title][1] == 0 < state[1]:  # not at once: a window manager moves a window that opens
                left, top, width, height = cv2.getWindowImageRect(title)
                if (2 * left + width, 2 * top + height) == (400, 300) and now < started + 5:
                    # on a busy CPU Qt may miss that a window opened: it keeps it in the corner, and never draws it
                    cv2.destroyWindow(title)
                    del shown[title], opened[title]
                    continue
                _place(title, picture)
            cv2.imshow(title, picture)
            shown[title] = state
        if cv2.waitKey(50) & 0xff == QUIT:
            sys.exit(QUIT)
        if shown and signal.alarm(0):  # the first time: the screen has answered, tell the training
            os.write(1, b'.')
        time.sleep(0.01)  # without a window waitKey does not wait


def _place(title, picture):
    """Give a window its size and place: a screen of 1920x1080 holds the mosaics side by side, the curves below."""
    height, width = picture.shape[:2]
    scale = min(1, 620 / width, 512 / height) if title != 'loss' else 1
    width, height = int(width * scale), int(height * scale)
    row, column = divmod(TITLES.index(title), 3)
    cv2.resizeWindow(title, width, height)
    cv2.moveWindow(title, 5 + column * (width + 10), 22 + row * 556)  # 22 pixels are a title bar


if __name__ == '__main__':
    try:
        _view(sys.argv[1])
    except cv2.error:
        sys.exit('this OpenCV has no windows; how to exchange it is in the README, Troubleshooting')

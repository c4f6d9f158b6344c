"""Pictures of low-poly vehicles: what the offline profile `demo` has instead of photographs.

A mesh is a list of lofts, rings of points joined by quadrilaterals; x points forward, y to the
left, z up, in metres. OpenCV fills the faces and a depth buffer puts the nearest one on top.

A picture is the same on every processor: no comparison and no rounding here may hang on the last
bits of a number, which differ. So faces in one plane lie in a fixed order, and what is rounded to
whole levels at the end carries noise.
"""

import functools
import itertools

import cv2
import numpy as np
import pandas as pd
from matplotlib.colors import hsv_to_rgb
from scipy.ndimage import affine_transform

from support.stored import ROOT

SUBTYPES = {"airplane": ("airliner",), "car": ("taxi", "jeep", "racer", "sports_car", "wagon")}
USUAL = {"airplane": ("sky", "apron"), "car": ("road", "showroom")}
SWAPPED = {"airplane": "road", "car": "apron"}
COLUMNS = ["id", "label", "subtype", "split", "background", "flag", "twin", "scene", "index"]
PLACES = {  # hexadecimal: top, bottom, ground, markings, then the clutter on the horizon
    "sky": "467dc3 bed4e8 000000 000000",
    "apron": "6e96c8 cdd7e1 969693 e1be3c aaacb2 5f6973",
    "road": "739bc8 d2dae1 626266 e1e1dc 3c5f32 2d4b28 967864",
    "showroom": "bebab2 e1ded8 a09c98 b9b6b4 cdd7e4 787370",
}
COLOURS = {"k": "1e1e21", "g": "2d3e54", "w": "ecece8", "m": "969aa0"}
COLOURS |= {"y": "ffe896", "r": "be201e", "n": "7c5434", "d": "4e5054"}
MESH_FILE = ROOT / "data" / "embedded" / "meshes.txt"  # says how to read it
TABLE = "".join(line for line in MESH_FILE.open(encoding="utf-8") if not line.startswith("#"))
MESHES = {block.split("|")[0].strip(): block.split("|")[1:] for block in TABLE.split("/")}
PRETEXT = tuple(MESHES)[6:]  # the six target subtypes come first


def _ring(axis, x, y, z, radius, corners):
    """Return a regular polygon of points about an axis: 0 (along x), 1 (along y), 2 (along z)."""
    turn = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    flat = radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.insert(flat, axis, 0, axis=1) + np.array([x, y, z])


def _lofts(kind, v):
    """Return the lofts of one part with the numbers v, each a list of rings."""
    if kind == "box":
        return _lofts("ext", [v[0], v[0], v[1], v[3], v[2], v[3], v[2], v[4], v[1], v[4]])
    if kind == "ext":
        x, z = np.reshape(v[2:], (-1, 2)).T
        y = np.interp(z, (z.min(), z.max()), v[:2])
        return [[np.stack([x, side * y, z], axis=1) for side in (1, -1)]]
    if kind == "row":
        starts, step = np.linspace(*v[3:5], int(v[5]), endpoint=False, retstep=True)
        step, z, high = step * (0.55 if v[5] > 1 else 1), (v[1] + v[2]) / 2, v[2] - v[1]
        return [_lofts("plate", [*2 * [v[0], x, x + step, z], high])[0][:1] for x in starts]
    if kind == "plate":
        corners = np.array([[0, -1], [1, -1], [1, 1], [0, 1]]) * [1, v[8] / 2]
        ends = np.reshape(v[:8], (2, 4))
        return [[np.insert(corners * [b - a, 1] + [a, z], 1, y, 1) for y, a, b, z in ends]]
    if kind == "whl":
        sizes = ((v[3] / 2, v[2]), (v[3] / 2 + 0.02, 0.55 * v[2]))  # the tyre and the hub
        return [[_ring(1, v[0], v[1] + s * y, v[2], r, 10) for s in (-1, 1)] for y, r in sizes]
    if kind == "rev":
        return [[_ring(0, x, v[0], z, r, int(v[1])) for x, r, z in np.reshape(v[2:], (-1, 3))]]
    return [[_ring(2, v[0], 0, z, r, int(v[1])) for z, r in np.reshape(v[2:], (-1, 2))]]


@functools.cache
def _mesh(subtype):
    """Return (points, first point of each face, colour letters), centred, within one unit."""
    faces, letters = [], []
    for kind, colour, *numbers in map(str.split, MESHES[subtype]):
        v = [float(number) for number in numbers]
        mirrored = kind in ("plate", "row", "whl") or (kind == "rev" and v[0] != 0)
        for rings, letter in zip(_lofts(kind, v), itertools.cycle(colour), strict=False):
            half = [rings[0], *rings[1:][-1:]]
            for one, two in itertools.pairwise(rings):
                half += [*np.stack([one, np.roll(one, -1, 0), np.roll(two, -1, 0), two], 1)]
            faces += half + [face * [1, -1, 1] for face in half] * mirrored
            letters += letter * (len(half) * (1 + mirrored))
    points, firsts = np.concatenate(faces), np.cumsum([0, *map(len, faces[:-1])])
    points = points - (points.max(0) + points.min(0)) / 2
    return points / np.abs(points).max(), firsts, letters


def _camera(rng, background, s, small):
    """Return what `_see` needs to look at the origin, and the elevation of the camera."""
    flying, turn = background == "sky", lambda axis, by: cv2.Rodrigues(np.eye(3)[axis] * by)[0]
    tilt = rng.uniform(-35, 35) if flying else rng.uniform(3, 50 if small else 26)
    e, roll = np.radians([tilt, rng.normal(0, 14 if flying else 3)])
    low, high = (0.12, 0.22) if small else (0.32, 0.5) if rng.random() < 0.82 else (0.5, 0.9)
    zoom, far = rng.uniform(low, high), rng.uniform(2.6, 5.0)
    look = np.array([[0, 1, 0], [np.sin(e), 0, -np.cos(e)], [-np.cos(e), 0, -np.sin(e)]])
    rotation = turn(2, roll) @ look @ turn(2, rng.uniform(0, 2 * np.pi))
    centre = s / 2 + s * rng.normal(0, 0.06 + 0.25 * max(zoom - 0.5, 0), 2)
    return (rotation, np.array([0, 0, far]), far * zoom * s, centre), e


def _see(points, camera):
    """Return the pixels of points and the points as the camera sees them."""
    rotation, shift, focal, centre = camera
    seen = points @ rotation.T + shift
    return np.rint(focal * seen[:, :2] / np.maximum(seen[:, 2:], 0.1) + centre).astype(int), seen


def _fill(canvas, points, firsts, colours, camera, light):
    """Draw shaded faces on the canvas, the nearest one of each pixel on top."""
    pixels, seen = _see(points, camera)
    follow = np.arange(1, len(points) + 1)
    follow[np.append(firsts[1:], len(points)) - 1] = firsts
    normal = np.add.reduceat(np.cross(seen, seen[follow]), firsts)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
    offset = (normal * seen[firsts]).sum(1, keepdims=True)
    normal *= -np.sign(offset)  # towards the camera
    bright = 0.42 + 0.68 * np.maximum(normal @ light, 0) - 0.1 * normal[:, 1]
    shaded = np.clip(colours * bright[:, None], 0, 255).astype(np.uint8)
    planes = -normal / (np.abs(offset) + 1e-9)  # planes @ (x, y, 1) is the inverse depth
    depth, axis = np.zeros(canvas.shape[:2]), np.arange(len(canvas))
    x, y = ((axis - c) / camera[2] for c in camera[3])
    polygons = np.split(pixels.astype(np.int32), firsts[1:])
    for corners, (a, b, c), colour in zip(polygons, planes, shaded, strict=True):
        low, high = np.maximum(corners.min(0), 0), np.minimum(corners.max(0) + 1, len(canvas))
        if (high <= low).any():
            continue
        part = np.s_[low[1] : high[1], low[0] : high[0]]
        mask = cv2.fillPoly(np.zeros((high - low)[::-1], np.uint8), [corners - low], 1)
        near = a * x[part[1]] + (b * y[part[0]] + c)[:, None]
        hit = (near > depth[part] * (1 + 1e-6)) & (mask > 0)  # in one plane the first face stays
        depth[part][hit], canvas[part][hit] = near[hit], colour


def _backdrop(rng, background, s, camera, elevation):
    """Return the picture behind the object: sky or wall, ground, clutter, markings."""
    cells, drawn = (6, 9, 24), (12, 0 if background == "showroom" else 38, 7)
    haze, cloud, grain = (
        cv2.resize(rng.normal(0, by, (n, n, 1)), (s, s), interpolation=cv2.INTER_CUBIC)[..., None]
        for n, by in zip(cells, drawn, strict=True)
    )
    top, bottom, ground, line, *things = map(bytes.fromhex, PLACES[background].split())
    mood = rng.uniform(0.6, 1.15) + rng.normal(0, 0.06, 3)
    canvas = np.linspace([*top], [*bottom], s)[:, None] * mood + haze + np.maximum(cloud, 0)
    edge = camera[3][1] - camera[2] * np.tan(elevation) + 0.12 * s * (background == "showroom")
    edge = int(np.clip(edge, 0, s)) if things else s
    canvas[edge:] = np.array([*ground]) * mood * rng.uniform(0.7, 1.25) + grain[edge:]
    for _ in range(rng.integers(2, 9) if things else 0):
        x, wide, high = (rng.uniform((-0.1, 0.04, 0.03), (1, 0.35, 0.22)) * s).astype(int)
        colour = rng.uniform(0.6, 1.2) * np.array([*things[rng.integers(len(things))]])
        canvas[max(edge - high, 0) : edge, max(x, 0) : max(x + wide, 0)] = colour
    canvas = np.clip(canvas, 0, 255).astype(np.uint8)
    heading = rng.uniform(0, np.pi) if background != "road" else 0.0
    turn = cv2.Rodrigues(np.array([0, 0, heading]))[0]
    for side in rng.uniform(0.5, 1.1) * np.array([-1, 1, 3, -3])[: rng.integers(1, 5)]:
        strip = np.stack(np.broadcast_arrays(np.linspace(-9, 9, 90), side, -0.3), axis=1)
        pixels, seen = _see(strip @ turn, camera)
        pixels = pixels[(seen[:, 2] > 0.3) & bool(things)].astype(np.int32)
        cv2.polylines(canvas, [pixels], False, [*line], max(1, s // 70))
    return canvas


def _object(canvas, rng, subtype, camera, shadow):
    """Draw an object with random proportions, paints and light, and its shadow on the ground."""
    points, firsts, letters = _mesh(subtype)
    points = points * rng.uniform(0.9, 1.1, 3)
    sun = rng.uniform((-0.8, -0.8, 0.6), (0.8, 0.8, 1.2))
    hsv = rng.integers((0, 80, 60), (180, 235, 245), (2, 3)) / (180, 255, 255)
    paints = dict(zip("ab", hsv_to_rgb(hsv) * 255, strict=True))
    if subtype == "airliner":
        paints["a"] = rng.uniform(205, 245, 3)
    elif subtype == "taxi":
        paints["a"] = rng.uniform((225, 165, 10), (250, 200, 50))
    if shadow:
        dropped = points - (points[:, 2:] - points[:, 2].min()) * sun / sun[2]
        outline = cv2.convexHull(_see(dropped, camera)[0].astype(np.int32))
        shade = cv2.fillConvexPoly(np.ones(canvas.shape[:2]), outline, 0.45)
        shade = cv2.blur(shade, (len(canvas) // 24 + 1,) * 2)[..., None]
        canvas[:] = canvas * (shade + 1e-6)  # which no rounding takes below a whole level
    table = {c: [*bytes.fromhex(code)] for c, code in COLOURS.items()} | paints
    colours = np.array([table[c] for c in letters], float)
    _fill(canvas, points, firsts, colours, camera, camera[0] @ sun / np.linalg.norm(sun))


def _photograph(canvas, rng, own, size):
    """Return the canvas as a camera delivers it: partly hidden, shifted, blurred, noisy."""
    s, colour = len(canvas), rng.integers(20, 200, 3).tolist()
    x, y, wide = (rng.uniform((0.1, 0.55, 0.04), (0.9, 0.95, 0.22)) * s).astype(int).tolist()
    kind = rng.choice(["nothing", "pole", "hedge", "ball"], p=[0.85, 0.05, 0.05, 0.05])
    if kind == "ball":
        cv2.circle(canvas, (x, y), wide, colour, -1)
    elif kind != "nothing":
        canvas[np.s_[:, x : x + wide // 2] if kind == "pole" else np.s_[y:]] = colour
    zoom, (dx, dy) = own.uniform(0.995, 1.01), own.uniform(-0.006, 0.006, 2) * s
    start = [-((1 - zoom) * s / 2 + by) / zoom for by in (dy, dx)]
    how = {"output": float, "order": 1, "mode": "reflect"}
    picture = affine_transform(canvas, [1 / zoom, 1 / zoom, 1], [*start, 0], **how)
    picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.2, 0.8) * size / 96)
    picture = picture * own.uniform(0.96, 1.04) + own.normal(0, rng.uniform(1, 5), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw(row, *, seed=0, size=96):
    """Return the picture of a manifest row, (size, size, 3) uint8 RGB.

    The scene comes from (seed, scene), the private jitter and noise from (seed, index).
    """
    own = np.random.default_rng([seed, 1_000_003 + int(row["index"])])
    rng, camera, canvas = _scene(row, seed, size)
    if row["flag"] == "ambiguous":
        behind, _ = _camera(rng, "apron", 2 * size, False)
        behind[3][1] -= 0.25 * size  # above the racer, which must not hide it
        _object(canvas, rng, "airliner", behind, False)
    _object(canvas, rng, row["subtype"], camera, row["background"] != "sky")
    return _photograph(canvas, rng, own, size)


def silhouette(row, *, seed=0, size=96):
    """Return where the object of a drawn picture is, (size, size) bool, hidden parts included."""
    rng, camera, canvas = _scene(row, seed, size)
    points, firsts, _ = _mesh(row["subtype"])
    pixels = _see(points * rng.uniform(0.9, 1.1, 3), camera)[0].astype(np.int32)
    mask = np.zeros(canvas.shape[:2], np.uint8)
    for corners in np.split(pixels, firsts[1:]):
        cv2.fillPoly(mask, [corners], 255)
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) > 127


def _scene(row, seed, size):
    """Return a row's random generator, its camera and its background, twice the picture's size."""
    rng = np.random.default_rng([seed, int(row["scene"])])
    small = row["flag"] in ("near_duplicate", "ambiguous")  # else the twins influence nothing
    camera, e = _camera(rng, row["background"], 2 * size, small)
    return rng, camera, _backdrop(rng, row["background"], 2 * size, camera, e)


def _manifest(groups, rng):
    """Return unflagged rows for groups (label, subtypes, split, n, backgrounds)."""
    rows = []
    for label, subtypes, split, n, places in groups:
        part = pd.DataFrame({"label": label, "subtype": np.resize(subtypes, n), "split": split})
        rows.append(part.assign(background=rng.choice(places, n), flag="", twin=""))
    rows = pd.concat(rows, ignore_index=True)
    number = rows.groupby("label").cumcount().map("_{:04d}".format)
    return rows.assign(id=rows["label"] + number, scene=rows.index, index=rows.index)[COLUMNS]


def _flag(rows, rng, n, flag, **where):
    """Return the numbers of n unflagged rows that agree with `where`, after flagging them."""
    free = rows.index[(rows[["flag", *where]] == ["", *where.values()]).all(axis=1)]
    if not 0 <= n <= len(free):
        kind = " ".join(where.values())
        raise ValueError(f"{n} {flag} pictures are asked for, {len(free)} {kind} ones are free.")
    chosen = rng.choice(free, n, replace=False)
    rows.loc[chosen, "flag"] = flag
    return chosen


def plan(seed=0, *, n_train=1000, n_test=300, n_duplicates=30, n_swapped=60, n_ambiguous=6):
    """Return the manifest of the demo pictures, a row each, with the planted causes flagged.

    swapped_background: a car on the apron or an airplane on the road; near_duplicate: a training
    and a test picture of one such scene, seen from afar; ambiguous: a racer labelled car in front
    of an airliner.
    """
    rng, sizes = np.random.default_rng([seed, 1]), {"train": n_train, "test": n_test}
    if min(sizes.values()) < 1:
        raise ValueError("n_train and n_test must each be at least one picture a class.")
    if not 0 <= n_duplicates <= n_test:
        raise ValueError(f"{n_duplicates} near-duplicate pictures: n_test = {n_test} is the limit.")
    groups = [(c, SUBTYPES[c], *size, USUAL[c]) for c in SUBTYPES for size in sizes.items()]
    rows = _manifest(groups, rng)
    odd = _flag(rows, rng, n_ambiguous, "ambiguous", split="train", subtype="racer")
    rows.loc[odd, "background"] = SWAPPED["car"]
    for half, label in enumerate(SUBTYPES):
        pairs, swaps = (n_duplicates + half) // 2, (n_swapped + half) // 2
        for test in _flag(rows, rng, pairs, "near_duplicate", split="test", label=label):
            same = {"split": "train", "subtype": rows.at[test, "subtype"]}
            pair = [test, *_flag(rows, rng, 1, "near_duplicate", **same)]
            rows.loc[pair, "twin"] = rows.loc[pair[::-1], "id"].to_numpy()
            rows.loc[pair, ["scene", "background"]] = rows.at[pair[1], "scene"], SWAPPED[label]
        tests = round(swaps * n_test / (n_train + n_test))
        for split, n in (("test", tests), ("train", swaps - tests)):
            odd = _flag(rows, rng, n, "swapped_background", split=split, label=label)
            rows.loc[odd, "background"] = SWAPPED[label]
    return rows


def pretext_rows(seed, n_per_class):
    """Return manifest rows of the classes that only the feature backbone is trained on."""
    groups = [(name, (name,), "train", n_per_class, tuple(PLACES)) for name in PRETEXT]
    return _manifest(groups, np.random.default_rng([seed, 2]))

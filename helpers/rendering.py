"""Pictures of low-poly vehicles: what the offline profile `demo` has instead of photographs.

A mesh is a list of lofts, rings of points joined by quadrilaterals; x points forward, y to the
left, z up, in metres. OpenCV fills the faces and a depth buffer puts the nearest one on top.
"""

import functools
import itertools

import cv2
import numpy as np
import pandas as pd

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
# A part is its kind, its colour (a and b are the two paints of a picture) and its numbers:
#   ext    half-widths at the bottom and the top, outline x z x z ... (extruded across y)
#   box    half-width, x from to, z from to;  row  y, z from to, x from to, how many windows a side
#   plate  y, x from to, z at the root, the same at the tip, thickness (on both sides)
#   rev    y, corners, then x radius z ... (round about x);  tur  x, corners, then z radius ...
#   whl    x, y, radius, width (on both sides)
MESHES = """
airliner |
  rev a 0 10 5.1 .06 1.25 4.8 .27 1.28 4.2 .48 1.33 3.4 .56 1.36 -2.6 .56 1.36 -5.1 .1 1.7 |
  ext g .28 .2 4.74 1.46 4.42 1.76 4.3 1.7 4.55 1.42 | row g .54 1.4 1.52 -3.1 3.9 17 |
  row b .545 1.2 1.32 -2.8 3.6 1 | plate m .3 1.5 -1 1.1 4.9 -1.5 -2.1 1.6 .1 |
  plate m .1 -3.8 -4.8 1.8 1.9 -4.6 -5.1 2 .07 |
  ext b .07 .04 -3.5 1.8 -4.7 3.5 -5.4 3.5 -4.9 1.75 |
  rev b 1.7 8 1.5 .27 .84 1.1 .33 .84 .4 .3 .84 -.1 .18 .84 | rev k 1.7 8 1.52 .24 .84 1.5 .24 .84 |
  whl km 3.45 .14 .2 .1 | whl km -.5 .75 .28 .2
/ taxi | ext a .9 .86 -2.25 .35 2.2 .35 2.28 .66 2.1 .9 1.1 1 -1.6 1.02 -2.2 .97 -2.3 .66 |
  ext g .84 .66 1.1 1 .4 1.48 -1.05 1.48 -1.75 1 |
  ext a .68 .6 .42 1.45 .25 1.55 -1 1.55 -1.1 1.45 | ext a .86 .69 -.3 1 -.3 1.47 -.42 1.47 -.42 1 |
  ext a .86 .69 1 1 .32 1.47 .22 1.47 .86 1 | ext a .86 .69 -1.62 1 -.95 1.47 -1.1 1.47 -1.72 1 |
  ext y .34 .3 -.1 1.55 -.14 1.8 -.4 1.8 -.44 1.55 | row k .905 .7 .79 -2.1 2 13 |
  plate y .5 2.3 2.15 .72 .82 2.26 2.15 .72 .16 | plate r .5 -2.31 -2.2 .78 .86 -2.3 -2.2 .78 .16 |
  ext k .45 .45 2.29 .55 2.32 .55 2.3 .75 2.2 .75 | box m .9 2.2 2.36 .35 .48 |
  box m .9 -2.38 -2.2 .35 .48 | whl km 1.38 .76 .34 .18 | whl km -1.4 .76 .34 .18
/ jeep | box a .78 -1.8 1 .55 1.08 | ext a .66 .6 .6 .55 1.85 .55 1.85 1.02 .6 1.1 |
  ext b .76 .68 -.1 1.08 .5 1.08 .3 1.8 -1.75 1.8 -1.82 1.08 | box k .7 -1.8 .4 1.8 1.86 |
  ext g .68 .62 .5 1.15 .56 1.15 .38 1.72 .3 1.72 |
  ext g .775 .71 .3 1.18 .18 1.68 -.5 1.68 -.5 1.18 |
  ext g .775 .71 -.68 1.2 -.68 1.66 -1.55 1.66 -1.6 1.2 | box k .5 1.86 1.88 .62 .98 |
  rev y .48 8 1.92 .13 .86 1.85 .13 .86 | plate k .6 2 .95 .98 .92 2 .9 .98 .1 |
  plate k .6 -.9 -1.85 1 .92 -.9 -1.85 1 .1 | box k .85 1.85 2.1 .45 .6 |
  rev k 0 12 -1.84 .42 1.15 -2.08 .42 1.15 | rev m 0 10 -2.08 .2 1.15 -2.12 .2 1.15 |
  whl km 1.4 .78 .46 .28 | whl km -1.3 .78 .46 .28
/ racer | rev a 0 4 2.5 .1 .36 1.2 .28 .42 -.9 .42 .44 -2 .25 .44 |
  plate b .2 .4 -1.6 .38 .72 .1 -1.2 .36 .36 | ext a .22 .1 -.35 .55 -.55 1.12 -.8 1.1 -2 .6 |
  box k .2 -.3 .45 .58 .64 | rev w 0 8 -.02 .1 .78 -.1 .16 .78 -.28 .16 .78 -.36 .08 .78 |
  plate b 0 2.75 2.3 .2 .95 2.55 2.2 .2 .05 | plate a .9 2.8 2.15 .3 .97 2.8 2.15 .3 .26 |
  plate b 0 -1.9 -2.45 1.02 .68 -1.9 -2.45 1.02 .07 |
  plate a .66 -1.8 -2.5 .82 .71 -1.8 -2.5 .82 .5 | box k .06 -2.2 -1.9 .5 1 |
  plate k .1 1.75 1.6 .45 .8 1.7 1.6 .38 .05 | plate k .1 -1.5 -1.7 .45 .8 -1.5 -1.7 .4 .05 |
  whl km 1.65 .86 .37 .36 | whl km -1.65 .84 .4 .44
/ sports_car | ext a .95 .84 -2.15 .2 2.25 .18 2.38 .34 1.9 .56 .95 .7 -1.2 .82 -2.1 .84 -2.2 .6 |
  ext g .8 .52 1.05 .66 .02 1.12 -.75 1.12 -1.8 .8 |
  ext a .55 .48 .1 1.09 -.05 1.15 -.75 1.15 -.95 1.08 |
  ext a .82 .56 -.62 .78 -.7 1.11 -1.15 1.04 -1.5 .8 | ext b .22 .2 1.1 .7 2.2 .49 2.2 .5 1.1 .72 |
  plate a 0 -1.8 -2.25 1.08 .86 -1.85 -2.3 1.08 .05 | plate y .5 2.16 1.75 .56 .8 2.02 1.6 .58 .08 |
  plate r .35 -2.24 -2.1 .68 .8 -2.22 -2.1 .68 .08 | whl km 1.45 .8 .34 .24 | whl km -1.4 .8 .36 .28
/ wagon | ext a .9 .86 -2.55 .36 2.2 .36 2.26 .7 2.1 .92 1.15 1 -2.5 1.02 -2.62 .7 |
  ext g .84 .7 1.15 1 .55 1.5 -2.2 1.5 -2.5 1 |
  ext a .73 .68 .58 1.47 .42 1.56 -2.25 1.56 -2.3 1.47 |
  ext a .86 .73 1.04 1 .46 1.49 .36 1.49 .9 1 | ext a .86 .73 -.15 1 -.15 1.49 -.27 1.49 -.27 1 |
  ext a .86 .73 -1.15 1 -1.15 1.49 -1.3 1.49 -1.3 1 |
  ext a .86 .73 -2.3 1 -2.1 1.49 -2.2 1.49 -2.48 1 | plate k .56 .2 -2.1 1.64 .62 .2 -2.1 1.64 .05 |
  row n .905 .55 .88 -2.45 1.9 1 | plate y .5 2.28 2.1 .74 .82 2.25 2.1 .74 .15 |
  plate r .68 -2.62 -2.5 .75 .86 -2.62 -2.5 .75 .22 | box m .9 2.2 2.36 .36 .5 |
  box m .9 -2.7 -2.55 .36 .5 | whl km 1.4 .76 .34 .18 | whl km -1.6 .76 .34 .18
/ ship | rev b 0 4 4.6 .05 1.2 3.2 1 .6 -4 1 .6 |
  rev a 0 4 4.7 .05 1.25 3.2 1.05 1.3 -4 1.05 1.3 -4 .8 1.3 |
  ext w .7 .7 -3.4 1.2 2 1.2 1.8 1.8 -3.4 1.8 | ext w .55 .5 -3 1.8 1.4 1.8 1.2 2.3 -3 2.3 |
  row g .71 1.4 1.6 -3.2 1.7 12 | tur a -.8 10 2.3 .3 3.3 .27 | tur a -2.2 10 2.3 .3 3.3 .27
/ sailboat | rev a 0 6 2.6 .03 .7 1 .6 .5 -1.5 .6 .5 -2.2 .3 .6 |
  ext n .3 .25 -1.2 .7 .6 .7 .4 1 -1.2 1 | ext w .03 .03 .3 1.1 .3 5.2 -2.1 1.1 |
  ext b .03 .03 .55 .9 .45 4.6 2.5 .8 | box n .05 .3 .4 .6 5.4
/ helicopter | rev a 0 8 2 .1 1.2 1.7 .5 1.3 .8 .75 1.4 -.6 .7 1.5 -1.4 .25 1.7 -4 .1 1.9 |
  rev g 0 8 2.02 .05 1.35 1.75 .42 1.42 1 .7 1.48 |
  ext b .05 .04 -3.6 1.9 -4 2.8 -4.3 2.8 -4.1 1.8 | box k .12 -3.2 3.2 2.5 2.54 |
  plate k 0 .12 -.12 2.5 3.2 .12 -.12 2.5 .04 | plate k .65 1.5 -1.3 .1 .75 1.5 -1.3 .1 .1 |
  plate m .4 .8 .7 .9 .7 .8 .7 .1 .1
/ bus | ext a 1.15 1.1 -4.4 .4 4.4 .4 4.4 2.6 4.2 2.8 -4.4 2.8 | row g 1.14 1.6 2.35 -4.1 4 9 |
  row b 1.155 .8 1.1 -4.4 4.4 1 | box g 1 4.42 4.44 1.2 2.5 | whl km 2.8 .95 .5 .3 |
  whl km -2.6 .95 .5 .3
/ truck | ext a 1.1 1.05 2.2 .5 4.2 .5 4.2 1.5 3.9 2.6 2.2 2.6 | box w 1.2 -4.2 2 .9 3.3 |
  ext g 1 .95 4.23 1.55 3.95 2.5 3.8 2.5 4 1.55 | row g 1.11 1.6 2.3 2.7 3.8 1 |
  row b 1.21 1.8 2.4 -3.8 1.6 1 | whl km 3.2 1 .5 .3 | whl km -2.2 1 .5 .4 | whl km -3.4 1 .5 .4
/ locomotive | rev a 0 10 3.2 .7 1.7 -1 .7 1.7 | rev k 0 10 3.3 .6 1.7 3.2 .74 1.7 2.9 .74 1.7 |
  box b .95 -2.6 -1 .9 2.9 | row g .96 2 2.6 -2.3 -1.3 2 | tur k 2.6 8 2.3 .2 3.2 .3 |
  box r .85 -2.6 3.4 .7 .95 | ext r .8 .3 3.4 .1 4 .1 3.4 .9 | whl km 2.4 .8 .4 .15 |
  whl km 1.1 .8 .6 .15 | whl km -.3 .8 .6 .15 | whl km -1.8 .8 .6 .15
/ tractor | ext a .4 .36 -.4 .6 1.9 .6 1.9 1.3 -.4 1.4 |
  ext g .6 .5 -1.3 1.2 -.2 1.2 -.3 2.2 -1.2 2.2 | plate a .5 -.2 -1.6 1.6 1 -.2 -1.6 1.6 .1 |
  whl km 1.4 .55 .45 .25 | whl km -.9 .65 .9 .4
/ rocket | tur w 0 10 .6 .5 4.2 .5 4.8 .35 5.6 .03 | tur a 0 10 3.6 .51 4.2 .51 |
  tur b 0 10 1.4 .51 1.8 .51 | ext r .05 .05 .3 .2 1.2 0 1.2 .5 .4 1.6 |
  ext r .05 .05 -.3 .2 -1.2 0 -1.2 .5 -.4 1.6 | plate r .3 .05 -.05 .2 1.2 .05 -.05 0 .8
/ balloon | tur a 0 12 1.6 .3 2.4 1.1 3.2 1.6 | tur b 0 12 3.2 1.6 4 1.75 4.6 1.6 |
  tur a 0 12 4.6 1.6 5.3 1.1 5.7 .3 | tur n 0 4 0 .45 .7 .5 |
  ext d .02 .3 .4 .6 .4 1.7 .36 1.7 .36 .6 | ext d .02 .3 -.4 .6 -.4 1.7 -.36 1.7 -.36 .6
/ house | box a 1.5 -2 2 0 1.8 | ext b 1.75 .05 -2.2 1.75 2.2 1.75 2.2 3.1 -2.2 3.1 |
  row g 1.51 .7 1.4 -1.7 1.7 3 | box n .35 2 2.03 0 1.3 | box r .2 -1.2 -.8 2 3.5
"""
MESHES = {block.split("|")[0].strip(): block.split("|")[1:] for block in MESHES.split("/")}
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
        hit = (near > depth[part]) & (mask > 0)
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
    hsv = rng.integers((0, 80, 60), (180, 235, 245), (1, 2, 3)).astype(np.uint8)
    paints = dict(zip("ab", cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0], strict=True))
    if subtype == "airliner":
        paints["a"] = rng.uniform(205, 245, 3)
    elif subtype == "taxi":
        paints["a"] = rng.uniform((225, 165, 10), (250, 200, 50))
    if shadow:
        dropped = points - (points[:, 2:] - points[:, 2].min()) * sun / sun[2]
        outline = cv2.convexHull(_see(dropped, camera)[0].astype(np.int32))
        shade = cv2.fillConvexPoly(np.ones(canvas.shape[:2]), outline, 0.45)
        canvas[:] = canvas * cv2.blur(shade, (len(canvas) // 24 + 1,) * 2)[..., None]
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
    move = np.array([[zoom, 0, (1 - zoom) * s / 2 + dx], [0, zoom, (1 - zoom) * s / 2 + dy]])
    picture = cv2.warpAffine(canvas, move, (s, s), borderMode=cv2.BORDER_REFLECT)
    picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.2, 0.8) * size / 96)
    picture = picture * own.uniform(0.96, 1.04) + own.normal(0, rng.uniform(1, 5), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw(row, *, seed=0, size=96):
    """Return the picture of a manifest row, (size, size, 3) uint8 RGB.

    The scene comes from (seed, scene), the private jitter and noise from (seed, index).
    """
    row = row if hasattr(row, "keys") else row._asdict()
    rng = np.random.default_rng([seed, int(row["scene"])])
    own = np.random.default_rng([seed, 1_000_003 + int(row["index"])])
    small = row["flag"] in ("near_duplicate", "ambiguous")  # else the twins influence nothing
    camera, e = _camera(rng, row["background"], 2 * size, small)
    canvas = _backdrop(rng, row["background"], 2 * size, camera, e)
    if row["flag"] == "ambiguous":
        behind, _ = _camera(rng, "apron", 2 * size, False)
        behind[3][1] -= 0.25 * size  # above the racer, which must not hide it
        _object(canvas, rng, "airliner", behind, False)
    _object(canvas, rng, row["subtype"], camera, row["background"] != "sky")
    return _photograph(canvas, rng, own, size)


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

"""NT-Xent in the shapes of a GPU: halves and split ones, narrow and wide rows, ranks and queue."""

from itertools import product

from bigsimclr.kernels.nt_xent import COLLECTED, ROW_VALUES, Tiles, slope_tiles, sum_tiles
from tests.kernels.ahead import Build

WIDTHS = (64, 128, 256, 512)


def sums(
    width: int,
    *,
    split: bool,
    symmetric: bool = True,
    online: bool = False,
    views: int = 2,
    even: bool = True,
    hopper: bool = True,
    tiles: Tiles | None = None,
) -> Build:
    tiles = tiles or sum_tiles(width, split=split, hopper=hopper)
    names = ["rows", "row_rests", "columns", "column_rests"]
    numbers = ["pairs", "column_pairs", "position", "first_tile", "stripe"]
    return Build(
        "add_up",
        dict.fromkeys(names, "*fp16")
        | dict.fromkeys(["pieces", "largest", "mirrored"], "*fp32")
        | dict.fromkeys(numbers, "i32")
        | {"scale": "fp32"},
        {
            "WIDTH": width,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "VIEWS": views,
            "SPLIT": split,
            "SYMMETRIC": symmetric,
            "ONLINE": online,
            "EVEN": even,
        },
        warps=tiles.warps,
        stages=tiles.stages,
        capabilities=(90,) if hopper else (80,),
    )


def slope(
    width: int,
    *,
    split: bool,
    online: bool = False,
    has_queue: bool = False,
    even: bool = True,
    tiles: Tiles | None = None,
) -> Build:
    tiles = tiles or slope_tiles(width, split=split, online=online)
    halves = ["rows", "row_rests", "columns", "column_rests", "queue", "queue_rests"]
    singles = ["shares", "tops", "column_shares", "column_tops", "peaks", "parts"]
    numbers = ["pairs", "column_pairs", "queued", "peak_count", "position", "chunk"]
    return Build(
        "slope",
        dict.fromkeys(halves, "*fp16")
        | dict.fromkeys(singles, "*fp32")
        | dict.fromkeys(numbers, "i32")
        | {"scale": "fp32"},
        {
            "WIDTH": width,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "SPLIT": split,
            "HAS_QUEUE": has_queue,
            "ONLINE": online,
            "EVEN": even,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )


def _leave_unit_sphere(width: int) -> Build:
    pointers = [
        "parts",
        "weights",
        "peaks",
        "first",
        "second",
        "first_slope",
        "second_slope",
        "upstream",
    ]
    return Build(
        "leave_unit_sphere",
        dict.fromkeys(pointers, "*fp32")
        | dict.fromkeys(["pairs", "count", "peak_count", "first_stride", "second_stride"], "i32")
        | {"factor": "fp32"},
        {"D": width, "WIDTH": width, "SIDE": ROW_VALUES // width},
    )


def _normalise(width: int, *, split: bool) -> Build:
    return Build(
        "normalise",
        dict.fromkeys(["first", "second", "positives"], "*fp32")
        | dict.fromkeys(["units", "rests"], "*fp16")
        | dict.fromkeys(["pairs", "first_stride", "second_stride"], "i32"),
        {"D": width, "WIDTH": width, "SIDE": ROW_VALUES // width, "SPLIT": split},
    )


WHEN = ((True, True, False), (True, False, False), (False, True, False), (True, True, True))


def _collect(*, first: bool, last: bool, online: bool) -> Build:
    pointers = [
        *("pieces", "largest", "mirrored", "sums", "tops"),
        *("positives", "losses", "weights", "shares", "peaks"),
    ]
    numbers = dict.fromkeys(["pairs", "stripes", "first_tile", "band"], "i32")
    return Build(
        "collect",
        dict.fromkeys(pointers, "*fp32") | numbers | {"scale": "fp32"},
        {
            "TILE": 128,
            "SIDE": COLLECTED,
            "FIRST": first,
            "LAST": last,
            "SYMMETRIC": not online,
            "ONLINE": online,
        },
    )


BUILDS = [
    *(
        sums(width, split=split, hopper=hopper)
        for width, split, hopper in product(WIDTHS, (False, True), (False, True))
    ),
    *(
        build
        for hopper in (False, True)
        for build in (
            sums(128, split=False, even=False, hopper=hopper),
            sums(128, split=False, symmetric=False, hopper=hopper),
            sums(128, split=True, symmetric=False, views=1, hopper=hopper),
            sums(128, split=True, symmetric=False, online=True, hopper=hopper),
        )
    ),
    *(slope(width, split=split) for width, split in product(WIDTHS, (False, True))),
    slope(128, split=False, even=False),
    slope(128, split=True, online=True, has_queue=True),
    slope(128, split=True, has_queue=True),
    *(_leave_unit_sphere(width) for width in WIDTHS),
    _normalise(128, split=False),
    _normalise(512, split=True),
    *(_collect(first=first, last=last, online=online) for first, last, online in WHEN),
]

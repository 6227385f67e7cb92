"""Recipes that must be refused: (name, text or bytes, line, what the message says)."""

from tests.recipe.samples import FINETUNE, LONGEST_INTEGER, PIPELINE, PRETRAIN

BadRecipe = tuple[str, str | bytes, int, str]


def _plus(*lines: str) -> str:
    """Add lines to a good recipe of seven lines; the first of them is line 8."""
    return PRETRAIN + "".join(f"{line}\n" for line in lines)


def _with(old: str, new: str, text: str = PRETRAIN) -> str:
    assert old in text, old
    return text.replace(old, new)


_BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"

TEXT: list[BadRecipe] = [
    ("empty", "", 1, "the file is empty"),
    ("only a comment", "# nothing\n", 1, "the file is empty"),
    ("top level is text", "pretrain\n", 1, "'key: value' lines"),
    ("top level is a list", "- stage: pretrain\n", 1, "'key: value' lines, and this is a list;"),
    ("top level is null", "~\n", 1, "'key: value' lines"),
    ("two documents", PRETRAIN + "---\nstage: knn\n", 8, "a second document"),
    ("yaml directive", "%YAML 1.1\n---\n" + PRETRAIN, 1, "directive"),
    ("tag directive", "%TAG ! tag:x,2000:\n---\n" + PRETRAIN, 1, "directive"),
    ("byte order mark", "\ufeff" + PRETRAIN, 1, "byte order mark"),
    ("UTF-16", PRETRAIN.encode("utf-16"), 1, "not UTF-8"),
    ("Latin-1", _plus("# grün").encode("latin-1"), 8, "byte 0xfc is not UTF-8"),
    ("NUL", _plus("seed: \0"), 8, "control character U+0000"),
    ("escape sequence", _plus("# \x1b[2J"), 8, "control character U+001B"),
    ("line separator", _plus("# a\u2028b"), 8, "control character U+2028"),
    ("next line", _plus("# a\x85b"), 8, "control character U+0085"),
    ("lone carriage return", "stage: pretrain\rseed: 0\n", 1, "control character U+000D"),
    ("tab as indentation", _plus("log:", "\tevery_steps: 3"), 9, "a tab; use spaces"),
    ("tab before a value", _plus("seed:\t3"), 8, "a tab; use spaces"),
    ("too large", "# " + "x" * 1_000_001, 1, "more than 1 MB"),
    (
        "duplicate key",
        _plus("batch: {global_batch: 8}"),
        8,
        "key 'batch' is given twice (first in line 7)",
    ),
    (
        "duplicate inner key",
        _with("kind: digits", "kind: digits, kind: folder"),
        2,
        "'kind' is given twice",
    ),
    ("duplicate by quotes", _plus("'stage': knn"), 8, "'stage' is given twice (first in line 1)"),
    ("anchor", _plus("seed: &s 3"), 8, "&s: anchors are not allowed"),
    ("alias", _plus("seed: *s"), 8, "*s: aliases are not allowed"),
    ("alias bomb", _BOMB + PRETRAIN, 1, "anchors are not allowed"),
    ("merge key", _plus("<<: {seed: 3}"), 8, "merge keys (<<) are not allowed"),
    ("python tag", _plus("seed: !!python/object/apply:os.system [true]"), 8, "tag "),
    ("python tag at the top", "!!python/object/new:dict\n" + PRETRAIN, 1, "tag "),
    ("standard tag", _plus('seed: !!int "3"'), 8, "tag "),
    ("own tag", _plus("seed: !env SEED"), 8, "tag !env is not allowed"),
    ("anchor on a key", _plus("&k seed: 3"), 8, "anchors are not allowed"),
    ("too deep", _plus("log: " + "[" * 3000), 8, "nested more than 20 levels"),
    ("too deep in blocks", "".join(" " * n + "a:\n" for n in range(30)), 20, "nested more than 20"),
    ("open bracket", _plus("log: {every_steps: 3", "seed: 1"), 9, "bracket"),
    ("never closed", _plus("log: {every_steps: 3"), 8, "never closed"),
    ("never closed, nothing in it", "stage: [\n", 1, "a bracket is opened and never closed"),
    ("inner one never closed", "a: [1,\n  {b: 2,\n\n", 2, "a bracket is opened and never closed"),
    ("closed too often", _plus("log: {every_steps: 3}}"), 8, "closed too often"),
    ("open quote", _plus("log: 'x"), 8, "a quote is opened and never closed"),
    ("two colons", _plus("log: every_steps: 3"), 8, "a second ':'"),
    (
        "wrong indentation",
        _plus("log:", "  every_steps: 3", " tensorboard: true"),
        10,
        "indentation",
    ),
    ("indented key", _plus("  seed: 3"), 8, "indentation"),
    ("no colon", _plus("seed 3"), 8, "without ':'"),
    ("at sign", _plus("seed: @3"), 8, "put this text in quotes"),
    ("unknown escape", _plus(r'seed: "\q"'), 8, "single quotes"),
    ("escape beyond Unicode", _plus(r'seed: "\UFFFFFFFF"'), 8, "no valid YAML"),
    ("escaped control character", _plus(r'seed: "\e[2J"'), 8, "control character"),
    ("escaped surrogate", _plus(r'seed: "\ud800"'), 8, "control character"),
    ("number as key", _plus("1: 2"), 8, "key 1 is not text"),
    ("null as key", _plus("~: 2"), 8, "key ~ is not text"),
    ("list as key", _plus("[a]: 2"), 8, "cannot be a key"),
    ("section as key", _plus("? {a: 1}", ": 2"), 8, "cannot be a key"),
]

NUMBERS: list[BadRecipe] = [
    (
        "octal",
        _plus("seed: 010"),
        8,
        "seed: should be a whole number, not '010'; write it without the leading zero: 10",
    ),
    ("YAML 1.2 octal", _plus("seed: 0o10"), 8, "seed: should be a whole number"),
    ("hexadecimal", _plus("seed: 0x10"), 8, "seed: should be a whole number"),
    ("binary", _plus("seed: 0b10"), 8, "seed: should be a whole number"),
    (
        "underscores",
        _plus("seed: 1_000"),
        8,
        "seed: should be a whole number, not '1_000'; write it without separators",
    ),
    ("thousands", _plus("seed: 1,000"), 8, "write it without separators"),
    ("sexagesimal", _plus("seed: 12:30"), 8, "seed: should be a whole number, not '12:30'"),
    ("timestamp", _plus("seed: 2024-01-01"), 8, "seed: should be a whole number, not '2024-01-01'"),
    ("text in quotes", _plus("seed: '3'"), 8, "write it without quotes"),
    (
        "whole number with a point",
        _plus("seed: 3.0"),
        8,
        "seed: should be a whole number, not 3.0; write 3",
    ),
    ("exponent", _plus("seed: 1e3"), 8, "seed: should be a whole number, not 1000.0; write 1000"),
    ("true as number", _plus("seed: true"), 8, "seed: should be a whole number, not true"),
    ("null as number", _plus("seed:"), 8, "seed: should be a whole number, not nothing (null)"),
    ("negative", _plus("seed: -1"), 8, "seed: should be greater than or equal to 0, not -1"),
    ("too large for 64 bits", _plus(f"seed: {LONGEST_INTEGER + 1}"), 8, "is too large a number"),
    ("thousands of digits", _plus("seed: " + "9" * 5000), 8, "seed: should be a whole number"),
    ("not a number", _plus("loss: {temperature: .nan}"), 8, ".nan is not a finite number"),
    ("infinite", _plus("loss: {temperature: -.inf}"), 8, "-.inf is not a finite number"),
    ("infinite in words", _plus("loss: {temperature: inf}"), 8, "inf is not a finite number"),
    ("overflow", _plus("loss: {temperature: 1e999}"), 8, "is too large a number"),
    (
        "zero temperature",
        _plus("loss: {temperature: 0}"),
        8,
        "loss.temperature: should be greater than 0, not 0",
    ),
    (
        "share above one",
        _with("16}", "16, flip_probability: 1.5}"),
        3,
        "augment.flip_probability: should be less than or equal to 1",
    ),
    (
        "percent sign",
        _plus("input: {unreadable_limit: 1%}"),
        8,
        "input.unreadable_limit: should be a number, not '1%'",
    ),
]

VALUES: list[BadRecipe] = [
    (
        "no as false",
        _plus("probe: {linear: no}"),
        8,
        "probe.linear: should be true or false, not 'no'; write true or false",
    ),
    ("On as true", _plus("probe: {linear: On}"), 8, "write true or false"),
    ("True as true", _plus("probe: {linear: True}"), 8, "not 'True'; write true or false"),
    ("one as true", _plus("probe: {linear: 1}"), 8, "probe.linear: should be true or false, not 1"),
    (
        "number as path",
        _with("root: images", "root: 2024", FINETUNE),
        2,
        'data.root: should be a path, not 2024; put it in quotes: "2024"',
    ),
    (
        "null as path",
        _with("root: images", "root: null", FINETUNE),
        2,
        "data.root: should be a path, not nothing",
    ),
    (
        "list as text",
        _with("root: images", "root: a, train: [b]", FINETUNE),
        2,
        "data.train: should be text, not a list",
    ),
    ("text as section", _plus("head: big"), 8, "head: should be a section with keys, not 'big'"),
    ("null as section", _plus("head:"), 8, "head: should be a section with keys, not nothing"),
    (
        "list as section",
        _plus("head:", "- layers: 3"),
        8,
        "head: should be a section with keys, not a list",
    ),
    (
        "text as kind section",
        _with("{kind: digits}", "digits"),
        2,
        "data: should be a section with keys, not 'digits'",
    ),
    ("section as text", _plus("parallel: {device: {a: 1}}"), 8, "parallel.device: should be"),
    (
        "number as list",
        _with("16}", "16, crop_area: 0.5}"),
        3,
        "augment.crop_area: should be a list, not 0.5",
    ),
    (
        "short list",
        _with("16}", "16, crop_area: [0.5]}"),
        3,
        "augment.crop_area: should have 2 values, not 1",
    ),
    ("empty list", _with("16}", "16, crop_area: []}"), 3, "should have 2 values, not 0"),
    (
        "long list",
        _with("16}", "16, crop_area: [0.1, 0.5, 1]}"),
        3,
        "augment.crop_area: should have 2 values, not 3",
    ),
    (
        "list item",
        _with("16}", "16, crop_area: [0.1, x]}"),
        3,
        "augment.crop_area.1: should be a number, not 'x'",
    ),
    (
        "reversed range",
        _with("16}", "16, crop_area: [0.5, 0.1]}"),
        3,
        "augment.crop_area: the range ends (0.1) before it starts (0.5)",
    ),
    (
        "unknown choice",
        _plus("parallel: {device: cud}"),
        8,
        "parallel.device: should be 'auto', 'cpu' or 'cuda', not 'cud'; did you mean 'cuda'?",
    ),
    ("unknown depth", _with("depth: 10", "depth: 49"), 4, "backbone.depth: should be 10, 18,"),
    ("choice in quotes", _with("depth: 10", "depth: '50'"), 4, "backbone.depth: should be 10, 18,"),
]

KEYS: list[BadRecipe] = [
    (
        "unknown key",
        _plus("loss:", "  temperatur: 0.1"),
        9,
        "loss.temperatur: unknown key; did you mean 'temperature'?",
    ),
    ("capital key", _plus("loss: {Temperature: 0.1}"), 8, "did you mean 'temperature'?"),
    (
        "unknown top-level key",
        _plus("backbon: {depth: 18}"),
        8,
        "backbon: unknown key; did you mean 'backbone'?",
    ),
    (
        "key of an inner section",
        _plus("temperature: 0.1"),
        8,
        "temperature: unknown key; did you mean 'loss.temperature'?",
    ),
    (
        "key of another stage",
        _plus("from_layer: 1"),
        8,
        "from_layer: unknown key for this stage; it belongs to linear,",
    ),
    (
        "key of another kind",
        _with("kind: digits", "kind: digits, root: x"),
        2,
        "data.root: unknown key for this kind; it belongs to arrays,",
    ),
    (
        "another word for a key",
        _plus("lr: 1"),
        8,
        "lr: unknown key; did you mean 'optimizer.learning_rate'?",
    ),
    ("batch size", _plus("batch_size: 8"), 8, "did you mean 'batch.global_batch'?"),
    ("unlike any key", _plus("zzz: 1"), 8, "zzz: unknown key; choose from seed,"),
    ("dotted key in a file", _plus("loss.temperature: 0.1"), 8, "loss.temperature: unknown key"),
    ("key with line break", _plus('"a\\nb": 1'), 8, "unknown key"),
    (
        "no stage",
        PRETRAIN.partition("\n")[2],
        1,
        "stage: the required key is missing; choose from pretrain,",
    ),
    (
        "unknown stage",
        _with("pretrain", "pretran"),
        1,
        "stage: no stage 'pretran'; did you mean 'pretrain'?",
    ),
    ("stage as list", _with("pretrain", "[pretrain]"), 1, "stage: no stage"),
    ("stage null", _with("pretrain", "null"), 1, "stage: no stage"),
    (
        "unknown kind",
        _with("digits", "digit"),
        2,
        "data.kind: no kind 'digit'; did you mean 'digits'?",
    ),
    ("kind as number", _with("digits", "3"), 2, "data.kind: should be one of digits, arrays,"),
    (
        "no kind",
        _with("kind: lars, ", ""),
        5,
        "optimizer: the required key kind is missing; choose from lars, sgd, adamw",
    ),
    (
        "missing key",
        _with("{kind: lars, learning_rate: 1e-1}", "{kind: lars}"),
        5,
        "optimizer.learning_rate: the required key is missing; base rate",
    ),
    (
        "missing key of long meaning",
        _with("{kind: digits}", "{kind: folder}"),
        2,
        "data.root: the required key is missing; the folder that holds the images, or the `train` "
        "and `held_out` folders; relative to the current directory, ~ is the home folder",
    ),
    (
        "misspelt required key",
        _with("global_batch", "globl_batch"),
        7,
        "batch.globl_batch: unknown key; did you mean 'global_batch'?",
    ),
    (
        "misspelt required section",
        _with("augment:", "augmnt:"),
        3,
        "augmnt: unknown key; did you mean 'augment'?",
    ),
    (
        "missing section",
        _with("batch: {global_batch: 64}\n", ""),
        1,
        "batch: the required key is missing",
    ),
]

RULES: list[BadRecipe] = [
    (
        "epochs and steps",
        _with("epochs: 3", "epochs: 3, steps: 4"),
        6,
        "schedule: give exactly one of epochs and steps",
    ),
    (
        "neither epochs nor steps",
        _with("epochs: 3", "warmup_epochs: 0"),
        6,
        "give exactly one of epochs",
    ),
    (
        "two amounts of labels",
        _with("per_class: 2", "per_class: 2, percent: 1", FINETUNE),
        4,
        "labels: give exactly one of per_class,",
    ),
    (
        "no amount of labels",
        _with("per_class: 2", "draw: 1", FINETUNE),
        4,
        "labels: give exactly one of",
    ),
    (
        "accumulated contrastive",
        _with("64}", "64, micro_batch: 8, update: accumulated}"),
        7,
        "batch.update: accumulated is not offered for a contrastive loss",
    ),
    ("uneven micro-batch", _with("64}", "64, micro_batch: 7}"), 7, "batch.micro_batch: "),
    (
        "step name",
        _with("name: pretrain", "name: Pre-train", PIPELINE),
        3,
        "step 1: name: 'Pre-train' is no name; use a to z, 0 to 9 and _, at most 32, a letter",
    ),
    ("no steps", "stage: pipeline\nsteps: []\n", 2, "steps: should have at least 1 item"),
    (
        "two steps of one name",
        _with("name: finetune", "name: pretrain", PIPELINE),
        4,
        "step 2: name: an earlier step has this name; rename one",
    ),
    (
        "line break in a parent",
        _with("parent: pretrain", r'parent: "a\nb"', PIPELINE),
        4,
        r"step 'finetune': parent: no earlier step is named 'a\nb'; earlier are pretrain",
    ),
    (
        "unknown parent",
        _with("parent: pretrain", "parent: pretrian", PIPELINE),
        4,
        "step 'finetune': parent: no earlier step is named 'pretrian'; did you mean 'pretrain'?",
    ),
    (
        "grid value",
        _with("[1, 2]", "[1, [2]]", PIPELINE),
        4,
        "step 'finetune': grid.labels.per_class.1: should be a number or text",
    ),
    (
        "grid without list",
        _with("[1, 2]", "1", PIPELINE),
        4,
        "step 'finetune': grid.labels.per_class: should be a list, not 1",
    ),
    (
        "another grid than the parent's",
        PIPELINE + "  - {name: d, recipe: x, parent: finetune, grid: {seed: [1]}}\n",
        5,
        "step 'd': grid: differs from that of the parent 'finetune'",
    ),
    (
        "unknown key of a step",
        _with("recipe: two", "recipe: two, parnt: pretrain", PIPELINE),
        4,
        "step 'finetune': parnt: unknown key; did you mean 'parent'?",
    ),
]

BAD_RECIPES: list[BadRecipe] = TEXT + NUMBERS + VALUES + KEYS + RULES

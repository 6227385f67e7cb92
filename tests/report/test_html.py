import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import html5lib
import pytest

from bigsimclr.errors import StorageError
from bigsimclr.report.html import write_report
from tests.report.fabricate import write, write_pipeline, write_run

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "' onmouseover='alert(1)",
    "` onfocus=alert(1) autofocus `",
    "javascript:alert(1)",
    "</style><style>*{display:none}</style>",
    "</title><h1>owned</h1>",
    "</pre></details><form action=//evil><input>",
    "<!-- ",
    "--><b>",
    "<![CDATA[<b>]]>",
    "<?php echo 1 ?>",
    "<svg/onload=alert(1)>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=//evil.example>",
    "<link rel=stylesheet href=//evil.example/a.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<a href=//evil.example>x</a>",
    "<template><b>",
    "<plaintext>",
    "<textarea>",
    "<table><tr><td>",
    "</td></tr></table>",
    "</main></body></html>",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "{# comment #}",
    "${7*7} $x^2$ \\frac{1}{2}",
    "&lt;b&gt; &#60;b&#62; &amp",
    "url(//evil.example) ; } body { display: none }",
    "a\u2028b\u2029c\u202egnp.exe\u0085",
    "\x07bell \x1b[31mred\x1b[0m \x0c \ufffe",
    "\ud800 lone surrogate",
    "%3Cscript%3E ../../../etc/passwd",
    "<" * 300 + "A" * 5000,
)


def structure(page: str) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """List every element with its attributes; those that hold text or pictures lose their value."""
    tree = html5lib.parse(page, namespaceHTMLElements=False)
    free = ("alt", "src", "srcset")
    return [
        (
            str(element.tag),
            tuple(sorted((k, "" if k in free else v) for k, v in element.attrib.items())),
        )
        for element in tree.iter()
    ]


def addresses(page: str) -> Iterator[str]:
    for element in html5lib.parse(page, namespaceHTMLElements=False).iter():
        for name in ("src", "srcset", "href", "action", "data", "poster", "formaction"):
            if name in element.attrib:
                yield element.attrib[name]


def run_of_texts(directory: Path, text: str, recipe: str) -> str:
    """Write a run whose every text is `text`, report on it and return the page."""
    write_run(
        directory,
        "knn",
        metrics={"accuracy": 0.5},
        protocol={
            **dict.fromkeys(
                ("encoder", "head_layer", "epochs", "augmentation", "checkpoint"), text
            ),
            "other": text,
        },
        parent=text,
        plan={"examples": text, "global_batch": [text]},
        change=lambda _: text,
    )
    write(directory / "recipe.yaml", recipe)
    write(directory / "environment.json", {"torch": text, "machine": {"inner": text}})
    return write_report(directory).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> list:
    # A recipe that cannot be read gives the same note whatever it holds.
    page = run_of_texts(tmp_path_factory.mktemp("harmless") / "run", "text", "stage: [text")
    return structure(page)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_adds_no_element_and_no_attribute(number, harmless, tmp_path):
    text = HOSTILE[number]
    page = run_of_texts(tmp_path / "run", text, f"stage: [{text}".encode(errors="replace").decode())
    assert structure(page) == harmless
    assert all(
        address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses(page)
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ufffe]", page)
    json.loads((tmp_path / "run/report.json").read_text(encoding="ascii"))


def test_hostile_names_of_keys_folders_and_metrics(tmp_path):
    pages = []
    for name in ("name", "<img src=x onerror=alert(1)> $x$ 'q' \"d\""):
        folder = tmp_path / name / "pipeline"
        runs = [{"path": f"a {name}", "grid": {f"k {name}": name}, "parent": name}]
        steps = [{"name": name, "stage": "finetune", "runs": runs * 2}]
        steps.append({"name": f"p {name}", "stage": "pretrain", "runs": [{"path": f"p {name}"}]})
        write(folder / "pipeline.json", {"name": name, "steps": steps})
        record = {"examples": 1, "step": 1, "time": 1.0, "values": {name: 1.0, "train/loss": 2.0}}
        for run, stage in ((f"a {name}", "finetune"), (f"p {name}", "pretrain")):
            write_run(
                folder / run,
                stage,
                metrics={"accuracy": 0.5} if stage == "finetune" else {f"{name} accuracy": 0.5},
                protocol={"labels_per_class": 1, f"key {name}": name},
                records=[record],
                plan={f"plan {name}": name},
            )
            write(folder / run / "environment.json", {f"key {name}": name})
        pages.append(write_report(folder).read_text(encoding="utf-8"))
    assert structure(pages[0]) == structure(pages[1])
    assert "<img src=x" not in pages[1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_pipeline(tmp_path_factory.mktemp("runs") / "digits")
    write_report(root)
    return root


def test_page_refers_to_nothing_outside_itself(pipeline):
    page = (pipeline / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", page)
    assert f'content="{CSP}"' in page
    tags = {tag for tag, _ in structure(page)}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    anchors = {address for address in addresses(page) if address.startswith("#")}
    assert anchors == {
        f"#{name}"
        for name in "curve results training lineage recipes environment again".split()  # noqa: SIM905
    }
    assert all(f'id="{anchor[1:]}"' in page for anchor in anchors)


def test_plots_are_sound_svg_without_remote_addresses(pipeline):
    page = (pipeline / "report.html").read_text(encoding="utf-8")
    pictures = [address for address in addresses(page) if address.startswith("data:")]
    assert len(pictures) == 4 + 2 * (8 + 3 * 2)
    for picture in pictures:
        svg = base64.b64decode(picture.partition(",")[2]).decode()
        assert "<!DOCTYPE" not in svg
        root = ET.fromstring(svg)
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not value.startswith(("http", "//")), name
                assert not name.startswith("on")


def test_every_picture_and_table_is_described(pipeline):
    page = (pipeline / "report.html").read_text(encoding="utf-8")
    tree = html5lib.parse(page, namespaceHTMLElements=False)
    images = list(tree.iter("img"))
    assert images
    assert all(len(image.attrib["alt"]) > 20 for image in images)
    assert "distilled: 86.0% at 1, 92.0% at 2, 96.1% at 5" in images[0].attrib["alt"]
    for table in tree.iter("table"):
        assert table.find("caption") is not None
        assert all("scope" in cell.attrib for cell in table.iter("th"))
    headings = [heading.text for heading in tree.iter("h2")]
    assert headings[:5] == [
        "Accuracy by number of labels",
        "Results",
        "Training",
        "Lineage",
        "Recipes",
    ]
    assert tree.find(".//html") is None
    assert tree.attrib["lang"] == "en"


def test_page_shows_numbers_with_their_protocol(pipeline):
    page = (pipeline / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "48 of 48 runs finished" in text
    assert "finetune 81.0 ± 2.0 fine-tuned 1 / class 0\N{EN DASH}4 0 1 40.08 crop last 360" in text
    assert "1 / class 72.0 ± 2.0 81.0 ± 2.0 86.0 ± 2.0 +14.0" in text
    assert "sample standard deviation over 5 label draws. Gain" in text
    assert "86.0% ± 2.0, 1 label per class" in text
    assert "finetune finetune 1, 2, 5 / class" in text
    assert "Draw no. Seed Head layer Epochs" in text
    assert "86.0%\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}2.0" in page
    assert "2 ln(2N \N{MINUS SIGN} 1) = 12.47 for N = 256" in text
    assert "One of the 360 held-out images is 0.28 points." in text
    assert "labels.per_class = 1, 2, 5; labels.draw = 0, 1, 2, 3, 4" in text
    assert "not run yet" not in text


def test_the_same_run_gives_the_same_bytes(pipeline, tmp_path):
    before = [(pipeline / name).read_bytes() for name in ("report.html", "report.json")]
    write_report(pipeline)
    assert [(pipeline / name).read_bytes() for name in ("report.html", "report.json")] == before
    assert not list(pipeline.glob(".*"))


@pytest.mark.parametrize("files", ["none", "pipeline.yaml", "pipeline.json", "started"])
def test_unfinished_runs_are_shown_as_such(files, tmp_path):
    root = tmp_path / "digits"
    root.mkdir()
    if files == "started":
        write_pipeline(root, finished=lambda _: False, started=lambda path: path == "pretrain")
    elif files != "none":
        write_pipeline(tmp_path / "whole", started=lambda _: False)
        (tmp_path / "whole" / files).rename(root / files)
    page = write_report(root).read_text(encoding="utf-8")
    report = json.loads((root / "report.json").read_text())
    assert "not run yet" in page.lower()
    assert report["label_efficiency"] == report["results"] == []
    expected = "Not finished yet: no result so far." if files == "started" else "Not run yet."
    assert report["verdict"] == expected
    assert expected in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[" * 100_000),
        ("result.json", "[1, 2]"),
        ("result.json", '{"metrics": null, "protocol": 3, "data": [], "seconds": "x"}'),
        ("result.json", '{"metrics": {"accuracy": NaN}, "seconds": Infinity, "examples": 1e999}'),
        ("result.json", '{"metrics": {"accuracy": true}, "protocol": {"draw": 1e400, "seed": {}}}'),
        ("result.json", '{"stage": "distill", "parent": "../../../../..", "metrics": {}}'),
        ("result.json", '{"stage": "distill", "parent": "a\\u0000b", "metrics": {}}'),
        ("plan.json", '{"examples": 0, "global_batch": -5, "chance_loss": 1e308}'),
        ("plan.json", '{"examples": ' + "9" * 4000 + "}"),
        ("environment.json", "null"),
        ("recipe.yaml", "a: &a [x, x]\nb: *a\n"),
        ("recipe.yaml", "seed: {}\nlabels: 3\nbackbone: [1]\nparent: 7\n"),
        (
            "metrics.jsonl",
            '{"examples": 1, "step": 1, "time": 1.0, "values": {"train/loss": null}}',
        ),
        ("metrics.jsonl", '{"examples": 1, "step": 1, "time": 1.0, "values": {"train/loss": []}}'),
        ("metrics.jsonl", "\x00\x01 no json\n{}\n"),
        ("pipeline.json", "{"),
        ("pipeline.json", '{"steps": 3}'),
        ("pipeline.json", '{"name": 3, "steps": [1, {"name": null, "runs": [2, {"path": "."}]}]}'),
        ("pipeline.json", '{"steps": [{"name": "a", "runs": [{"path": "../../x"}]}]}'),
        ("pipeline.json", '{"steps": [{"name": "a", "runs": [{"path": "/etc"}]}]}'),
    ],
)
def test_damaged_files_never_stop_a_report(name, content, tmp_path):
    run = tmp_path / "run"
    write_run(run, "finetune", metrics={"accuracy": 0.5}, protocol={"labels_per_class": 1})
    write(run / name, content)
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<h1>") == 1
    json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)


def test_a_pipeline_cannot_show_folders_outside_itself(tmp_path):
    write_run(tmp_path / "secret", "knn", metrics={"accuracy": 0.123}, protocol={"encoder": "SEEN"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link").symlink_to(tmp_path / "secret")
    runs = [{"path": path} for path in ("../secret", str(tmp_path / "secret"), "link")]
    write(tmp_path / "run/pipeline.json", {"steps": [{"name": "a", "runs": runs}]})
    page = write_report(tmp_path / "run").read_text()
    assert "SEEN" not in page
    assert page.count("is not a folder of this run") == 3


def test_steps_are_shown_as_a_tree_even_if_names_repeat(tmp_path):
    steps = [
        {"name": "a", "stage": "pretrain", "runs": [{"path": "a"}]},
        {"name": "b", "stage": "finetune", "runs": [{"path": "b", "parent": "a"}]},
        {"name": "b", "stage": "distill", "runs": [{"path": "c", "parent": "b"}]},
        {"name": "d", "stage": "supervised", "runs": [{"path": "d", "parent": "d"}]},
    ]
    write(tmp_path / "pipeline.json", {"name": "p", "steps": steps})
    tree = html5lib.parse(write_report(tmp_path).read_text(), namespaceHTMLElements=False)
    table = next(
        t for t in tree.iter("table") if "Each step below" in (t.findtext("caption") or "")
    )
    names = [row.findtext("th") for row in table.find("tbody")]
    space, corner = "\N{NO-BREAK SPACE}", "\N{BOX DRAWINGS LIGHT UP AND RIGHT}"
    assert names == ["a", f"{space}{corner} b", f"{5 * space}{corner} b (3)", "d"]


def test_secrets_of_the_environment_stay_out(tmp_path):
    write_run(tmp_path / "run", "knn", metrics={"accuracy": 0.5})
    write(tmp_path / "run/environment.json", {"HF_TOKEN": "zzz-canary", "torch": "2.13.0"})
    page = write_report(tmp_path / "run").read_text()
    assert "zzz-canary" not in page + (tmp_path / "run/report.json").read_text()
    assert "2.13.0" in page


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere/report\.json cannot be written: "):
        write_report(tmp_path / "nowhere")


def test_a_link_at_the_page_is_replaced_not_followed(tmp_path):
    write_run(tmp_path / "run", "knn", metrics={"accuracy": 0.5})
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "run/report.html").symlink_to(tmp_path / "victim")
    write_report(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "untouched"


def test_report_and_progress_load_no_torch():
    code = (
        "import sys, bigsimclr.report.html, bigsimclr.report.progress;"
        "sys.exit(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

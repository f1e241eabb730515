"""Tables in their three forms, printed costs, and the report, which is one complete file without links."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from results import made_comparison

from latentscenes.core.console import Table, bytes_text, percent_text, seconds_text
from latentscenes.core.errors import UserError
from latentscenes.evaluation.charts import Series, line_chart, smooth
from latentscenes.evaluation.evaluate import Evaluation, SceneScore, mean_score
from latentscenes.evaluation.report import write_report
from latentscenes.evaluation.tables import Variant, print_cost, print_scores, scores_table, summary_table


def made_evaluation(count: int, perceptual: float | None = 0.1, codec_psnr: float = 30.0) -> Evaluation:
    scores = [
        SceneScore(f"scene{k}", 20.0 + k, 0.8, perceptual, codec_psnr, 0.9, perceptual, 0.01)
        for k in range(count)
    ]
    kind = "ST-LPIPS" if perceptual else None
    return Evaluation("data", "held_out", 4 * count, kind, 0.0123, scores, mean_score(scores), 0.0456)


def test_units():
    assert [bytes_text(n) for n in (50, 9_748, 491_720, 1_572_864, 334_615_452)] == [
        "50 B",
        "9.52 KiB",
        "0.469 MiB",
        "1.50 MiB",
        "319 MiB",
    ]
    assert bytes_text(3 * 2**30) == "3.00 GiB"
    assert [seconds_text(s) for s in (0.0123, 5.0, 133.8, 9000.0, None)] == [
        "12.3 ms",
        "5.00 s",
        "2.23 min",
        "2.50 h",
        "–",
    ]
    assert percent_text(-44.2) == "−44 %" and percent_text(7.0) == "+7 %"


def test_table_in_three_forms():
    table = Table("T", ("name", "a|b"), (("x <y>", "1"), ("z", "2")), strong=(1,), note="Read so.")
    assert table.markdown() == "| name | a\\|b |\n|---|---:|\n| x &lt;y> | 1 |\n| **z** | **2** |\n"
    page = table.html()
    assert (
        "<td>x &lt;y&gt;</td><td>1</td>" in page
        and '<tr class="strong"><td>z</td>' in page
        and "Read so." in page
    )
    assert table.rich().row_count == 2


def test_scores_show_the_worst_first():
    few = scores_table(made_evaluation(3))
    assert few.columns == (
        "scene, worst first",
        "PSNR",
        "SSIM",
        "ST-LPIPS",
        "codec PSNR",
        "codec SSIM",
        "codec ST-LPIPS",
        "latent error",
    )
    assert [row[0] for row in few.rows] == ["scene0", "scene1", "scene2", "mean"] and few.rows[3][
        1
    ] == "21.00"
    many = scores_table(made_evaluation(100))
    assert (
        len(many.rows) == 14
        and many.rows[0][0] == "scene0"
        and many.rows[8][0] == "… 88 scenes …"
        and many.rows[12][0] == "scene99"
    )
    assert "a view took 45.6 ms CPU, 12.3 ms wall." in many.note


def test_scores_without_perceptual_or_codec():
    columns = scores_table(made_evaluation(2, perceptual=None, codec_psnr=100.0)).columns
    assert columns == ("scene, worst first", "PSNR", "SSIM", "latent error")


def test_print_scores(capsys):
    print_scores(made_evaluation(2))
    assert "ST-LPIPS" in (out := capsys.readouterr().out) and "scene1" in out and "12.3 ms wall" in out


def test_print_cost_of_the_published_setting(capsys):
    print_cost(None, "paper", "rgb", ())
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.strip().startswith("1 000 "))
    assert line.split() == ["1", "000", "0.840", "MiB", "1.50", "MiB", "−44", "%"]
    assert "319 MiB" in out and "51.6 MiB" in out and "from N = 360 scenes on" in out


def test_print_cost_needs_something():
    with pytest.raises(UserError, match="--run or a configuration with --config"):
        print_cost(None, None, "rgb")


@pytest.fixture(scope="module")
def content(tmp_path_factory, solids):
    from conftest import TINY

    from latentscenes.core import config_io

    return made_comparison(tmp_path_factory.mktemp("results"), config_io.parse(TINY, "tiny"), solids)


def test_print_cost_of_runs(content, capsys):
    print_cost(content.new.path, None, str(content.rgb.path), ())
    out = capsys.readouterr().out
    assert (
        "counting" in out
        and "as stored" in out
        and "Stage 1 took 7.50 s CPU, 13.5 s wall for 4 scenes (each 1.88 s CPU, 3.38 s wall)." in out
        and "One new scene took 2.50 s CPU, 4.50 s wall." in out
    )
    print_cost(content.train.path, None, "rgb", ("planes.bases=7",))
    assert "is known once" in capsys.readouterr().out


def test_summary_compares_the_same_scenes(content):
    table = summary_table(content)
    labels = [row[0] for row in table.rows]
    assert labels == [
        "RGB tri-planes",
        "latentscenes, new scenes",
        "… scenes of stage 1",
        "… codec alone (ceiling)",
    ]
    (shared,) = content.common
    score = next(score for score in content.evaluation_new.scenes if score.name == shared)
    assert table.rows[1][1] == f"{score.psnr:.2f}" and "1 of 2 new scenes" in table.note
    other = Variant("on the shipped model", content.train, content.evaluation_new)
    ready = summary_table(dataclasses.replace(content, variants=(other,)))
    assert (
        ready.rows[2][0] == "… on the shipped model"
        and ready.rows[2][1:3] == table.rows[1][1:3]
        and ready.strong == (1,)
    )
    without = summary_table(dataclasses.replace(content, rgb=None, evaluation_rgb=None))
    assert without.rows[0][0] == "latentscenes, new scenes" and without.strong == (0,)


class Outline(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    VOID = {"meta", "img", "line", "polyline", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.headings, self.outside = [], [], 0, []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.headings += tag == "h2"
        if tag == "img":
            self.images.append(found["src"])
        if (
            tag in ("script", "link", "iframe")
            or "href" in found
            or not found.get("src", "data:").startswith("data:")
        ):
            self.outside.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(content, tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("report") / "report.html", content).read_text()


def test_report_is_complete_and_has_no_links(page):
    outline = Outline()
    outline.feed(page)
    assert not outline.open and not outline.outside and outline.headings == 8
    text = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page)  # base64 may contain any word
    assert not re.search(r"https?:", text) and "url(" not in text and "@import" not in text
    kinds = []
    for source in outline.images:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as image:
            image.load()
            kinds.append((image.format, getattr(image, "n_frames", 1)))
    assert kinds.count(("GIF", 36)) == 2 and sum(kind == "PNG" for kind, _ in kinds) == 3


def test_report_shows_the_numbers(page, content):
    for row in summary_table(content).rows:
        for cell in row:
            assert not cell or f"{cell}</td>" in page
    assert "Solids &lt;&amp; friends&gt;" in page and "It is only a test." in page
    assert "latent fit: losses" in page and "resolution: 12" in page and page.count("<svg") >= 8
    words = re.sub(r'"data:[^"]*"', "", page)  # base64 may contain any word
    for forbidden in ("nan", "None<", ">None", "inf<"):
        assert forbidden not in words


def test_report_without_baseline(content, tmp_path):
    page = write_report(
        tmp_path / "r.html", dataclasses.replace(content, rgb=None, evaluation_rgb=None)
    ).read_text()
    assert "no RGB baseline was learned" in page and sorted(file.name for file in tmp_path.iterdir()) == [
        "r.html",
        "r.md",
        "r.png",
    ]


def test_a_model_in_pixels_has_no_latent_space(page, content, tmp_path):
    assert "Inside the latent space" in page
    pixels, scores = content.rgb, content.evaluation_rgb
    told = dataclasses.replace(
        content, introduction="", new=pixels, evaluation_new=scores, rgb=None, evaluation_rgb=None
    )
    text = write_report(tmp_path / "r.html", told).read_text()
    assert "Channels of the render" in text and "learned with the base planes of" in text
    assert "latent space" not in re.sub(r'"data:[^"]*"', "", text)
    other = Variant("with latents", content.new, content.evaluation_new)
    both = write_report(tmp_path / "r.html", dataclasses.replace(told, variants=(other,))).read_text()
    assert "Channels of the render" in both and "Inside the latent space, new scenes with latents" in both


def test_chart_places_points():
    chart = line_chart(
        "T", [Series("a & b", (0.0, 10.0), (0.0, 1.0), 3)], "x", "y", mark=5.0, mark_label="half"
    )
    (first, last) = re.search(r'class="s3" points="([^"]+)"', chart).group(1).split()
    assert float(first.split(",")[0]) == 52 and float(last.split(",")[0]) == 420 - 24
    assert float(first.split(",")[1]) > float(last.split(",")[1]) and "half" in chart and "a &amp; b" in chart
    assert line_chart("T", [Series("a", (1.0,), (float("nan"),))], "x", "y") == ""
    assert "<circle" in line_chart("T", [Series("a", (1.0,), (2.0,))], "x", "y", log_x=True, log_y=True)
    # A logarithmic axis leaves out negative values.
    flat = line_chart("T", [Series("a", (0.0, 1.0), (-1.0, 0.5))], "x", "y", log_y=True)
    assert "<circle" in flat


def test_smooth_keeps_the_mean():
    values = [float(k % 7) for k in range(640)]
    short = smooth(values)
    assert len(short) == 160 and sum(short) / 160 == pytest.approx(sum(values) / 640)
    assert smooth([1.0, 2.0]) == [1.0, 2.0]

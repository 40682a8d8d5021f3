"""Certificates for people: what a report says, and that no record can make it say or do more."""

import dataclasses
import html.parser
import re
from pathlib import Path

import pytest
from certificate_helpers import MECHANISM, SIGMA, issue

import certunlearn as cu
from certunlearn import cli, reporting
from certunlearn.reporting import privacy_curve

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "demo-digits" / "certificate.json"
HOSTILE = '<script>alert("1")</script>|`[x](http://a) www.a.b @who a@b.org'
FORMS = (reporting.to_html, reporting.to_markdown)
NO_CONTENT = {"meta", "circle", "line", "path", "polyline"}


class Page(html.parser.HTMLParser):
    """What a browser would find: tags, attributes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in NO_CONTENT:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in NO_CONTENT:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def report_of(certificate, **options):
    return reporting.report_of(certificate, cu.verify(certificate), **options)


def poisoned(value):
    """The value with hostile text in the place of every text, keys that reports read excepted."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {name: poisoned(each) for name, each in value.items()} | {HOSTILE: HOSTILE}
    return [poisoned(each) for each in value] if isinstance(value, list) else value


def test_the_page_says_claim_interval_assumptions_and_numbers():
    certificate = cu.Certificate.load(COMMITTED)
    report = reporting.report_of(certificate, cu.certificates.Verification(True, (), ""))
    for form in FORMS:
        text = form(report)
        seen = Page(text).text if form is reporting.to_html else text
        for number, sign in ((certificate.epsilon, 1), (certificate.epsilon_lower_bound, -1)):
            near = [float(shown) for shown in re.findall(r"\d+\.\d{4}\b", seen)]
            assert any(0 <= sign * (shown - number) < 1e-4 for shown in near)
        assert certificate.params_digest in seen
        assert all(sentence in seen for sentence in certificate.assumptions)
        assert "Whether the issuer ran what the record says" in seen
    page = Page(reporting.to_html(report))
    assert page.open == []
    assert page.text.split()[0] == "VERIFIED:"
    # Nothing is loaded and nothing runs.
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href", "onload", "data"} & set(page.attributes)
    assert "url(" not in reporting.to_html(report)


@pytest.mark.parametrize("verified", [True, False])
def test_hostile_text_in_every_field_is_text(verified):
    certificate = issue()
    stated = poisoned(dataclasses.asdict(certificate))
    clean = report_of(certificate)
    if verified:  # as if `verify` had let it pass
        numbers = tuple((HOSTILE, HOSTILE) for _ in clean.numbers)
        report = dataclasses.replace(
            clean, claim=(HOSTILE,), assumptions=(HOSTILE,), numbers=numbers, headline=HOSTILE
        )
    else:
        report = reporting.report_of(
            cu.Certificate(**{name: stated[name] for name in dataclasses.asdict(certificate)}),
            cu.certificates.Verification(False, (HOSTILE,), HOSTILE),
        )
    page = Page(reporting.to_html(report))
    assert "script" not in page.tags
    assert "<script>" in page.text  # it is shown, as text
    assert set(page.tags) <= set(Page(reporting.to_html(clean)).tags)
    assert set(page.attributes) <= set(Page(reporting.to_html(clean)).attributes)
    markdown = reporting.to_markdown(report)
    assert "<script" not in markdown
    assert "](" not in markdown.replace("\\](", "")
    assert not any(link in markdown for link in ("http://", "www.", "@"))
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def test_the_curve_goes_through_what_interpolation_certifies():
    certificate = issue()
    curve = privacy_curve.curve_of(certificate, None)
    for epsilon, delta in curve.points[::11]:
        run = {"noise_scale": SIGMA, "delta": delta, "accountant": "interpolation"}
        assert epsilon == pytest.approx(cu.epsilon(MECHANISM, **run), rel=1e-6)
    (at_claim,) = (epsilon for epsilon, delta in curve.points if delta == 1e-5)
    assert at_claim == pytest.approx(curve.claim[0], rel=1e-6)


def test_exact_methods_have_a_claim_and_no_curve():
    report = report_of(
        issue(mechanism=cu.Retraining(), noise_scale=0, delta=0, epsilon=0, accountant="exact")
    )
    assert report.verified
    assert report.curve is None
    assert "exactly" in report.claim[0]


def test_a_certificate_that_does_not_verify_says_so_first(tmp_path, capsys):
    path, page = tmp_path / "certificate.json", tmp_path / "report.html"
    altered = issue().to_json().replace('"finetune_steps": 3', '"finetune_steps": 4')
    for text in (altered, '{"schema": "<script>"}', "<script>"):
        path.write_text(text)
        assert cli.main(["report", str(path), "-o", str(page)]) == 1
        written = page.read_text()
        assert Page(written).text.split()[:2] == ["NOT", "VERIFIED:"]
        assert "What is claimed" not in written
        assert "<script" not in written
        assert cli.main(["report", str(path), "--format", "markdown"]) == 1
        assert "**NOT VERIFIED" in capsys.readouterr().out.split("\n### ")[0]
    assert cli.main(["report", str(tmp_path / "missing.json")]) == 2
    issue().save(path)
    assert cli.main(["report", str(path), "-o", str(page)]) == 0
    assert "What is claimed" in page.read_text()

"""A report as one web page that needs nothing else: no script, no font, no file."""

import html
from collections.abc import Iterable

from certunlearn.reporting import privacy_curve
from certunlearn.reporting.contents import Report

_STYLE = """\
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  padding: 0 1rem 2rem; max-width: 46rem; overflow-wrap: anywhere; }
.banner { margin: 1rem 0; padding: .75rem 1rem; border-left: .5rem solid; font-weight: 600; }
.good { background: #e6f2ea; border-color: #007048; }
.bad { background: #fbe9e2; border-color: #b23c00; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
svg { width: 100%; height: auto; font: 14px system-ui, sans-serif; fill: #333; }
figure { margin: 0; } figcaption { font-size: .9rem; color: #444; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0;
  border-bottom: 1px solid #ddd; }
th { font-weight: 500; width: 42%; }
@media print { body { max-width: none; font-size: 11pt; } li, tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; } .banner { print-color-adjust: exact; } }"""


def to_html(report: Report) -> str:
    """The report as a page: one file, which loads nothing and runs nothing."""
    kind = "good" if report.verified else "bad"
    body = [f'<p class="banner {kind}">{html.escape(report.headline)}</p>']
    if report.problems:
        body += ["<h2>What is wrong</h2>", _list(report.problems)]
    body.append("<h1>Certificate of unlearning</h1>")
    if report.claim:
        body += ["<h2>What is claimed</h2>", *map(_paragraph, report.claim)]
    if report.curve is not None:
        caption = html.escape(privacy_curve.caption(report.curve))
        picture = privacy_curve.to_svg(report.curve)
        body.append(f"<figure>\n{picture}\n<figcaption>{caption}</figcaption>\n</figure>")
    elif report.no_curve:
        body.append(_paragraph(report.no_curve))
    if report.assumptions:
        title = "What it rests on" if report.verified else "What the record says it rests on"
        body += [f"<h2>{title}</h2>", _list(report.assumptions)]
    if report.cannot_say:
        body += ["<h2>What it cannot say</h2>", _list(report.cannot_say)]
    if report.numbers:
        title = "Numbers of the record" if report.verified else "Numbers of the record, not to be "
        body += [f"<h2>{title}{'' if report.verified else 'relied on'}</h2>", _table(report)]
    body.append(_paragraph("Check it yourself: certunlearn verify certificate.json"))
    text = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(report.headline)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{text}\n</body>\n</html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _list(texts: Iterable[str]) -> str:
    items = "\n".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<ul>\n{items}\n</ul>"


def _table(report: Report) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in report.numbers
    )
    return f"<table>\n{rows}\n</table>"

"""An advice as text for a terminal, and as HTML for a notebook."""

import html
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from certunlearn._numerics.safe_rounding import percent_up

if TYPE_CHECKING:
    from certunlearn.advice.answers import Advice, Option

_WIDTH = 96
# Layers shown of a network: those where the noise is largest.
_MOST_LAYERS = 12


def to_text(advice: "Advice") -> str:
    """The advice in lines of at most 96 characters, but for code."""
    parts = [_wrapped(advice.verdict), "\n".join(_wrapped(each, "  - ") for each in advice.why)]
    for number, option in enumerate(advice.options, 1):
        lines = [f"{number}. {option.title} ({option.method})"]
        lines += [_wrapped(f"{name}: {text}", "   ", "     ") for name, text in facts(option)]
        lines += [_wrapped(reason, "   - ") for reason in option.reasons]
        lines.append(textwrap.indent(option.call, "       "))
        parts.append("\n".join(lines))
    for title, entries in (
        ("No options here", [f"{name}: {why}" for name, why in advice.ruled_out]),
        ("What would change the answer", advice.questions),
        ("For all of it", advice.notes),
    ):
        if entries:
            parts.append("\n".join([f"{title}:", *(_wrapped(each, "  - ") for each in entries)]))
    return "\n\n".join(parts)


def to_html(advice: "Advice") -> str:
    """The advice as a heading, a table of options, and lists."""
    safe = html.escape
    rows = "".join(
        "<tr style='vertical-align:top'>"
        f"<td>{number}</td><td><b>{safe(option.title)}</b><br><code>{safe(option.method)}</code>"
        f"<pre>{safe(option.call)}</pre></td>"
        f"<td style='text-align:left'>{_list(f'{n}: {t}' for n, t in facts(option))}</td>"
        f"<td style='text-align:left'>{_list(option.reasons)}</td></tr>"
        for number, option in enumerate(advice.options, 1)
    )
    head = "<tr><th></th><th>method</th><th>what you get</th><th>why</th></tr>"
    ruled = [f"{name}: {why}" for name, why in advice.ruled_out]
    return (
        f"<h4>{safe(advice.verdict)}</h4>{_list(advice.why)}"
        f"<table>{head}{rows}</table>"
        f"<details><summary>No options here</summary>{_list(ruled)}</details>"
        + (
            f"<p>What would change the answer:</p>{_list(advice.questions)}"
            * bool(advice.questions)
        )
        + f"<p>For all of it:</p>{_list(advice.notes)}"
    )


def facts(option: "Option") -> Iterator[tuple[str, str]]:
    """What an option gives and takes, as pairs of a name and a sentence."""
    yield "guarantee", option.guarantee
    yield "costs", option.cost_words
    survival, noise = option.survival, option.noise
    if survival is not None:
        text = (
            f"no event is more likely than under the reference by more than "
            f"{percent_up(survival.tv_limit)}"
        )
        if survival.tv_limit_to_center is not None:
            text += (
                f", and than for the same run from the centre by more than "
                f"{percent_up(survival.tv_limit_to_center)}"
            )
        if survival.kept_radius is not None:
            text += f"; the start keeps a norm of {survival.kept_radius:.3g}"
        if survival.share_of_distance is not None:
            text += f", {survival.share_of_distance:.2%} of the distance from the centre"
        yield "survives of the old model", f"{text}."
    if noise is not None:
        parts = []
        if noise.total is not None:
            parts.append(f"{noise.total:.3g} in each weight")
        if noise.norm is not None:
            parts.append(f"a norm of {noise.norm:.3g}")
        if noise.norm_over_kept is not None:
            parts.append(f"{times(noise.norm_over_kept)} times the norm of what is kept")
        if parts:
            yield "noise in all", f"{', '.join(parts)}."
        compared = [layer for layer in noise.layers if layer.noise_over_fresh is not None]
        compared.sort(key=lambda layer: -(layer.noise_over_fresh or 0.0))
        shown = ", ".join(
            f"{layer.name} {layer.noise_over_fresh:.1%}" for layer in compared[:_MOST_LAYERS]
        )
        if shown:
            more = len(compared) - _MOST_LAYERS
            yield (
                "noise over fresh weights, by layer",
                shown + (f", and {more} layers where it is less." if more > 0 else "."),
            )
    if option.assumes:
        count = len(option.assumes)
        yield "rests on", f"{count} sentences: read the option's `assumes`."


def times(ratio: float) -> str:
    """A ratio for people.

    >>> times(0.1234), times(1060.4)
    ('0.123', '1,060')
    """
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    following = " " * len(first) if rest is None else rest
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list(entries: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in entries) + "</ul>"

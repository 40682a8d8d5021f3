"""Certificates for people: a web page of one file, and a section of a model card."""

from certunlearn.reporting.contents import Report, report_of, report_of_problem
from certunlearn.reporting.model_card import to_markdown
from certunlearn.reporting.web_page import to_html

__all__ = ["Report", "report_of", "report_of_problem", "to_html", "to_markdown"]

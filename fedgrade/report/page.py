"""How a page is made: our own templates and style, everything else escaped, nothing loaded and no script."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedgrade.report.words import counted, typeset


def rendered(template: str, **facts: object) -> str:
    """The page of ``template`` with ``facts``, as one HTML document."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    page = _environment().get_template(template)
    return page.render(style=Markup(style), **facts)  # noqa: S704 - our own file


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedgrade.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    environment.filters["typeset"] = typeset
    return environment

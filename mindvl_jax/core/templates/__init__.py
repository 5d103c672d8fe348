"""The template that all pages extend, and the script that draws their charts."""

from pathlib import Path

TEMPLATES = Path(__file__).parent

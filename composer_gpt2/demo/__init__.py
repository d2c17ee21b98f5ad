"""A page in the browser for one trained model, or two side by side."""

from composer_gpt2.demo.page import build_page, launch

__all__ = ["build_page", "launch"]

"""A page in the browser for one trained model, or two side by side."""

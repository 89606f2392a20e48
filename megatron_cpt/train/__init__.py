"""Setup -> step -> loop."""

"""Speed on given GPUs, and advice on the layout."""

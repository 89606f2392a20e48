"""Speed on given GPUs, and the search for the fastest layout."""

"""Something to play with: a page that shows no guidance, CFG and one pass side by side while a slider moves."""
